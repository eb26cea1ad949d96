"""Gaussian noise for DP-SGD from ChaCha20 (RFC 8439), keyed afresh by the operating system for every step.

Noise is laid over the clipped sum once per logical step (P16) and nowhere else (P1). This module knows neither the
clipping norm nor the batch: the standard deviation that it is given is the planned one, in units of the sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from dpfa_hf.errors import PrivacyError

Sums = TypeVar("Sums", dict[str, torch.Tensor], list[torch.Tensor])

_NORMALS_PER_BLOCK = 8  # one ChaCha20 block is 64 bytes: four 64-bit radii and four 64-bit angles
_CHUNK = 2**18  # normals at a time; bounds the extra memory to about 16 MB whatever the model's size
_ZEROS = bytes(8 * _CHUNK)
_GRID_BITS = 12
_MERSENNE_WORDS = 624


def chacha20_keystream(key: bytes, nonce: int, counter: int, length: int) -> bytearray:
    """Returns `length` <= 2 MiB of the ChaCha20 keystream, beginning at 64-byte block `counter`.

    Args:
        key: 32 bytes.
        nonce: 0 <= nonce < 2**64.
        counter: 0 <= counter < 2**64; the original layout of the cipher (64-bit counter, 64-bit nonce), which agrees
            with RFC 8439 (32-bit counter, 96-bit nonce) wherever the same sixteen bytes are meant.
        length: bytes.
    """
    state = counter.to_bytes(8, "little") + nonce.to_bytes(8, "little")
    stream = bytearray(length)  # writable, as torch wants it
    Cipher(ChaCha20(key, state), mode=None).encryptor().update_into(memoryview(_ZEROS)[:length], stream)
    return stream


def box_muller(words: np.ndarray) -> torch.Tensor:
    """Turns uniform 64-bit words into as many independent standard normals (Box and Muller, 1958).

    Args:
        words: uint64 [8 k], whole ChaCha20 blocks. Normals 8 b to 8 b + 7 come from block b alone, so that the noise of
            an element does not depend on how a tensor is cut into chunks.

    Returns:
        float64 [8 k] on the CPU.

    Guarantee:
        The radius uses all 64 bits: u = (word + 1) / 2**64 is never 0, and its least value gives a radius of 9.42
        standard deviations (P17), where a 32-bit uniform would stop at 6.66.
    """
    blocks = words.reshape(-1, _NORMALS_PER_BLOCK)
    half = _NORMALS_PER_BLOCK // 2
    radius = torch.from_numpy(blocks[:, :half].astype(np.float64))
    radius.add_(1.0).mul_(2.0**-64).log_().mul_(-2.0).sqrt_()
    signed = torch.from_numpy(words.view(np.int64)).view(-1, _NORMALS_PER_BLOCK)
    angle = signed[:, half:].to(torch.float64).mul_(math.pi * 2.0**-63)
    return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1).view(-1)


class GaussianNoise:
    """Adds independent Gaussian noise to clipped sums, in place.

    Args:
        standard_deviation: of the noise on every coordinate, in units of the sums: noise multiplier times sensitivity.
            0 leaves the sums as they are and is for plans that say NOT PRIVATE.
        generator: "chacha20", or "torch": a private Mersenne Twister whose whole state comes from the operating system
            at every step. The latter is not cryptographic: its output reveals its state (P9).

    Raises:
        PrivacyError: for a standard deviation that is negative, not finite or too small for float32, or an unknown
            generator.

    Guarantee:
        Every call of `add_noise` is one logical step and takes fresh key bytes from the operating system. Within a step
        the tensor's position in `sums` is the nonce and the element's position divided by eight is the counter, so no
        normal serves two elements, and no key two steps (P9, P17). There is no seed to pass, to
        save or to restore; torch's and numpy's global generators are neither read nor advanced. Epsilon is for real
        arithmetic (P18): snapping removes the low bits that the simplest floating-point attacks read, it does not prove
        finite precision.
    """

    def __init__(
        self,
        standard_deviation: float,
        *,
        generator: str = "chacha20",
        _key_source: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if not (standard_deviation == 0 or torch.finfo(torch.float32).tiny <= standard_deviation < math.inf):
            raise PrivacyError(
                f"standard_deviation={standard_deviation} cannot be added in float32: pass a finite positive number, "
                "or 0 for a run that is NOT PRIVATE"
            )
        if generator not in ("chacha20", "torch"):
            raise PrivacyError(f"generator={generator!r} is unknown: choose 'chacha20' or 'torch'")
        self.standard_deviation = float(standard_deviation)
        self.generator = generator
        self._key_source = _key_source

    @property
    def seeded_by_caller(self) -> bool:
        """Whether somebody other than the operating system supplies the key: such a run is NOT PRIVATE."""
        return self._key_source is not os.urandom

    @property
    def grid(self) -> float:
        """Spacing of the results, a power of two between sd / 8192 and sd / 4096; 0.0 without noise."""
        if self.standard_deviation == 0:
            return 0.0
        _, exponent = math.frexp(self.standard_deviation)
        return math.ldexp(1.0, exponent - 1 - _GRID_BITS)

    def describe(self) -> dict[str, str | float | bool]:
        """Returns what the report states about the noise (P25); JSON-serialisable."""
        return {
            "generator": self.generator,
            "cryptographic": self.generator == "chacha20" and not self.seeded_by_caller,
            "private": self.standard_deviation > 0 and not self.seeded_by_caller,
            "key": "NOT PRIVATE: seeded by the caller" if self.seeded_by_caller else "operating system, new every step",
            "standard_deviation": self.standard_deviation,
            "grid": self.grid,
            "floating_point": "epsilon is for real arithmetic; noised sums are snapped to the grid",
        }

    @torch.no_grad()
    def add_noise(self, sums: Sums) -> Sums:
        """Adds noise to the sums of one logical step, in place, and returns the same object.

        Args:
            sums: float32 or float64 tensors of any shape on any device, the clipped sums over the whole logical batch
                after every reduction over micro-batches and ranks. An empty batch is a step too: pass zeros (P7).

        Returns:
            `sums`. Each element is (sum + noise), computed in float64, rounded to a multiple of `grid` and then to the
            tensor's dtype. The extra memory is a few chunks, plus one copy of a tensor that is not contiguous.

        Raises:
            PrivacyError: if there is no tensor, a tensor is below float32 or appears twice (before anything is noised),
                or a result is not finite (the step is then void: discard all sums).
        """
        named = list(sums.items()) if isinstance(sums, dict) else [(str(i), tensor) for i, tensor in enumerate(sums)]
        _check(named)
        if self.standard_deviation == 0:
            return sums
        normals = self._normals_of_a_step()
        for index, (name, tensor) in enumerate(named):
            flat = tensor.detach().reshape(-1)
            for start in range(0, flat.numel(), _CHUNK):
                chunk = flat[start : start + _CHUNK]
                noised = normals(index, start, chunk.numel()).mul_(self.standard_deviation)
                noised.add_(chunk.to("cpu", torch.float64))
                noised.mul_(1.0 / self.grid).round_().mul_(self.grid)
                rounded = noised.to(chunk.dtype)
                if not math.isfinite(rounded.sum(dtype=torch.float64)):  # three times faster than isfinite().all()
                    raise PrivacyError(
                        f"the noised sum of {name!r} is not finite: a clipped sum must be (P15), check the clipping "
                        "of that module"
                    )
                chunk.copy_(rounded)
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat.view(tensor.shape))
        return sums

    def _normals_of_a_step(self) -> Callable[[int, int, int], torch.Tensor]:
        """Takes fresh key bytes and returns (tensor index, first element, count) -> float64 standard normals."""
        if self.generator == "torch":
            private_generator = _fresh_mersenne_twister(self._key_source)
            return lambda index, start, count: torch.randn(count, dtype=torch.float64, generator=private_generator)

        key = self._key_source(32)

        def normals(index: int, start: int, count: int) -> torch.Tensor:
            blocks = -(-count // _NORMALS_PER_BLOCK)
            stream = chacha20_keystream(key, index, start // _NORMALS_PER_BLOCK, 64 * blocks)
            return box_muller(np.frombuffer(stream, dtype="<u8"))[:count]

        return normals


def _check(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    seen: dict[tuple[torch.device, int], str] = {}
    names = 0
    for name, tensor in named:
        names += 1
        if tensor.dtype not in (torch.float32, torch.float64):
            raise PrivacyError(f"the sum {name!r} is {tensor.dtype}: accumulate it in float32 or float64 (P14)")
        if tensor.numel() and (other := seen.setdefault((tensor.device, tensor.data_ptr()), name)) != name:
            raise PrivacyError(f"the sums {other!r} and {name!r} share memory: pass a tied tensor once")
    if not names:
        raise PrivacyError("sums is empty, so no noise would be added: pass the clipped sum of every trainable tensor")


def _fresh_mersenne_twister(key_source: Callable[[int], bytes]) -> torch.Generator:
    # manual_seed would keep 32 bits of its argument, and two steps in a hundred thousand would then share their noise.
    generator = torch.Generator()
    state = generator.get_state()
    first = 3  # 64-bit words before the twister's own: the seed, two flags, the position
    words = np.frombuffer(key_source(4 * _MERSENNE_WORDS), dtype="<u4").astype(np.int64)
    state.view(torch.int64)[first : first + _MERSENNE_WORDS] = torch.from_numpy(words)
    generator.set_state(state)
    return generator
