from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import struct
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from dpfa_hf import keystream, noise
from dpfa_hf.errors import PrivacyError
from dpfa_hf.keystream import TileWords, chacha20_keystream, tile_words
from dpfa_hf.noise import BoxMuller, GaussianNoise

Sums = dict[str, torch.Tensor]
Step = Callable[[Sums], Sums]

SD = 0.7
GRID = 2.0**-13  # floor(log2(0.7)) - 12
SHAPES = {"weight": (400, 250), "bias": (50_000,), "norm": (25, 2, 1000)}
STEPS = 2  # 400,000 residuals


# ---------------------------------------------------------------------------------------------------------------------
# Against a slow computation of its own


def normal(key: bytes, nonce: int, element: int) -> float:
    """Box and Muller's formula on the words that `dpfa_hf.keystream` assigns to the element, in Python's float64."""
    tile, place = divmod(element, 1024)
    j, block = divmod(place, 128)
    cipher = Cipher(ChaCha20(key, struct.pack("<QQ", 128 * tile + block, nonce)), mode=None)
    words = struct.unpack("<16I", cipher.encryptor().update(bytes(64)))
    pair = j % 4
    radius = math.sqrt(-2 * math.log((words[2 * pair] | words[2 * pair + 1] << 32 | 1) / 2**64))
    angle = 2 * math.pi * words[8 + pair] / 2**32
    return radius * (math.cos(angle) if j < 4 else math.sin(angle))


@pytest.mark.parametrize("chunk", [1024, 2**15])
def test_noise_equals_a_slow_independent_computation_whatever_the_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    key = os.urandom(32)
    sums = {"a": torch.randn(13, 110), "b": torch.randn(2075, dtype=torch.float64), "c": torch.randn(3)}
    before = copy.deepcopy(sums)
    after = GaussianNoise(SD, _key_source=lambda length: key).add_noise(sums)
    for nonce, name in enumerate(sums):
        old, new = before[name].flatten().tolist(), after[name].flatten().tolist()
        expected = [x + SD * normal(key, nonce, element) for element, x in enumerate(old)]
        # Half of the grid for snapping, and float32 for radius, cosine and sine.
        assert max(abs(x - y) for x, y in zip(new, expected, strict=True)) <= GRID / 2 + SD * 2e-6


@pytest.mark.parametrize(("threads", "chunk"), [(1, 1024), (2, 2**15), (2, 2**12), (7, 2**14)])
def test_noise_is_the_same_bits_for_every_number_of_threads_and_every_chunk(
    threads: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noised() -> Sums:
        sums = {"large": torch.linspace(-3, 3, 150_001), "double": torch.ones(20_000, dtype=torch.float64)}
        return GaussianNoise(SD, _key_source=bytes).add_noise(sums)

    expected = noised()
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    torch.set_num_threads(threads)
    found = noised()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_thread_that_is_asked_for_works_and_what_one_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    started, both = [], threading.Barrier(2, timeout=30)

    def broken_cipher(key: bytes, nonce: int, first_tile: int, tiles: int) -> TileWords:
        started.append(threading.get_ident())
        both.wait()
        raise MemoryError("no keystream")

    torch.set_num_threads(2)
    monkeypatch.setattr(noise, "tile_words", broken_cipher)
    with pytest.raises(MemoryError, match="no keystream"):
        GaussianNoise(SD).add_noise([torch.zeros(100_000)])
    assert len(set(started)) == 2 and threading.get_ident() not in started


def test_pytorch_keeps_its_number_of_threads_here_and_in_threads_that_start_later() -> None:
    torch.set_num_threads(3)
    inside, drawn = set(), noise.tile_words

    def observed(key: bytes, nonce: int, first_tile: int, tiles: int) -> TileWords:
        inside.add(torch.get_num_threads())
        return drawn(key, nonce, first_tile, tiles)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(noise, "tile_words", observed)
        GaussianNoise(SD).add_noise([torch.zeros(100_000)])
        with pytest.raises(PrivacyError, match="not finite"):
            GaussianNoise(SD).add_noise([torch.full((100_000,), math.nan)])
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert inside == {1} and later == [torch.get_num_threads()] == [3]


# ---------------------------------------------------------------------------------------------------------------------
# The law of the noise; each planted bug must fail the check that catches it


def correlated(x: torch.Tensor, y: torch.Tensor) -> bool:
    n = min(x.numel(), y.numel())
    x, y = x[:n], y[:n]
    scale = math.sqrt(float((x**2).mean() * (y**2).mean())) or 1.0
    return abs(float((x * y).mean())) / scale > 5 / math.sqrt(n)


def variance_is_off(x: torch.Tensor) -> bool:
    return abs(float((x**2).mean()) / SD**2 - 1) > 5 * math.sqrt(2 / x.numel())


def law_violations(make_step: Callable[[], Step]) -> set[str]:
    """Returns the names of the laws that the noise breaks; each is tested at five standard errors."""
    clean = {name: torch.randint(-(2**14), 2**14, shape) * GRID for name, shape in SHAPES.items()}
    found = set()

    def run() -> list[Sums]:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(42)
        step = make_step()
        return [step({name: tensor.clone() for name, tensor in clean.items()}) for _ in range(STEPS)]

    results, again = run(), run()
    if any(torch.equal(a[name], b[name]) for a, b in zip(results, again, strict=True) for name in SHAPES):
        found.add("reproducible from the global seeds")
    if any(tensor.dtype != torch.float32 for step in results for tensor in step.values()):
        found.add("dtype")
    residuals = [{name: (step[name].double() - clean[name].double()).flatten() for name in SHAPES} for step in results]
    everything = torch.cat([tensor for step in residuals for tensor in step.values()])
    count = everything.numel()
    assert count >= 400_000
    if variance_is_off(everything):
        found.add("variance")
    if any(variance_is_off(tensor) for step in residuals for tensor in step.values()):
        found.add("variance per tensor")
    if abs(float(everything.mean())) > 5 * SD / math.sqrt(count):
        found.add("mean")
    kurtosis = float((everything**4).mean() / ((everything**2).mean() ** 2 + 1e-300))
    if abs(kurtosis - 3) > 5 * math.sqrt(24 / count):
        found.add("kurtosis")
    if stats.kstest(everything.numpy(), "norm", args=(0, SD)).pvalue < 1e-6:
        found.add("shape")
    if any(correlated(residuals[0][name], residuals[1][name]) for name in SHAPES):
        found.add("steps")
    if any(correlated(step[a], step[b]) for step in residuals for a, b in itertools.combinations(SHAPES, 2)):
        found.add("tensors")
    for step in residuals:
        x = step["weight"]
        square = x**2 - (x**2).mean()
        lags = [*range(1, 9), *range(128, 1024, 128), 1024, noise._CHUNK]
        if any(correlated(x[:-lag], x[lag:]) or correlated(square[:-lag], square[lag:]) for lag in lags):
            found.add("neighbours")
    if not torch.equal(everything / GRID, (everything / GRID).round()):
        found.add("grid")
    if any(tensor[tensor == 0].signbit().any() for step in results for tensor in step.values()):
        found.add("sign of zero")
    if float((everything == everything.bfloat16().double()).double().mean()) > 0.25:
        found.add("resolution")
    return found


@pytest.fixture(autouse=True)
def several_chunks_per_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_CHUNK", 2**14)


@pytest.mark.parametrize("generator", ["chacha20", "torch"])
def test_noise_is_gaussian_independent_and_on_the_grid(generator: str) -> None:
    assert law_violations(lambda: GaussianNoise(SD, generator=generator).add_noise) == set()


def no_noise() -> Step:
    return lambda sums: sums


def noise_over_the_batch() -> Step:
    return GaussianNoise(SD / 64).add_noise


def noise_over_root_two() -> Step:
    return GaussianNoise(SD / math.sqrt(2)).add_noise


def noise_once_per_micro_batch() -> Step:
    mechanism = GaussianNoise(SD)
    return lambda sums: mechanism.add_noise(mechanism.add_noise(sums))


def one_tensor_without_noise() -> Step:
    mechanism = GaussianNoise(SD)
    return lambda sums: {**sums, **mechanism.add_noise({name: sums[name] for name in list(sums)[1:]})}


def bfloat16_noise() -> Step:
    mechanism = GaussianNoise(SD)

    def step(sums: Sums) -> Sums:
        drawn = mechanism.add_noise({name: torch.zeros_like(tensor) for name, tensor in sums.items()})
        return {name: tensor + drawn[name].bfloat16().float() for name, tensor in sums.items()}

    return step


def bfloat16_sum() -> Step:
    mechanism = GaussianNoise(SD)
    return lambda sums: {name: tensor.bfloat16() for name, tensor in mechanism.add_noise(sums).items()}


def unsnapped() -> Step:
    return lambda sums: {name: tensor + SD * torch.randn_like(tensor) for name, tensor in sums.items()}


def zeros_with_the_sign_of_the_sum() -> Step:
    return lambda sums: {
        name: ((tensor + SD * torch.randn_like(tensor)) / GRID).round() * GRID for name, tensor in sums.items()
    }


def fixed_key() -> Step:
    return GaussianNoise(SD, _key_source=bytes).add_noise


def key_reused_in_every_step() -> Step:
    key = os.urandom(32)
    return GaussianNoise(SD, _key_source=lambda length: key).add_noise


def same_keystream_for_every_tensor() -> Step:
    def step(sums: Sums) -> Sums:
        key = os.urandom(32)
        mechanism = GaussianNoise(SD, _key_source=lambda length: key)
        for name, tensor in sums.items():
            mechanism.add_noise({name: tensor})
        return sums

    return step


def torch_randn_from_the_global_seed() -> Step:
    return lambda sums: {
        name: ((tensor + SD * torch.randn_like(tensor)) / GRID).round() * GRID for name, tensor in sums.items()
    }


def uniform_instead_of_gaussian() -> Step:
    width = SD * math.sqrt(12)
    return lambda sums: {
        name: ((tensor + width * (torch.rand_like(tensor) - 0.5)) / GRID).round() * GRID
        for name, tensor in sums.items()
    }


@pytest.mark.parametrize(
    ("mutant", "caught_by"),
    [
        (no_noise, "variance"),
        (noise_over_the_batch, "variance"),
        (noise_over_root_two, "variance"),
        (noise_once_per_micro_batch, "variance"),
        (one_tensor_without_noise, "variance per tensor"),
        (bfloat16_noise, "resolution"),
        (bfloat16_sum, "dtype"),
        (unsnapped, "grid"),
        (zeros_with_the_sign_of_the_sum, "sign of zero"),
        (fixed_key, "steps"),
        (fixed_key, "reproducible from the global seeds"),
        (key_reused_in_every_step, "steps"),
        (same_keystream_for_every_tensor, "tensors"),
        (torch_randn_from_the_global_seed, "reproducible from the global seeds"),
        (uniform_instead_of_gaussian, "kurtosis"),
        (uniform_instead_of_gaussian, "shape"),
    ],
)
def test_the_law_catches_planted_noise_bugs(mutant: Callable[[], Step], caught_by: str) -> None:
    assert caught_by in law_violations(mutant)


def test_the_law_catches_a_keystream_repeated_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_counter(key: bytes, nonce: int, first_tile: int, tiles: int) -> TileWords:
        return tile_words(key, nonce, 0, tiles)

    monkeypatch.setattr(noise, "tile_words", without_counter)
    assert "neighbours" in law_violations(lambda: GaussianNoise(SD).add_noise)


def test_the_law_catches_a_keystream_repeated_in_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_tile(key: bytes, nonce: int, counter: int, length: int) -> bytearray:
        return chacha20_keystream(key, nonce, counter, 64 * 128) * (length // (64 * 128))

    monkeypatch.setattr(keystream, "chacha20_keystream", one_tile)
    assert "neighbours" in law_violations(lambda: GaussianNoise(SD).add_noise)


def test_the_law_catches_box_muller_with_one_normal_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class CosinesTwice(BoxMuller):
        def __call__(self, words: TileWords, scale: float = 1.0) -> torch.Tensor:
            return super().__call__(words, scale).view(-1, 2, 4, 128)[:, :1].repeat(1, 2, 1, 1).view(-1)

    monkeypatch.setattr(noise, "BoxMuller", CosinesTwice)
    assert "neighbours" in law_violations(lambda: GaussianNoise(SD).add_noise)


# ---------------------------------------------------------------------------------------------------------------------
# The tail

Transform = Callable[[np.ndarray], torch.Tensor]  # uint64 [n], each with one angle of every edge -> normals


def edge_words(radii: np.ndarray) -> TileWords:
    """Each radius with angles at and beside every eighth of a turn; tiles of one radius."""
    angles = np.array([(k << 29) + beside for k in range(8) for beside in (-1, 0, 1)]).astype(np.uint32)
    pairs = (len(radii), 4, 128)
    radius = torch.from_numpy(np.broadcast_to(radii[:, None, None], pairs).copy().view(np.int64))
    angle = torch.from_numpy(np.resize(angles, pairs).view(np.int32))
    return TileWords(radius, angle, torch.zeros_like(angle))


def box_muller(radii: np.ndarray) -> torch.Tensor:
    return BoxMuller(len(radii))(edge_words(radii))


def box_muller_of_32_bits(radii: np.ndarray) -> torch.Tensor:
    return box_muller(radii | np.uint64(2**32 - 1))


def tail_reaches_nine_sd(transform: Transform) -> bool:
    least = transform(np.zeros(1, dtype=np.uint64))
    return bool(least.isfinite().all()) and float(least.max()) > 9


def test_support_exceeds_nine_standard_deviations_and_every_word_is_finite() -> None:
    assert tail_reaches_nine_sd(box_muller)
    assert not tail_reaches_nine_sd(box_muller_of_32_bits)
    edges = [0, 1, 2, 2**32, 2**53, 2**63 - 2**9, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2**10, 2**64 - 1]
    normals = box_muller(np.array(edges, dtype=np.uint64))
    assert normals.isfinite().all()
    assert float(normals.abs().max()) < 9.5


def test_radius_keeps_float32s_relative_accuracy_at_both_ends_of_the_uniforms() -> None:
    radii = np.array([0, 1, 12345, 2**40, 2**63, 2**64 - 2**60, 2**64 - 2**40, 2**64 - 2**20], dtype=np.uint64)
    for word, normals in zip(radii.tolist(), box_muller(radii).view(len(radii), -1), strict=True):
        complement = (2**64 - (word | 1)) / 2**64
        radius = math.sqrt(-2 * (math.log1p(-complement) if complement < 0.5 else math.log((word | 1) / 2**64)))
        # Float64's own grain next to 1 is all that stands between a tiny radius and float32's accuracy.
        assert abs(float(normals.abs().max()) - radius) < 2e-7 * radius + 2**-53 / max(radius, 1e-9)


def test_noise_is_far_finer_than_float32_below_its_grid() -> None:
    # The share of a point of the grid must not show where float32's own points lie in it.
    words = tile_words(os.urandom(32), 0, 0, 32)
    normals = BoxMuller(32)(words)
    assert float((normals == normals.float().double()).double().mean()) < 1e-2


def test_tail_beyond_four_sd_has_the_gaussian_frequency() -> None:
    sums = [torch.zeros(2_000_000)]
    GaussianNoise(1.0).add_noise(sums)
    expected = 2_000_000 * 2 * stats.norm.sf(4.0)
    assert abs(int((sums[0].abs() > 4.0).sum()) - expected) < 5 * math.sqrt(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize("generator", ["chacha20", "torch"])
def test_every_step_takes_fresh_key_bytes_and_never_more_than_once(generator: str) -> None:
    keys: list[bytes] = []

    def recorded(length: int) -> bytes:
        keys.append(os.urandom(length))
        return keys[-1]

    mechanism = GaussianNoise(SD, generator=generator, _key_source=recorded)
    for _ in range(20):
        mechanism.add_noise({"a": torch.zeros(3), "b": torch.zeros(2**15)})
    assert len(keys) == len(set(keys)) == 20
    assert all(len(key) >= 32 for key in keys)


def test_default_key_source_is_the_operating_system_and_anything_else_is_not_private() -> None:
    honest = GaussianNoise(SD)
    assert not honest.seeded_by_caller and honest.describe()["private"] is True
    seeded = GaussianNoise(SD, _key_source=bytes)
    assert seeded.seeded_by_caller
    assert seeded.describe()["private"] is seeded.describe()["cryptographic"] is False
    assert "NOT PRIVATE" in str(seeded.describe()["key"])


def test_torch_generator_is_described_as_not_cryptographic() -> None:
    assert GaussianNoise(SD, generator="torch").describe()["cryptographic"] is False
    description = GaussianNoise(SD).describe()
    assert description["cryptographic"] is True
    assert "real arithmetic" in str(description["floating_point"])
    assert json.loads(json.dumps(description)) == description


def same_noise(generator: Callable[[bytes], torch.Generator], a: bytes, b: bytes) -> bool:
    return torch.equal(torch.randn(4096, generator=generator(a)), torch.randn(4096, generator=generator(b)))


def generator_by_number(key: bytes) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


@pytest.mark.parametrize("byte", [3, 4, 8, 31, 1000, 2495])  # of word 0 the twister uses the top bit only
def test_torch_generator_depends_on_every_key_byte_where_manual_seed_keeps_32_bits(byte: int) -> None:
    key = os.urandom(2496)
    other = bytearray(key)
    other[byte] ^= 0x80
    assert not same_noise(lambda k: noise._fresh_mersenne_twister(lambda _: k), key, bytes(other))
    assert same_noise(generator_by_number, bytes(7), bytes(4) + b"\1\1\1")


def test_torch_generator_state_is_that_of_numpys_mersenne_twister() -> None:
    key = os.urandom(2496)
    reference = np.random.RandomState()
    reference.set_state(("MT19937", np.frombuffer(key, dtype=np.uint32), 624, 0, 0.0))
    generator = noise._fresh_mersenne_twister(lambda _: key)
    drawn = torch.empty(1000, dtype=torch.int64).random_(0, 2**24, generator=generator)
    assert drawn.tolist() == [int(word) % 2**24 for word in reference.randint(0, 2**32, 1000, dtype=np.uint32)]


@pytest.mark.parametrize("generator", ["chacha20", "torch"])
def test_global_generators_are_left_alone(generator: str) -> None:
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate()
    GaussianNoise(SD, generator=generator).add_noise([torch.zeros(100)])
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state(legacy=False)["state"]["key"])
    assert states[2] == random.getstate()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, dtypes, refusals


@pytest.mark.parametrize("sd", [1e-30, 2.0**-7, 0.9999, 1.0, 3.7, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_multiples_of_a_power_of_two_grid(sd: float, dtype: torch.dtype) -> None:
    mechanism = GaussianNoise(sd)
    assert math.frexp(mechanism.grid)[0] == 0.5
    assert sd / 8192 < mechanism.grid <= sd / 4096
    (noised,) = mechanism.add_noise([torch.randn(5000, dtype=dtype) * sd * 1e5])
    assert noised.dtype == dtype
    multiples = noised.double() / mechanism.grid
    assert torch.equal(multiples, multiples.round())


def test_noise_is_in_place_in_dicts_and_lists_of_any_shape() -> None:
    sums = {"scalar": torch.tensor(5.0), "none": torch.zeros(0, 3), "transposed": torch.zeros(30, 20).t()}
    tensors = dict(sums)
    assert GaussianNoise(SD).add_noise(sums) is sums
    assert all(sums[name] is tensors[name] for name in sums)
    assert sums["scalar"] != 5.0
    assert sums["transposed"].shape == (20, 30) and int((sums["transposed"] != 0).sum()) > 590
    parameter = torch.nn.Parameter(torch.zeros(100))
    listed: list[torch.Tensor] = [parameter]
    assert GaussianNoise(SD).add_noise(listed) is listed
    assert float(parameter.detach().std()) > 0.4 and parameter.grad_fn is None


def test_standard_deviation_zero_leaves_sums_untouched_and_says_not_private() -> None:
    sums = [torch.randn(1000)]
    before = sums[0].clone()
    mechanism = GaussianNoise(0)
    assert torch.equal(mechanism.add_noise(sums)[0], before)
    assert mechanism.grid == 0.0 and mechanism.describe()["private"] is False


@pytest.mark.parametrize("sd", [-1.0, math.nan, math.inf, 1e-45])
def test_bad_standard_deviation_is_refused(sd: float) -> None:
    with pytest.raises(PrivacyError, match="standard_deviation"):
        GaussianNoise(sd)


def test_unknown_generator_is_refused() -> None:
    with pytest.raises(PrivacyError, match="'numpy'"):
        GaussianNoise(SD, generator="numpy")


@pytest.mark.parametrize("sd", [SD, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.complex64])
def test_sums_below_float32_are_refused_before_anything_is_noised(dtype: torch.dtype, sd: float) -> None:
    sums = {"good": torch.zeros(5), "bad": torch.zeros(5, dtype=dtype)}
    with pytest.raises(PrivacyError, match="'bad'"):
        GaussianNoise(sd).add_noise(sums)
    assert not sums["good"].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sum_that_is_not_finite_is_refused_by_name(value: float) -> None:
    broken = torch.zeros(40_000)
    broken[33_333] = value
    with pytest.raises(PrivacyError, match="'broken'"):
        GaussianNoise(SD).add_noise({"fine": torch.zeros(10), "broken": broken})


def test_overflow_of_float32_is_refused() -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        GaussianNoise(1e38).add_noise([torch.full((1000,), torch.finfo(torch.float32).max)])


def test_a_tensor_given_twice_and_an_empty_step_are_refused() -> None:
    tied = torch.zeros(4)
    with pytest.raises(PrivacyError, match="share memory"):
        GaussianNoise(SD).add_noise({"embedding": tied, "head": tied})
    with pytest.raises(PrivacyError, match="empty"):
        GaussianNoise(SD).add_noise({})


def test_privacy_errors_are_one_line() -> None:
    for sums in ({}, {"a": torch.zeros(3, dtype=torch.bfloat16)}, {"a": torch.tensor([math.nan])}):
        with pytest.raises(PrivacyError) as raised:
            GaussianNoise(SD).add_noise(sums)
        assert "\n" not in str(raised.value)
