"""The Triton kernels in Triton's interpreter, forward and backward, against attention written out in float64.

What is exact here is not yet fast, free of races or fit for a GPU: the interpreter runs one program after the other.
All tests run in memory that is filled with NaN and bordered by it, inputs and outputs alike.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
from dpfa_hf._kernel import attention, backward, dispatch, flash, forward  # noqa: E402
from dpfa_hf._kernel.pattern import Pattern  # noqa: E402
from dpfa_hf._kernel.tiles import Tile  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own"),
    pytest.mark.usefixtures("guarded"),
]


@pytest.fixture(autouse=True)
def use_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Ours whatever the dispatcher prefers, with tiles so small that short sequences need several."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")

    def use(block_m: int, block_n: int) -> None:
        monkeypatch.setattr(flash, "tile", lambda *_: Tile(block_m, block_n, 4, 1))

    use(32, 16)
    return use


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(
    rows: int = 2,
    heads: int = 2,
    key_heads: int = 1,
    queries: int = 37,
    keys: int = 37,
    width: int = 16,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    return [
        normal(rows, heads, queries, width, seed=1, dtype=dtype),
        normal(rows, key_heads, keys, width, seed=2, dtype=dtype),
        normal(rows, key_heads, keys, value_width or width, seed=3, dtype=dtype),
    ]


def results(function: Callable[..., tuple[Tensor, Tensor]], leaves: Sequence[Tensor], **call: Any) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradients of all leaves through both."""
    named = dict(zip(("query", "key", "value"), (leaf.detach().requires_grad_() for leaf in leaves), strict=True))
    if call.get("sinks") is not None:
        call["sinks"] = named["sinks"] = call["sinks"].detach().requires_grad_()
    output, lse = function(named["query"], named["key"], named["value"], **call)
    # Cotangents that every dtype holds, so that all are asked for the same gradient.
    loss = (output.double() * normal(*output.shape, seed=4, dtype=torch.bfloat16).double()).sum()
    loss = loss + (torch.where(lse.isinf(), 0.0, lse).double() * normal(*lse.shape, seed=5).bfloat16().double()).sum()
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    return {"output": output.detach(), "lse": lse.detach()} | gradients


def ours(leaves: Sequence[Tensor], **call: Any) -> dict[str, Tensor]:
    return results(attention, leaves, return_lse=True, **call)


def check(lab: SimpleNamespace, leaves: Sequence[Tensor], **call: Any) -> None:
    """Ours is at most twice (gradients: three times) as far from float64 as the same rounded after every step."""
    torch.manual_seed(6)
    found = ours(leaves, **call)
    if call.get("dropout"):
        torch.manual_seed(6)
        seed = int(torch.randint(2**62, (1,)))
        call["keep"] = lab.kept(seed, *leaves[0].shape[:3], leaves[1].shape[2], call["dropout"])
    rounded = results(lab.written_out, leaves, dtype=leaves[0].dtype, **call)
    if call.get("sinks") is not None:
        call["sinks"] = call["sinks"].double()
    exact = results(lab.written_out, [leaf.double() for leaf in leaves], **call)
    # Scores are computed in float32 whatever the dtype.
    torch.testing.assert_close(found.pop("lse").double(), exact["lse"], rtol=2e-6, atol=2e-6)
    for name, tensor in found.items():
        error, allowed = (float((one.double() - exact[name]).abs().max()) for one in (tensor, rounded[name]))
        bound = (2 if name == "output" else 3) * allowed + 1e-6 * max(1.0, float(exact[name].abs().max()))
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def right_padded(rows: int, length: int) -> Tensor:
    return torch.arange(length) < torch.tensor([[length - 3 - 5 * row] for row in range(rows)])


def left_padded(rows: int, length: int) -> Tensor:
    return right_padded(rows, length).flip(1)


def with_holes(rows: int, length: int) -> Tensor:
    """The last of several rows is nothing but padding."""
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) > 0.3
    if rows > 1:
        mask[-1] = False
    return mask


PADDINGS = {"right": right_padded, "left": left_padded, "holes": with_holes}

FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "causal": (True, False),
    "window": (None, 6),
    "softcap": (None, 2.0, 50.0),
    "sinks": (None, "by head", "by row"),
    "padding": (None, "right", "left", "holes"),
    "packing": (None, "cu_seq_lens", "segments"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "dropout": (0.0, 0.25),
    "width": ((16, 16), (24, 10), (64, 64), (80, 80), (128, 64), (256, 256)),
    "length": ((37, 37), (19, 43), (43, 19)),
    "layout": ("dense", "framed", "sequence first", "width first", "one key head expanded"),
}


def every_pair(factors: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few cases in which any two levels of any two factors meet, chosen greedily (a covering array of strength two)."""
    sizes = [len(levels) for levels in factors.values()]
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for x, y in itertools.product(range(sizes[a]), range(sizes[b]))
    }
    cases = []
    while missing:
        a, x, b, y = min(missing)
        case = {a: x, b: y}

        def pairs(factor: int, level: int, case: dict[int, int] = case) -> set[tuple[int, int, int, int]]:
            return {(*min(one, two), *max(one, two)) for one in [(factor, level)] for two in case.items()}

        for factor, size in enumerate(sizes):
            if factor not in case:
                case[factor] = max(range(size), key=lambda level: len(missing & pairs(factor, level)))  # noqa: B023
        for factor, level in case.items():
            missing -= pairs(factor, level)
        cases.append({name: levels[case[factor]] for factor, (name, levels) in enumerate(factors.items())})
    return cases


def call_of(lab: SimpleNamespace, case: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors and the arguments of a case of `FACTORS`."""
    rows = 1 if case["packing"] == "cu_seq_lens" else 2
    (heads, key_heads), (queries, keys), (width, value_width) = case["heads"], case["length"], case["width"]
    leaves = tensors(rows, heads, key_heads, queries, keys, width, value_width, case["dtype"])
    orders = {"framed": (0, 1, 2, 3), "sequence first": (0, 2, 1, 3), "width first": (0, 3, 1, 2)}
    if case["layout"] in orders:
        leaves = [lab.framed(leaf, orders[case["layout"]]) for leaf in leaves]
    if case["layout"] == "one key head expanded":
        leaves[1:] = [leaf[:, :1].expand(leaf.shape) for leaf in leaves[1:]]
    call: dict[str, Any] = {
        "scale": width**-0.5, "is_causal": case["causal"], "window": case["window"], "softcap": case["softcap"],
        "dropout": case["dropout"],
    }  # fmt: skip
    if case["sinks"] is not None:
        call["sinks"] = normal(*((heads,) if case["sinks"] == "by head" else (rows, heads)), seed=7)
    if case["padding"] is not None:
        call["key_mask"] = PADDINGS[case["padding"]](rows, keys)
    # The second document has no query, the third no key unless both sides have one length.
    ends = [(0, n // 7, n // 7 if n == queries else n // 4, n // 2, n // 2 if n != queries else n - 5, n)
            for n in (queries, keys)]  # fmt: skip
    if case["packing"] == "cu_seq_lens":
        call |= {f"cu_seq_lens_{side}": torch.tensor(end) for side, end in zip("qk", ends, strict=True)}
    if case["packing"] == "segments":
        for side, end, length in zip("qk", ends, (queries, keys), strict=True):
            other = torch.tensor((0, length // 3, length))
            call[f"segments_{side}"] = torch.cat([lab.numbered(one, length) for one in (torch.tensor(end), other)])
    return leaves, call


def name_of(case: Mapping[str, Any]) -> str:
    return "-".join(re.sub(r"[ ,()]+", "_", str(level).removeprefix("torch.")) for level in case.values())


@pytest.mark.parametrize("case", every_pair(FACTORS), ids=name_of)
def test_every_pair_of_features_is_as_exact_as_its_dtype_allows(lab: SimpleNamespace, case: dict[str, Any]) -> None:
    leaves, call = call_of(lab, case)
    check(lab, leaves, **call)


RICH = {
    "dtype": torch.float32, "causal": True, "window": 6, "softcap": 2.0, "sinks": "by row", "padding": "holes",
    "packing": "segments", "heads": (2, 1), "dropout": 0.25, "width": (16, 16), "length": (37, 37), "layout": "framed",
}  # fmt: skip


def test_all_features_at_once_are_as_exact_as_alone(lab: SimpleNamespace) -> None:
    leaves, call = call_of(lab, RICH)
    check(lab, leaves, **call)


def altered(**planted: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """`flash_attention` that is told something else than what it is asked for."""
    names = ("query", "key", "value", "key_mask", "segments_q", "segments_k", "sinks", "seed", "pattern")
    plain = flash.flash_attention

    def mutant(*arguments: Any) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, arguments, strict=True))
        given |= {name: change(given[name]) for name, change in planted.items()}
        return plain(*given.values())

    return mutant


@pytest.mark.parametrize(
    "planted",
    [
        {"key_mask": lambda mask: None},
        {"key_mask": lambda mask: mask.flip(0)},
        {"segments_q": lambda segments: None, "segments_k": lambda segments: None},
        {"segments_k": lambda segments: torch.cat([segments[:, :1], segments[:, :-1]], 1)},
        {"sinks": lambda sinks: sinks.flip(0)},
        {"seed": lambda seed: seed + 1},
        {"pattern": lambda pattern: pattern._replace(scale=1.001 * pattern.scale)},
        {"pattern": lambda pattern: pattern._replace(is_causal=False)},
        {"pattern": lambda pattern: pattern._replace(window=7)},
        {"pattern": lambda pattern: pattern._replace(window=None)},
        {"pattern": lambda pattern: pattern._replace(softcap=2.01)},
        {"pattern": lambda pattern: pattern._replace(dropout=0.26)},
    ],
)
def test_mutant_that_ignores_or_changes_an_argument_is_caught(
    lab: SimpleNamespace, planted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, call = call_of(lab, RICH)
    monkeypatch.setattr(flash, "flash_attention", altered(**planted))
    with pytest.raises(AssertionError):
        check(lab, leaves, **call)


def moved(bounds: Callable[..., Any], by: tuple[int, int]) -> Callable[..., Any]:
    """Intervals with both ends moved, where there is anything in them."""

    def mutant(*arguments: Any) -> Any:
        start, stop = bounds(*arguments)
        return start + by[0], stop + by[1]

    return mutant


@pytest.mark.parametrize(
    ("module", "name", "by"),
    [
        (forward, "keys_of_queries", (0, 1)),
        (forward, "keys_of_queries", (1, 0)),
        (backward, "keys_of_queries", (0, -1)),
        (backward, "keys_of_queries", (-1, 0)),
        (backward, "queries_of_keys", (1, 0)),
        (backward, "queries_of_keys", (0, -1)),
    ],
)
def test_mutant_whose_intervals_are_off_by_one_is_caught(
    lab: SimpleNamespace, module: Any, name: str, by: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, call = call_of(lab, {**RICH, "padding": None, "dropout": 0.0, "layout": "dense"})
    monkeypatch.setattr(module, name, moved(getattr(module, name), by))
    with pytest.raises(AssertionError):
        check(lab, leaves, **call)


def test_mutant_whose_dropout_differs_between_forward_and_backward_is_caught(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = backward.kept
    monkeypatch.setattr(backward, "kept", lambda seed, *position: kept(seed + 1, *position))
    with pytest.raises(AssertionError, match="query"):
        check(lab, tensors(), scale=0.25, dropout=0.25)


def test_mutant_that_forgets_the_gradient_of_the_log_sum_exp_is_caught(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = flash.backward
    monkeypatch.setattr(flash, "backward", lambda output_grad, lse_grad, *rest: plain(output_grad, None, *rest))
    with pytest.raises(AssertionError, match="query"):
        check(lab, tensors(), scale=0.25)


class OneProgramLess:
    """A kernel whose last program never runs."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.kernel[(grid[0] - 1,)]


@pytest.mark.parametrize(
    ("module", "name"),
    [(forward, "forward_kernel"), (backward, "delta_kernel"), (backward, "query_grad_kernel"),
     (backward, "key_grad_kernel")],
)  # fmt: skip
def test_mutant_that_leaves_memory_unwritten_is_caught(
    lab: SimpleNamespace, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, OneProgramLess(getattr(module, name)))
    with pytest.raises(AssertionError):
        check(lab, tensors(rows=1), scale=0.25)


def test_mutant_that_writes_beside_its_memory_is_caught(guarded: Callable[[], bool]) -> None:
    for fresh in (torch.empty(2, 3), torch.empty(2, 3, dtype=torch.int32)):
        behind = fresh.as_strided((1,), (1,), fresh.storage_offset() + 6)
        before = behind.clone()
        behind.zero_()
        assert not guarded()
        behind.copy_(before)


LENGTHS = [(1, 1), (1, 47), (47, 1), (2, 3), (31, 33), (17, 67), (64, 64), (65, 63)]


@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_ragged_lengths_are_exact(lab: SimpleNamespace, queries: int, keys: int, is_causal: bool) -> None:
    check(lab, tensors(1, 2, 1, queries, keys), scale=0.25, is_causal=is_causal, sinks=normal(2, seed=7))


@pytest.mark.parametrize(
    ("rows", "queries", "keys"), [(0, 3, 3), (2, 0, 0), (2, 0, 3), (2, 3, 0)], ids=lambda size: str(size)
)
@pytest.mark.parametrize("more", [{}, {"is_causal": True}, {"sinks": torch.ones(2)}, {"key_mask": True}])
def test_without_queries_or_keys_there_is_nothing(rows: int, queries: int, keys: int, more: dict[str, Any]) -> None:
    if "key_mask" in more:
        more = {"key_mask": torch.ones(rows, keys, dtype=torch.bool), "is_causal": True}
    found = ours(tensors(rows, queries=queries, keys=keys), scale=0.25, **more)
    assert bool((found.pop("lse") == -torch.inf).all())
    assert found["output"].shape == (rows, queries, 2, 16)
    assert all(not bool(tensor.any()) for tensor in found.values())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("more", [{}, {"sinks": torch.ones(2, 2)}, {"softcap": 1.0}])
def test_a_row_of_padding_gives_zero_and_takes_zero(is_causal: bool, more: dict[str, Any]) -> None:
    key_mask = torch.ones(2, 37, dtype=torch.bool)
    key_mask[1] = False
    found = ours(tensors(), scale=0.25, is_causal=is_causal, key_mask=key_mask, **more)
    assert bool((found["lse"][1] == -torch.inf).all()) and bool(found["lse"][0].isfinite().all())
    del found["lse"]
    assert all(not bool(tensor[1].any()) and bool(tensor[0].any()) for tensor in found.values())


@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_that_padding_holds_reaches_output_or_gradient(is_causal: bool, padding: str) -> None:
    key_mask = PADDINGS[padding](2, 37)
    call = {"scale": 0.25, "is_causal": is_causal, "key_mask": key_mask, "sinks": torch.ones(2, 2)}
    before = ours(tensors(), **call)
    leaves = tensors()
    fillings = torch.tensor([torch.nan, torch.inf, 3e38])
    # Without a causal pattern every query is real: key_mask speaks about keys alone.
    for leaf in leaves if is_causal else leaves[1:]:
        places = leaf.transpose(1, 2)
        positions = torch.arange(37).view(1, 37, 1, 1).expand(places.shape)[~key_mask]
        places[~key_mask] = fillings[positions % 3]
    after = ours(leaves, **call)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("softcap", [50.0, 1e4])
def test_a_softcap_far_above_the_scores_costs_no_precision(lab: SimpleNamespace, softcap: float) -> None:
    check(lab, tensors(), scale=0.25, softcap=softcap)


def test_log_sum_exp_is_that_of_the_scores(lab: SimpleNamespace) -> None:
    query, key, value = tensors(key_heads=2)
    _, lse = attention(query, key, value, scale=0.25, return_lse=True)
    torch.testing.assert_close(lse, (0.25 * query @ key.mT).logsumexp(-1))
    _, lse = attention(query, key, value, scale=0.25, sinks=torch.ones(2), return_lse=True)
    torch.testing.assert_close(lse, torch.cat([0.25 * query @ key.mT, torch.ones(2, 2, 37, 1)], -1).logsumexp(-1))


def weights_used(seed: int, **more: Any) -> tuple[Tensor, Tensor]:
    """[B, H, Sq, Sk] after dropout, from the forward and from the backward pass, by values and gradients of one."""
    query, key, _ = tensors(key_heads=2)
    value = torch.eye(37).expand(2, 2, 37, 37).clone().requires_grad_()
    torch.manual_seed(seed)
    output = attention(query, key, value, scale=0.25, dropout=0.25, **more)
    # d output[i] / d value[j] is the weight of key j for query i.
    (grad,) = torch.autograd.grad(output, value, torch.eye(37)[None, :, None].expand_as(output))
    return output.detach().transpose(1, 2), grad.mT


def test_dropout_keeps_the_same_weights_in_forward_and_backward_and_for_any_tile(
    use_tile: Callable[[int, int], None],
) -> None:
    used, again = weights_used(0)
    torch.testing.assert_close(used, again)
    assert torch.equal(used == 0, again == 0)
    use_tile(64, 64)
    for other in weights_used(0):
        torch.testing.assert_close(used, other)
        assert torch.equal(used == 0, other == 0)


def test_dropout_keeps_every_weight_with_the_same_probability_independently_of_the_others(
    use_tile: Callable[[int, int], None],
) -> None:
    use_tile(64, 64)
    dropped = torch.stack([weights_used(seed)[0] == 0 for seed in range(2)]).double()
    # 5 standard deviations of the mean of as many independent draws.
    assert abs(float(dropped.mean()) - 0.25) < 5 * (0.25 * 0.75 / dropped.numel()) ** 0.5
    # Any two seeds, rows, heads, queries and keys: products of centred draws have the mean 0.
    centred = dropped - 0.25
    for dimension in range(5):
        product = centred.narrow(dimension, 0, 1) * centred.narrow(dimension, 1, 1)
        assert abs(float(product.mean())) < 5 * 0.25 * 0.75 / product.numel() ** 0.5


def test_the_generator_of_these_tests_gives_the_published_words(lab: SimpleNamespace) -> None:
    # Random123's known answers for philox4x32-10.
    zeros = lab.philox(0, *np.zeros(4, dtype=np.uint64))
    assert [int(word) for word in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = lab.philox(2**64 - 1, *np.full(4, 2**32 - 1, dtype=np.uint64))
    assert [int(word) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(("preserve_rng_state", "same"), [(True, True), (False, False)])
def test_dropout_is_the_same_when_checkpointing_computes_it_again(preserve_rng_state: bool, same: bool) -> None:
    def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, scale=0.25, dropout=0.25)

    def gradients(**checkpointing: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        leaves = [leaf.requires_grad_() for leaf in tensors(rows=1, queries=19, keys=19)]
        output = checkpoint(layer, *leaves, use_reentrant=False, **checkpointing) if checkpointing else layer(*leaves)
        return torch.autograd.grad((output * normal(*output.shape)).sum(), leaves)

    pairs = zip(gradients(), gradients(preserve_rng_state=preserve_rng_state), strict=True)
    assert all(torch.equal(plain, again) for plain, again in pairs) == same


def test_results_are_the_same_to_the_bit_in_any_order_of_programs(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, call = call_of(lab, {**RICH, "dropout": 0.0})
    before, again = ours(leaves, **call), ours(leaves, **call)
    builder = interpreter.interpreter_builder
    plain = builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: plain(builder.grid_dim[0] - 1 - x, y, z))
    backwards = ours(leaves, **call)
    assert all(torch.equal(before[name], other[name]) for name in before for other in (again, backwards))


def test_no_kernel_adds_up_by_atomic_operations() -> None:
    sources = [path.read_text() for path in Path(flash.__file__).parent.glob("*.py")]
    assert any("tl.store" in source for source in sources) and not any("atomic_" in source for source in sources)


@pytest.mark.parametrize(
    ("far", "size", "stride"), [(0, 17, 2**27), (1, 17, 2**27), (2, 133, 2**24)], ids=["rows", "heads", "sequence"]
)
def test_offsets_may_need_more_than_32_bits(
    far: int, size: int, stride: int, tmp_path: Path, use_tile: Callable[[int, int], None]
) -> None:
    # Rows, heads or positions far from one another in a file without content: 4 GiB that take no room. Outputs are
    # allocated by the kernels themselves, dense: offsets beyond 2**31 in them are not tried.
    use_tile(64, 64)
    shape, strides = [1, 1, 3, 16], [96, 48, 16, 1]
    shape[far], strides[far] = size, stride
    assert (size - 1) * stride >= 2**31
    size = (size - 1) * stride + 2**10
    memory = torch.from_file(str(tmp_path / "numbers"), shared=True, size=size, dtype=torch.float16)
    places = [memory.as_strided(shape, strides, 256 * part) for part in range(4)]
    dense = [normal(*shape, seed=part, dtype=torch.float16) for part in range(4)]
    for place, tensor in zip(places, dense, strict=True):
        place.copy_(tensor)
    rows, _, length, _ = shape
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, -1] = False
    steps = (strides[0] if far == 0 else 4, strides[2] if far == 2 else 1)
    bytes_ = torch.from_file(str(tmp_path / "mask"), shared=True, size=size, dtype=torch.bool)
    far_mask = bytes_.as_strided(mask.shape, steps).copy_(mask)

    def both(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, key_mask: Tensor) -> list[Tensor]:
        rest = (key_mask, None, None, None, None, Pattern(0.25, is_causal=True))
        output, lse = flash.forward(query, key, value, *rest)
        gradients = flash.backward(grad.transpose(1, 2), None, query, key, value, output, lse, *rest)
        return [output, lse, *gradients[:3]]

    found, expected = both(*places, far_mask), both(*dense, mask)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", ["expanded", "width first"])
def test_gradients_of_the_output_may_have_any_strides(lab: SimpleNamespace, form: str) -> None:
    query, key, value = tensors(key_heads=2)
    rest = (None, None, None, None, None, Pattern(0.25))
    output, lse = flash.forward(query, key, value, *rest)
    grad = torch.ones(()).expand(output.shape)
    if form == "width first":
        grad = lab.framed(normal(*output.shape), (0, 3, 1, 2))
    found, expected = (
        flash.backward(one, None, query, key, value, output, lse, *rest) for one in (grad, grad.contiguous())
    )
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))


@pytest.mark.parametrize("more", [{}, {"window": 6, "sinks": torch.ones(4), "softcap": 2.0}])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_a_cache_equals_the_whole_forward(padded: bool, more: dict[str, Any]) -> None:
    query, key, value = tensors(heads=4, key_heads=2, queries=21, keys=21)
    key_mask = left_padded(2, 21) if padded else None
    whole = attention(query, key, value, scale=0.25, is_causal=True, key_mask=key_mask, **more)
    # A prompt of eight tokens, then one by one, then three at a time.
    for start, stop in [(0, 8), *((n, n + 1) for n in range(8, 15)), (15, 18), (18, 21)]:
        cache = None if key_mask is None else key_mask[:, :stop]
        step = attention(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], scale=0.25, is_causal=True, key_mask=cache,
            **more,
        )  # fmt: skip
        torch.testing.assert_close(step, whole[:, start:stop])


def test_a_second_derivative_is_refused() -> None:
    leaves = [leaf.requires_grad_() for leaf in tensors(rows=1, queries=3, keys=3)]
    gradients = torch.autograd.grad(attention(*leaves, scale=0.25).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()
