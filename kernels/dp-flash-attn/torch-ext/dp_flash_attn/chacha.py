"""ChaCha20 (RFC 8439; Bernstein, 2008) and Gaussian noise from it, twice: in PyTorch, and in Triton for use in kernels.

Both compute the same numbers. Nothing here calls a logarithm, sine or cosine of the device's: with additions,
multiplications, one division and one square root the normals are the same bits wherever each is rounded as IEEE 754
says (a GPU fuses some), and the tail is what this page says it is.

One block of the cipher, 16 words of 32 bits, gives `NORMALS_PER_BLOCK` standard normals by Box and Muller (1958): pair
p takes words 2 p and 2 p + 1 as the low and the high half of its radius, and word 8 + p as its angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # macOS and Windows: what is decorated is then never called
    triton = tl = None

    def jit(function):
        return function


NORMALS_PER_BLOCK = 8
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"


def chacha20_blocks(key: Tensor, counters: Tensor, nonce: int = 0) -> Tensor:
    """Blocks of the ChaCha20 keystream.

    Args:
        key: int32 [8], the 256 bits as little-endian words.
        counters: int64 [n], each below 2**63.
        nonce: 0 <= nonce < 2**64; the cipher's original layout (64-bit counter, 64-bit nonce), which agrees with RFC
            8439 (32-bit counter, 96-bit nonce) wherever the same sixteen bytes are meant.

    Returns:
        int32 [16, n], the words' bits, on the device of `counters`.
    """
    low_high = torch.stack([counters, counters >> 32]).to(torch.int32)
    nonce_words = torch.tensor([nonce & 0xFFFFFFFF, nonce >> 32], device=counters.device).to(torch.int32)
    count = counters.numel()
    a = torch.tensor(_CONSTANTS, dtype=torch.int32, device=counters.device)[:, None].expand(4, count)
    b, c = (half[:, None].expand(4, count) for half in key.to(counters.device).split(4))
    d = torch.cat([low_high, nonce_words[:, None].expand(2, count)])
    start = torch.cat([a, b, c, d])
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return torch.cat([a, b, c, d]) + start


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four quarter rounds of a round, one in each row."""
    for first, second in ((16, 12), (8, 7)):
        a = a + b
        d = _rotate_left(d ^ a, first)
        c = c + d
        b = _rotate_left(b ^ c, second)
    return a, b, c, d


def _rotate_left(word: Tensor, bits: int) -> Tensor:
    return (word << bits) | ((word >> (32 - bits)) & ((1 << bits) - 1))


def standard_normals(words: Tensor) -> Tensor:
    """Turns blocks of uniform words into independent standard normals.

    Args:
        words: int32 [16, n].

    Returns:
        float32 [n, NORMALS_PER_BLOCK]; the first half are cosines, the second half sines.

    Guarantee:
        The radius is sqrt(-2 ln u) with u = (w | 1) / 2**64 for 64 uniform bits w, so u is never 0 and the support
        reaches 9.42 standard deviations (P17). No result is NaN or infinite. Radius, cosine and sine are within 1e-6 of
        those of real arithmetic, relative to the radius.
    """
    low, high = words[0:8:2].to(torch.int64) & 0xFFFFFFFF, words[1:8:2].to(torch.int64)
    radius = _radius((high << 32) | low)
    cosine, sine = _cosine_sine(words[8:12])
    return torch.cat([radius * cosine, radius * sine]).T


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln((word | 1) / 2**64)) of 64 bits."""
    bits = (word | 1).view(torch.uint64).to(torch.float64).view(torch.int64)
    # u = 2**exponent (1 + mantissa), with 1 + mantissa in [0.75, 1.5): its sign is the mantissa's upper half.
    mantissa = (bits >> 20).to(torch.int32)
    upper = mantissa < 0
    exponent = ((bits >> 52) - (1023 + 64)).to(torch.int32) + upper.to(torch.int32)
    f = mantissa.to(torch.float32) * torch.where(upper, 2.0**-33, 2.0**-32).to(torch.float32)
    # ln(1 + f) = 2 artanh(f / (2 + f)); the series' first term left out is below 1e-8 of the sum.
    s = f / (f + 2.0)
    s2 = s * s
    series = (((s2 * (1 / 9) + 1 / 7) * s2 + 1 / 5) * s2 + 1 / 3) * s2 + 1.0
    half_log = exponent.to(torch.float32) * (math.log(2) / 2) + s * series
    # PyTorch's square root of float32 is not correctly rounded on every CPU; this is.
    return (half_log * -4.0).to(torch.float64).sqrt().to(torch.float32)


def _cosine_sine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angle / 2**32 turns, for 32 bits: quarter turns, and Taylor's series on [-pi/4, pi/4)."""
    quarters = ((angle >> 29) + 1) >> 1
    x = (angle << 2).to(torch.float32) * (math.pi * 2.0**-33)
    x2 = x * x
    sine = ((((x2 * (1 / 362880) - 1 / 5040) * x2 + 1 / 120) * x2 - 1 / 6) * x2 + 1.0) * x
    cosine = (((x2 * (1 / 40320) - 1 / 720) * x2 + 1 / 24) * x2 - 1 / 2) * x2 + 1.0
    odd = (quarters & 1) != 0
    turned_cosine = torch.where(odd, sine, cosine)
    turned_sine = torch.where(odd, cosine, sine)
    turned_cosine = torch.where(((quarters + 1) & 2) != 0, -turned_cosine, turned_cosine)
    return turned_cosine, torch.where((quarters & 2) != 0, -turned_sine, turned_sine)


@jit
def _rotated(word, BITS: tl.constexpr):
    return (word << BITS) | (word >> (32 - BITS))


@jit
def _wrapping_sum(a, b):
    return tl.add(a, b, sanitize_overflow=False)


@jit
def _quarter_round(a, b, c, d):
    a = _wrapping_sum(a, b)
    d = _rotated(d ^ a, 16)
    c = _wrapping_sum(c, d)
    b = _rotated(b ^ c, 12)
    a = _wrapping_sum(a, b)
    d = _rotated(d ^ a, 8)
    c = _wrapping_sum(c, d)
    b = _rotated(b ^ c, 7)
    return a, b, c, d


@jit
def chacha20_block(KEY, counter, nonce):
    """`chacha20_blocks` in a kernel: KEY points to 8 int32, counter is a block of int64, nonce a scalar int64.

    Returns 16 blocks of uint32.
    """
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low & 0
    nonce_low = zero + nonce.to(tl.uint32)
    nonce_high = zero + (nonce >> 32).to(tl.uint32)
    a0 = zero + 0x61707865
    a1 = zero + 0x3320646E
    a2 = zero + 0x79622D32
    a3 = zero + 0x6B206574
    k0 = zero + tl.load(KEY + 0).to(tl.uint32, bitcast=True)
    k1 = zero + tl.load(KEY + 1).to(tl.uint32, bitcast=True)
    k2 = zero + tl.load(KEY + 2).to(tl.uint32, bitcast=True)
    k3 = zero + tl.load(KEY + 3).to(tl.uint32, bitcast=True)
    k4 = zero + tl.load(KEY + 4).to(tl.uint32, bitcast=True)
    k5 = zero + tl.load(KEY + 5).to(tl.uint32, bitcast=True)
    k6 = zero + tl.load(KEY + 6).to(tl.uint32, bitcast=True)
    k7 = zero + tl.load(KEY + 7).to(tl.uint32, bitcast=True)
    b0, b1, b2, b3, c0, c1, c2, c3 = k0, k1, k2, k3, k4, k5, k6, k7
    d0, d1, d2, d3 = low, high, nonce_low, nonce_high
    for _ in range(10):  # unrolled, it takes 17 s to compile
        a0, b0, c0, d0 = _quarter_round(a0, b0, c0, d0)
        a1, b1, c1, d1 = _quarter_round(a1, b1, c1, d1)
        a2, b2, c2, d2 = _quarter_round(a2, b2, c2, d2)
        a3, b3, c3, d3 = _quarter_round(a3, b3, c3, d3)
        a0, b1, c2, d3 = _quarter_round(a0, b1, c2, d3)
        a1, b2, c3, d0 = _quarter_round(a1, b2, c3, d0)
        a2, b3, c0, d1 = _quarter_round(a2, b3, c0, d1)
        a3, b0, c1, d2 = _quarter_round(a3, b0, c1, d2)
    return (
        _wrapping_sum(a0, zero + 0x61707865),
        _wrapping_sum(a1, zero + 0x3320646E),
        _wrapping_sum(a2, zero + 0x79622D32),
        _wrapping_sum(a3, zero + 0x6B206574),
        _wrapping_sum(b0, k0),
        _wrapping_sum(b1, k1),
        _wrapping_sum(b2, k2),
        _wrapping_sum(b3, k3),
        _wrapping_sum(c0, k4),
        _wrapping_sum(c1, k5),
        _wrapping_sum(c2, k6),
        _wrapping_sum(c3, k7),
        _wrapping_sum(d0, low),
        _wrapping_sum(d1, high),
        _wrapping_sum(d2, nonce_low),
        _wrapping_sum(d3, nonce_high),
    )


@jit
def radius_cosine_sine(low, high, angle):
    """Radius, cosine and sine, float32, from three words, uint32: the factors of `standard_normals` in a kernel."""
    bits = ((high.to(tl.uint64) << 32) | low.to(tl.uint64) | 1).to(tl.float64).to(tl.int64, bitcast=True)
    mantissa = (bits >> 20).to(tl.int32)
    upper = mantissa < 0
    exponent = ((bits >> 52) - 1087).to(tl.int32) + upper.to(tl.int32)
    f = mantissa.to(tl.float32) * tl.where(upper, 1.1641532182693481e-10, 2.3283064365386963e-10)  # 2**-33, 2**-32
    s = tl.div_rn(f, f + 2.0)
    s2 = s * s
    series = (((s2 * (1 / 9) + 1 / 7) * s2 + 1 / 5) * s2 + 1 / 3) * s2 + 1.0
    half_log = exponent.to(tl.float32) * 0.34657359027997264 + s * series  # ln(2) / 2
    radius = tl.sqrt_rn(half_log * -4.0)

    quarters = ((angle >> 29) + 1) >> 1
    x = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198167899e-10  # pi / 2**33
    x2 = x * x
    sine = ((((x2 * (1 / 362880) - 1 / 5040) * x2 + 1 / 120) * x2 - 1 / 6) * x2 + 1.0) * x
    cosine = (((x2 * (1 / 40320) - 1 / 720) * x2 + 1 / 24) * x2 - 1 / 2) * x2 + 1.0
    odd = (quarters & 1) != 0
    turned_cosine = tl.where(odd, sine, cosine)
    turned_sine = tl.where(odd, cosine, sine)
    turned_cosine = tl.where(((quarters + 1) & 2) != 0, -turned_cosine, turned_cosine)
    turned_sine = tl.where((quarters & 2) != 0, -turned_sine, turned_sine)
    return radius, turned_cosine, turned_sine


@jit
def normal_pair(low, high, angle):
    """Two standard normals, float32, from three words, uint32: `standard_normals` in a kernel."""
    radius, cosine, sine = radius_cosine_sine(low, high, angle)
    return radius * cosine, radius * sine
