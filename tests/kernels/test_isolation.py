"""Rule P3 of attention: output and gradient of a row, or of a packed document, come from it alone, to the bit.

Every property runs on the Triton kernels (in Triton's interpreter) and on the plain PyTorch of the CPU. Values that are
not finite must stop at the border of a row in both, and at padding in the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from dpfa_hf._kernel import dispatch, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpfa_hf import _kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.interpreter,
        pytest.mark.skipif(not INTERPRETED, reason="run by `make test` in a process of its own"),
    ],
)
# Largest magnitude that is put into places which must not matter: scores of the PyTorch path must not overflow there,
# since it adds -inf to them, and inf - inf is not a number. The kernels choose instead of adding.
HUGE = {"triton": 6e4, "reference": 1e4}

both_backends = pytest.mark.parametrize("backend", ["reference", TRITON], indirect=True)
examples = settings(
    max_examples=7 if INTERPRETED else 60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, request.param)
    if request.param == "triton":
        from dpfa_hf._kernel import flash
        from dpfa_hf._kernel.tiles import Tile

        monkeypatch.setattr(flash, "tile", lambda *_: Tile(16, 16, 4, 1))
    return str(request.param)


class Case(NamedTuple):
    """Tensors with the sequence as their second dimension (sinks: [B, H]), and the other arguments of a call."""

    tensors: dict[str, Tensor]
    call: dict[str, Any]


def case_of(
    seed: int,
    dtype: torch.dtype = torch.float32,
    rows: int = 2,
    heads: tuple[int, int] = (2, 1),
    lengths: tuple[int, int] = (19, 19),
    padding: str = "none",
    documents: int = 0,
    sinks: bool = False,
    **call: Any,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = lengths
    shapes = {
        "query": (rows, queries, heads[0], 16),
        "key": (rows, keys, heads[1], 16),
        "value": (rows, keys, heads[1], 16),
        "output_grad": (rows, queries, heads[0], 16),
    }
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    if sinks:
        tensors["sinks"] = torch.randn(rows, heads[0], generator=generator)
    if padding != "none":
        call["key_mask"] = masks(padding, rows, keys, generator)
    if documents:
        call |= {
            name: torch.randint(documents, (rows, length), generator=generator).sort(1).values
            for name, length in (("segments_q", queries), ("segments_k", keys))
        }
        if queries == keys:
            call["segments_k"] = call["segments_q"]
    return Case(tensors, {"scale": 0.25, **call})


def masks(padding: str, rows: int, keys: int, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(keys + 1, (rows, 1), generator=generator)
    right = torch.arange(keys) < lengths
    holes = torch.rand(rows, keys, generator=generator) < 0.6
    return {"right": right, "left": right.flip(1), "holes": holes}[padding]


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    free = {
        "seed": st.integers(0, 2**31),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "rows": st.integers(2, 3),
        "heads": st.sampled_from([(1, 1), (2, 1), (2, 2)]),
        "lengths": st.sampled_from([(19, 19), (7, 7), (1, 35), (3, 20), (20, 3), (17, 1)]),
        "padding": st.sampled_from(["none", "right", "left", "holes"]),
        "documents": st.sampled_from([0, 0, 1, 3]),
        "sinks": st.booleans(),
        "is_causal": st.booleans(),
        "window": st.sampled_from([None, 1, 5]),
        "softcap": st.sampled_from([None, 2.0]),
        "dropout": st.sampled_from([0.0, 0.25]),
    }
    return case_of(**{name: fixed[name] if name in fixed else draw(strategy) for name, strategy in free.items()})


def run(case: Case) -> dict[str, Tensor]:
    """Output and gradients, each with the row first and the position second."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items() if name != "output_grad"}
    torch.manual_seed(0)
    query, key, value = (leaves[name].transpose(1, 2) for name in ("query", "key", "value"))
    output = _kernel.attention(query, key, value, sinks=leaves.get("sinks"), **case.call)
    gradients = torch.autograd.grad(output, list(leaves.values()), case.tensors["output_grad"])
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


def with_strange(case: Case, queries: Tensor, keys: Tensor, filling: float) -> Case:
    """Other values at the given queries and keys, bool [B, Sq] and [B, Sk]: random, and one of them `filling`."""
    generator = torch.Generator().manual_seed(99)
    tensors = {}
    for name, tensor in case.tensors.items():
        places = {"query": queries, "output_grad": queries, "sinks": queries.all(1)}.get(name, keys)
        new = tensor.clone()
        new[places] = torch.randn(new[places].shape, generator=generator).to(new.dtype)
        new[places] = torch.where(torch.rand(new[places].shape, generator=generator) < 0.3, filling, new[places])
        tensors[name] = new
    return Case(tensors, dict(case.call))


def assert_equal(before: dict[str, Tensor], after: dict[str, Tensor], queries: Tensor, keys: Tensor) -> None:
    """At the given places, every bit but the sign of zero."""
    for name, tensor in before.items():
        places = {"key": keys, "value": keys, "sinks": queries.all(1)}.get(name, queries)
        assert torch.equal(tensor[places], after[name][places]), name


def check_rows(case: Case, row: int, filling: float, backend: str) -> None:
    """Row `row` gives the same whatever values, padding and packing the other rows have, and alone."""
    before = run(case)
    rows, queries = case.tensors["query"].shape[:2]
    others = torch.arange(rows) != row
    other_q, other_k = (others[:, None].expand(rows, case.tensors[name].shape[1]) for name in ("query", "key"))
    changed = with_strange(case, other_q, other_k, filling)
    generator = torch.Generator().manual_seed(7)
    for name in {"key_mask", "segments_q", "segments_k"} & case.call.keys():
        new = case.call[name].clone()
        new[others] = torch.randint(2, new[others].shape, generator=generator).sort(1).values.to(new.dtype)
        changed.call[name] = new
    assert_equal(before, run(changed), ~other_q, ~other_k)
    if backend == "triton" and not case.call.get("dropout"):
        only = Case(
            {name: tensor[row : row + 1] for name, tensor in case.tensors.items()},
            {name: given[row : row + 1] if isinstance(given, Tensor) else given for name, given in case.call.items()},
        )
        alone = run(only)
        assert all(torch.equal(tensor[0], before[name][row]) for name, tensor in alone.items())


@both_backends
@examples
@given(cases(), st.integers(0, 1), st.sampled_from([0.0, 6e4, torch.nan, torch.inf, -torch.inf]))
def test_a_row_is_the_same_to_the_bit_whatever_the_other_rows_hold(
    backend: str, case: Case, row: int, filling: float
) -> None:
    check_rows(case, row, filling, backend)


def check_documents(case: Case, document: int, filling: float) -> None:
    """A packed document gives the same whatever finite values the other documents have."""
    other_q, other_k = (case.call[f"segments_{side}"] != document for side in "qk")
    assert_equal(run(case), run(with_strange(case, other_q, other_k, filling)), ~other_q, ~other_k)


@both_backends
@examples
@given(cases(documents=3, sinks=False), st.integers(0, 2), st.booleans())
def test_a_packed_document_is_the_same_to_the_bit_whatever_finite_values_the_others_hold(
    backend: str, case: Case, document: int, is_huge: bool
) -> None:
    check_documents(case, document, HUGE[backend] if is_huge else 0.0)


def check_padding(case: Case, filling: float) -> None:
    """What stands at padding changes nothing, and gets no gradient."""
    padded = ~case.call["key_mask"]
    queries, keys = (case.tensors[name].shape[1] for name in ("query", "key"))
    none = torch.zeros(len(padded), queries, dtype=torch.bool)
    # Only a causal pattern says that queries are padding, those that stand at such keys.
    is_padding = padded if case.call["is_causal"] and queries == keys else none
    before, after = run(case), run(with_strange(case, is_padding, padded, filling))
    assert_equal(before, after, ~none, torch.ones_like(padded))
    assert not after["key"][padded].any() and not after["value"][padded].any()


@both_backends
@examples
@given(st.data(), st.sampled_from(["right", "left", "holes"]))
def test_what_stands_at_padding_changes_nothing(backend: str, data: st.DataObject, padding: str) -> None:
    case = data.draw(cases(padding=padding, sinks=False, documents=0))
    fillings = [0.0, HUGE[backend]] + ([torch.nan, torch.inf] if backend == "triton" else [])
    check_padding(case, data.draw(st.sampled_from(fillings)))


def check_future(case: Case, last: int, filling: float) -> None:
    """Up to the key `last`, a causal pattern gives the same whatever finite values come later."""
    rows, queries = case.tensors["query"].shape[:2]
    keys = case.tensors["key"].shape[1]
    later_k = (torch.arange(keys) > last).expand(rows, keys)
    later_q = (torch.arange(queries) + keys - queries > last).expand(rows, queries)
    case.tensors["output_grad"][later_q] = 0
    changed = with_strange(case, later_q, later_k, filling)
    changed.tensors["output_grad"][later_q] = 0
    assert_equal(run(case), run(changed), ~later_q, ~later_k)


@both_backends
@examples
@given(cases(is_causal=True, padding="none", documents=0, sinks=False), st.integers(0, 18), st.booleans())
def test_the_past_is_the_same_to_the_bit_whatever_finite_values_come_later(
    backend: str, case: Case, last: int, is_huge: bool
) -> None:
    check_future(case, last, HUGE[backend] if is_huge else 0.0)


NAMES = {
    "triton": ("query", "key", "value", "key_mask", "segments_q", "segments_k", "sinks", "seed", "pattern"),
    "reference": ("query", "key", "value", "key_mask", "segments_q", "segments_k", "sinks", "pattern"),
}


def plant(monkeypatch: pytest.MonkeyPatch, backend: str, changes: dict[str, Callable[[Any], Any]]) -> None:
    """Attention that is told something else than what it was asked for."""
    owner, name = reference, "attention"
    if backend == "triton":
        from dpfa_hf._kernel import flash as owner  # type: ignore[no-redef]

        name = "flash_attention"
    plain = getattr(owner, name)

    def mutant(*arguments: Any, **more: Any) -> Any:
        given = dict(zip(NAMES[backend], arguments, strict=True))
        return plain(*(given | {name: change(given[name]) for name, change in changes.items()}).values(), **more)

    monkeypatch.setattr(owner, name, mutant)


def one_too_many(pattern: Any) -> Any:
    return pattern._replace(is_causal=False, window=2)


@both_backends
@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"value": lambda value: value + 1e-3 * value.mean(0)}, "rows"),
        ({"key_mask": lambda mask: mask.roll(1, 0)}, "rows"),
        ({"segments_q": lambda _: None, "segments_k": lambda _: None}, "documents"),
        ({"segments_q": lambda numbers: torch.cat([numbers[:, :1], numbers[:, :-1]], 1)}, "documents"),
        ({"key_mask": lambda _: None}, "padding"),
        ({"key_mask": lambda mask: mask.roll(1, 1)}, "padding"),
        ({"pattern": lambda pattern: pattern._replace(is_causal=False)}, "future"),
        # The diagonal is off by one: a query sees its own key, the one before and the one after.
        ({"pattern": one_too_many}, "future"),
    ],
)
def test_mutant_that_mixes_what_is_apart_is_caught(
    backend: str, changes: dict[str, Any], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(0, padding="right" if check in ("rows", "padding") else "none", documents=3, is_causal=True)
    checks: dict[str, Callable[[], None]] = {
        "rows": lambda: check_rows(case, 1, torch.nan, backend),
        "documents": lambda: check_documents(case, 1, HUGE[backend]),
        "padding": lambda: check_padding(case, HUGE[backend]),
        "future": lambda: check_future(case, 9, HUGE[backend]),
    }
    checks[check]()
    plant(monkeypatch, backend, changes)
    with pytest.raises(AssertionError):
        checks[check]()
