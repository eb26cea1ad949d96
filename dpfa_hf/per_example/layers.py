"""One rule per layer type: what a layer's inputs and output gradients say about its per-example gradients.

A rule turns one call of a layer, after the backward pass, into the per-example gradients of that layer's own
parameters, in factored form. It never decides about norms or clipping: `Outer`, `Lookup` and `Dense` know how to take
their norm and their weighted sum, and `combined_squared_norm` knows what happens when several layers, or several calls
of one layer, share a parameter (the cross term of rule P12).

Add a layer type with one function::

    @register_rule(MyLinear)
    def my_linear(call):
        return {"weight": Outer(call.grad_rows, call.rows(call.inputs[0]))}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap

from dpfa_hf._kernel import lookup_squared_norm, outer_squared_norm, position_sums, tied_squared_norm
from dpfa_hf._kernel.norms import SquaredNorm, fused
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.packing import Segments
from dpfa_hf.per_example.shards import whole

# Elements of the largest temporary of a norm: 4 MB in float32, which a CPU's cache holds and its allocator gives again.
_MAX_TEMPORARY = 2**20
# Terms that one float32 product adds up; longer sums are made of several, because their error grows with their length.
_MAX_TERMS = 256
# Tokens that one product of the Gram form has on its left, so that little more than a triangle is computed.
_GRAM_ROWS = 64
# Layers of which no row is long enough for the Gram form to be worth it: half the harmonic mean of their sides.
_ALWAYS_TILES = 64
# Positions of a vector's gradient that are added up in float32.
_GROUP = 16
# Of gradients that are written out, over what they are made of, which is dropped then.
MORE_MEMORY = 1.25
# A matrix so many times as tall as wide is summed as its transpose: BLAS is several times faster so (LoRA's B).
_NARROW = 16


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64 tensors, else float32: norms and sums are never taken in half precision (P14)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _rounding(terms: float, dtype: torch.dtype) -> float:
    """n u / (1 - n u): the error of a sum of n products, relative to the sum of their sizes, in whatever order it was
    taken (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1)."""
    return float(_share(torch.tensor(terms * torch.finfo(dtype).eps / 2, dtype=torch.float64)))


def _share(rounding: torch.Tensor) -> torch.Tensor:
    """x / (1 - x); infinite where that bound says nothing."""
    return torch.where(rounding < 0.5, rounding / (1 - rounding), torch.inf)


def sum_positions(rows: torch.Tensor, segments: Segments | None = None) -> Dense:
    """The gradients of a vector that takes part at every position, from its terms [B, T, features], or [N, features] of
    packed tokens: added up a few at a time in float32, and what they give in float64."""
    if fused(rows):
        return Dense(position_sums(rows, cu_seq_lens=None if segments is None else segments.boundaries).bias)
    mass = _add_positions(torch.linalg.vector_norm(rows, dim=-1, dtype=compute_dtype(rows)), segments)
    if segments is None:
        return Dense(_sum_rows(rows), mass)
    if rows.device.type == "cpu":
        return Dense(torch.stack([_sum_rows(example) for example in segments.slices(rows)]), mass)
    total = torch.zeros(segments.count, rows.shape[1], dtype=torch.float64, device=rows.device)
    return Dense(total.index_add_(0, segments.owner, rows.double()), mass)


def _sum_rows(rows: torch.Tensor) -> torch.Tensor:
    """[..., T, features] -> [..., features] float64. PyTorch converts and adds far slower than it does either."""
    length, dtype = rows.shape[-2], compute_dtype(rows)
    groups = rows[..., : length // _GROUP * _GROUP, :].unflatten(-2, (length // _GROUP, _GROUP))
    rest = rows[..., length // _GROUP * _GROUP :, :]
    return groups.sum(-2, dtype=dtype).double().sum(-2) + rest.sum(-2, dtype=dtype).double()


@dataclass
class Outer:
    """Per-example gradients of a matrix as sums of outer products: gradient_i = left_i^T right_i.

    Args:
        left: [B, T, rows], float of any precision; or the tokens of packed examples, [N, rows].
        right: [B, T, columns], or [N, columns].
        segments: where the examples lie among the tokens, if they are packed.
    """

    left: torch.Tensor
    right: torch.Tensor
    segments: Segments | None = None

    @cached_property
    def mass(self) -> torch.Tensor:
        """[B] float64, sum over t of |left_t| |right_t|: what rounding errors of the sum are proportional to."""
        if fused(self.left, self.right):
            return self._fused.mass
        row, column = self._lengths
        return _add_positions(row * column, self.segments)

    @cached_property
    def _lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T], or [N] of packed examples, each: |left_t| and |right_t|."""
        dtype = compute_dtype(self.left)
        row = torch.linalg.vector_norm(self.left, dim=-1, dtype=dtype)
        return row, torch.linalg.vector_norm(self.right, dim=-1, dtype=dtype)

    def squared_norm(self) -> torch.Tensor:
        """[B] float64: through the T x T Gram matrices or through tiles of the gradient, whichever costs less.

        Guarantee:
            Never below the squared norm of what `left` and `right` hold by more than float64's rounding: the worst
            error of the products is added to what they give (P14). What is added depends on the example alone, not on
            the form, which the longest row of a batch decides: or else a newcomer would shorten its neighbours.
        """
        if fused(self.left, self.right):
            return self._fused.value + self._fused.error
        rows, columns = self.left.shape[-1], self.right.shape[-1]
        out = self.left.new_empty(self._count, dtype=torch.float64)
        for examples, left, right in self._blocks():
            if _by_gram(left.shape[1], rows, columns):
                out[examples] = _gram(left, right)
            else:
                out[examples] = _tiled(left, right)
        return out + self._worst_error(out)

    def _worst_error(self, value: torch.Tensor) -> torch.Tensor:
        """[B] float64: how far the squared norms may be above `value`, whichever form has computed it.

        By Cauchy and Schwarz the gradient is off by the rounding of sums over positions times the mass, and a sum of
        products of inner products by the rounding of both times mass^2. Positions of zeros, such as padding, round
        nothing. Masses and other sums of positive terms are right to 1 part in 8. What is too small for a normal number
        is lost whole.
        """
        rows, columns, dtype = self.left.shape[-1], self.right.shape[-1], compute_dtype(self.left)
        row, column = self._lengths
        positions = _add_positions((row * column != 0).to(dtype), self.segments)
        tiny, unit = torch.finfo(dtype).tiny, torch.finfo(dtype).eps / 2
        depth = positions.clamp_max(_MAX_TERMS) + (positions / _MAX_TERMS).ceil()
        distance = 1.125 * _share(depth * unit) * self.mass + (rows * columns * tiny) ** 0.5
        norm = value.sqrt() * (1 + _rounding(max(rows, columns) / 2 + 2, dtype)) + distance
        error = norm.square() - value
        if _may_be_gram(rows, columns):
            left, right = (1.125 * _rounding(_gram_depth(width), dtype) for width in (rows, columns))
            error += (left + right + left * right) * self.mass.square()
            largest = _add_positions(row.double().square() + column.double().square(), self.segments).nan_to_num()
            error += tiny * positions.square() * (rows + columns + 1) * (1 + largest)
        return error

    def add_weighted_sum(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out += sum_i weights_i gradient_i; weights [B], out [rows, columns] float32 or float64."""
        scale = _token_weights(weights, self.left, self.segments).to(out.dtype)
        left, right = self.left.flatten(0, -2).to(out.dtype), self.right.flatten(0, -2).to(out.dtype)
        if left.shape[1] < right.shape[1]:
            left = left * scale
        else:
            right = right * scale
        if left.shape[1] > _NARROW * right.shape[1]:
            out.add_((right.t() @ left).t())
        else:
            out.addmm_(left.t(), right)

    @property
    def narrow(self) -> bool:
        """Whether the gradients are at most 64 / T times as large as what they are made of; the same for every T, or
        else the longest row would decide how its neighbours' norms round."""
        return not _may_be_gram(self.left.shape[-1], self.right.shape[-1]) and not fused(self.left, self.right)

    @property
    def long(self) -> bool:
        """Whether the gradients, written out, take about as little memory as what they are made of. Then that costs
        less than any form of the norm, because their sum is no product any more."""
        size = compute_dtype(self.left).itemsize * self._count * self.left.shape[-1] * self.right.shape[-1]
        made_of = self.left.nbytes + self.right.nbytes
        return size <= MORE_MEMORY * made_of and not fused(self.left, self.right)

    def written_out(self) -> Dense:
        """The same gradients, multiplied out in float32; their norm is then that of the very numbers that are added."""
        dtype = compute_dtype(self.left)
        grads = self.left.new_empty(self._count, self.left.shape[-1], self.right.shape[-1], dtype=dtype)
        for examples, left, right in self._blocks():
            torch.bmm(left.to(dtype).transpose(1, 2), right.to(dtype), out=grads[examples])
        return Dense(grads, self.mass)

    def add_one_by_one(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """As `add_weighted_sum`, with every example's product formed by itself before it is added."""
        for i, weight in enumerate(weights):
            left, right = self.tokens(i)
            out.add_((left.t() * weight) @ right)

    def zero_rows(self, keep: torch.Tensor) -> Outer:
        """The same with examples outside `keep` ([B] bool) set to zero, so that 0 * inf cannot make NaN (P15)."""
        drop = ~_by_token(keep, self.left, self.segments)
        return Outer(self.left.masked_fill(drop, 0), self.right.masked_fill(drop, 0), self.segments)

    def double(self) -> Outer:
        """The same in float64, so that norms and sums are taken in it."""
        return Outer(self.left.double(), self.right.double(), self.segments)

    def padded(self) -> Outer:
        """The same with every example in a row of its own, [B, longest, ...]."""
        if self.segments is None:
            return self
        return Outer(self.segments.unpack(self.left, 0), self.segments.unpack(self.right, 0))

    def example(self, i: int) -> torch.Tensor:
        """[rows, columns] float64, the gradient of example i."""
        left, right = self.tokens(i)
        return left.double().t() @ right.double()

    def tokens(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """left and right of example i, [T, rows] and [T, columns]."""
        if self.segments is None:
            return self.left[i], self.right[i]
        return self.segments.slices(self.left)[i], self.segments.slices(self.right)[i]

    @property
    def positions(self) -> int:
        """T, or the length of the longest packed example: the most terms that a coordinate adds up."""
        return self.left.shape[1] if self.segments is None else self.segments.longest

    @cached_property
    def _fused(self) -> SquaredNorm:
        return outer_squared_norm(self.left, self.right, **_boundaries(self.segments))

    @property
    def _count(self) -> int:
        return len(self.left) if self.segments is None else self.segments.count

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Views [b, t, ...] of as many examples as keep their temporaries small; of packed ones, one each."""
        if self.segments is not None:
            pairs = zip(self.segments.slices(self.left), self.segments.slices(self.right), strict=True)
            for i, (left, right) in enumerate(pairs):
                yield slice(i, i + 1), left[None], right[None]
            return
        batch, length, rows = self.left.shape
        converted = any(side.dtype != compute_dtype(side) for side in (self.left, self.right))
        widest = max(_GRAM_ROWS, rows, self.right.shape[2]) if converted else _GRAM_ROWS
        step = max(1, _MAX_TEMPORARY // max(length * widest, 1))
        for start in range(0, batch, step):
            block = slice(start, start + step)
            yield block, self.left[block], self.right[block]


def _by_gram(length: int, rows: int, columns: int) -> bool:
    """Whether Gram matrices of so many positions cost less than the gradient."""
    tokens = (length + min(length, _GRAM_ROWS)) / 2  # columns of the triangle that is computed, per row
    return _may_be_gram(rows, columns) and tokens * (rows + columns) < rows * columns


def _may_be_gram(rows: int, columns: int) -> bool:
    return rows * columns >= _ALWAYS_TILES * (rows + columns)


def _gram(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B] float64: sum over s, t of (left_s . left_t) (right_s . right_t), as computed, but never negative."""
    length, dtype = left.shape[1], compute_dtype(left)
    left, right = left.to(dtype), right.to(dtype)
    value = left.new_zeros(len(left), dtype=torch.float64)
    for start in range(0, length, _GRAM_ROWS):
        end = min(start + _GRAM_ROWS, length)
        products = _products(left, start, end).mul_(_products(right, start, end)).sum(1, dtype=torch.float64)
        products[:, :start] *= 2
        value += products.sum(1)
    return value.clamp_min_(0)


def _gram_depth(width: int) -> float:
    """Roundings that a term of an inner product goes through, and one for the product of two of them."""
    return min(width, _MAX_TERMS) + -(-width // _MAX_TERMS) + 1


def _products(rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """[B, end - start, end]: inner products of rows start..end with all rows up to end."""
    some, others = rows[:, start:end], rows[:, :end].transpose(1, 2)
    out = torch.bmm(some[..., :_MAX_TERMS], others[:, :_MAX_TERMS])
    for k in range(_MAX_TERMS, rows.shape[2], _MAX_TERMS):
        out.baddbmm_(some[..., k : k + _MAX_TERMS], others[:, k : k + _MAX_TERMS])
    return out


def _tiled(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B] float64: the squared norm of the gradient, tile by tile, as computed."""
    if left.shape[2] > right.shape[2]:
        # The transpose has the same norm, and BLAS is several times faster with the narrow side first.
        left, right = right, left
    batch, length, rows = left.shape
    columns, dtype = right.shape[2], compute_dtype(left)
    out = left.new_zeros(batch, dtype=torch.float64)
    examples = max(1, min(batch, _MAX_TEMPORARY // max(rows * columns, 1)))
    tile = max(1, min(rows, _MAX_TEMPORARY // max(columns, 1)))
    buffer = left.new_empty(examples, tile, columns, dtype=dtype)
    for first in range(0, batch, examples):
        one, other = left[first : first + examples].to(dtype), right[first : first + examples].to(dtype)
        for row in range(0, rows, tile):
            part = one[:, :, row : row + tile].transpose(1, 2)
            gradient = buffer[: len(part), : part.shape[1]]
            torch.bmm(part[..., :_MAX_TERMS], other[:, :_MAX_TERMS], out=gradient)
            for t in range(_MAX_TERMS, length, _MAX_TERMS):
                gradient.baddbmm_(part[..., t : t + _MAX_TERMS], other[:, t : t + _MAX_TERMS])
            norms = torch.linalg.vector_norm(gradient, dim=2)
            out[first : first + examples] += norms.double().square_().sum(1)
    return out


def _add_positions(values: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """[B, T], or [N] of packed examples, -> [B] float64."""
    if segments is None:
        return values.sum(1, dtype=torch.float64)
    total = torch.zeros(segments.count, dtype=torch.float64, device=values.device)
    return total.index_add_(0, segments.owner, values.double())


def _by_token(values: torch.Tensor, tokens: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """[B] -> [B, 1, 1], or [N, 1] of packed examples: one value for each of the tokens' examples."""
    return values[:, None, None] if segments is None else values[segments.owner][:, None]


def _token_weights(weights: torch.Tensor, tokens: torch.Tensor, segments: Segments | None) -> torch.Tensor:
    """[B] -> [tokens, 1]."""
    if segments is None:
        weights = weights[:, None].expand(tokens.shape[:2]).flatten()
        return weights[:, None]
    return weights[segments.owner][:, None]


@dataclass
class Lookup:
    """Per-example gradients of a table of which rows were read: gradient_i[v] = sum of grad_t over t with index_t = v.

    Args:
        index: [B, T] int64; or that of packed examples, [N].
        grad: [B, T, columns], float of any precision; or [N, columns].
        num_rows: rows of the table.
        segments: where the examples lie among the tokens, if they are packed.
        transposed: whether the parameter is the table's transpose, [columns, num_rows].
    """

    index: torch.Tensor
    grad: torch.Tensor
    num_rows: int
    segments: Segments | None = None
    transposed: bool = False

    @cached_property
    def mass(self) -> torch.Tensor:
        """[B] float64, sum over t of |grad_t|."""
        if fused(self.grad):
            return self._fused.mass
        norms = torch.linalg.vector_norm(self.grad, dim=-1, dtype=compute_dtype(self.grad))
        return _add_positions(norms, self.segments)

    def squared_norm(self) -> torch.Tensor:
        """[B] float64; repeated indices of an example are added up, in float64, before squaring."""
        if fused(self.grad):
            return self._fused.value + self._fused.error
        device, columns = self.grad.device, self.grad.shape[-1]
        if self.segments is None:
            count = len(self.grad)
            example = torch.arange(count, device=device)[:, None].expand(self.index.shape).flatten()
        else:
            count, example = self.segments.count, self.segments.owner
        key, slot = torch.unique(example * self.num_rows + self.index.flatten(), return_inverse=True)
        squared = torch.zeros(len(key), dtype=torch.float64, device=device)
        grad = self.grad.reshape(-1, columns)
        step = max(1, _MAX_TEMPORARY // 2 // max(len(key), 1))
        for start in range(0, columns, step):
            part = grad[:, start : start + step].double()
            summed = torch.zeros(len(key), part.shape[1], dtype=torch.float64, device=device)
            squared += summed.index_add_(0, slot, part).square_().sum(1)
        out = torch.zeros(count, dtype=torch.float64, device=device)
        return out.index_add_(0, key // self.num_rows, squared)

    def add_weighted_sum(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """out[index] += weights_i grad; weights [B], out the parameter's shape."""
        out = out.t() if self.transposed else out
        grad = self.grad.flatten(0, -2).to(out.dtype) * _token_weights(weights, self.grad, self.segments).to(out.dtype)
        out.index_add_(0, self.index.flatten(), grad)

    def add_one_by_one(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """As `add_weighted_sum`, with every example's repeated indices added up before anything is added to `out`."""
        out = out.t() if self.transposed else out
        for i, weight in enumerate(weights):
            index, grad = self.tokens(i)
            rows, slot = torch.unique(index, return_inverse=True)
            summed = torch.zeros(len(rows), grad.shape[1], dtype=out.dtype, device=out.device)
            out.index_add_(0, rows, summed.index_add_(0, slot, grad * weight))

    @property
    def positions(self) -> int:
        """T, or the length of the longest packed example: the most terms that a coordinate adds up."""
        return self.index.shape[1] if self.segments is None else self.segments.longest

    @cached_property
    def _fused(self) -> SquaredNorm:
        boundaries = None if self.segments is None else self.segments.boundaries
        return lookup_squared_norm(self.index, self.grad, cu_seq_lens=boundaries)

    def zero_rows(self, keep: torch.Tensor) -> Lookup:
        drop = ~_by_token(keep, self.grad, self.segments)
        return replace(self, grad=self.grad.masked_fill(drop, 0))

    def double(self) -> Lookup:
        return replace(self, grad=self.grad.double())

    def padded(self) -> Lookup:
        """The same with every example in a row of its own, [B, longest, ...]."""
        if self.segments is None:
            return self
        index, grad = self.segments.unpack(self.index, 0), self.segments.unpack(self.grad, 0)
        return replace(self, index=index, grad=grad, segments=None)

    def example(self, i: int) -> torch.Tensor:
        out = torch.zeros(self.num_rows, self.grad.shape[-1], dtype=torch.float64, device=self.grad.device)
        index, grad = self.tokens(i)
        out.index_add_(0, index, grad.double())
        return out.t() if self.transposed else out

    def tokens(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """index and grad of example i, [T] and [T, columns]."""
        if self.segments is None:
            return self.index[i], self.grad[i]
        return self.segments.slices(self.index)[i], self.segments.slices(self.grad)[i]


@dataclass
class Dense:
    """Per-example gradients written out, for parameters so small (biases, norms) that this costs nothing, and for
    matrices whose gradients are about as small as what they are made of.

    Args:
        grads: [B, *parameter shape]. The norm is that of these very numbers, which are added.
        mass_of_terms: [B] float64, what the rounding errors of the sum over positions are proportional to; by default,
            as of a sum in float64, the norm.
        margin: [B] float64, what is added to the squared norm beyond that.
    """

    grads: torch.Tensor
    mass_of_terms: torch.Tensor | None = None
    margin: torch.Tensor | None = None
    positions = 1

    @property
    def mass(self) -> torch.Tensor:
        """[B] float64, `mass_of_terms`."""
        return self.squared_norm().sqrt() if self.mass_of_terms is None else self.mass_of_terms

    def squared_norm(self) -> torch.Tensor:
        return self._squares if self.margin is None else self._squares + self.margin

    @cached_property
    def _squares(self) -> torch.Tensor:
        grads, out = self.grads.flatten(1), self.grads.new_zeros(len(self.grads), dtype=torch.float64)
        step = max(1, _MAX_TEMPORARY // 2 // max(len(grads), 1))
        for start in range(0, grads.shape[1], step):
            out += grads[:, start : start + step].double().square().sum(1)
        return out

    def add_weighted_sum(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        grads = self.grads.flatten(1)
        if grads.dtype == out.dtype and out.is_contiguous():
            out.view(1, -1).addmm_(weights.to(out.dtype)[None], grads)
        else:
            out.add_((weights.double() @ grads.double()).view(out.shape).to(out.dtype))

    def add_one_by_one(self, weights: torch.Tensor, out: torch.Tensor) -> None:
        """As `add_weighted_sum`, with every example's gradient multiplied by itself before it is added."""
        for grad, weight in zip(self.grads, weights, strict=True):
            out.add_((grad * weight).view_as(out))

    def zero_rows(self, keep: torch.Tensor) -> Dense:
        return Dense(self.grads.flatten(1).masked_fill(~keep[:, None], 0).view_as(self.grads))

    def double(self) -> Dense:
        return Dense(self.grads.double())

    def example(self, i: int) -> torch.Tensor:
        return self.grads[i].double()


PerExampleGradient = Outer | Lookup | Dense


def combined_squared_norm(uses: Sequence[PerExampleGradient]) -> torch.Tensor:
    """[B] float64, the squared norm of the *sum* of a parameter's per-example gradients over all its uses.

    Guarantee:
        A tied weight, or a layer called twice, is counted with the cross term: |a + b|^2, never |a|^2 + |b|^2 (P12).
    """
    uses = merge_uses(uses)
    if len(uses) == 1:
        return uses[0].squared_norm()
    outer = [use for use in uses if isinstance(use, Outer)]
    lookup = [use for use in uses if isinstance(use, Lookup)]
    if len(outer) == len(lookup) == 1 and len(uses) == 2 and not lookup[0].transposed:
        if fused(outer[0].left, outer[0].right, lookup[0].grad):
            return _tied_squared_norm(outer[0], lookup[0])
        cross = _outer_lookup_product(outer[0], lookup[0])
        return (outer[0].squared_norm() + lookup[0].squared_norm() + 2 * cross).clamp_min_(0)
    examples = range(uses[0].mass.shape[0])
    return torch.stack([sum((use.example(i) for use in uses[1:]), uses[0].example(i)).square().sum() for i in examples])


def write_out(uses: list[PerExampleGradient]) -> list[PerExampleGradient]:
    """A parameter's uses, written out where its matrix is narrow or its rows are long; others as they are.

    Guarantee:
        What long rows have added to their squared norm is what `Outer.squared_norm` adds, because neighbours can make a
        row long, and would shorten or stretch it otherwise (P14).
    """
    outer = [use for use in uses if isinstance(use, Outer)]
    if len(outer) == len(uses) and all(use.narrow for use in outer):
        return [use.written_out() for use in outer]
    lookup = [use for use in uses if isinstance(use, Lookup) and not use.transposed]
    if len(outer) != 1 or len(outer) + len(lookup) != len(uses) or not outer[0].long:
        return uses
    written = outer[0].written_out()
    margin = outer[0]._worst_error(written.squared_norm())
    for use in lookup:
        for i, total in enumerate(written.grads):
            index, grad = use.tokens(i)
            total.index_add_(0, index, grad.to(total.dtype))
    return [Dense(written.grads, sum((use.mass for use in lookup), written.mass), margin)]


def add_weighted_sums(
    uses: Sequence[PerExampleGradient], weights: torch.Tensor, out: torch.Tensor, *, one_by_one: bool = False
) -> None:
    """out += sum_i weights_i gradient_i, over all uses of a parameter.

    Args:
        uses: the parameter's per-example gradients.
        weights: [B].
        out: the parameter's shape, float32 or float64.
        one_by_one: form each example's share by itself, in float64, and merge uses of one kind first, so that `out`
            goes through at most three additions an example (`dpfa_hf.rounding`). Takes memory for another `out`.
    """
    if one_by_one:
        uses = merge_uses([use.double() for use in uses])
    for use in uses:
        view = out.view(len(out), -1) if isinstance(use, Outer) else out
        (use.add_one_by_one if one_by_one else use.add_weighted_sum)(weights, view)


def merge_uses(uses: Sequence[PerExampleGradient]) -> list[PerExampleGradient]:
    """Uses of one kind become one use over the concatenated positions: the gradients add up, exactly."""
    outer = [use for use in uses if isinstance(use, Outer)]
    lookup = [use for use in uses if isinstance(use, Lookup)]
    dense = [use for use in uses if isinstance(use, Dense)]
    if len(outer) > 1:
        outer = [use.padded() for use in outer]
        outer = [Outer(torch.cat([use.left for use in outer], 1), torch.cat([use.right for use in outer], 1))]
    if len(lookup) > 1:
        lookup = [use.padded() for use in lookup]
        index = torch.cat([use.index for use in lookup], 1)
        lookup = [replace(lookup[0], index=index, grad=torch.cat([use.grad for use in lookup], 1))]
    if len(dense) > 1:
        dense = [Dense(sum((use.grads for use in dense[1:]), dense[0].grads))]
    return [*outer, *lookup, *dense]


def _tied_squared_norm(outer: Outer, lookup: Lookup) -> torch.Tensor:
    """[B] float64, never below the squared norm of the sum of both."""
    if outer.segments is not lookup.segments:
        outer, lookup = outer.padded(), lookup.padded()
    boundaries = _boundaries(outer.segments)
    found = tied_squared_norm(outer.left, outer.right, lookup.index, lookup.grad, **boundaries)
    return found.value + found.error


def _boundaries(segments: Segments | None) -> dict[str, Any]:
    """How the kernels are told of packed examples."""
    return {} if segments is None else {"cu_seq_lens": segments.boundaries, "longest": segments.longest}


def _outer_lookup_product(outer: Outer, lookup: Lookup) -> torch.Tensor:
    """[B] float64, the inner product of the two gradients: a tied language-model head against its embedding."""
    products = []
    for i in range(len(outer.mass)):
        (left, right), (index, grad) = outer.tokens(i), lookup.tokens(i)
        inner = right.double() @ grad.double().t()
        # In two sums, because in one of T^2 terms rounding could add up to much more.
        products.append((inner * left.index_select(1, index).double()).sum(0).sum())
    return torch.stack(products)


# How a layer's output relates to the examples; found once, before step 1, then enforced.
BATCHED, FLATTENED, SHARED = "batched", "flattened", "shared"
# In a packed row the tokens of all examples lie along one dimension: [T, ...], [1, T, ...] or [1, heads, T, ...].
PACKED = tuple(f"packed along dimension {axis}" for axis in range(3))


@dataclass
class LayerCall:
    """One call of a layer during a forward pass, with the gradient that came back to its output.

    Attributes:
        module: the layer.
        inputs: its positional arguments, detached.
        kwargs: its keyword arguments, detached.
        output_grad: gradient of the summed losses with respect to its output; the shape of the output.
        batch_size: B, the number of examples in the micro-batch.
        layout: "batched" ([B, ...]), "flattened" ([B * T, ...], examples one after another) or "shared" (one value for
            all examples, such as position embeddings; the engine has expanded the output to [B, ...]) or one of
            `PACKED`.
        segments: where the examples lie, if they are packed into one row.
    """

    module: nn.Module
    inputs: tuple
    kwargs: Mapping
    output_grad: torch.Tensor
    batch_size: int
    layout: str = BATCHED
    name: str = field(default="", repr=False)
    segments: Segments | None = field(default=None, repr=False)

    def examples(self, tensor: torch.Tensor, *, is_grad: bool = False) -> torch.Tensor:
        """The tensor with the examples in its first dimension, [B, ...]; a view, an expansion or a copy, never a sum.

        Packed examples come out as long as the longest, with zeros behind the others' gradients and, elsewhere, their
        own last token over again: finite wherever the example is, and multiplied by those zeros.
        """
        if self.segments is not None:
            axis = PACKED.index(self.layout)
            tokens = tensor[0].movedim(axis - 1, 0) if axis else tensor
            return self.segments.unpack(tokens, 0 if is_grad or tensor is self.output_grad else None)
        if self.layout == SHARED and not is_grad:
            tensor = tensor if tensor.shape[0] == 1 and tensor.dim() == self.output_grad.dim() else tensor[None]
            return tensor.expand(self.batch_size, *tensor.shape[1:])
        if self.layout == FLATTENED:
            return tensor.reshape(self.batch_size, -1, *tensor.shape[1:])
        return tensor

    def rows(self, tensor: torch.Tensor, *, is_grad: bool = False) -> torch.Tensor:
        """The tensor as [B, T, features]; all positions between the examples and the features become T."""
        tensor = self.examples(tensor, is_grad=is_grad)
        return tensor.reshape(self.batch_size, -1, tensor.shape[-1])

    @property
    def packing(self) -> Segments | None:
        """Where the examples lie in `tokens`: None unless they are packed and each token has one row of features."""
        flat = self.segments is not None and self.output_grad.dim() == PACKED.index(self.layout) + 2 <= 3
        return self.segments if flat else None

    def tokens(self, tensor: torch.Tensor, *, is_grad: bool = False) -> torch.Tensor:
        """The tensor as `Outer` and `Lookup` take it beside `packing`: packed tokens [N, features] as they are, at the
        price of N tokens whatever the longest example's length, or else `rows`."""
        if self.packing is None:
            return self.rows(tensor, is_grad=is_grad)
        return tensor.reshape(-1, tensor.shape[-1])

    @property
    def grad_tokens(self) -> torch.Tensor:
        """The output's gradient as `tokens`."""
        return self.tokens(self.output_grad, is_grad=True)

    @property
    def grad_rows(self) -> torch.Tensor:
        """The output's gradient as [B, T, features]."""
        return self.rows(self.output_grad, is_grad=True)


Rule = Callable[[LayerCall], dict[str, PerExampleGradient]]
_RULES: dict[Callable | str, Rule] = {}


def register_rule(*layer_types: type[nn.Module] | str) -> Callable[[Rule], Rule]:
    """Register the rule of a layer type, as a decorator.

    The rule is chosen by the layer's own ``forward``: a subclass that changes it does not inherit the rule. A type may
    be given by its name, "package.module.Class" where its forward is defined, so that it need not be imported. A rule
    takes a `LayerCall` and returns, for each of the layer's own trainable parameters by name, an `Outer`, `Lookup` or
    `Dense`. It may assume nothing: before the first step every rule is held against autograd on synthetic rows.
    """

    def decorate(rule: Rule) -> Rule:
        for layer_type in layer_types:
            _RULES[f"{layer_type}.forward" if isinstance(layer_type, str) else layer_type.forward] = rule
        return rule

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for a layer, or None: the layer's trainable parameters must then be refused."""
    forward = type(module).forward
    rule = _RULES.get(forward) or _RULES.get(f"{forward.__module__}.{forward.__qualname__}")
    if rule is not None:
        return rule
    if isinstance(module, nn.Embedding):
        return _embedding_subclass
    name = type(module).__name__
    small = all(p.dim() == 1 for p in module.parameters(recurse=False)) and not list(module.children())
    if small and name.endswith("Norm") and not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _elementwise_norm
    if name == "Conv1D" and hasattr(module, "nf"):
        return _gpt2_conv1d
    if name in ("ViTEmbeddings", "DeiTEmbeddings"):
        return _vision_embeddings
    return None


def rule_name(rule: Rule) -> str:
    """What `dpfa check` prints for a rule."""
    return rule.__name__.strip("_").replace("_", " ")


def _bias(call: LayerCall) -> Dense:
    return sum_positions(call.grad_tokens, call.packing)


@register_rule(nn.Linear, "transformers.models.falcon.modeling_falcon.FalconLinear")
def _linear(call: LayerCall) -> dict[str, PerExampleGradient]:
    weight = Outer(call.grad_tokens, call.tokens(call.inputs[0]), call.packing)
    out: dict[str, PerExampleGradient] = {"weight": weight}
    if call.module.bias is not None:
        out["bias"] = _bias(call)
    return out


def _gpt2_conv1d(call: LayerCall) -> dict[str, PerExampleGradient]:
    return {"weight": Outer(call.tokens(call.inputs[0]), call.grad_tokens, call.packing), "bias": _bias(call)}


@register_rule(nn.Embedding)
def _embedding(call: LayerCall) -> dict[str, PerExampleGradient]:
    module = call.module
    assert isinstance(module, nn.Embedding)
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise PrivacyError(
            f"{call.name}: nn.Embedding with max_norm, scale_grad_by_freq or sparse=True has gradients that depend on "
            "other examples; build it without that option"
        )
    grad = call.grad_tokens
    index = call.inputs[0] if call.inputs else call.kwargs["input"]
    index = call.examples(index).reshape(call.batch_size, -1) if call.packing is None else index.flatten()
    if module.padding_idx is not None:
        grad = grad.masked_fill((index == module.padding_idx)[..., None], 0)
    return {"weight": Lookup(index, grad, module.num_embeddings, call.packing)}


class _Forward(nn.Module):
    """A layer without its hooks: FSDP2's would put the weights of training in the place of those that are asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layer.forward(*args, **kwargs)


def _embedding_subclass(call: LayerCall) -> dict[str, PerExampleGradient]:
    """Embeddings that compute their own indices or scale their output (BART, OPT, Whisper, Gemma).

    Which row was read, and by what it was multiplied, is asked of the layer itself: its forward is linear in the
    table, so a table whose row v holds (v, 1) answers (scale * index, scale).
    """
    module = call.module
    assert isinstance(module, nn.Embedding)
    weight = module.weight
    probe = torch.stack([torch.arange(len(weight)), torch.ones(len(weight))], 1).to(weight.device, torch.float64)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        answer = functional_call(_Forward(module), {"layer.weight": probe}, call.inputs, dict(call.kwargs))
    answer = call.rows(answer)
    scale = answer[..., 1]
    index = (answer[..., 0] / scale).round().long()
    grad = call.grad_rows
    if module.padding_idx is not None:
        grad = grad.masked_fill((index == module.padding_idx)[..., None], 0)
    return {"weight": Lookup(index, grad * scale[..., None].to(grad.dtype), module.num_embeddings)}


@register_rule("transformers.models.nemotron.modeling_nemotron.NemotronLayerNorm1P")
def _elementwise_norm(call: LayerCall) -> dict[str, PerExampleGradient]:
    """LayerNorm and every variant of RMSNorm: the layer's own forward, differentiated example by example.

    Exact for whatever the variant does with its vectors (Gemma multiplies by 1 + weight), because nothing is assumed
    about it but that it treats examples separately, which the isolation check shows.
    """
    module = call.module
    own = dict(module.named_parameters(recurse=False))
    parameters = {k: whole(p.detach()) for k, p in own.items() if p.requires_grad}
    frozen = {k: whole(p.detach()) for k, p in own.items() if not p.requires_grad}
    frozen.update(module.named_buffers(recurse=False))
    dtype = compute_dtype(call.output_grad)
    parameters = {k: p.to(dtype) for k, p in parameters.items()}
    # Packed documents token by token, because padded they would all cost what the longest does.
    packed = call.packing is not None
    x = (call.tokens(call.inputs[0]) if packed else call.examples(call.inputs[0])).to(dtype)
    grad = (call.grad_tokens if packed else call.examples(call.output_grad, is_grad=True)).to(dtype)

    def one_example(x_i: torch.Tensor, grad_i: torch.Tensor) -> dict[str, torch.Tensor]:
        def forward(p: dict[str, torch.Tensor]) -> torch.Tensor:
            tensors = {f"layer.{name}": tensor for name, tensor in {**frozen, **p}.items()}
            return functional_call(_Forward(module), tensors, (x_i[None],))[0].to(dtype)

        return vjp(forward, parameters)[1](grad_i)[0]

    with torch.autocast(x.device.type, enabled=False):
        grads = vmap(one_example)(x, grad)
    return {name: sum_positions(grad, call.packing) if packed else Dense(grad) for name, grad in grads.items()}


@register_rule(nn.LayerNorm)
def _layer_norm(call: LayerCall) -> dict[str, PerExampleGradient]:
    module = call.module
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        return _elementwise_norm(call)
    x, grad = call.tokens(call.inputs[0]), call.grad_tokens
    if fused(x, grad):
        boundaries = None if call.packing is None else call.packing.boundaries
        sums = position_sums(grad, x, eps=module.eps, cu_seq_lens=boundaries)
        found = {"weight": sums.weight, "bias": sums.bias}
        return {name: Dense(found[name]) for name, parameter in module.named_parameters(recurse=False)}
    dtype, shape, eps = compute_dtype(grad), module.normalized_shape, module.eps
    out: dict[str, PerExampleGradient] = {}
    if module.weight.requires_grad:
        product = nn.functional.layer_norm(x.to(dtype), shape, eps=eps).mul_(grad)
        out["weight"] = sum_positions(product, call.packing)
    if module.bias is not None:
        out["bias"] = _bias(call)
    return out


@register_rule(nn.Conv1d, nn.Conv2d)
def _convolution(call: LayerCall) -> dict[str, PerExampleGradient]:
    """Patch embeddings and audio stems: a convolution is a linear layer over unfolded patches."""
    module = call.module
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise PrivacyError(
            f"{call.name}: a convolution with groups, string padding or padding_mode={module.padding_mode!r} has no "
            "norm rule; freeze it or register one with dpfa_hf.register_rule"
        )
    x, grad = call.examples(call.inputs[0]), call.examples(call.output_grad, is_grad=True)
    kernel, dilation, padding, stride = module.kernel_size, module.dilation, module.padding, module.stride
    if isinstance(module, nn.Conv1d):
        x = x[:, :, None]
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        padding = (0, *padding)
    patches = nn.functional.unfold(x.to(compute_dtype(x)), kernel, dilation, padding, stride).transpose(1, 2)
    grad_rows = grad.flatten(2).transpose(1, 2)
    out: dict[str, PerExampleGradient] = {"weight": Outer(grad_rows, patches)}
    if module.bias is not None:
        out["bias"] = sum_positions(grad_rows)
    return out


def _vision_embeddings(call: LayerCall) -> dict[str, PerExampleGradient]:
    """ViT's and DeiT's own vectors: the class (and distillation) token and the positions, added to every image."""
    module = call.module
    if getattr(module, "mask_token", None) is not None and module.mask_token.requires_grad:
        raise PrivacyError(f"{call.name}.mask_token has no norm rule; freeze it (requires_grad_(False))")
    dropout = getattr(module, "dropout", None)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        raise PrivacyError(
            f"{call.name}: hidden_dropout_prob > 0 hides the gradient of cls_token and position_embeddings; set it to "
            "0 in the model's config or freeze the two parameters"
        )
    grad = call.examples(call.output_grad, is_grad=True).double()
    out: dict[str, PerExampleGradient] = {"position_embeddings": Dense(grad[:, None])}
    for position, name in enumerate(n for n in ("cls_token", "distillation_token") if hasattr(module, n)):
        out[name] = Dense(grad[:, None, position : position + 1])
    return out
