"""Gaussian noise from ChaCha20 added to sums where they lie: cipher, Box-Muller, addition and grid in one kernel."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .chacha import NORMALS_PER_BLOCK, chacha20_block, jit, radius_cosine_sine, tl, triton

BLOCKS_PER_TILE = 128
NORMALS_PER_TILE = NORMALS_PER_BLOCK * BLOCKS_PER_TILE

# Columns of the table that a launch reads a row of. It holds what Triton would round to float32, or compile anew for.
_NONCE, _SIZE, _AMPLITUDE, _GRID, _INVERSE_GRID, _NOT_FINITE = range(6)
_COLUMNS = 8


def can_add_noise(sums: Tensor) -> bool:
    """Whether `add_gaussian_noise` takes the tensor: it is on a GPU (or interpreted), and Triton is installed."""
    return triton is not None and (sums.is_cuda or triton.knobs.runtime.interpret)


def add_gaussian_noise(
    sums: Sequence[Tensor], nonces: Sequence[int], key: bytes, *, standard_deviation: float, grid: float
) -> Tensor:
    """Adds Gaussian noise from ChaCha20 to tensors, in place, and snaps them to a grid; waits for no device.

    Args:
        sums: float32 or float64, contiguous, all on one CUDA or ROCm device, of any size.
        nonces: of the cipher, one for each tensor, 0 <= nonce < 2**63, none twice under one key.
        key: 32 bytes, fresh from the operating system for every call. A key that was used before is NOT PRIVATE.
        standard_deviation: of the noise on every element.
        grid: a power of two; every result is a multiple of it, but for the rounding to the tensor's dtype.

    Returns:
        bool [len(sums)] on the device, True for a tensor in which a result is NaN or infinite: the caller must look,
        once for the whole step, and discard the step.

    Raises:
        ValueError: an argument that is not described above, or no Triton.

    Guarantee:
        No block of the cipher serves two tensors or two tiles: a tile of 1024 elements takes the 128 blocks from 128
        times its number on, whatever the size of the tensor, with 64-bit counters. Element 128 j + b of the tile takes
        from block b its j-th normal, in the order of `standard_normals`. Radius, cosine and sine are those of
        `standard_normals`, with support to 9.42 standard deviations (P17). All else is float64: the product of the two
        float32 factors, times the standard deviation over the grid, plus the sum over the grid, rounded to the nearest
        integer.
    """
    _check(sums, nonces, key, standard_deviation, grid)
    numbers = [standard_deviation / grid, grid, 1.0 / grid]
    constants = list(struct.unpack("<3q", struct.pack("<3d", *numbers)))
    table = torch.zeros(len(sums), _COLUMNS, dtype=torch.int64)
    for row, nonce, tensor in zip(table, nonces, sums, strict=True):
        row[: _INVERSE_GRID + 1] = torch.tensor([nonce, tensor.numel(), *constants])
    device = sums[0].device
    table = table.to(device)
    words = torch.frombuffer(bytearray(key), dtype=torch.int32).to(device)
    with torch.cuda.device_of(sums[0]):
        for row, tensor in zip(table, sums, strict=True):
            if tensor.numel():
                tiles = triton.cdiv(tensor.numel(), NORMALS_PER_TILE)
                gaussian_noise_kernel[(tiles,)](tensor, words, row, BLOCKS=BLOCKS_PER_TILE)
    return table[:, _NOT_FINITE] != 0


def _check(sums: Sequence[Tensor], nonces: Sequence[int], key: bytes, standard_deviation: float, grid: float) -> None:
    if not sums or len(sums) != len(nonces) or len(set(nonces)) < len(nonces):
        raise ValueError(f"nonces must be one for each of the {len(sums)} sums, and none twice, not {len(nonces)}")
    if not all(0 <= nonce < 2**63 for nonce in nonces):
        raise ValueError("nonces must be at least 0 and below 2**63")
    if len(key) != 32:
        raise ValueError(f"key must be 32 bytes, not {len(key)}: pass os.urandom(32)")
    if not (0 < standard_deviation < math.inf and 0 < grid < math.inf and math.frexp(grid)[0] == 0.5):
        raise ValueError(
            f"standard_deviation={standard_deviation} and grid={grid}: pass positive numbers, the grid a power of two"
        )
    for tensor in sums:
        if tensor.dtype not in (torch.float32, torch.float64) or not tensor.is_contiguous():
            raise ValueError(f"sums must be contiguous float32 or float64, not {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.device != sums[0].device or not can_add_noise(tensor):
            raise ValueError(f"sums must be on one GPU that Triton can compile for, not on {tensor.device}")


@jit
def gaussian_noise_kernel(SUMS, KEY, ROW, BLOCKS: tl.constexpr):
    """SUMS = (SUMS + noise) on the grid, one tile of 8 * BLOCKS elements a program; ROW is the launch's row."""
    add_noise_to_tile(SUMS, KEY, ROW, tl.program_id(0).to(tl.int64), BLOCKS)


@jit
def add_noise_to_tile(SUMS, KEY, ROW, tile, BLOCKS: tl.constexpr):
    """Lanes stand side by side, and a block's normals lie BLOCKS apart, so that loads and stores are coalesced."""
    nonce = tl.load(ROW + 0)
    size = tl.load(ROW + 1)
    amplitude = tl.load(ROW + 2).to(tl.float64, bitcast=True)
    grid = tl.load(ROW + 3).to(tl.float64, bitcast=True)
    inverse_grid = tl.load(ROW + 4).to(tl.float64, bitcast=True)
    lane = tl.arange(0, BLOCKS)
    words = chacha20_block(KEY, tile * BLOCKS + lane, nonce)
    broken = tl.zeros([BLOCKS], tl.int32)
    for pair in tl.static_range(4):
        radius, cosine, sine = radius_cosine_sine(words[2 * pair], words[2 * pair + 1], words[8 + pair])
        scaled = radius.to(tl.float64) * amplitude
        for half in tl.static_range(2):
            i = tile * (8 * BLOCKS) + (pair + 4 * half) * BLOCKS + lane
            inside = i < size
            x = tl.load(SUMS + i, mask=inside, other=0.0).to(tl.float64)
            y = x * inverse_grid + (sine if half else cosine).to(tl.float64) * scaled
            whole = tl.floor(y)
            snapped = ((whole + tl.where(y - whole >= 0.5, 1.0, 0.0)) * grid).to(SUMS.dtype.element_ty)
            broken |= (inside & ~(tl.abs(snapped) < float("inf"))).to(tl.int32)
            tl.store(SUMS + i, snapped, mask=inside)
    some = tl.max(broken, 0)
    tl.store(ROW + 5, some.to(tl.int64), mask=some > 0)
