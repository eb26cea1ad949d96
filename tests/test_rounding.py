from __future__ import annotations

from fractions import Fraction

import pytest

from dpfa_hf.errors import PrivacyError
from dpfa_hf.rounding import MAX_CANCELLATION, MAX_TERMS, contribution_error, summation_error


def in_rational_arithmetic(roundings: int) -> Fraction:
    """k u / (1 - k u)."""
    unit = Fraction(1, 2**53)
    return roundings * unit / (1 - roundings * unit)


@pytest.mark.parametrize(("examples", "terms"), [(1, 1), (64, 8192), (4096, MAX_TERMS)])
def test_a_sum_is_charged_for_every_rounding_of_every_term(examples: int, terms: int) -> None:
    exact = in_rational_arithmetic(terms + 3 * examples + 4) * 256 * 2 * examples
    assert exact <= Fraction(summation_error(2.0, examples=examples, terms=terms)) <= exact * Fraction(1001, 1000)


def test_what_is_returned_for_a_contribution_holds_all_that_its_proof_adds_up() -> None:
    assert MAX_CANCELLATION == 256
    squares = in_rational_arithmetic(MAX_TERMS**2) + 256**2 * in_rational_arithmetic(16 * MAX_TERMS)
    # sqrt(1 + x) <= 1 + x / 2; the rest is for what the proof leaves out, each part below 2**-20.
    assert Fraction(contribution_error()) >= squares / 2 + 100 * Fraction(1, 2**20)
    assert contribution_error() < 2.0**-11.9


@pytest.mark.parametrize(("examples", "terms"), [(0, 1), (1, 0), (1, 2**52), (2**51, 1)])
def test_nonsense_is_refused(examples: int, terms: int) -> None:
    with pytest.raises(PrivacyError, match="terms="):
        summation_error(1.0, examples=examples, terms=terms)
