"""Whether the trainer's draws are what the accountant was told: Poisson sampling with a ceiling (P5, P6).

Sizes, units and overlaps of many draws have known laws. Fixed-size batches do not vary enough, shuffled epochs never
repeat a unit, and a ceiling that keeps the first units favours these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dpfa_hf.audit.results import Check
from dpfa_hf.audit.steps import Units, columns_of, give_units, invented_rows
from dpfa_hf.audit.subject import Subject

DRAWS = "draws"
FALSE_ALARM = 1e-6
"""Probability that sound draws fail, about: the statistics are sums over hundreds of draws, taken as normal."""
_TESTS = 6
_DRAWS = 600


def draws(subject: Subject, mutate: Callable[[Any], None] | None = None) -> list[Check]:
    """One check, of the draws that the trainer's own data loader makes, for the plan's n, q and ceiling."""
    trainer = subject.build(False)
    row = invented_rows(trainer, columns_of(trainer, trainer._task), [8])[0]
    give_units(trainer, Units(subject.num_units, {0: row}))
    if mutate is not None:
        mutate(trainer)
    plan = trainer.privacy_plan
    usual = _draw(trainer, _DRAWS)
    broken = _violations(usual, plan.num_units, plan.sampling_probability, plan.max_batch_size)
    sampler = trainer._sampler
    kept, sampler.max_batch_size = sampler.max_batch_size, max(round(plan.num_units * plan.sampling_probability), 1)
    try:
        low = _draw(trainer, _DRAWS)
    finally:
        sampler.max_batch_size = kept
    broken += _ceiling_violations(low, plan.num_units, max(round(plan.num_units * plan.sampling_probability), 1))
    sizes = [len(draw) for draw in usual]
    return [
        Check(
            DRAWS,
            not broken,
            "Units are drawn by themselves, each with probability q, and a ceiling drops random ones.",
            {
                "broken": broken,
                "false_alarm": FALSE_ALARM,
                "draws": len(usual),
                "mean_size": float(np.mean(sizes)),
                "expected_size": plan.num_units * plan.sampling_probability,
                "variance_of_size": float(np.var(sizes)),
                "expected_variance": plan.num_units * plan.sampling_probability * (1 - plan.sampling_probability),
            },
        )
    ]


def _draw(trainer: Any, number: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    sampler = trainer.get_train_dataloader().sampler
    while len(found) < number:
        before = len(found)
        for draw in sampler:
            found.append(np.asarray(draw))
            if len(found) == number:
                break
        if len(found) == before:
            break
    return found


def _violations(found: list[np.ndarray], units: int, probability: float, ceiling: int) -> list[str]:
    from scipy import stats

    alarm, number, broken = FALSE_ALARM / _TESTS, len(found), []
    far = float(stats.norm.isf(alarm / 2))
    sizes = np.array([len(draw) for draw in found], float)
    if any(len(np.unique(draw)) != len(draw) or (len(draw) and draw.max() >= units) for draw in found):
        broken.append("a unit comes twice in a draw")
    if len(sizes) < _DRAWS or sizes.max() > ceiling:
        broken.append("ceiling")
    if stats.binomtest(int(sizes.sum()), units * number, probability).pvalue < alarm:
        broken.append("mean size")
    variance = units * probability * (1 - probability)
    if variance > 0:
        kurtosis = 2 + (1 - 6 * probability * (1 - probability)) / variance
        spread = float((np.square(sizes - units * probability) / variance).sum())
        if abs(spread - number) > far * math.sqrt(number * kurtosis) + far**2:
            broken.append("variance of the size")
        overlaps = [len(np.intersect1d(a, b)) for a, b in zip(found, found[1:], strict=False)]
        both = probability**2
        each = units * (both * (1 - both) + 2 * (probability**3 - probability**4))
        pairs = len(overlaps)
        if abs(sum(overlaps) - pairs * units * both) > far * math.sqrt(pairs * each) + far**2:
            broken.append("units that come again in the next draw")
        counts = np.bincount(np.concatenate(found).astype(np.int64), minlength=units)[:units]
        uneven = float(np.square(counts - number * probability).sum() / (number * probability * (1 - probability)))
        if abs(uneven - units) > far * math.sqrt(units * (2 + 1 / (number * probability))) + far**2:
            broken.append("some units come more often")
    return broken


def _ceiling_violations(found: list[np.ndarray], units: int, ceiling: int) -> list[str]:
    """Of draws that are cut half of the time: given their sizes, they are uniformly random sets of units."""
    from scipy import stats

    sizes = np.array([len(draw) for draw in found], float)
    first = units // 2
    in_first = sum(int((draw < first).sum()) for draw in found)
    share = first / units
    variance = float((sizes * share * (1 - share) * (units - sizes) / max(units - 1, 1)).sum())
    far = float(stats.norm.isf(FALSE_ALARM / _TESTS / 2))
    broken = []
    if sizes.max(initial=0) > ceiling:
        broken.append("a low ceiling is passed")
    if abs(in_first - share * sizes.sum()) > far * math.sqrt(variance) + 1:
        broken.append("the ceiling prefers some units")
    return broken
