"""Per-example norms in Triton's interpreter against gradients written out in float64, and against their own bounds.

Everything runs in memory that is filled with NaN and bordered by it. What a matrix unit does to the sums that the
interpreter computes too well is shown by a worse one in its place.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from dpfa_hf._kernel import norm_kernels, norms, tiles  # noqa: E402
from dpfa_hf._kernel.norms import SquaredNorm  # noqa: E402
from dpfa_hf._kernel.tiles import Tile  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from dpfa_hf import _kernel  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own"),
    pytest.mark.usefixtures("guarded"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_forms = pytest.mark.parametrize("form", norms.FORMS)
# Several blocks of pairs and positions, ragged in all three sizes; a width for LoRA; one position; whole blocks.
SHAPES = [(1, 75, 70, 36), (2, 37, 8, 90), (1, 1, 5, 3), (1, 32, 64, 64)]
# Segments of a packed row: empty ones in front, between and behind, a single position, several blocks.
LENGTHS = [0, 5, 40, 0, 33, 1, 0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that short sequences need several."""
    monkeypatch.setattr(tiles, "_INTERPRETER", Tile(32, 32, 4, 1))
    monkeypatch.setattr(norms, "MASS_BLOCK", 64)


@pytest.fixture(autouse=True)
def bounds_of_their_own_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds for 2**16 positions would hide most mistakes in 40."""
    monkeypatch.setattr(norms, "_LONGEST", 0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def boundaries(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def outer_gradient(left: Tensor, right: Tensor) -> Tensor:
    """[p, d] float64, written out position by position."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for one, other in zip(left.double(), right.double(), strict=True):
        total += torch.outer(one, other)
    return total


def table_gradient(index: Tensor, grad: Tensor, rows: int) -> Tensor:
    total = torch.zeros(rows, grad.shape[1], dtype=torch.float64)
    for key, one in zip(index.tolist(), grad.double(), strict=True):
        total[key] += one
    return total


def check(found: SquaredNorm, gradients: Sequence[Tensor], masses: Sequence[Tensor]) -> None:
    """Values within their bounds of what is true, masses nearly exact, and bounds that are no excuse."""
    exact = torch.stack([gradient.square().sum() for gradient in gradients])
    mass = torch.stack(list(masses))
    assert (found.value >= 0).all() and (found.error >= 0).all()
    assert ((found.value - exact).abs() <= found.error).all(), (found, exact)
    torch.testing.assert_close(found.mass, mass, rtol=1e-5, atol=0)
    # A norm is overestimated by a part in a hundred of the mass, and by nothing like it where nothing cancels.
    assert (found.error <= 2.0**-13 * mass.square()).all()
    # The interpreter's float32 is far better than the worst case.
    assert ((found.value - exact).abs() <= 1e-5 * mass.square()).all()


def mass(*factors: Tensor) -> Tensor:
    norms_of_rows = [factor.double().norm(dim=-1) for factor in factors]
    return torch.stack(norms_of_rows).prod(0).sum(-1)


def check_outer(left: Tensor, right: Tensor, form: str | None) -> None:
    found = norms.outer_squared_norm(left, right, form=form)
    check(found, [outer_gradient(*pair) for pair in zip(left, right, strict=True)], list(mass(left, right)))


def check_packed(form: str, lengths: Sequence[int] = LENGTHS, longest: int | None = None) -> None:
    left, right = normal(sum(lengths), 20, seed=1), normal(sum(lengths), 40, seed=2)
    found = norms.outer_squared_norm(left, right, cu_seq_lens=boundaries(lengths), longest=longest, form=form)
    pairs = list(zip(left.split(lengths), right.split(lengths), strict=True))
    check(found, [outer_gradient(*pair) for pair in pairs], [mass(*pair) for pair in pairs])


def repeated(rows: int, length: int, seed: int = 3) -> Tensor:
    """int64 [rows, length], some keys once, some often; the last row has one key in all places."""
    index = torch.randint(0, 30, (rows, length), generator=torch.Generator().manual_seed(seed))
    index[-1] = 7
    return index


def check_lookup(index: Tensor, grad: Tensor) -> None:
    gradients = [table_gradient(*pair, rows=30) for pair in zip(index, grad, strict=True)]
    check(norms.lookup_squared_norm(index, grad), gradients, list(mass(grad)))


# --- Linear layers ---------------------------------------------------------------------------------------------------


@both_forms
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms_are_within_their_bounds(shape: tuple[int, int, int, int], dtype: torch.dtype, form: str) -> None:
    batch, length, rows, columns = shape
    check_outer(
        normal(batch, length, rows, seed=1, dtype=dtype), normal(batch, length, columns, seed=2).to(dtype), form
    )


@both_forms
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_left_and_right_may_differ_in_dtype(dtypes: tuple[torch.dtype, torch.dtype], form: str) -> None:
    check_outer(normal(2, 40, 20, seed=1, dtype=dtypes[0]), normal(2, 40, 24, seed=2, dtype=dtypes[1]), form)


@both_forms
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1)], ids=str)
def test_strides_do_not_matter_and_nothing_beside_the_tensors_is_read(
    lab: SimpleNamespace, order: tuple[int, ...], form: str
) -> None:
    left, right = normal(2, 37, 20, seed=1), normal(2, 37, 40, seed=2)
    found = norms.outer_squared_norm(lab.framed(left, order), lab.framed(right, order), form=form)
    expected = norms.outer_squared_norm(left, right, form=form)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@both_forms
def test_inputs_shared_by_all_examples_may_be_expanded(form: str) -> None:
    check_outer(normal(2, 37, 20, seed=1), normal(1, 37, 40, seed=2).expand(2, 37, 40), form)


@both_forms
@pytest.mark.parametrize("shape", [(2, 0, 4, 5), (0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_what_is_empty_has_the_norm_zero(shape: tuple[int, int, int, int], form: str) -> None:
    batch, length, rows, columns = shape
    found = norms.outer_squared_norm(torch.ones(batch, length, rows), torch.ones(batch, length, columns), form=form)
    assert all(torch.equal(tensor, torch.zeros(batch, dtype=torch.float64)) for tensor in found)


def cancelling(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions in pairs that cancel: to nothing in the first example, to less and less of the mass in the others."""
    left, right = normal(1, 17, 40, seed=1), normal(1, 17, 24, seed=2)
    remains = torch.tensor([0.0, 1e-1, 1e-2])[:, None, None]
    left = torch.cat([left.expand(3, -1, -1), remains * normal(3, 17, 40, seed=3) - left], 1)
    return left.to(dtype), right.repeat(3, 2, 1).to(dtype)


@both_forms
@every_dtype
def test_clipping_by_the_bound_never_exceeds_the_clipping_norm(dtype: torch.dtype, form: str) -> None:
    left, right = cancelling(dtype)
    check_outer(left, right, form)
    found = norms.outer_squared_norm(left, right, form=form)
    clipping_norm = 1e-3
    coefficient = (clipping_norm / (found.value + found.error).sqrt()).clamp(max=1)
    clipped = [c * outer_gradient(*pair).norm() for c, *pair in zip(coefficient, left, right, strict=True)]
    assert (torch.stack(clipped) <= clipping_norm).all()


def test_the_tile_form_keeps_most_of_a_norm_that_cancels() -> None:
    left, right = cancelling(torch.float32)
    exact = torch.stack([outer_gradient(*pair).square().sum() for pair in zip(left, right, strict=True)])
    tile, gram = (norms.outer_squared_norm(left, right, form=form) for form in ("tile", "gram"))
    # The third example's norm is less than a hundredth of its mass.
    assert tile.error[2] < 0.1 * exact[2] < exact[2] < gram.error[2]


@both_forms
def test_an_example_that_is_not_finite_spoils_only_itself(form: str) -> None:
    left, right = normal(3, 40, 20, seed=1), normal(3, 40, 24, seed=2)
    before = norms.outer_squared_norm(left, right, form=form)
    left[1, 30, 2], right[2, 5, 5] = torch.inf, torch.nan
    after = norms.outer_squared_norm(left, right, form=form)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[0], new[0]) and not new[1:].isfinite().any()


@both_forms
@pytest.mark.parametrize("far", ["rows", "positions"])
def test_offsets_may_need_more_than_32_bits(
    far: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows or positions far from one another in a file without content: 4 GiB that take no room.
    monkeypatch.setattr(tiles, "_INTERPRETER", Tile(128, 128, 4, 1))
    shape, strides = ((2, 3, 16), (2**31, 16, 1)) if far == "rows" else ((1, 258, 16), (16, 2**23 - 16, 1))
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert last >= 2**31
    memory = torch.from_file(str(tmp_path / "numbers"), shared=True, size=last + 2**10, dtype=torch.float16)
    dense = [normal(*shape, seed=seed, dtype=torch.float16) for seed in (1, 2)]
    places = [memory.as_strided(shape, strides, 256 * i).copy_(tensor) for i, tensor in enumerate(dense)]
    for found, expected in zip(*(norms.outer_squared_norm(*pair, form=form) for pair in (places, dense)), strict=True):
        assert torch.equal(found, expected)
    index = torch.arange(shape[1]).expand(shape[:2]) % 5
    for found, expected in zip(*(norms.lookup_squared_norm(index, one) for one in (places[0], dense[0])), strict=True):
        assert torch.equal(found, expected)


def test_float64_is_computed_in_float64() -> None:
    left, right = normal(2, 37, 20, seed=1).double(), normal(2, 37, 40, seed=2).double()
    found = norms.outer_squared_norm(left, right)
    exact = torch.stack([outer_gradient(*pair).square().sum() for pair in zip(left, right, strict=True)])
    assert ((found.value - exact).abs() <= found.error).all() and (found.error < 1e-11 * exact).all()


# --- Packed rows -----------------------------------------------------------------------------------------------------


@both_forms
@pytest.mark.parametrize("longest", [None, max(LENGTHS)])
def test_segments_have_the_norms_of_their_own_positions(longest: int | None, form: str) -> None:
    check_packed(form, longest=longest)


@both_forms
def test_segments_have_the_bits_that_they_have_alone(form: str) -> None:
    left, right = normal(sum(LENGTHS), 20, seed=1), normal(sum(LENGTHS), 40, seed=2)
    packed = norms.outer_squared_norm(left, right, cu_seq_lens=boundaries(LENGTHS, torch.int32), form=form)
    for i in (1, 2, 4):
        pair = left.split(LENGTHS)[i], right.split(LENGTHS)[i]
        alone = norms.outer_squared_norm(*(part[None] for part in pair), form=form)
        assert packed.value[i] == alone.value[0] and packed.mass[i] == alone.mass[0]
    left[:5] = torch.nan
    after = norms.outer_squared_norm(left, right, cu_seq_lens=boundaries(LENGTHS), form=form)
    assert after.value[1].isnan() and torch.equal(after.value[2:], packed.value[2:])


@pytest.mark.parametrize("lengths", [[96, 1], [1] * 9, [33] * 3, [64, 32, 1, 31, 0, 0]], ids=str)
def test_there_are_programs_enough_for_every_packing(lengths: list[int]) -> None:
    check_packed("gram", lengths, max(lengths))


@pytest.mark.parametrize("ends", [[0, 30, 39], [1, 20, 40], [0, 30, 20, 40], [0, 20, 41], [-1, 40]], ids=str)
def test_segments_that_do_not_cover_the_row_have_no_norm(ends: list[int]) -> None:
    left, right, ends_ = normal(40, 20, seed=1), normal(40, 24, seed=2), torch.tensor(ends)
    index = repeated(1, 40)[0]
    for found in (
        norms.outer_squared_norm(left, right, cu_seq_lens=ends_, form="gram"),
        norms.outer_squared_norm(left, right, cu_seq_lens=ends_, form="tile"),
        norms.lookup_squared_norm(index, right, cu_seq_lens=ends_),
        norms.position_sums(right, right, cu_seq_lens=ends_),
        norms.outer_squared_norm(left.double(), right.double(), cu_seq_lens=ends_),
    ):
        assert all(tensor.isnan().all() and len(tensor) == len(ends) - 1 for tensor in found)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_segment_longer_than_the_longest_has_no_norm(form: str, dtype: torch.dtype) -> None:
    left = normal(sum(LENGTHS), 20).to(dtype)
    found = norms.outer_squared_norm(left, left, cu_seq_lens=boundaries(LENGTHS), longest=max(LENGTHS) - 1, form=form)
    assert all(tensor.isnan().all() for tensor in found)


# --- Embeddings ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("shape", [(3, 75, 40), (2, 1, 5), (1, 64, 32)], ids=str)
def test_positions_with_one_index_are_added_up(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_lookup(repeated(*shape[:2]), normal(*shape, seed=1, dtype=dtype))


def test_an_embeddings_norm_cancels_exactly_as_its_gradient_does() -> None:
    grad = normal(1, 40, 24, seed=1)
    index = torch.arange(20).repeat(2)[None]
    grad[:, 20:] = -grad[:, :20]
    found = norms.lookup_squared_norm(index, grad)
    assert found.value == 0 < found.error
    check_lookup(index, grad)


def test_packed_embeddings_keep_their_segments_apart(lab: SimpleNamespace) -> None:
    index, grad = repeated(2, sum(LENGTHS))[0], normal(sum(LENGTHS), 40, seed=1)
    found = norms.lookup_squared_norm(index.int(), lab.framed(grad, (0, 1)), cu_seq_lens=boundaries(LENGTHS))
    pairs = list(zip(index.split(LENGTHS), grad.split(LENGTHS), strict=True))
    check(found, [table_gradient(*pair, rows=30) for pair in pairs], [mass(grad) for _, grad in pairs])


def tied_tensors(length: int, lookups: int, dtype: torch.dtype) -> list[Tensor]:
    left, right = normal(2, length, 30, seed=1, dtype=dtype), normal(2, length, 20, seed=2, dtype=dtype)
    return [left, right, repeated(2, lookups), normal(2, lookups, 20, seed=4, dtype=dtype)]


def check_tied(tensors: Sequence[Tensor], **call: Tensor) -> None:
    found = norms.tied_squared_norm(*tensors, **call)
    if call:
        lengths = call["cu_seq_lens"].diff().tolist()
        examples = list(zip(*(tensor.split(lengths) for tensor in tensors), strict=True))
    else:
        examples = list(zip(*tensors, strict=True))
    gradients = [outer_gradient(left, right) + table_gradient(*rest, rows=30) for left, right, *rest in examples]
    check(found, gradients, [mass(left, right) + mass(grad) for left, right, _, grad in examples])


@every_dtype
@pytest.mark.parametrize("lengths", [(40, 40), (33, 70), (1, 3)], ids=str)
def test_a_tied_weight_is_counted_with_the_cross_term(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    check_tied(tied_tensors(*lengths, dtype))


def test_a_tied_weights_two_layers_may_differ_in_dtype() -> None:
    left, right, index, grad = tied_tensors(33, 20, torch.bfloat16)
    check_tied([left, right.float(), index, grad])


def test_a_tied_weight_in_a_packed_row_is_counted_by_segment() -> None:
    total = sum(LENGTHS)
    check_tied([tensor[1] for tensor in tied_tensors(total, total, torch.float32)], cu_seq_lens=boundaries(LENGTHS))


# --- Norm layers and biases ------------------------------------------------------------------------------------------


def check_sums(grad: Tensor, x: Tensor, eps: float, centered: bool, lengths: Sequence[int] | None = None) -> None:
    """Against autograd through PyTorch's own layers, example by example, in float64."""
    call = {} if lengths is None else {"cu_seq_lens": boundaries(lengths)}
    found = norms.position_sums(grad, x, eps=eps, centered=centered, **call)
    width = grad.shape[-1]
    pairs = zip(grad, x, strict=True) if lengths is None else zip(grad.split(lengths), x.split(lengths), strict=True)
    for i, (grad_i, x_i) in enumerate(pairs):
        weight, bias = torch.ones(2, width, dtype=torch.float64).requires_grad_().unbind()
        x_i = x_i.double()
        output = F.layer_norm(x_i, (width,), weight, bias, eps) if centered else F.rms_norm(x_i, (width,), weight, eps)
        expected = torch.autograd.grad((output * grad_i.double()).sum(), (weight, bias), allow_unused=True)
        terms = grad_i.double().abs().sum(0).max() if len(grad_i) else 0
        torch.testing.assert_close(found.weight[i], expected[0], rtol=0, atol=1e-5 * float(terms) + 1e-12)
        torch.testing.assert_close(found.bias[i], grad_i.double().sum(0), rtol=1e-12, atol=1e-12)


@every_dtype
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(2, 37, 70), (1, 1, 3), (2, 0, 4), (1, 33, 200)], ids=str)
def test_sums_over_positions_are_the_gradients_of_norm_layers(
    shape: tuple[int, int, int], centered: bool, dtype: torch.dtype
) -> None:
    x = 3 * normal(*shape, seed=1) + 5
    check_sums(normal(*shape, seed=2, dtype=dtype), x.to(dtype), 1e-5, centered)


def test_packed_sums_keep_their_segments_apart() -> None:
    total = sum(LENGTHS)
    check_sums(normal(total, 20, seed=1), normal(total, 20, seed=2), 1e-5, True, LENGTHS)


def test_a_bias_needs_no_input() -> None:
    grad = normal(2, 37, 70, dtype=torch.bfloat16)
    found = norms.position_sums(grad)
    assert found.weight is None
    torch.testing.assert_close(found.bias, grad.double().sum(1), rtol=1e-14, atol=1e-14)


# --- A worse matrix unit ---------------------------------------------------------------------------------------------


def cut_off(x: np.ndarray) -> np.ndarray:
    """float64 -> float32, towards zero."""
    nearest = x.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def dot_that_cuts_off(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Four products at a time, aligned with the running sum, each cut off at 24 bits, and their sum as well."""
    for k in range(0, a.shape[1], 4):
        parts = [a[:, i, None].astype(np.float64) * b[None, i].astype(np.float64) for i in range(k, k + 4)]
        parts.append(total.astype(np.float64))
        _, exponent = np.frexp(np.max(np.abs(parts), axis=0))
        quantum = np.ldexp(1.0, exponent - 24)
        total = cut_off(sum(np.trunc(part / quantum) * quantum for part in parts))
    return total


@pytest.fixture
def matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dot(self, a, b, total, *_):  # type: ignore[no-untyped-def]
        return interpreter.TensorHandle(dot_that_cuts_off(a.data, b.data, total.data), total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def positive(*shape: int, seed: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 1).half()


def check_under_a_worse_unit(form: str, length: int = 1000) -> None:
    """Many terms of one sign, so that all errors have one, too; they come to a good part of the bound."""
    shape = (1, 33, 192, 64) if form == "gram" else (1, length, 16, 16)
    left, right = positive(*shape[:3], seed=1), positive(*shape[:2], shape[3], seed=2)
    found = norms.outer_squared_norm(left, right, form=form)
    exact = (left[0].double().mT @ right[0].double()).square().sum()
    assert found.error / 64 < exact - found.value[0] < found.error


@both_forms
@pytest.mark.usefixtures("matrix_unit")
def test_the_bound_holds_on_a_matrix_unit_that_cuts_off_its_sums(form: str) -> None:
    check_under_a_worse_unit(form)


@both_forms
@pytest.mark.usefixtures("matrix_unit")
def test_mutant_bound_that_is_too_small_is_caught(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_UNIT_ROUNDOFF", {True: 2.0**-28, False: 2.0**-30})
    monkeypatch.setattr(norms, "_FLOAT32", 2.0**-30)
    with pytest.raises(AssertionError):
        check_under_a_worse_unit(form)


# --- Mutants of the kernels ------------------------------------------------------------------------------------------


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Replaces a line of the kernels."""

    def replace(right: str, wrong: str) -> None:
        source = Path(norm_kernels.__file__).read_text()
        assert source.count(right) == 1, right
        path = tmp_path / "mutant.py"
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location("mutant", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(_kernel, "norm_kernels", module)

    return replace


@pytest.mark.usefixtures("matrix_unit")
def test_mutant_that_sums_in_one_accumulator_is_caught(plant: Callable[[str, str], None]) -> None:
    plant("return total + tl.dot(a, b, input", "return tl.dot(a, b, total, input")
    with pytest.raises(AssertionError):
        check_under_a_worse_unit("tile", 4000)


@pytest.mark.parametrize(
    ("right", "wrong", "caught_by"),
    [
        ("weight = tl.where(i == j, 1.0, 2.0)", "weight = 1.0", lambda: check_packed("gram")),
        ("i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)", "i += 1", lambda: check_packed("gram")),
        ("stop = tl.load(BOUNDARIES + example + 1).to(tl.int32)", "stop = length", lambda: check_packed("tile")),
        ("stop = tl.load(BOUNDARIES + example + 1).to(tl.int32)", "stop = length", lambda: check_packed("gram")),
        ("follows == 0) | (key != before)", "follows == 0) | (key == key)", lambda: check_lookup_of(75)),
        ("carried[None, :], 0.0)", "0.0, 0.0)", lambda: check_lookup_of(75)),
        ("squares += tl.where(opening != 0, carried * carried, 0.0)", "", lambda: check_lookup_of(75)),
        ("left * inner", "inner", lambda: check_tied(tied_tensors(40, 40, torch.float32))),
        ("x = tl.where(tl.arange(0, WIDTH)[None, :] < columns - column, x, 0.0)", "", lambda: check_sums_of(70)),
    ],
)
def test_mutant_kernel_is_caught(
    right: str, wrong: str, caught_by: Callable[[], None], plant: Callable[[str, str], None]
) -> None:
    plant(right, wrong)
    with pytest.raises(AssertionError):
        caught_by()


def check_lookup_of(length: int) -> None:
    check_lookup(repeated(3, length), normal(3, length, 20, seed=1))


def check_sums_of(width: int) -> None:
    check_sums(normal(2, 9, width, seed=1), normal(2, 9, width, seed=2) + 5, 1e-5, True)


def test_mutant_that_forgets_the_cross_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_cross", lambda left, *_: torch.zeros(len(left), dtype=torch.float64))
    with pytest.raises(AssertionError):
        check_tied(tied_tensors(40, 40, torch.float32))


# --- The choice of a form --------------------------------------------------------------------------------------------


def test_the_forms_meet_where_their_operations_do() -> None:
    for rows, columns, meet in ((4096, 4096, 4096), (768, 768, 768), (16, 4096, 32), (3072, 768, 1229)):
        gram, tile = (
            [norms.operations(form, length, rows, columns, "sm_90", True) for length in (meet // 4, meet * 4)]
            for form in norms.FORMS
        )
        if meet >= 768:
            assert gram[0] < tile[0] and gram[1] > tile[1], (rows, columns)
        # Whole tiles only: T^2 (d + p) / 2 for the lower triangle and its diagonal, and T d p.
        length = 4096
        blocks = length // 128
        assert norms.operations("gram", length, 4096, 4096, "sm_90", True) == blocks * (blocks + 1) * 128**2 * 4096
        assert norms.operations("tile", length, 4096, 4096, "sm_90", True) == length * 4096**2


def test_the_choice_is_by_operations_and_can_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"dtype": torch.float16, "device": torch.device("cpu")}
    assert norms.choose_form(32, 512, 512, **call) == "gram" and norms.choose_form(4096, 512, 512, **call) == "tile"
    monkeypatch.setitem(tiles.GRAM_COST, "interpreter", 1e9)
    assert norms.choose_form(32, 512, 512, **call) == "tile"
    forms = []
    for name in norms.FORMS:
        original = getattr(norms, f"_{name}")
        monkeypatch.setattr(norms, f"_{name}", lambda *a, name=name, run=original: (forms.append(name), run(*a))[1])
    left = normal(1, 3, 4)
    for form in (None, "gram"):
        norms.outer_squared_norm(left, left, form=form)
    assert forms == ["tile", "gram"]


def test_the_benchmark_without_a_gpu_counts_and_invents_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "norms.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_norms", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["norms.py", "--output", str(tmp_path / "norms.json")])
    benchmark.main()
    printed = capsys.readouterr().out
    assert "nothing is timed" in printed and "gram" in printed and not list(tmp_path.iterdir())
    assert [benchmark.meeting_length(*shape) for shape in benchmark.SHAPES[:2]] == [768, 1228]


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: norms.outer_squared_norm(x, x[:, :2]), "one batch and length"),
        (lambda x: norms.outer_squared_norm(x[0], x[0]), "3 dimensions"),
        (lambda x: norms.outer_squared_norm(x, x, cu_seq_lens=torch.tensor([0, 3])), "2 dimensions"),
        (lambda x: norms.outer_squared_norm(x.long(), x), "floating-point"),
        (lambda x: norms.outer_squared_norm(x, x, form="best"), "form='best'"),
        (lambda x: norms.outer_squared_norm(x[0], x[0], cu_seq_lens=torch.tensor([0.0, 3.0])), "cu_seq_lens"),
        (lambda x: norms.outer_squared_norm(x[0], x[0], cu_seq_lens=torch.tensor([[0, 3]])), "cu_seq_lens"),
        (lambda x: norms.lookup_squared_norm(torch.zeros(2, 4).long(), x), "one batch and length"),
        (lambda x: norms.lookup_squared_norm(torch.zeros(2, 3), x), "index must be int"),
        (lambda x: norms.position_sums(x, x[..., :2]), "one shape"),
        (lambda x: norms.tied_squared_norm(x, x, torch.zeros(2, 3).long(), x[..., :2]), "one batch and width"),
    ],
)
def test_what_is_not_described_is_refused_in_one_line(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        call(normal(2, 3, 4))
    assert "\n" not in str(refusal.value)
