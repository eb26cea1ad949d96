"""The plain PyTorch path of attention against attention written out in float64, on any combination of arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpfa_hf._kernel import dispatch, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpfa_hf import _kernel


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU computes without being asked for a backend."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


def check(lab: SimpleNamespace, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **call: Any) -> None:
    """Output, log-sum-exp if asked for, and every gradient against float64."""
    names = [name for name in ("bias", "sinks") if call.get(name) is not None]
    return_lse = call.pop("return_lse", False)
    results = []
    for is_exact in (False, True):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value, *(call[name] for name in names))]
        arguments = call | dict(zip(names, leaves[3:], strict=True))
        if is_exact:
            outputs = lab.written_out(*leaves[:3], **arguments)[: 1 + return_lse]
        else:
            outputs = _kernel.attention(*leaves[:3], **arguments, return_lse=return_lse)
            outputs = outputs if return_lse else (outputs,)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (torch.where(output.isinf(), 0.0, output) * torch.randn(output.shape, generator=generator)).sum()
            for output in outputs
        )
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True)]
        results.append([tensor.detach().double() for tensor in (*outputs, *gradients)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def coin(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.6, 0.9]))

    packed = draw(st.sampled_from([None, "cu_seq_lens", "segments"]))
    rows = 1 if packed == "cu_seq_lens" else draw(st.integers(1, 2))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    queries, keys = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shape = tuple(draw(st.sampled_from([1, size])) for size in (rows, heads, queries)) + (keys,)
    call: dict[str, Any] = {
        "query": normal(rows, heads, queries, 4),
        "key": normal(rows, kv_heads, keys, 4),
        "value": normal(rows, kv_heads, keys, draw(st.sampled_from([2, 4]))),
        "scale": draw(st.sampled_from([0.5, 1.0])),
        "is_causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 2, 9])),
        "key_mask": coin(rows, keys) if draw(st.booleans()) else None,
        "mask": coin(*shape) if draw(st.booleans()) else None,
        "bias": normal(*shape) if draw(st.booleans()) else None,
        "softcap": draw(st.sampled_from([None, 0.7])),
        "sinks": normal(*((heads,) if draw(st.booleans()) else (rows, heads))) if draw(st.booleans()) else None,
        "return_lse": draw(st.booleans()),
    }
    if packed == "segments":
        for name, length in (("segments_q", queries), ("segments_k", keys)):
            call[name] = torch.randint(3, (rows, length), generator=generator).sort(1).values
    if packed == "cu_seq_lens":
        parts = draw(st.integers(1, 3))
        for name, length in (("cu_seq_lens_q", queries), ("cu_seq_lens_k", keys)):
            inner = sorted(draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
            call[name] = torch.tensor([0, *inner, length], dtype=torch.int32)
    return call


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_any_combination_of_patterns_equals_float64_written_out(lab: SimpleNamespace, call: dict[str, Any]) -> None:
    check(lab, **call)


def tensors(rows: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, heads, length, 8), (rows, kv_heads, length, 8), (rows, kv_heads, length, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize(
    "planted",
    [
        {"is_causal": False},
        {"window": 3},
        {"key_mask": None},
        {"bias": None},
        {"softcap": None},
        {"sinks": None},
        {"scale": 0.36},
    ],
)
def test_mutant_that_drops_or_changes_one_argument_is_caught(
    lab: SimpleNamespace, planted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {
        "scale": 0.35, "is_causal": True, "window": 2, "key_mask": torch.tensor([[True] * 4 + [False], [True] * 5]),
        "bias": torch.randn(1, 4, 5, 5), "softcap": 0.5, "sinks": torch.ones(4),
    }  # fmt: skip
    check(lab, *tensors(), **call)
    attention = _kernel.attention
    monkeypatch.setattr(_kernel, "attention", lambda *args, **given: attention(*args, **(given | planted)))
    with pytest.raises(AssertionError):
        check(lab, *tensors(), **call)


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}, {"bias": torch.zeros(1, 1, 1, 5)}])
def test_a_masked_key_has_no_influence_however_large(more: dict[str, Any]) -> None:
    query, key, value = tensors()
    key_mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    before = _kernel.attention(query, key, value, scale=0.3, key_mask=key_mask, **more)
    key[0, :, 3:], value[0, :, 3:] = 1e30, -1e30
    after = _kernel.attention(query, key, value, scale=0.3, key_mask=key_mask, **more)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}])
def test_output_has_the_dtype_of_the_query_and_its_precision(
    lab: SimpleNamespace, dtype: torch.dtype, more: dict[str, Any]
) -> None:
    query, key, value = (tensor.to(dtype) for tensor in tensors())
    exact, _ = lab.written_out(query, key, value, scale=0.3, is_causal=True, **more)
    output = _kernel.attention(query, key, value, scale=0.3, is_causal=True, **more)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max())
    )


def test_autocast_rounds_the_inputs_and_nothing_inside_softcapping(lab: SimpleNamespace) -> None:
    rounded = [tensor.bfloat16() for tensor in tensors()]
    exact, _ = lab.written_out(*rounded, scale=0.3, softcap=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = _kernel.attention(*tensors(), scale=0.3, softcap=2.0)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_packed_query_is_padding_where_the_key_beside_it_in_its_own_sequence_is(lab: SimpleNamespace) -> None:
    # Aligned at their ends, query 1 stands beside key 0, which is real; in the row it would stand beside key 1.
    query, key, value = tensors(rows=1, length=3)
    check(
        lab, query, key, value, scale=0.3, is_causal=True, key_mask=torch.tensor([[True, False, True]]),
        segments_q=torch.tensor([[0, 0, 1]]), segments_k=torch.tensor([[0, 1, 1]]),
    )  # fmt: skip


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize(
    "more", [{}, {"is_causal": True}, {"sinks": torch.zeros(4)}, {"softcap": 1.0}, {"padded": True}, {"packed": True}]
)
def test_without_queries_or_keys_there_is_nothing(queries: int, keys: int, more: dict[str, Any]) -> None:
    query, _, _ = tensors(length=queries)
    _, key, value = tensors(length=keys)
    more = dict(more)
    if more.pop("padded", False):
        more |= {"key_mask": torch.ones(2, keys, dtype=torch.bool), "is_causal": True}
    if more.pop("packed", False):
        more |= {f"segments_{side}": torch.zeros(2, n, dtype=torch.long) for side, n in (("q", queries), ("k", keys))}
    leaves = [leaf.requires_grad_() for leaf in (query, key, value)]
    output, lse = _kernel.attention(*leaves, scale=0.3, return_lse=True, **more)
    assert output.shape == (2, queries, 4, 8) and not output.any() and bool((lse == -torch.inf).all())
    assert not any(gradient.any() for gradient in torch.autograd.grad(output.sum(), leaves))


def test_a_row_of_padding_gives_zero_and_takes_zero() -> None:
    key_mask = torch.tensor([[True] * 5, [False] * 5])
    for more in ({}, {"sinks": torch.ones(2, 4)}, {"softcap": 1.0}, {"is_causal": True}):
        leaves = [leaf.requires_grad_() for leaf in tensors()]
        output, lse = _kernel.attention(*leaves, scale=0.3, key_mask=key_mask, return_lse=True, **more)
        loss = (output * torch.randn_like(output)).sum() + lse[0].sum()
        gradients = torch.autograd.grad(loss, leaves)
        assert bool((lse[1] == -torch.inf).all()) and bool(lse[0].isfinite().all())
        assert all(not tensor[1].any() and tensor[0].any() for tensor in (output, *gradients))


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows on a CPU, sequence by sequence

BOUNDARIES = torch.tensor([0, 3, 4, 9], dtype=torch.int32)  # two more tokens follow


def packed_outputs(hostile: float | None = None, **options: Any) -> list[torch.Tensor]:
    """Output and gradients of a row of eleven tokens, with `hostile` in the second sequence's place."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 11, 8, generator=generator) for heads in (4, 2, 2)]
    if hostile is not None:
        for tensor in tensors:
            tensor[:, :, 3:4] = hostile
    tensors = [tensor.requires_grad_() for tensor in tensors]
    output = _kernel.attention(
        *tensors, scale=0.3, is_causal=True, cu_seq_lens_q=BOUNDARIES, cu_seq_lens_k=BOUNDARIES, **options
    )
    output.sum().backward()
    others = torch.tensor([i for i in range(11) if i != 3])
    grads = [tensor.grad.index_select(2, others) for tensor in tensors if tensor.grad is not None]
    return [output.detach().index_select(1, others), *grads]


def unchanged(options: dict[str, Any]) -> bool:
    pairs = zip(packed_outputs(**options), packed_outputs(float("nan"), **options), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 3.0}, {"sinks": torch.ones(4)}], ids=str)
def test_not_even_what_is_not_finite_leaves_its_packed_sequence(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unchanged(options)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not unchanged(options), "one mask over the whole row multiplies the neighbour's NaN by zero"


def test_one_mask_and_sequence_by_sequence_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packed_outputs()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for a, b in zip(found, packed_outputs(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_mutant_boundaries_off_by_one_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = reference._sizes
    monkeypatch.setattr(reference, "_sizes", lambda cu, total: sizes(cu + (cu == 4), total))
    assert not unchanged({})


def test_packed_rows_compile_without_a_break() -> None:
    def call(query: torch.Tensor) -> torch.Tensor:
        return _kernel.attention(query, query, query, scale=0.3, cu_seq_lens_q=BOUNDARIES, cu_seq_lens_k=BOUNDARIES)

    query = torch.randn(1, 2, 11, 8)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), call(query))
