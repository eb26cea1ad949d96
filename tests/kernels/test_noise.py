from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from dpfa_hf._kernel import chacha
from dpfa_hf._kernel import noise as kernel_noise
from dpfa_hf._kernel.noise import add_gaussian_noise

from dpfa_hf import noise
from dpfa_hf.errors import PrivacyError
from dpfa_hf.noise import GaussianNoise

triton = pytest.importorskip("triton")
tl = triton.language

SD = 0.7
GRID = 2.0**-13
KEY = bytes(range(7, 39))


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    skipped = pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own"
    )
    return pytest.mark.interpreter(skipped(test))


Add = Callable[[Sequence[torch.Tensor], Sequence[int], bytes], object]


def in_a_kernel(sums: Sequence[torch.Tensor], nonces: Sequence[int], key: bytes) -> torch.Tensor:
    return add_gaussian_noise(sums, nonces, key, standard_deviation=SD, grid=GRID)


def in_pytorch(sums: Sequence[torch.Tensor], nonces: Sequence[int], key: bytes) -> None:
    """The kernel's specification: the keystream of OpenSSL, the factors of `chacha.standard_normals`, float64."""
    for tensor, nonce in zip(sums, nonces, strict=True):
        tiles = -(-tensor.numel() // 1024)
        cipher = Cipher(ChaCha20(key, struct.pack("<QQ", 0, nonce)), mode=None)
        stream = np.frombuffer(cipher.encryptor().update(bytes(tiles * 128 * 64)), "<i4").reshape(-1, 16).T.copy()
        words = torch.from_numpy(stream)
        radius = chacha._radius((words[1:8:2].to(torch.int64) << 32) | (words[0:8:2].to(torch.int64) & 0xFFFFFFFF))
        cosine, sine = chacha._cosine_sine(words[8:12])
        turns = torch.cat([cosine, sine]).double()
        normals = torch.cat([radius, radius]).double() * (SD / GRID) * turns
        noise = normals.view(8, tiles, 128).transpose(0, 1).reshape(-1)[: tensor.numel()].view(tensor.shape)
        tensor.copy_((tensor.double() / GRID + noise + 0.5).floor() * GRID)


def sums_of_many_sizes() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1,), (0, 4), (127,), (1024,), (3, 5, 173)]
    sums = [torch.randn(shape, generator=generator) * 10 for shape in shapes]
    return [*sums, torch.randn(1100, dtype=torch.float64, generator=generator)]


def check_equals_the_specification(add: Add) -> None:
    """Bit for bit, and nothing beside the tensors is touched."""
    nonces = [0, 1, 2**31, 5, 2**63 - 1, 6]
    expected, found = sums_of_many_sizes(), sums_of_many_sizes()
    in_pytorch(expected, nonces, KEY)
    frames = [torch.full((tensor.numel() + 64,), 777.0, dtype=tensor.dtype) for tensor in found]
    framed = [frame[32 : frame.numel() - 32].view(x.shape).copy_(x) for frame, x in zip(frames, found, strict=True)]
    add(framed, nonces, KEY)
    for x, y in zip(framed, expected, strict=True):
        assert torch.equal(x, y) and not x[x == 0].signbit().any()
    assert all(bool((frame[:32] == 777).all() and (frame[-32:] == 777).all()) for frame in frames)


@interpreted
def test_noised_sums_equal_the_specification_bit_for_bit_and_nothing_else_is_written() -> None:
    check_equals_the_specification(in_a_kernel)


def test_the_specification_is_the_cpu_generators_stream() -> None:
    """Same words for every element: only float32's last places in radius, cosine and sine differ."""
    for index, (expected, found) in enumerate(zip(sums_of_many_sizes(), sums_of_many_sizes(), strict=True)):
        in_pytorch([expected], [index], KEY)
        # As the only tensors of their steps; the nonce is the index in the step.
        step = [torch.zeros(1) for _ in range(index)] + [found]
        on_the_cpu(step)
        assert found.shape == expected.shape
        if found.numel():
            assert float((found - expected).abs().max()) <= GRID + 2e-6
            assert float((found != expected).double().mean()) < 0.01


def on_the_cpu(step: list[torch.Tensor]) -> None:
    noise._noise_chunks(
        {index: tensor.view(-1) for index, tensor in enumerate(step)},
        lambda: GaussianNoise(SD)._from_chacha20(KEY),
        threads=1,
    )


@interpreted
def test_noise_beyond_two_to_the_31_elements_is_addressed_by_64_bits() -> None:
    tile = 2**25 + 3  # of a tensor that is not there: its counters pass 2**32, too
    memory = torch.zeros(1024)
    numbers = struct.unpack("<3q", struct.pack("<3d", SD / GRID, GRID, 1 / GRID))
    row = torch.tensor([9, 1024 * tile + 1000, *numbers, 0, 0, 0])
    words = torch.frombuffer(bytearray(KEY), dtype=torch.int32)
    far_kernel[(1,)](memory, words, row, torch.tensor([tile]), BLOCKS=128)
    normals = chacha.standard_normals(chacha.chacha20_blocks(words, 128 * tile + torch.arange(128), 9))
    expected = SD * normals.T.flatten().double()
    assert float((memory.double() - expected)[:1000].abs().max()) <= GRID / 2 + 1e-6
    assert not memory[1000:].any() and row[5] == 0


@triton.jit
def far_kernel(SUMS, KEY, ROW, TILE, BLOCKS: tl.constexpr):
    tile = tl.load(TILE)
    kernel_noise.add_noise_to_tile(SUMS - tile * 1024, KEY, ROW, tile, BLOCKS)


@interpreted
@pytest.mark.parametrize("value", [math.nan, -math.inf, torch.finfo(torch.float32).max])
def test_results_that_are_not_finite_are_flagged_by_tensor_and_refused_by_name(value: float) -> None:
    def sums() -> list[torch.Tensor]:
        broken = torch.zeros(1500)
        broken[1100:1300] = value
        return [torch.zeros(5), broken, torch.zeros(5)]

    mechanism = GaussianNoise(1e37 if math.isfinite(value) else SD)  # the largest float32 plus noise overflows
    flags = add_gaussian_noise(
        sums(), [0, 1, 2], KEY, standard_deviation=mechanism.standard_deviation, grid=mechanism.grid
    )
    assert flags.tolist() == [False, True, False]
    with pytest.raises(PrivacyError, match="'second'"):
        mechanism.add_noise(dict(zip(("first", "second", "third"), sums(), strict=True)))


@interpreted
def test_gaussian_noise_on_a_device_equals_its_own_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> dict[str, torch.Tensor]:
        return {"a": torch.ones(700, 2).t(), "b": torch.linspace(-9, 9, 1000, dtype=torch.float64), "c": torch.ones(())}

    mechanism = GaussianNoise(SD, _key_source=bytes)
    on_device = mechanism.add_noise(step())
    monkeypatch.setattr(noise, "can_add_noise", lambda tensor: False)
    on_cpu = mechanism.add_noise(step())
    for name, found in on_device.items():
        assert float((found - on_cpu[name]).abs().max()) <= GRID + 2e-6
        assert torch.equal(found / GRID, (found / GRID).round())
    assert float((on_device["a"] != on_cpu["a"]).double().mean()) < 0.01


# --- Bugs that the check of equality must catch ---


def one_nonce_for_all(sums: Sequence[torch.Tensor], nonces: Sequence[int], key: bytes) -> None:
    for tensor in sums:
        in_pytorch([tensor], [0], key)


def each_tile_with_the_first_keystream(sums: Sequence[torch.Tensor], nonces: Sequence[int], key: bytes) -> None:
    for tensor, nonce in zip(sums, nonces, strict=True):
        for tile in tensor.view(-1).split(1024):
            in_pytorch([tile], [nonce], key)


def unsnapped(sums: Sequence[torch.Tensor], nonces: Sequence[int], key: bytes) -> None:
    before = [tensor.clone() for tensor in sums]
    noise_alone = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in sums]
    in_pytorch(noise_alone, nonces, key)
    for tensor, old, drawn in zip(sums, before, noise_alone, strict=True):
        tensor.copy_(old + drawn)


def beyond_the_end(sums: Sequence[torch.Tensor], nonces: Sequence[int], key: bytes) -> None:
    in_pytorch([torch.as_strided(tensor, (tensor.numel() + 8,), (1,)) for tensor in sums], nonces, key)


@pytest.mark.parametrize("mutant", [one_nonce_for_all, each_tile_with_the_first_keystream, unsnapped, beyond_the_end])
def test_mutant_of_the_noise_is_caught(mutant: Add) -> None:
    check_equals_the_specification(in_pytorch)
    with pytest.raises(AssertionError):
        check_equals_the_specification(mutant)


@interpreted
def test_mutant_kernel_with_sine_and_cosine_swapped_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_noise, "radius_cosine_sine", swapped)
    with pytest.raises(AssertionError):
        check_equals_the_specification(in_a_kernel)


@triton.jit
def swapped(low, high, angle):
    radius, cosine, sine = chacha.radius_cosine_sine(low, high, angle)
    return radius, sine, cosine


# --- Refusals ---


@interpreted
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("nonces", [0]),
        ("nonces", [3, 3]),
        ("nonces", [0, 2**63]),
        ("nonces", [-1, 0]),
        ("key", bytes(31)),
        ("standard_deviation", 0.0),
        ("standard_deviation", math.inf),
        ("grid", 0.3),
        ("grid", 0.0),
        ("sums", [torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)]),
        ("sums", [torch.zeros(3), torch.zeros(3, 4).t()]),
        ("sums", []),
    ],
)
def test_arguments_that_are_not_described_are_refused_in_one_line(argument: str, value: object) -> None:
    arguments = {
        "sums": [torch.zeros(3), torch.zeros(4)], "nonces": [0, 1], "key": bytes(32),
        "standard_deviation": SD, "grid": GRID,
    }  # fmt: skip
    with pytest.raises(ValueError, match=argument) as raised:
        add_gaussian_noise(**(arguments | {argument: value}))
    assert "\n" not in str(raised.value)


def test_a_tensor_on_the_cpu_is_refused_where_nothing_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_noise, "can_add_noise", lambda tensor: tensor.is_cuda)
    with pytest.raises(ValueError, match="cpu"):
        in_a_kernel([torch.zeros(3)], [0], KEY)
