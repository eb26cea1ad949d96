from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from dpfa_hf._kernel import chacha
from scipy import stats

triton = pytest.importorskip("triton")
tl = triton.language


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    skipped = pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own"
    )
    return pytest.mark.interpreter(skipped(test))


Keystream = Callable[[bytes, int, int, int], bytes]  # key, counter, nonce, blocks


def torch_keystream(key: bytes, counter: int, nonce: int, blocks: int) -> bytes:
    words = torch.frombuffer(bytearray(key), dtype=torch.int32)
    return chacha.chacha20_blocks(words, counter + torch.arange(blocks), nonce).T.contiguous().numpy().tobytes()


@triton.jit
def keystream_kernel(KEY, COUNTERS, NONCE, OUT, blocks, TILE: tl.constexpr):
    lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
    words = chacha.chacha20_block(KEY, tl.load(COUNTERS + lane, mask=lane < blocks, other=0), tl.load(NONCE))
    for j in tl.static_range(16):
        tl.store(OUT + lane * 16 + j, words[j].to(tl.int32, bitcast=True), mask=lane < blocks)


def triton_keystream(key: bytes, counter: int, nonce: int, blocks: int) -> bytes:
    words = torch.frombuffer(bytearray(key), dtype=torch.int32)
    out = torch.full((blocks * 16 + 64,), -559038737, dtype=torch.int32)
    signed = torch.tensor([nonce - (1 << 64 if nonce >> 63 else 0)])
    tile = min(2048, triton.next_power_of_2(blocks))
    keystream_kernel[(triton.cdiv(blocks, tile),)](
        words, counter + torch.arange(blocks), signed, out, blocks, TILE=tile
    )
    assert (out[blocks * 16 :] == -559038737).all()
    return out[: blocks * 16].numpy().tobytes()


def openssl(key: bytes, counter: int, nonce: int, blocks: int) -> bytes:
    stream = b""
    while blocks:
        # Its counter has 32 bits, and it refuses to cross them: ask for each side by itself.
        count = min(blocks, 2**32 - counter % 2**32)
        cipher = Cipher(ChaCha20(key, struct.pack("<QQ", counter, nonce)), mode=None)
        stream += cipher.encryptor().update(bytes(64 * count))
        counter, blocks = counter + count, blocks - count
    return stream


# RFC 8439: 2.3.2, then appendix A.1 #1 to #5 as (key, counter, 96-bit nonce, keystream).
VECTORS = [
    (
        bytes(range(32)).hex(), 1, "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4ed2826446079faa0914c2d705d98b02a2b5129cd1de164eb9"
        "cbd083e8a2503c4e",
    ),
    (
        "00" * 32, 0, "00" * 12,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11c"
        "c387b669b2ee6586",
    ),
    (
        "00" * 32, 1, "00" * 12,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed1f28510afb45"
        "ace10a1f4b794d6f",
    ),
    (
        "00" * 31 + "01", 1, "00" * 12,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125"
        "a64addeb006c13a0",
    ),
    (
        "00ff" + "00" * 30, 2, "00" * 12,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b"
        "7374f4872e99f096",
    ),
    (
        "00" * 32, 0, "00" * 11 + "02",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c78a970e0e955c14f3a88e741b97c286f75f8fc299e8148362"
        "fa198a39531bed6d",
    ),
]  # fmt: skip


def check_vectors(keystream: Keystream) -> None:
    for key, counter, nonce, expected in VECTORS:
        first, second, third = struct.unpack("<3I", bytes.fromhex(nonce))
        assert keystream(bytes.fromhex(key), counter | first << 32, second | third << 32, 1).hex() == expected


def check_long_stream(keystream: Keystream) -> None:
    key = bytes(range(100, 132))
    for counter, nonce in ((7, 3), (2**32 - 2048, 2**63 + 12345), (2**40 - 1, 2**32)):
        # Only the verdict is asserted: where CI is set, pytest would look for hours for what differs in 256 KiB.
        same = keystream(key, counter, nonce, 4096) == openssl(key, counter, nonce, 4096)
        assert same


def test_blocks_equal_the_vectors_of_rfc_8439() -> None:
    check_vectors(torch_keystream)


def test_stream_of_256_kib_equals_openssl_across_the_32_bit_counter() -> None:
    check_long_stream(torch_keystream)


@interpreted
def test_blocks_in_a_kernel_equal_the_vectors_of_rfc_8439() -> None:
    check_vectors(triton_keystream)


@interpreted
def test_stream_in_a_kernel_of_256_kib_equals_openssl_across_the_32_bit_counter() -> None:
    check_long_stream(triton_keystream)


def test_mutant_with_a_wrong_rotation_fails_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = chacha._rotate_left
    monkeypatch.setattr(chacha, "_rotate_left", lambda word, bits: rotate(word, 9 if bits == 8 else bits))
    with pytest.raises(AssertionError):
        check_vectors(torch_keystream)


def test_mutant_with_an_arithmetic_shift_fails_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chacha, "_rotate_left", lambda word, bits: (word << bits) | (word >> (32 - bits)))
    with pytest.raises(AssertionError):
        check_vectors(torch_keystream)


def test_mutant_whose_counter_has_32_bits_fails_the_stream() -> None:
    def wrapped(key: bytes, counter: int, nonce: int, blocks: int) -> bytes:
        wrapping = (counter + torch.arange(blocks)) & 0xFFFFFFFF
        words = torch.frombuffer(bytearray(key), dtype=torch.int32)
        return chacha.chacha20_blocks(words, wrapping, nonce).T.contiguous().numpy().tobytes()

    with pytest.raises(AssertionError):
        check_long_stream(wrapped)


Normals = Callable[[torch.Tensor], torch.Tensor]  # int32 [16, n] -> float32 [n, 8]


@triton.jit
def normals_kernel(WORDS, OUT, count, TILE: tl.constexpr):
    lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = lane < count
    for pair in tl.static_range(4):
        low = tl.load(WORDS + 2 * pair * count + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
        high = tl.load(WORDS + (2 * pair + 1) * count + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
        angle = tl.load(WORDS + (8 + pair) * count + lane, mask=inside, other=0).to(tl.uint32, bitcast=True)
        cosine, sine = chacha.normal_pair(low, high, angle)
        tl.store(OUT + lane * 8 + pair, cosine, mask=inside)
        tl.store(OUT + lane * 8 + 4 + pair, sine, mask=inside)


def triton_normals(words: torch.Tensor) -> torch.Tensor:
    count = words.shape[1]
    out = torch.full((count + 8, 8), math.nan)
    normals_kernel[(triton.cdiv(count, 4096),)](words.contiguous(), out, count, TILE=4096)
    assert out[count:].isnan().all()
    return out[:count]


def stream_words(blocks: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(openssl(bytes(range(32)), 0, 9, blocks), "<i4").reshape(blocks, 16).T.copy())


def edge_words() -> torch.Tensor:
    """Every pair of an edge radius and an edge angle: zeros, ones, and the neighbours of powers of two and of 3/4."""
    powers = [1 << k for k in range(64)]
    radii = {0, 2**64 - 1, 3 << 62, (3 << 62) - 1, *powers, *(p - 1 for p in powers), *(2**64 - p for p in powers)}
    angles = {k << 29 for k in range(8)} | {(k << 29) - 1 for k in range(1, 9)} | {1, 0x12345678}
    grid = [(radius, angle) for radius in radii for angle in angles]
    grid += grid[: -len(grid) % 4]
    columns = np.array(grid, dtype=np.uint64).reshape(-1, 4, 2)
    words = np.zeros((16, len(columns)), dtype=np.uint32)
    for pair in range(4):
        words[2 * pair] = columns[:, pair, 0] & np.uint64(0xFFFFFFFF)
        words[2 * pair + 1] = columns[:, pair, 0] >> np.uint64(32)
        words[8 + pair] = columns[:, pair, 1]
    return torch.from_numpy(words.view(np.int32))


def box_muller(words: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Box and Muller's formula in extended precision: normals [n, 8] and radii [n, 4]."""
    unsigned = words.numpy().view(np.uint32).T.astype(np.uint64)
    word = (unsigned[:, 1:8:2] << np.uint64(32) | unsigned[:, 0:8:2] | np.uint64(1)).astype(np.longdouble)
    radius = np.sqrt(-2 * np.log(word / np.longdouble(2) ** 64))
    angle = unsigned[:, 8:12].astype(np.longdouble) * 2 * np.arccos(np.longdouble(-1)) / 2**32
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1), radius


def check_formula(normals: Normals) -> None:
    for words in (edge_words(), stream_words(2**12)):
        found = normals(words)
        assert found.dtype == torch.float32 and found.isfinite().all()
        expected, radius = box_muller(words)
        # Next to u = 1 the radius is as fine as a 32-bit uniform; everywhere else the error is relative.
        tolerance = 1e-6 * np.concatenate([radius, radius], axis=1) + 2**-16 * (np.concatenate([radius] * 2, 1) < 1e-3)
        assert (np.abs(found.numpy() - expected) <= tolerance).all()


def check_support(normals: Normals) -> None:
    """The most extreme normal is beyond 9 standard deviations (P17)."""
    assert normals(torch.zeros(16, 1, dtype=torch.int32)).abs().max() > 9


def check_law(normals: Normals) -> None:
    x = normals(stream_words(2**15)).double()
    count = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(count)
    assert abs(x.std() - 1) < 4 / math.sqrt(2 * count)
    assert abs((x**4).mean() / x.var() ** 2 - 3) < 4 * math.sqrt(24 / count)
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(x.T.numpy())
    assert np.abs(correlation - np.eye(8)).max() < 5 / math.sqrt(len(x))
    assert np.abs(np.corrcoef((x**2).T.numpy()) - np.eye(8)).max() < 5 / math.sqrt(len(x))


def test_normals_equal_box_muller_in_extended_precision_at_edges_and_at_random() -> None:
    check_formula(chacha.standard_normals)


def test_support_reaches_beyond_nine_standard_deviations() -> None:
    check_support(chacha.standard_normals)


def test_normals_follow_the_normal_law_and_are_uncorrelated() -> None:
    check_law(chacha.standard_normals)


@interpreted
@pytest.mark.parametrize("words", [edge_words, lambda: stream_words(2**12)])
def test_normals_in_a_kernel_equal_those_of_torch(words: Callable[[], torch.Tensor]) -> None:
    assert torch.equal(triton_normals(words()), chacha.standard_normals(words()))


@interpreted
def test_normals_in_a_kernel_have_the_formula_the_support_and_the_law() -> None:
    check_formula(triton_normals)
    check_support(triton_normals)
    check_law(triton_normals)


def clamped_like_tl_randn(words: torch.Tensor) -> torch.Tensor:
    return chacha.standard_normals(words).clamp(-5.678, 5.678)


def with_a_32_bit_radius(words: torch.Tensor) -> torch.Tensor:
    words = words.clone()
    words[0:8:2] = -1
    words[1:8:2] |= words[1:8:2] == 0
    return chacha.standard_normals(words)


@pytest.mark.parametrize("mutant", [clamped_like_tl_randn, with_a_32_bit_radius])
def test_mutant_with_a_short_tail_is_caught(mutant: Normals) -> None:
    for check in (check_support, check_formula):
        with pytest.raises(AssertionError):
            check(mutant)


def over_sqrt_2(words: torch.Tensor) -> torch.Tensor:
    return chacha.standard_normals(words) / math.sqrt(2)


def sines_twice(words: torch.Tensor) -> torch.Tensor:
    sines = chacha.standard_normals(words)[:, 4:]
    return torch.cat([sines, sines], dim=1)


def uniform_of_unit_variance(words: torch.Tensor) -> torch.Tensor:
    return words[:8].T.float() * (math.sqrt(3) * 2.0**-31)


@pytest.mark.parametrize("mutant", [over_sqrt_2, sines_twice, uniform_of_unit_variance])
def test_mutant_with_another_law_is_caught(mutant: Normals) -> None:
    with pytest.raises(AssertionError):
        check_law(mutant)
