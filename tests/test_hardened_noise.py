from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from dpfa_hf import hardened_noise, noise
from dpfa_hf.errors import PrivacyError
from dpfa_hf.hardened_noise import RoundedGaussian
from dpfa_hf.noise import GaussianNoise

SD = 0.7
GRID = 2.0**-13
INDEX = 3
START = 5 * 1024


Mechanism = Callable[[bytes, torch.Tensor], torch.Tensor]  # key, float64 sums -> noised sums


def hardened(key: bytes, sums: torch.Tensor) -> torch.Tensor:
    return RoundedGaussian(key, SD, GRID, 2)(INDEX, START, sums.clone()).clone()


def block(key: bytes, nonce: int, counter: int) -> bytes:
    return Cipher(ChaCha20(key, struct.pack("<QQ", counter, nonce)), mode=None).encryptor().update(bytes(64))


def ideal_noise(key: bytes, element: int) -> mpmath.mpf:
    """Noise over the grid to more than 200 bits, from 64 + 512 bits of each uniform number, without the module."""
    tile, place = divmod(START + element, 1024)
    j, b = divmod(place, 128)
    counter, pair = 128 * tile + b, j % 4
    words = struct.unpack("<16I", block(key, INDEX, counter))
    u = words[2 * pair] + (words[2 * pair + 1] << 32)
    v = (words[8 + pair] << 32) + struct.unpack("<i", struct.pack("<I", words[12 + pair]))[0]
    for number in range(2):
        more = block(key, 2**63 + INDEX, ((4 * counter + pair) << 20) + number)
        u, v = (u << 256) + int.from_bytes(more[:32], "big"), (v << 256) + int.from_bytes(more[32:], "big")
    radius = mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(u) / mpmath.mpf(2) ** 576))
    angle = 2 * mpmath.pi * mpmath.mpf(v) / mpmath.mpf(2) ** 576
    return mpmath.mpf(SD) / mpmath.mpf(GRID) * radius * (mpmath.cos(angle) if j < 4 else mpmath.sin(angle))


def ideal(key: bytes, sums: torch.Tensor) -> torch.Tensor:
    with mpmath.workprec(640):
        rounded = [
            float(int(mpmath.floor(mpmath.mpf(total) / GRID + ideal_noise(key, element) + mpmath.mpf(0.5)))) * GRID
            for element, total in enumerate(sums.tolist())
        ]
    return torch.tensor(rounded, dtype=torch.float64)


def hard_cases(key: bytes, count: int, distance: float) -> torch.Tensor:
    """Sums that bring sum plus noise to `distance` of a grid on either side of the middle of two of its points."""
    with mpmath.workprec(640):
        middles = [mpmath.floor(drawn) + 0.5 - drawn for drawn in (ideal_noise(key, i) for i in range(count))]
        sides = [distance if i % 2 else -distance for i in range(count)]
        totals = [float((middle + side) * GRID) for middle, side in zip(middles, sides, strict=True)]
    return torch.tensor(totals, dtype=torch.float64)


def check_is_the_ideal_gaussian_rounded(mechanism: Mechanism) -> None:
    key = os.urandom(32)
    ordinary = torch.randn(700, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scales = torch.tensor([0.0, 1e-300, 1e-9, 1e3, 1e9, 1e16, -1e16, 1e300], dtype=torch.float64)
    hard = [hard_cases(key, 100, 0.75 * 2.0**exponent) for exponent in (-26, -42, -51)]
    for sums in (ordinary, ordinary[:200] * scales.repeat(25), *hard):
        assert torch.equal(mechanism(key, sums), ideal(key, sums))


def test_results_are_the_ideal_gaussian_rounded_to_the_grid() -> None:
    check_is_the_ideal_gaussian_rounded(hardened)


def test_pytorchs_functions_are_within_the_errors_that_the_proof_assumes() -> None:
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(4000, dtype=torch.float64, generator=generator)
    powers = 2.0 ** -torch.arange(1, 25, dtype=torch.float64)
    near_ends = torch.cat([uniform[:500] * 2.0**-20, 1 - uniform[500:1000] * 2.0**-20, powers, 1 - powers])
    uniform = torch.cat([uniform, near_ends]).clamp(2.0**-24, 1 - 2.0**-24)
    quarters = torch.arange(-2, 3, dtype=torch.float64) * (math.pi / 2)
    angle = torch.cat([(uniform * 2 - 1) * math.pi, quarters, quarters.repeat(200) + 1e-9 * (uniform[:1000] - 0.5)])
    assumed = 2.0**-42
    with mpmath.workprec(200):
        for x, found in zip(uniform.tolist(), uniform.log().tolist(), strict=True):
            assert abs(found / mpmath.log(x) - 1) <= assumed / 2**8
        for x, cosine, sine in zip(angle.tolist(), angle.cos().tolist(), angle.sin().tolist(), strict=True):
            assert max(abs(cosine - mpmath.cos(x)), abs(sine - mpmath.sin(x))) <= assumed / 2**8


def refine_everything(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on; returns a list that the refined elements enter."""
    refined: list[int] = []
    refine = RoundedGaussian._refined

    def recorded(self: RoundedGaussian, index: int, element: int, total: float) -> float:
        refined.append(element)
        return refine(self, index, element, total)

    monkeypatch.setattr(RoundedGaussian, "_refined", recorded)
    monkeypatch.setattr(hardened_noise, "_ERROR", 1.0)
    return refined


def test_results_are_the_same_bits_when_every_element_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    key, sums = os.urandom(32), torch.randn(1500, dtype=torch.float64) * 3
    quick = hardened(key, sums)
    refined = refine_everything(monkeypatch)
    assert torch.equal(hardened(key, sums), quick)
    assert refined == list(range(START, START + 1500))


def test_uniforms_next_to_zero_and_one_are_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    key, sums = os.urandom(32), torch.randn(1500, dtype=torch.float64)
    quick = hardened(key, sums)
    refined = refine_everything(monkeypatch)
    monkeypatch.setattr(hardened_noise, "_ERROR", 0.0)
    monkeypatch.setattr(hardened_noise, "_EXTREME", 2.0**-5)
    assert torch.equal(hardened(key, sums), quick)
    words = hardened_noise.tile_words(key, INDEX, START // 1024, 2).radius.numpy().view(np.uint64).astype(np.float64)
    uniform = np.stack([words, words], axis=1).reshape(-1)[:1500] / 2**64
    assert refined == (START + np.flatnonzero(np.abs(uniform - 0.5) > 0.5 - 2**-5)).tolist()


def test_more_bits_are_drawn_until_the_rounding_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    key, sums = os.urandom(32), torch.randn(300, dtype=torch.float64)
    quick = hardened(key, sums)
    prefixes, draw = [0], RoundedGaussian._uniforms

    def from_few_bits(self: RoundedGaussian, index: int, element: int) -> Iterator[tuple[int, int, int]]:
        bits, u, v = next(draw(self, index, element))
        for fewer in (8, 16, 32, 64, bits):
            prefixes.append(fewer)
            if u >> (bits - fewer):
                yield fewer, u >> (bits - fewer), v >> (bits - fewer)

    refine_everything(monkeypatch)
    monkeypatch.setattr(RoundedGaussian, "_uniforms", from_few_bits)
    assert torch.equal(hardened(key, sums), quick)
    assert prefixes.count(8) == 300 and prefixes.count(32) > 100 and prefixes.count(320) < 50


def test_further_bits_extend_both_uniforms_and_are_those_of_the_pair_alone() -> None:
    mechanism = RoundedGaussian(os.urandom(32), SD, GRID, 1)

    def prefixes(element: int) -> list[tuple[int, int, int]]:
        return list(itertools.islice(mechanism._uniforms(INDEX, element), 3))

    first = prefixes(START)
    assert first == prefixes(START + 512)  # the sine beside the cosine
    others = [prefixes(START + beside) for beside in (1, 127, 128, 384, 1024)]
    for i in range(2):
        (bits, *shorter), (more_bits, *longer) = first[i : i + 2]
        assert more_bits == bits + 256
        assert [word >> 256 for word in longer] == shorter
    further = [[word % 2**512 for word in found[2][1:]] for found in (first, *others)]
    assert len({word for words in further for word in words}) == 12


def test_an_interval_that_holds_zero_is_never_taken_for_a_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = RoundedGaussian(bytes(32), SD, GRID, 1)
    stream = hardened_noise.chacha20_keystream

    def zero_at_first(key: bytes, nonce: int, counter: int, length: int) -> bytearray:
        first = nonce < 2**63 or counter % 2**20 == 0
        return bytearray(length) if first else stream(key, nonce, counter, length)

    monkeypatch.setattr(hardened_noise, "chacha20_keystream", zero_at_first)
    bits, u, _ = next(mechanism._uniforms(INDEX, 0))
    assert bits == 64 + 512 and 0 < u < 2**256
    # No tail is cut off: this normal is beyond what 64 bits reach.
    assert mechanism._refined(INDEX, 0, 0.0) > 20 * SD / GRID


# --- Bugs that the check must catch ---


def test_mutant_whose_error_bound_is_too_small_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened_noise, "_ERROR", 2.0**-44)
    with pytest.raises(AssertionError):
        check_is_the_ideal_gaussian_rounded(hardened)


def test_mutant_that_extends_the_uniforms_by_zeros_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = hardened_noise.chacha20_keystream

    def nothing_further(key: bytes, nonce: int, counter: int, length: int) -> bytearray:
        return stream(key, nonce, counter, length) if nonce < 2**63 else bytearray(length)

    monkeypatch.setattr(hardened_noise, "chacha20_keystream", nothing_further)
    with pytest.raises(AssertionError):
        check_is_the_ideal_gaussian_rounded(hardened)


def zeros_are_positive(monkeypatch: pytest.MonkeyPatch) -> bool:
    def almost_none(self: RoundedGaussian, index: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((count,), -0.1, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)

    monkeypatch.setattr(RoundedGaussian, "_noise", almost_none)
    found = hardened(bytes(32), torch.tensor([-0.0, 0.0, -1e-9, 1e-9], dtype=torch.float64))
    assert torch.equal(found, torch.zeros(4, dtype=torch.float64))
    return not found.signbit().any()


def test_no_zero_has_the_sign_of_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert zeros_are_positive(monkeypatch)


def test_mutant_whose_zeros_have_the_sign_of_the_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened_noise, "scale_by_grid", lambda integers, grid: integers * grid)
    assert not zeros_are_positive(monkeypatch)


def snapped(key: bytes, sums: torch.Tensor) -> torch.Tensor:
    return GaussianNoise(SD)._from_chacha20(key)(INDEX, START, sums)


def rounded_twice(key: bytes, sums: torch.Tensor) -> torch.Tensor:
    return (hardened(key, (sums / (GRID / 2)).round() * (GRID / 2)) / GRID).round() * GRID


def the_sum_left_out_of_the_rounding(key: bytes, sums: torch.Tensor) -> torch.Tensor:
    return hardened(key, torch.zeros_like(sums)) + (sums / GRID).round() * GRID


@pytest.mark.parametrize("mutant", [snapped, rounded_twice, the_sum_left_out_of_the_rounding])
def test_mutant_mechanism_is_caught(mutant: Mechanism) -> None:
    with pytest.raises(AssertionError):
        check_is_the_ideal_gaussian_rounded(mutant)


# --- As a mode of GaussianNoise ---


def test_hardened_noise_is_the_snapped_noise_but_for_its_last_places() -> None:
    def noised(floating_point: str) -> list[torch.Tensor]:
        sums = [torch.linspace(-2, 2, 40_000), torch.ones(30, 70, dtype=torch.float64).t()]
        return GaussianNoise(SD, floating_point=floating_point, _key_source=bytes).add_noise(sums)

    for found, near in zip(noised("hardened"), noised("snapped"), strict=True):
        assert found.dtype == near.dtype and found.shape == near.shape
        assert float((found - near).abs().max()) <= GRID
        assert float((found != near).double().mean()) < 0.02


def test_hardened_noise_is_the_same_bits_for_every_number_of_threads_and_every_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def noised() -> torch.Tensor:
        return GaussianNoise(SD, floating_point="hardened", _key_source=bytes).add_noise([torch.ones(70_001)])[0]

    expected = noised()
    monkeypatch.setattr(noise, "_CHUNK", 2**12)
    torch.set_num_threads(3)
    assert torch.equal(noised(), expected)


def test_hardened_noise_follows_the_normal_law() -> None:
    (x,) = GaussianNoise(SD, floating_point="hardened").add_noise([torch.zeros(200_000)])
    assert abs(float(x.mean())) < 5 * SD / math.sqrt(200_000)
    assert abs(float(x.std()) / SD - 1) < 5 / math.sqrt(400_000)
    assert stats.kstest(x.numpy(), "norm", args=(0, SD)).pvalue > 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sum_that_is_not_finite_is_refused_by_name(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened_noise, "_ERROR", 1.0)
    with pytest.raises(PrivacyError, match="'broken'"):
        GaussianNoise(SD, floating_point="hardened").add_noise({"broken": torch.tensor([1.0, value])})


def test_modes_that_cannot_be_hardened_are_refused_and_the_mode_is_described() -> None:
    with pytest.raises(PrivacyError, match="generator='chacha20'"):
        GaussianNoise(SD, generator="torch", floating_point="hardened")
    with pytest.raises(PrivacyError, match="'exact'"):
        GaussianNoise(SD, floating_point="exact")
    assert "ideal Gaussian" in str(GaussianNoise(SD, floating_point="hardened").describe()["floating_point"])
    assert "real arithmetic" in str(GaussianNoise(SD).describe()["floating_point"])


def test_a_device_that_could_add_noise_is_not_asked_in_the_hardened_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "can_add_noise", lambda tensor: True)
    monkeypatch.setattr(noise, "add_gaussian_noise", lambda *arguments, **options: pytest.fail("the device was asked"))
    GaussianNoise(SD, floating_point="hardened").add_noise([torch.zeros(10)])
