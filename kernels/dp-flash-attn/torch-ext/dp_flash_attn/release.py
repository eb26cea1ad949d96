"""Private release of attention outputs, for inference over private contexts: clip by segment and head, add noise.

Not for training (P2): noise on attention gives the weights no guarantee, since the residual stream, the MLPs, the
labels and the loss go round it.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .chacha import NORMALS_PER_BLOCK, chacha20_block, chacha20_blocks, jit, normal_pair, standard_normals, tl, triton

# Contributions are clipped this much below the clipping norm, so that no rounding takes them over it.
_MARGIN = 2.0**-20
# Within these bounds neither the clipped contributions nor the noise on its grid leave float32's normal range.
_SMALLEST, _LARGEST = 1e-15, 1e15
_GRID_BITS = 12
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

CHUNK_BLOCKS = 2**15  # of the cipher, made at a time on the CPU; about 20 MB
TILE_ELEMENTS = 2048  # of the output, summed at a time by a program of `clip_factor_kernel`
TILE_BLOCKS = 128  # of the cipher, made by a program of `clip_and_noise_kernel`


class _Mechanism(NamedTuple):
    """The mechanism's constants, each a number that float32 holds."""

    bound: float
    standard_deviation: float
    grid: float


def dp_release(
    output: Tensor,
    *,
    clipping_norm: float,
    noise_multiplier: float,
    cu_seq_lens: Tensor | None = None,
    query_mask: Tensor | None = None,
    _key_source: Callable[[int], bytes] = os.urandom,
) -> Tensor:
    """Clips attention outputs per (segment, head) to an l2 norm and adds cryptographic Gaussian noise to every element.

    A segment is a row, or one of the sequences packed into the one row. What is private is everything that went into a
    segment's outputs: its queries, keys, values and masks, or some of them, such as a context that public queries
    attend. Each call is one Gaussian mechanism with sensitivity `release_sensitivity(H, clipping_norm, ...)` and
    standard deviation noise_multiplier * clipping_norm; the noise multiplier for an accountant is their ratio,
    noise_multiplier / sqrt(H) under zero-out. Every layer and every generated token is one call more: compose them.
    CUDA and ROCm tensors take two Triton kernels where there is Triton, others are computed on the CPU.

    Args:
        output: [B, S, H, Dv], float16, bfloat16 or float32; any strides. Attention must be isolated by segment (P3).
        clipping_norm: C, bound on the l2 norm of a segment's outputs of one head, [its tokens, Dv] taken as one vector.
        noise_multiplier: sigma; the noise on every element has standard deviation sigma * C.
        cu_seq_lens: int [n + 1], boundaries of the sequences packed into the one row (B = 1), from 0. They are public.
        query_mask: bool [B, S], False where the query is padding. In padded rows it is as private as its row.
        _key_source: for tests; a key that is not fresh from the operating system is NOT PRIVATE.

    Returns:
        float32 [B, S, H, Dv], contiguous. Noise is on every element, whatever the values. Padding (False in
        `query_mask`, or behind the last boundary) and segments that hold NaN or infinity, outside padding, contribute
        zero: pure noise. So do fully masked segments: where there is noise tells nothing about lengths or emptiness.

    Raises:
        ValueError: grad mode is enabled or `output` requires a gradient; an argument that is not described above.
            Never because of a value in `output` or `query_mask` (P23).

    Guarantee:
        Let neighbours differ in one segment, with equal B, S, H, Dv and `cu_seq_lens`, which are public: under zero-out
        it contributes zero in one of them, as a segment does that may attend nothing; under replace-one it is any
        other. What the segments contribute before noise then differs by at most `release_sensitivity` in the l2 norm of
        the whole tensor, all heads together, and no other segment's contribution differs. It is attained but for a
        millionth, and holds for the very float32 numbers to which noise is added: the norm N is summed in float64,
        where squares of float32 are exact and neither overflow nor vanish, with a relative error below 2**-30 for
        segments of fewer than 2**22 tokens; elements are multiplied by min(1, b / N) in float64, b being C (1 - 2**-20)
        in float32, and rounded to float32, which adds at most 2**-24 relative (and 2**-150 absolute); so every
        (segment, head) has a norm below C (1 - 2**-21).
        Noise is from ChaCha20 under 256 fresh bits of the operating system for every call. With k = ceil(Dv / 8), the
        element [b, s, h, d] takes normal d // k of the block with counter ((b S + s) H + h) k + d % k, so no normal
        serves two elements. Its support is 9.42 standard deviations (P17), and its standard deviation is rounded up.
        The sum is snapped to a grid between standard deviation / 8192 and / 4096; epsilon is for real arithmetic (P18).
        Whatever leaves a segment by another way than the returned tensor is not covered: where the residual stream of
        private tokens goes on, this call protects nothing.
    """
    if torch.is_grad_enabled() or output.requires_grad:
        raise ValueError(
            "dp_release is not for training: noise on attention gives the weights no guarantee (P2); release "
            "output.detach() inside torch.no_grad(), and train with dpfa_hf's DPTrainer"
        )
    _check(output, cu_seq_lens, query_mask)
    mechanism = _mechanism(clipping_norm, noise_multiplier)
    if output.numel() == 0:
        return output.to(torch.float32)
    boundaries, segment = _segments(output, cu_seq_lens, query_mask)
    key = torch.frombuffer(bytearray(_key_source(32)), dtype=torch.int32)
    if triton is not None and (output.is_cuda or triton.knobs.runtime.interpret):
        return _release_triton(output, boundaries, segment, key, mechanism)
    return _release_torch(output, boundaries, segment, key, mechanism)


def release_sensitivity(
    heads: int, clipping_norm: float, adjacency: str = "zero_out", *, segments_per_unit: int = 1
) -> float:
    """The l2 sensitivity of one call of `dp_release`, over the whole released tensor.

    Args:
        heads: H, each clipped by itself.
        clipping_norm: C.
        adjacency: "zero_out" (a unit's segments contribute zero in one neighbour) or "replace_one".
        segments_per_unit: the most segments whose outputs one privacy unit can change, more than 1 where several rows
            attend one private context.

    Returns:
        sqrt(segments_per_unit * heads) * C, twice that for "replace_one".

    Raises:
        ValueError: an unknown adjacency, or a number that is not positive.
    """
    if adjacency not in ("zero_out", "replace_one"):
        raise ValueError(f"adjacency={adjacency!r} is unknown: choose 'zero_out' or 'replace_one'")
    if not (heads >= 1 and segments_per_unit >= 1 and clipping_norm > 0):
        raise ValueError(
            f"heads={heads}, clipping_norm={clipping_norm} and segments_per_unit={segments_per_unit} must be positive"
        )
    return math.sqrt(segments_per_unit * heads) * clipping_norm * (2 if adjacency == "replace_one" else 1)


def _check(output: Tensor, cu_seq_lens: Tensor | None, query_mask: Tensor | None) -> None:
    if output.ndim != 4 or output.dtype not in _DTYPES:
        raise ValueError(
            f"output must be float16, bfloat16 or float32 [batch, sequence, heads, width], "
            f"not {output.dtype} {tuple(output.shape)}"
        )
    rows, length = output.shape[:2]
    if query_mask is not None and (query_mask.dtype != torch.bool or query_mask.shape != (rows, length)):
        raise ValueError(f"query_mask must be bool {(rows, length)}, not {query_mask.dtype} {tuple(query_mask.shape)}")
    if cu_seq_lens is None:
        return
    if rows != 1 or cu_seq_lens.ndim != 1 or cu_seq_lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seq_lens must be one row of integers for one packed row (batch 1), "
            f"not {cu_seq_lens.dtype} {tuple(cu_seq_lens.shape)} for batch {rows}"
        )
    # Overlapping segments would be two contributions of one token, so this is worth waiting for the device.
    boundaries = cu_seq_lens.tolist()
    if boundaries[:1] != [0] or boundaries != sorted(boundaries) or boundaries[-1] > length:
        raise ValueError(f"cu_seq_lens must rise from 0 to at most the row's length {length}, not {boundaries}")


def _mechanism(clipping_norm: float, noise_multiplier: float) -> _Mechanism:
    standard_deviation = noise_multiplier * clipping_norm
    if not all(_SMALLEST <= number <= _LARGEST for number in (clipping_norm, standard_deviation)):
        raise ValueError(
            f"clipping_norm={clipping_norm} and noise_multiplier={noise_multiplier}: pass a norm and a standard "
            f"deviation (their product) between {_SMALLEST} and {_LARGEST}"
        )
    _, exponent = math.frexp(standard_deviation)
    return _Mechanism(
        bound=_float32(clipping_norm * (1 - _MARGIN)),
        standard_deviation=_float32(standard_deviation * (1 + 2.0**-23)),
        grid=math.ldexp(1.0, exponent - 1 - _GRID_BITS),
    )


def _float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def _segments(output: Tensor, cu_seq_lens: Tensor | None, query_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Boundaries of the n segments in the B * S tokens, int64 [n + 1], and each token's segment, n outside of all."""
    rows, length = output.shape[:2]
    tokens = torch.arange(rows * length, device=output.device)
    if cu_seq_lens is None:
        boundaries = torch.arange(rows + 1, device=output.device) * length
    else:
        boundaries = cu_seq_lens.to(output.device, torch.int64)
    segment = torch.bucketize(tokens, boundaries[1:], right=True)
    if query_mask is not None:
        segment = segment.masked_fill(~query_mask.to(output.device).flatten(), boundaries.numel() - 1)
    return boundaries, segment


def _release_torch(output: Tensor, boundaries: Tensor, segment: Tensor, key: Tensor, mechanism: _Mechanism) -> Tensor:
    """`dp_release` on the CPU, wherever `output` lives."""
    released = _clipped(output.cpu(), boundaries.cpu(), segment.cpu(), mechanism.bound)
    width = output.shape[3]
    blocks_per_row = -(-width // NORMALS_PER_BLOCK)
    first = 0
    for rows in released.view(-1, width).split(max(1, CHUNK_BLOCKS // blocks_per_row)):
        counters = torch.arange(first, first + rows.shape[0] * blocks_per_row)
        first += counters.numel()
        normals = standard_normals(chacha20_blocks(key, counters))
        normals = normals.view(-1, blocks_per_row, NORMALS_PER_BLOCK).transpose(1, 2).flatten(1)[:, :width]
        noised = rows + normals * mechanism.standard_deviation
        rows.copy_((noised * (1 / mechanism.grid) + 0.5).floor() * mechanism.grid)
    return released.to(output.device)


def _clipped(output: Tensor, boundaries: Tensor, segment: Tensor, bound: float) -> Tensor:
    """What the segments contribute before noise: float32 [B, S, H, Dv], contiguous."""
    tokens = output.flatten(0, 1).to(torch.float64)
    count = boundaries.numel() - 1
    squares = torch.zeros(count + 1, output.shape[2], dtype=torch.float64, device=output.device)
    squares.index_add_(0, segment, tokens.square().sum(-1))
    factors = torch.where(squares < math.inf, bound / squares.sqrt().clamp(min=bound), 0.0)
    factors[count] = 0.0
    factor = factors[segment][:, :, None]
    return torch.where(factor > 0, tokens * factor, 0.0).to(torch.float32).view(output.shape)


def _release_triton(output: Tensor, boundaries: Tensor, segment: Tensor, key: Tensor, mechanism: _Mechanism) -> Tensor:
    """`dp_release` in two kernels: the norms, then all else in one pass over the output."""
    rows, length, heads, width = output.shape
    released = torch.empty(output.shape, dtype=torch.float32, device=output.device)
    count = boundaries.numel() - 1
    factors = torch.zeros(count + 1, heads, dtype=torch.float64, device=output.device)
    with torch.cuda.device_of(output):
        if count:
            tile_width = triton.next_power_of_2(width)
            clip_factor_kernel[(count, heads)](
                output,
                boundaries,
                segment,
                factors,
                *output.stride(),
                length,
                mechanism.bound,
                HEADS=heads,
                WIDTH=width,
                TILE_WIDTH=tile_width,
                TILE_TOKENS=max(1, TILE_ELEMENTS // tile_width),
            )
        blocks = rows * length * heads * triton.cdiv(width, NORMALS_PER_BLOCK)
        clip_and_noise_kernel[(triton.cdiv(blocks, TILE_BLOCKS),)](
            output,
            segment,
            factors,
            key.to(output.device),
            released,
            *output.stride(),
            length,
            blocks,
            mechanism.standard_deviation,
            mechanism.grid,
            1 / mechanism.grid,
            HEADS=heads,
            WIDTH=width,
            BLOCKS_PER_ROW=triton.cdiv(width, NORMALS_PER_BLOCK),
            TILE_BLOCKS=TILE_BLOCKS,
        )
    return released


@jit
def clip_factor_kernel(
    OUTPUT,
    BOUNDARIES,
    SEGMENT,
    FACTORS,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    length,
    bound,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
):
    """FACTORS[segment, head] = min(1, bound / norm), or 0 if the norm is not finite; one program for each."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(BOUNDARIES + number)
    stop = tl.load(BOUNDARIES + number + 1)
    d = tl.arange(0, TILE_WIDTH)[None, :]
    column = OUTPUT + head.to(tl.int64) * stride_h + d.to(tl.int64) * stride_d
    squares = tl.zeros([TILE_TOKENS, TILE_WIDTH], tl.float64)
    for first in range(start, stop, TILE_TOKENS):
        token = first + tl.arange(0, TILE_TOKENS).to(tl.int64)[:, None]
        inside = token < stop
        inside = inside & (tl.load(SEGMENT + token, mask=inside, other=-1) == number)
        row = (token // length) * stride_b + (token % length) * stride_s
        x = tl.load(column + row, mask=inside & (d < WIDTH), other=0.0).to(tl.float32).to(tl.float64)
        squares += x * x
    total = tl.sum(tl.sum(squares, 1), 0)
    factor = bound / tl.maximum(tl.sqrt(total), bound)
    tl.store(FACTORS + number.to(tl.int64) * HEADS + head, tl.where(total < float("inf"), factor, 0.0))


@jit
def clip_and_noise_kernel(
    OUTPUT,
    SEGMENT,
    FACTORS,
    KEY,
    RELEASED,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    length,
    blocks,
    standard_deviation,
    grid,
    inverse_grid,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS_PER_ROW: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """RELEASED = clipped OUTPUT + noise, on the grid; a lane makes one block of the cipher, for 8 elements of a row.

    Lanes stand side by side in a row, and a block's normals lie BLOCKS_PER_ROW apart, so that stores are coalesced.
    """
    counter = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    row = counter // BLOCKS_PER_ROW
    d = (counter % BLOCKS_PER_ROW).to(tl.int32)
    token = row // HEADS
    head = row % HEADS
    inside = counter < blocks
    segment = tl.load(SEGMENT + token, mask=inside, other=0)
    factor = tl.load(FACTORS + segment * HEADS + head, mask=inside, other=0.0)
    x_row = OUTPUT + (token // length) * stride_b + (token % length) * stride_s + head * stride_h
    released_row = RELEASED + row * WIDTH
    words = chacha20_block(KEY, counter, tl.zeros([], tl.int64))
    for pair in tl.static_range(4):
        cosine, sine = normal_pair(words[2 * pair], words[2 * pair + 1], words[8 + pair])
        for half in tl.static_range(2):
            i = d + (pair + 4 * half) * BLOCKS_PER_ROW
            x = tl.load(x_row + i.to(tl.int64) * stride_d, mask=inside & (i < WIDTH), other=0.0).to(tl.float32)
            y = tl.where(factor > 0, x.to(tl.float64) * factor, 0.0).to(tl.float32)
            noised = y + (sine if half else cosine) * standard_deviation
            snapped = tl.floor(noised * inverse_grid + 0.5) * grid
            tl.store(released_row + i, snapped, mask=inside & (i < WIDTH))
