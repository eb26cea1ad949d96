"""Per-example squared norms of gradients that are sums over positions, without ever writing such a gradient.

A linear layer's gradient of an example is the sum over its positions t of left_t^T right_t (output gradient and input);
its squared norm is also the sum over pairs of positions of <left_s, left_t> <right_s, right_t> (Goodfellow 2015,
arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679). An embedding's gradient is the sum of grad_t by index, a norm
layer's that of grad_t times its normalised input.

Examples are the rows of a batch, [B, T, ...], or the segments of one packed row, [T, ...] with `cu_seq_lens` int
[n + 1] from 0 to T on the tensors' device. Segments need no padding. What `cu_seq_lens` holds is checked without
waiting for the device: where it does not rise from 0 to T, or a segment is longer than `longest`, every result is NaN,
which clips to nothing (P15).

GPU tensors of 16 or 32 bits take the kernels, others are computed in float64 by PyTorch. The same call gives the same
bits every time, and nothing waits for the device.

How wrong a norm may be (P14). Products of 16 bits are exact. A matrix unit sums them in chunks of 64 with an error of
at most 64 u times the sum of their magnitudes, u = 2**-22: it aligns four or more products with the running sum, cuts
them off at 24 bits and cuts the result off once more (Fasi et al. 2021, PeerJ CS 7:e330, measured it), so n products
cost n (1 + 2/4) 2**-23 at the most. In float32, chunks have 32 products and u = 2**-24. Chunks are added in float32,
rounded to nearest, so that a sum of n products is within gamma(n) = (chunk u + (n / chunk + 1) 2**-24) of the sum of
their magnitudes. With mass = sum_t |left_t| |right_t|, Cauchy and Schwarz then give

- Gram form: |value - norm^2| <= (gamma(d) + gamma(p) + r) mass^2, since terms of either sign may cancel;
- tile form, and embeddings: |sqrt(value) - norm| <= gamma(T) mass, but for a factor of 1 + r on value,

where r = (128 + 1) 2**-24 is for the sums over a tile. All is taken 1 % larger for terms of second order. These are
linear in d, p and T, worst cases: a bound with their square roots would hold only for errors that are independent.

An example is clipped by value + error, which must depend on it alone, and the longest row of a batch decides the form
and T. So `error` is the sum of both forms' bounds wherever either may be taken, for T = 2**16 or more.

Magnitudes whose products leave float32's range are not covered below it (they vanish: less than 2**-126 each) and are
not finite above it.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import GRAM_COST, NORM_CHUNK, NORM_WIDEST, Tile, norm_tile

FORMS = ("gram", "tile")
_HALVES = (torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_FLOAT32, _FLOAT64 = 2.0**-24, 2.0**-53
_UNIT_ROUNDOFF = {True: 2.0**-22, False: _FLOAT32}  # of the sums within a chunk
_SECOND_ORDER = 1.01
# Every length up to this has one bound.
_LONGEST = 2**16
# Layers of which no row is long enough for the Gram form to be worth it: half the harmonic mean of their sides.
_ALWAYS_TILES = 64
# Positions, and columns, that a program of the kernels without matrix products takes at a time.
MASS_BLOCK, MASS_WIDTH = 16, 128
SUMS_BLOCK, SUMS_WIDTH = 32, 32
FINISH_BLOCK = 256
SEARCH = 128


class SquaredNorm(NamedTuple):
    """Squared norms of the examples' gradients.

    Attributes:
        value: [B] float64, never negative; NaN or infinite if the example is not finite.
        error: [B] float64, a bound on |value - squared norm| in the worst case.
        mass: [B] float64, the sum over positions of the norms of what is added up.

    Guarantee:
        sqrt(value + error) is at least the norm, so what is clipped by it is never longer than the clipping norm.
    """

    value: Tensor
    error: Tensor
    mass: Tensor


class PositionSums(NamedTuple):
    """Per-example gradients of a norm layer's vectors, [B, d] float64; `weight` is None where no input was given."""

    weight: Tensor | None
    bias: Tensor


class _Coefficients(NamedTuple):
    """error = relative value + distance (2 sqrt(value) + distance) + squared mass^2, where distance = absolute mass."""

    absolute: float = 0.0
    squared: float = 0.0
    relative: float = 0.0


def outer_squared_norm(
    left: Tensor,
    right: Tensor,
    *,
    cu_seq_lens: Tensor | None = None,
    longest: int | None = None,
    form: str | None = None,
) -> SquaredNorm:
    """Squared norms of gradient_i = sum_t left_it^T right_it, by the form that needs fewer operations.

    Args:
        left: [B, T, p], or [T, p] with `cu_seq_lens`; any strides.
        right: [B, T, d] or [T, d].
        cu_seq_lens: int [n + 1], boundaries of the segments.
        longest: length of the longest segment, if it is known without waiting for the device; T otherwise.
        form: "gram" or "tile", to overrule `choose_form`.

    Raises:
        ValueError: shapes or dtypes that are not described above; an unknown form.

    Guarantee:
        That of `SquaredNorm`. The bound is that of the module's head; that of the Gram form is relative to mass^2,
        hence far above a norm that comes of cancelling terms: clipping by it stays private and only shortens more.
    """
    _check(left, right, cu_seq_lens=cu_seq_lens)
    if form not in (None, *FORMS):
        raise ValueError(f"form={form!r} is unknown: choose 'gram', 'tile' or None")
    rows, columns = left.shape[-1], right.shape[-1]
    if not fused(left, right):
        return _outer_in_float64(left, right, cu_seq_lens, longest)
    segments = _Segments.of(left, cu_seq_lens, longest)
    coefficients = _linear_coefficients(segments.longest, _wider(left, right) in _HALVES)
    if form == "gram" or _may_be_gram(rows, columns):
        squared = _gram_coefficient(rows, left.dtype in _HALVES, columns, right.dtype in _HALVES)
        coefficients = coefficients._replace(squared=squared)
    if form is None:
        form = choose_form(segments.longest, rows, columns, dtype=_wider(left, right), device=left.device)
    return (_gram if form == "gram" else _tile)(left, right, segments, coefficients)


def lookup_squared_norm(index: Tensor, grad: Tensor, *, cu_seq_lens: Tensor | None = None) -> SquaredNorm:
    """Squared norms of an embedding's gradient: row v of gradient_i is the sum of grad_it over t with index_it = v.

    Equal indices are brought together by sorting and added up, in one pass over `grad`: there is no cancellation.

    Args:
        index: int [B, T], or [T] with `cu_seq_lens`; 0 <= index < 2**40.
        grad: [B, T, d] or [T, d]; any strides.
        cu_seq_lens: int [n + 1], boundaries of at most 2**22 segments.

    Raises:
        ValueError: shapes or dtypes that are not described above.
    """
    _check(grad, index=index, cu_seq_lens=cu_seq_lens)
    if not fused(grad):
        return _lookup_in_float64(index, grad, cu_seq_lens)
    return _lookup(index, grad, cu_seq_lens, _linear_coefficients(grad.shape[-2], grad.dtype in _HALVES))


def tied_squared_norm(
    left: Tensor,
    right: Tensor,
    index: Tensor,
    grad: Tensor,
    *,
    cu_seq_lens: Tensor | None = None,
    longest: int | None = None,
) -> SquaredNorm:
    """Squared norms of the sum of a linear layer's gradient and an embedding's, whose weight is one (P12).

    Args:
        left: [B, S, rows], the linear layer's, or [T, rows] with `cu_seq_lens`; one column for each row of the table.
        right: [B, S, d] or [T, d].
        index: int [B, T], the embedding's, or [T].
        grad: [B, T, d] or [T, d].
        cu_seq_lens: int [n + 1], boundaries of the segments, the same for both layers.
        longest: as in `outer_squared_norm`.

    Raises:
        ValueError: shapes or dtypes that are not described above.

    Guarantee:
        That of `SquaredNorm`, cross term included: |a + b|^2 and not |a|^2 + |b|^2. mass is the sum of both masses.
    """
    outer = outer_squared_norm(left, right, cu_seq_lens=cu_seq_lens, longest=longest)
    lookup = lookup_squared_norm(index, grad, cu_seq_lens=cu_seq_lens)
    if right.shape[-1] != grad.shape[-1] or left.shape[:-2] != grad.shape[:-2]:
        raise ValueError(f"right {tuple(right.shape)} and grad {tuple(grad.shape)} must have one batch and width")
    if fused(left, right, grad):
        product = _cross(left, right, index, grad, _Segments.of(right, cu_seq_lens, longest))
        coefficient = _SECOND_ORDER * (_gamma(grad.shape[-1], _wider(right, grad) in _HALVES) + _tile_sum())
    else:
        product = _cross_in_float64(left, right, index, grad, cu_seq_lens)
        coefficient = 2 * grad.shape[-1] * _FLOAT64
    value = outer.value + lookup.value + 2 * product
    error = outer.error + lookup.error + 2 * coefficient * outer.mass * lookup.mass
    return SquaredNorm(torch.where(value < 0, 0.0, value), error, outer.mass + lookup.mass)


def position_sums(
    grad: Tensor,
    x: Tensor | None = None,
    *,
    eps: float = 0.0,
    centered: bool = True,
    cu_seq_lens: Tensor | None = None,
) -> PositionSums:
    """Gradients of LayerNorm's or RMSNorm's weight and bias, or of any bias: sums over positions, in float64.

    Args:
        grad: [B, T, d], gradient of the layer's output, or [T, d] with `cu_seq_lens`; any strides.
        x: [B, T, d] or [T, d], its input before normalisation; None for a bias alone.
        eps: as in the layer.
        centered: True for LayerNorm, (x - mean) / sqrt(variance + eps); False for RMSNorm, x / sqrt(mean square + eps).
        cu_seq_lens: int [n + 1], boundaries of the segments.

    Raises:
        ValueError: shapes or dtypes that are not described above.
    """
    _check(grad, x, cu_seq_lens=cu_seq_lens)
    if x is not None and x.shape != grad.shape:
        raise ValueError(f"x {tuple(x.shape)} and grad {tuple(grad.shape)} must have one shape")
    if fused(grad, *([] if x is None else [x])):
        return _position_sums(grad, x, eps, centered, cu_seq_lens)
    grad = grad.double()
    bias = _sums_in_float64(grad, cu_seq_lens)
    if x is None:
        return PositionSums(None, bias)
    x = x.double()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    normalised = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return PositionSums(_sums_in_float64(grad * normalised, cu_seq_lens), bias)


def fused(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: of 16 or 32 bits on a GPU, or wherever Triton's interpreter runs."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    able = _HAS_TRITON and all(tensor.is_cuda or interpreted for tensor in tensors)
    return able and all(tensor.dtype in (*_HALVES, torch.float32) for tensor in tensors)


def choose_form(length: int, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> str:
    """The form that costs less by its operations, "gram" or "tile": they meet near T = 2 d p / (d + p).

    Narrow layers, for which that is a few positions, always take tiles, and are spared the Gram form's bound.
    """
    from .flash import architecture

    chip, half = architecture(device), dtype in _HALVES
    if not _may_be_gram(rows, columns):
        return "tile"
    gram = operations("gram", length, rows, columns, chip, half) * GRAM_COST.get(chip, 1.0)
    return "gram" if gram <= operations("tile", length, rows, columns, chip, half) else "tile"


def _may_be_gram(rows: int, columns: int) -> bool:
    return rows * columns >= _ALWAYS_TILES * (rows + columns)


def operations(form: str, length: int, rows: int, columns: int, architecture: str, half: bool) -> int:
    """Multiplications of one example, those with the padding of tiles included.

    Args:
        form: "gram" or "tile".
        length: T.
        rows, columns: p and d.
        architecture: a key of `tiles.SHARED_MEMORY`, or "interpreter".
        half: whether the inputs have 16 bits instead of 32.
    """
    chunk = NORM_CHUNK[half]
    if form == "gram":
        block = norm_tile(architecture, "gram", half).block_m
        blocks = _blocks(length, block)
        return blocks * (blocks + 1) // 2 * block**2 * chunk * (_blocks(rows, chunk) + _blocks(columns, chunk))
    rows, columns = max(rows, columns), min(rows, columns)
    block_m, block_n, *_ = norm_tile(architecture, "tile", half, columns)
    return _blocks(rows, block_m) * block_m * _blocks(columns, block_n) * block_n * _blocks(length, chunk) * chunk


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _check(
    first: Tensor, second: Tensor | None = None, *, index: Tensor | None = None, cu_seq_lens: Tensor | None = None
) -> None:
    tensors = [first] if second is None else [first, second]
    dimensions = 3 if cu_seq_lens is None else 2
    shapes = {tensor.shape[:-1] for tensor in tensors} | (set() if index is None else {index.shape})
    if len(shapes) != 1 or first.ndim != dimensions or not all(tensor.is_floating_point() for tensor in tensors):
        integers = [] if index is None else [index]
        given = ", ".join(f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors + integers)
        raise ValueError(
            f"expected floating-point tensors of one batch and length, {dimensions} dimensions of features, not {given}"
        )
    for name, integers in (("index", index), ("cu_seq_lens", cu_seq_lens)):
        if integers is not None and (integers.dtype not in (torch.int32, torch.int64) or integers.ndim == 0):
            raise ValueError(f"{name} must be int32 or int64, not {integers.dtype} {tuple(integers.shape)}")
    if cu_seq_lens is not None and (cu_seq_lens.ndim != 1 or len(cu_seq_lens) == 0):
        raise ValueError(f"cu_seq_lens must be one row of boundaries, not {tuple(cu_seq_lens.shape)}")


def _wider(left: Tensor, right: Tensor) -> torch.dtype:
    return left.dtype if left.dtype == right.dtype else torch.float32


# --- Bounds ----------------------------------------------------------------------------------------------------------


def _gamma(terms: int, half: bool) -> float:
    """Relative error of a sum of so many products, of the sum of their magnitudes."""
    chunk = NORM_CHUNK[half]
    return min(terms, chunk) * _UNIT_ROUNDOFF[half] + (_blocks(terms, chunk) + 1) * _FLOAT32


def _tile_sum() -> float:
    """Relative error of the products in a tile and of their float32 sums by row, in any order; the rest is float64."""
    return (NORM_WIDEST + 1) * _FLOAT32


def _gram_coefficient(rows: int, half_rows: bool, columns: int, half_columns: bool) -> float:
    return _SECOND_ORDER * (_gamma(rows, half_rows) + _gamma(columns, half_columns) + _tile_sum())


def _linear_coefficients(length: int, half: bool) -> _Coefficients:
    length = max(length, _LONGEST)
    gamma = _gamma(length, half)
    # The embedding's sums of squares also run over chunks of positions.
    relative = _tile_sum() + _blocks(length, NORM_CHUNK[half]) * _FLOAT32
    return _Coefficients(absolute=_SECOND_ORDER * gamma, relative=_SECOND_ORDER * relative)


# --- Float64 ---------------------------------------------------------------------------------------------------------


def _examples(cu_seq_lens: Tensor | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors of each example."""
    if cu_seq_lens is None:
        return list(zip(*tensors, strict=True))
    ends = cu_seq_lens.clamp(0, tensors[0].shape[0]).tolist()
    bounds = zip(ends, ends[1:], strict=False)
    return [tuple(tensor[start : max(start, stop)] for tensor in tensors) for start, stop in bounds]


def _outer_in_float64(left: Tensor, right: Tensor, cu_seq_lens: Tensor | None, longest: int | None) -> SquaredNorm:
    """Through the gradients themselves, one at a time."""
    examples = _examples(cu_seq_lens, left.double(), right.double())
    values = [(one.mT @ other).square().sum() for one, other in examples]
    masses = [(one.norm(dim=1) * other.norm(dim=1)).sum() for one, other in examples]
    return _in_float64(left, _Segments.of(left, cu_seq_lens, longest), values, masses)


def _lookup_in_float64(index: Tensor, grad: Tensor, cu_seq_lens: Tensor | None) -> SquaredNorm:
    values, masses = [], []
    for keys, one in _examples(cu_seq_lens, index, grad.double()):
        distinct, row = keys.unique(return_inverse=True)
        sums = one.new_zeros(len(distinct), one.shape[1]).index_add_(0, row, one)
        values.append(sums.square().sum())
        masses.append(one.norm(dim=1).sum())
    return _in_float64(grad, _Segments.of(grad, cu_seq_lens), values, masses)


def _cross_in_float64(left: Tensor, right: Tensor, index: Tensor, grad: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
    outer = _examples(cu_seq_lens, left.double(), right.double())
    lookup = _examples(cu_seq_lens, index, grad.double())
    products = [
        ((one @ table.mT) * logits[:, keys]).sum() for (logits, one), (keys, table) in zip(outer, lookup, strict=True)
    ]
    return _stacked(products, left, _Segments.of(left, cu_seq_lens))


def _sums_in_float64(terms: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
    sums = [one.sum(0) for (one,) in _examples(cu_seq_lens, terms)]
    segments = _Segments.of(terms, cu_seq_lens)
    return segments.checked(torch.stack(sums) if sums else terms.new_zeros(0, terms.shape[-1]))


def _in_float64(like: Tensor, segments: _Segments, values: list[Tensor], masses: list[Tensor]) -> SquaredNorm:
    value, mass = (_stacked(numbers, like, segments) for numbers in (values, masses))
    distance = _SECOND_ORDER * (like.shape[-2] + like.shape[-1]) * _FLOAT64 * mass
    relative = 2.0**-40  # of a sum of squares: enough for 8,000 terms in a row, far fewer than PyTorch's pairwise sums
    return SquaredNorm(value, relative * value + distance * (2 * value.sqrt() + distance), mass)


def _stacked(numbers: list[Tensor], like: Tensor, segments: _Segments) -> Tensor:
    stacked = torch.stack(numbers) if numbers else torch.zeros(0, dtype=torch.float64, device=like.device)
    return segments.checked(stacked)


# --- Kernels ---------------------------------------------------------------------------------------------------------


class _Segments(NamedTuple):
    """What the kernels are told of the examples: B or n of them, T positions in a row, and where segments lie."""

    examples: int
    length: int
    longest: int
    boundaries: Tensor | None
    valid: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, cu_seq_lens: Tensor | None, longest: int | None = None) -> _Segments:
        if cu_seq_lens is None:
            return cls(tensor.shape[0], tensor.shape[1], tensor.shape[1], None, None)
        length = tensor.shape[0]
        longest = length if longest is None else longest
        lengths = cu_seq_lens.diff()
        valid = ((lengths >= 0) & (lengths <= longest)).all() & (cu_seq_lens[0] == 0) & (cu_seq_lens[-1] == length)
        return cls(len(lengths), length, longest, cu_seq_lens.clamp(0, length).contiguous(), valid)

    @property
    def segmented(self) -> bool:
        return self.boundaries is not None

    def programs(self, block: int, *, square: bool) -> tuple[int, Tensor | None]:
        """(programs enough for all pairs of blocks in every segment, those of the segments up to each one [n]).

        A segment of m + 1 blocks has m blocks' worth of positions and more, so all m together are at most T / block.
        """
        assert self.boundaries is not None
        blocks = (self.boundaries.diff() + (block - 1)).clamp_min(0) // block
        pairs = blocks * blocks if square else blocks * (blocks + 1) // 2
        whole = self.length // block
        largest = max(1, min(whole, _blocks(self.longest, block)))
        most = whole * (largest + 2) if square else whole * (largest + 1) // 2 + whole
        programs = most + self.examples
        # Boundaries that are no good would lead beyond the programs' results.
        return programs, pairs.cumsum(0).clamp(max=programs).int()

    def checked(self, out: Tensor) -> Tensor:
        return out if self.valid is None else out.masked_fill(~self.valid, torch.nan)


def _gram(left: Tensor, right: Tensor, segments: _Segments, coefficients: _Coefficients) -> SquaredNorm:
    from . import norm_kernels

    left, right = _dense(left), _dense(right)
    half = _wider(left, right) in _HALVES
    tile = _tile_for("gram", half, left, right)
    blocks = _blocks(segments.length, tile.block_m)
    tiles = blocks * (blocks + 1) // 2
    programs, ends = segments.examples * tiles, None
    if segments.segmented:
        programs, ends = segments.programs(tile.block_m, square=False)
    partial, mass = _new(left, programs, torch.float64), _new(left, left.shape[:-1].numel())
    if programs:
        norm_kernels.gram_kernel[(programs,)](
            left, right, partial, mass, segments.boundaries, ends, *_strides(left), *_strides(right),
            segments.examples, segments.length, tiles, left.shape[-1], right.shape[-1],
            SEGMENTED=segments.segmented, SEARCH=SEARCH, BLOCK=tile.block_m,
            CHUNK_LEFT=NORM_CHUNK[left.dtype in _HALVES], CHUNK_RIGHT=NORM_CHUNK[right.dtype in _HALVES],
            UPCAST_LEFT=_upcast(left), UPCAST_RIGHT=_upcast(right), **_launch(tile),
        )  # fmt: skip
    return _finish(partial, mass, segments, ends, tiles, coefficients)


def _tile(left: Tensor, right: Tensor, segments: _Segments, coefficients: _Coefficients) -> SquaredNorm:
    from . import norm_kernels

    if left.shape[-1] < right.shape[-1]:
        left, right = right, left
    left, right = _dense(left), _dense(right)
    half = _wider(left, right) in _HALVES
    tile = _tile_for("tile", half, left, right)
    tiles = _blocks(left.shape[-1], tile.block_m) * _blocks(right.shape[-1], tile.block_n)
    partial = _new(left, segments.examples * tiles, torch.float64)
    if len(partial):
        norm_kernels.tile_kernel[(len(partial),)](
            left, right, partial, segments.boundaries, *_strides(left), *_strides(right),
            segments.length, left.shape[-1], right.shape[-1],
            SEGMENTED=segments.segmented, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            CHUNK=NORM_CHUNK[half], UPCAST=_upcast(left) or _upcast(right), **_launch(tile),
        )  # fmt: skip
    return _finish(partial, _mass(left, right), segments, None, tiles, coefficients)


def _lookup(index: Tensor, grad: Tensor, cu_seq_lens: Tensor | None, coefficients: _Coefficients) -> SquaredNorm:
    from . import norm_kernels

    segments = _Segments.of(grad, cu_seq_lens)
    index, grad = index.long(), _dense(grad)
    if segments.boundaries is not None:
        positions = torch.arange(segments.length, device=index.device)
        index = index + (torch.searchsorted(segments.boundaries[1:], positions, right=True) << 40)
    key, order = torch.sort(index, dim=-1, stable=True)
    half = grad.dtype in _HALVES
    tile = _tile_for("lookup", half, grad)
    tiles = _blocks(grad.shape[-1], tile.block_n)
    partial = _new(grad, segments.examples * tiles, torch.float64)
    if len(partial):
        norm_kernels.lookup_kernel[(len(partial),)](
            key.contiguous(), order.contiguous(), grad, partial, segments.boundaries, *_strides(grad),
            segments.length, grad.shape[-1],
            SEGMENTED=segments.segmented, BLOCK_N=tile.block_n, CHUNK=tile.block_m, UPCAST=_upcast(grad),
            **_launch(tile),
        )  # fmt: skip
    return _finish(partial, _mass(grad, None), segments, None, tiles, coefficients)


def _cross(left: Tensor, right: Tensor, index: Tensor, grad: Tensor, segments: _Segments) -> Tensor:
    """[B] float64, the inner product of the two gradients."""
    from . import norm_kernels

    length = grad.shape[-2]
    left, right, index, grad = _dense(left), _dense(right), index.long().contiguous(), _dense(grad)
    half = _wider(right, grad) in _HALVES
    tile = _tile_for("cross", half, right, grad)
    tiles = _blocks(segments.length, tile.block_m) * _blocks(length, tile.block_m)
    programs, ends = segments.examples * tiles, None
    if segments.segmented:
        programs, ends = segments.programs(tile.block_m, square=True)
    partial = _new(grad, programs, torch.float64)
    if programs:
        norm_kernels.cross_kernel[(programs,)](
            left, right, index, grad, partial, segments.boundaries, ends,
            *_strides(left), *_strides(right), *_strides(grad),
            segments.examples, segments.length, length, tiles, left.shape[-1], right.shape[-1],
            SEGMENTED=segments.segmented, SEARCH=SEARCH, BLOCK=tile.block_m, CHUNK=NORM_CHUNK[half],
            UPCAST=_upcast(right) or _upcast(grad), **_launch(tile),
        )  # fmt: skip
    return _finish(partial, None, segments, ends, tiles, _Coefficients()).value


def _mass(left: Tensor, right: Tensor | None) -> Tensor:
    """float32 [B * T], |left_t| |right_t| of every position."""
    from . import norm_kernels

    batch, length = (1, *left.shape[:-1])[-2:]
    mass = _new(left, batch * length)
    if len(mass):
        norm_kernels.mass_kernel[(batch * _blocks(length, MASS_BLOCK),)](
            left, right, mass, *_strides(left), *((0, 0) if right is None else _strides(right)),
            length, left.shape[-1], 0 if right is None else right.shape[-1],
            PAIRED=right is not None, BLOCK=MASS_BLOCK, WIDTH=MASS_WIDTH,
        )  # fmt: skip
    return mass


def _finish(
    partial: Tensor,
    mass: Tensor | None,
    segments: _Segments,
    ends: Tensor | None,
    tiles: int,
    coefficients: _Coefficients,
) -> SquaredNorm:
    from . import norm_kernels

    out = torch.empty(3, segments.examples, dtype=torch.float64, device=partial.device)
    if segments.examples:
        norm_kernels.finish_kernel[(segments.examples,)](
            partial, mass, out, segments.boundaries, ends, segments.examples, segments.length, tiles, *coefficients,
            SEGMENTED=segments.segmented, RAGGED=ends is not None, HAS_MASS=mass is not None,
            BLOCK=FINISH_BLOCK,
        )  # fmt: skip
    return SquaredNorm(*segments.checked(out))


def _position_sums(
    grad: Tensor, x: Tensor | None, eps: float, centered: bool, cu_seq_lens: Tensor | None
) -> PositionSums:
    from . import norm_kernels

    segments, columns = _Segments.of(grad, cu_seq_lens), grad.shape[-1]
    grad = _dense(grad)
    bias = torch.empty(segments.examples, columns, dtype=torch.float64, device=grad.device)
    weight = moments = None
    positions = grad.shape[:-1].numel()
    if x is not None:
        x = _dense(x)
        weight = torch.empty_like(bias)
        moments = _new(grad, 2 * positions)
        if positions:
            batch, length = (1, *grad.shape[:-1])[-2:]
            norm_kernels.moments_kernel[(batch * _blocks(length, MASS_BLOCK),)](
                x, moments, *_strides(x), positions, length, columns, eps,
                CENTERED=centered, BLOCK=MASS_BLOCK, WIDTH=MASS_WIDTH,
            )  # fmt: skip
    if bias.numel():
        norm_kernels.position_sums_kernel[(segments.examples * _blocks(columns, SUMS_WIDTH),)](
            grad, x, moments, segments.boundaries, weight, bias,
            *_strides(grad), *((0, 0) if x is None else _strides(x)), positions, segments.length, columns,
            NORMALISED=x is not None, SEGMENTED=segments.segmented, BLOCK=SUMS_BLOCK, WIDTH=SUMS_WIDTH,
        )  # fmt: skip
    return PositionSums(None if weight is None else segments.checked(weight), segments.checked(bias))


def _new(like: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)


def _dense(tensor: Tensor) -> Tensor:
    """Features must be contiguous, and offsets within a block fit into 32 bits; else the tensor is copied."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) < 2**23 else tensor.contiguous()


def _strides(tensor: Tensor) -> tuple[int, int]:
    return (0, *tensor.stride()[:-1])[-2:]


def _upcast(tensor: Tensor) -> bool:
    """Triton's interpreter multiplies the bits of bfloat16 as integers."""
    from .tile_math import INTERPRETED

    return INTERPRETED and tensor.dtype == torch.bfloat16


def _tile_for(kernel: str, half: bool, *tensors: Tensor) -> Tile:
    from .flash import architecture

    aligned = not any(size % 16 for tensor in tensors for size in (tensor.shape[-1], *_strides(tensor)))
    return norm_tile(architecture(tensors[0].device), kernel, half, tensors[-1].shape[-1], aligned)


def _launch(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}
