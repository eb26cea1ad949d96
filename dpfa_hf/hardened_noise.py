"""The ideal Gaussian, rounded to a grid: noise whose guarantee holds for the numbers in the machine (P18).

In floating point, which results can occur at all depends on what the noise was added to, and that has told neighbours
apart (Mironov, 2012). Here the result is one that real arithmetic would have given: noise is computed to a proven
error, and where that error leaves open which point of the grid is nearest, with as many more random bits as it takes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
from mpmath.ctx_iv import MPIntervalContext
from mpmath.libmp import to_int

from dpfa_hf._kernel.noise import BLOCKS_PER_TILE, NORMALS_PER_TILE
from dpfa_hf.keystream import BLOCK_BYTES, block_and_pair, chacha20_keystream, is_cosine, tile_words
from dpfa_hf.noise import scale_by_grid

# Bound on the error of the noised sum in float64, in units of the grid, wherever the uniform number of the radius is
# further than _EXTREME from 0 and 1. See `RoundedGaussian`.
_ERROR = 2.0**-24
_EXTREME = 2.0**-24
_REFINING_NONCES = 2**63
_BLOCKS_TO_REFINE = 2**20  # of the cipher, for each pair of elements: 32 MiB of further bits for each uniform number
_BITS_AT_A_TIME = 256


class RoundedGaussian:
    """Noises chunks of sums: each becomes the multiple of the grid that is nearest to sum + ideal Gaussian noise.

    Args:
        key: 32 bytes, fresh from the operating system for every step.
        standard_deviation: of the noise.
        grid: a power of two with standard_deviation / grid in [4096, 8192).
        tiles: of 1024 elements, the most in a chunk.

    Guarantee:
        Let S be the float64 number given for an element, and U and V the real numbers whose binary expansions are the
        element's bits of the keystream: 64, then as many more as anybody asks for, from blocks with a nonce of their
        own, which serve no other pair of elements. Let Z = standard_deviation * sqrt(-2 ln U) * cos(2 pi V), or sin for
        the pair's other element. The result is k * grid, k being the integer nearest to (S + Z) / grid; converting it
        to float64 and to the tensor's dtype may round it, but depends on k alone, and no zero is negative. For uniform
        bits Z is an ideal Gaussian over all real numbers, with no tail cut off. So the release is post-processing of
        the Gaussian mechanism in real arithmetic, and has its epsilon, provided that its sensitivity is that of the
        very numbers S: an accountant must be given a sensitivity that covers the error of clipping and summing in
        floating point (P15, the declared summation error). The bits are ChaCha20's: as everywhere in this package,
        epsilon is against an adversary who cannot break the cipher.

        Proof. Let A = standard_deviation / grid < 2**13, R = sqrt(-2 ln U), and e = 2**-42. Assumed are IEEE 754's
        float64 (round to nearest, subnormal numbers kept) and that PyTorch's logarithm is within e of the true one,
        relative, and its sine and cosine within e, absolute: 2**10 units in the last place, where good libraries
        promise one. Chunks are split as S / grid = n + f with n an integer and |f| <= 1/2, both exact.
        Unless u, the middle of the 64 bits' interval, is within 2**-24 of 0 or 1, which refines the element:
        (a) u < 1/2. Half the interval, 2**-65, is at most 2**-41 of U, and two roundings add 2**-52. So ln is wrong
        by 2**-65 / U + 2**-52 + e |ln U|, and R <= 5.77 by that over R, plus 2**-53 R: below 2**-39.3.
        (b) u >= 1/2. U is wrong by 2**-52.4 at most, ln U by 2**-51.4 + e |ln U|, and R, which is at least 2**-11.5
        and at most 1.18, by 2**-38.7.
        (c) The angle is wrong by 2**-48.9, its cosine by 2**-41.9; times A R that is 2**-26.3 in (a), 2**-28.6 in (b).
        (d) With A times the error of R, the noise over the grid is wrong by 2**-25.3 in (a) and 2**-25.5 in (b); the
        roundings of products and of the sum with f add 2**-35. All are below 2**-24, the bound used.
        Where f plus noise is further than that from the middle between two integers, the nearest integer m is that of
        the real number, and float64's n + m is the integer n + m rounded once. Everywhere else the element is computed
        again in interval arithmetic (`mpmath.iv`, assumed to enclose) from S itself, with 256 bits more of U and V each
        time, until both ends of the interval round to one integer.

        About one element in four million is refined. Which ones depends on the noise and on S, and a refined one takes
        a fraction of a millisecond: who can time a step to that precision learns more than the release tells. Step
        times are withheld (P23).
    """

    def __init__(self, key: bytes, standard_deviation: float, grid: float, tiles: int) -> None:
        self._key = key
        self._amplitude = standard_deviation / grid
        self._grid = grid
        self._interval = MPIntervalContext()
        pairs = (tiles, 4, BLOCKS_PER_TILE)
        self._radius, self._angle, self._spare = torch.empty((3, *pairs), dtype=torch.float64)
        self._normals = torch.empty((tiles, 2, *pairs[1:]), dtype=torch.float64)
        self._whole, self._rest = torch.empty((2, tiles * NORMALS_PER_TILE), dtype=torch.float64)

    def __call__(self, index: int, start: int, sums: torch.Tensor) -> torch.Tensor:
        """Noises elements `start` (a multiple of 1024) and on of the tensor with that index.

        Args:
            sums: float64 [count], count <= 1024 tiles.

        Returns:
            float64 [count], multiples of the grid; NaN or infinite where a sum is. The next call overwrites them.
        """
        count = sums.numel()
        noise, extreme = self._noise(index, start, count)
        whole, rest = self._whole[:count], self._rest[:count]
        torch.round(torch.mul(sums, 1.0 / self._grid, out=rest), out=whole)
        rest.sub_(whole).add_(noise)
        whole.add_(torch.round(rest, out=noise))
        from_middle = rest.sub_(torch.floor(rest, out=noise)).sub_(0.5).abs_()
        for place in (from_middle < _ERROR).logical_or_(extreme).nonzero().flatten().tolist():
            total = float(sums[place])
            if abs(total) < float("inf"):
                whole[place] = self._refined(index, start + place, total)
        return scale_by_grid(whole, self._grid)

    def _noise(self, index: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise in units of the grid, float64 [count], and where its error is not bounded, bool [count]."""
        tiles = -(-count // NORMALS_PER_TILE)
        words = tile_words(self._key, index, start // NORMALS_PER_TILE, tiles)
        radius, angle, spare = self._radius[:tiles], self._angle[:tiles], self._spare[:tiles]
        radius.copy_(words.radius).mul_(2.0**-64)
        radius.sub_(torch.floor(radius, out=spare)).add_(2.0**-65)
        extreme = torch.sub(radius, 0.5, out=spare).abs_() > 0.5 - _EXTREME
        radius.log_().mul_(-2.0).sqrt_().mul_(self._amplitude)
        angle.copy_(words.angle).mul_(torch.pi * 2.0**-31)
        angle.add_(spare.copy_(words.refinement), alpha=torch.pi * 2.0**-63)
        normals = self._normals[:tiles]
        torch.mul(torch.cos(angle, out=spare), radius, out=normals[:, 0])
        torch.mul(torch.sin(angle, out=spare), radius, out=normals[:, 1])
        return normals.view(-1)[:count], torch.stack([extreme, extreme], dim=1).view(-1)[:count]

    def _refined(self, index: int, element: int, total: float) -> float:
        """The integer nearest to total / grid + noise, as a float64."""
        interval = self._interval
        turn = interval.cos if is_cosine(element) else interval.sin
        for bits, u, v in self._uniforms(index, element):
            interval.prec = bits + 64
            uniform, angle = (interval.mpf([word, word + 1]) / (1 << bits) for word in (u, v))
            noise = self._amplitude * interval.sqrt(-2 * interval.log(uniform)) * turn(2 * interval.pi * angle)
            middle = interval.mpf(total) / self._grid + noise + 0.5
            low, high = (to_int(end, "f") for end in middle._mpi_)
            if low == high:
                return float(low)
        raise AssertionError("unreachable: 2**28 random bits did not decide a rounding")

    def _uniforms(self, index: int, element: int) -> Iterator[tuple[int, int, int]]:
        """Longer and longer prefixes (bits, of U, of V): U lies in [word, word + 1] / 2**bits."""
        block, pair = block_and_pair(element)
        words = struct.unpack("<16I", chacha20_keystream(self._key, index, block, BLOCK_BYTES))
        u = words[2 * pair] | words[2 * pair + 1] << 32
        # The refinement is read as a signed number, here as above, and carries into the angle where it is negative.
        v = ((words[8 + pair] << 32) + words[12 + pair] - (words[12 + pair] >> 31 << 32)) % 2**64
        bits = 64
        for number in range(_BLOCKS_TO_REFINE):
            counter = (4 * block + pair) * _BLOCKS_TO_REFINE + number
            more = chacha20_keystream(self._key, _REFINING_NONCES + index, counter, BLOCK_BYTES)
            u = u << _BITS_AT_A_TIME | int.from_bytes(more[: BLOCK_BYTES // 2], "big")
            v = v << _BITS_AT_A_TIME | int.from_bytes(more[BLOCK_BYTES // 2 :], "big")
            bits += _BITS_AT_A_TIME
            if u:
                yield bits, u, v
