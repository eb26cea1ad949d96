"""Gaussian noise for DP-SGD from ChaCha20 (RFC 8439), keyed afresh by the operating system for every step.

Noise is laid over the clipped sum once per logical step (P16) and nowhere else (P1). This module knows neither the
clipping norm nor the batch: the standard deviation that it is given is the planned one, in units of the sum.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from dpfa_hf._kernel.noise import BLOCKS_PER_TILE, NORMALS_PER_TILE, add_gaussian_noise, can_add_noise
from dpfa_hf.errors import PrivacyError
from dpfa_hf.keystream import TileWords, tile_words

Sums = TypeVar("Sums", dict[str, torch.Tensor], list[torch.Tensor])
# (tensor's index, first element, float64 sums of one chunk) -> the noised sums, in a buffer that the next call reuses.
NoiseChunk = Callable[[int, int, torch.Tensor], torch.Tensor]

# Elements at a time. Of fewer, calling PyTorch costs more than it computes, and threads wait for Python's lock.
_CHUNK = 2**17
_GRID_BITS = 12
_ZERO = torch.zeros((), dtype=torch.float64)
_MERSENNE_WORDS = 624


class BoxMuller:
    """Turns uniform words into as many independent standard normals (Box and Muller, 1958); holds a thread's buffers.

    Guarantee:
        The radius uses all 64 bits: u = (word | 1) / 2**64 is never 0, and its least value gives a radius of 9.42
        standard deviations (P17), where a 32-bit uniform would stop at 6.66. Logarithms are taken in float64; radius,
        cosine and sine are float32, as on a GPU, and are multiplied in float64, where their product is exact. So the
        noise has the 48 bits of both factors, and the share of each point of the grid is smooth to far below float32.
    """

    def __init__(self, tiles: int) -> None:
        pairs = (tiles, 4, BLOCKS_PER_TILE)
        self._word = torch.empty(pairs, dtype=torch.int64)
        self._radius, self._floor = torch.empty((2, *pairs), dtype=torch.float64)
        self._angle, self._cosine = torch.empty((2, *pairs))
        self._normals = torch.empty((tiles, 2, *pairs[1:]), dtype=torch.float64)

    def __call__(self, words: TileWords, scale: float = 1.0) -> torch.Tensor:
        """Returns float64 [1024 tiles], standard normals times `scale`; the next call overwrites them."""
        tiles = words.radius.shape[0]
        word, radius, floor = self._word[:tiles], self._radius[:tiles], self._floor[:tiles]
        angle, cosine, normals = self._angle[:tiles], self._cosine[:tiles], self._normals[:tiles]
        torch.bitwise_or(words.radius, 1, out=word)
        # The bits are those of a number without a sign: where PyTorch reads a negative one, it is short of 2**64.
        radius.copy_(word).mul_(2.0**-64)
        radius.sub_(torch.floor(radius, out=floor)).log_()
        radius.copy_(angle.copy_(radius).mul_(-2.0).sqrt_()).mul_(scale)
        angle.copy_(words.angle).mul_(math.pi * 2.0**-31)
        normals[:, 0].copy_(torch.cos(angle, out=cosine)).mul_(radius)
        normals[:, 1].copy_(angle.sin_()).mul_(radius)
        return normals.view(-1)


class GaussianNoise:
    """Adds independent Gaussian noise to clipped sums, in place.

    Args:
        standard_deviation: of the noise on every coordinate, in units of the sums: noise multiplier times sensitivity.
            0 leaves the sums as they are and is for plans that say NOT PRIVATE.
        generator: "chacha20", or "torch": a private Mersenne Twister whose whole state comes from the operating system
            at every step. The latter is not cryptographic: its output reveals its state (P9).
        floating_point: "snapped", or "hardened": on the CPU alone, `dpfa_hf.hardened_noise.RoundedGaussian`.

    Raises:
        PrivacyError: for a standard deviation that is negative, not finite or too small for float32, an unknown
            generator or floating_point, or the hardened mode without ChaCha20.

    Guarantee:
        Every call of `add_noise` is one logical step and takes fresh key bytes from the operating system. Within a step
        the tensor's position in `sums` is the nonce, and the element's position gives the counter and its place in that
        block (`dpfa_hf.keystream`), so no normal serves two elements, and no key two steps (P9, P17). Neither the
        number of threads nor the chunks change a bit. There is no seed to pass, to save or to restore; torch's and
        numpy's global generators are neither read nor advanced. Snapped, epsilon is for real arithmetic (P18): the grid
        removes the low bits that the simplest floating-point attacks read, it does not prove finite precision.
        Hardened, each result is the ideal Gaussian's, rounded to the grid: epsilon is for the numbers in the machine,
        provided that the sensitivity that is accounted covers the rounding errors of clipping and summing (P15).
    """

    def __init__(
        self,
        standard_deviation: float,
        *,
        generator: str = "chacha20",
        floating_point: str = "snapped",
        _key_source: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if not (standard_deviation == 0 or torch.finfo(torch.float32).tiny <= standard_deviation < math.inf):
            raise PrivacyError(
                f"standard_deviation={standard_deviation} cannot be added in float32: pass a finite positive number, "
                "or 0 for a run that is NOT PRIVATE"
            )
        if generator not in ("chacha20", "torch"):
            raise PrivacyError(f"generator={generator!r} is unknown: choose 'chacha20' or 'torch'")
        if floating_point not in ("snapped", "hardened"):
            raise PrivacyError(f"floating_point={floating_point!r} is unknown: choose 'snapped' or 'hardened'")
        if floating_point == "hardened" and generator != "chacha20":
            raise PrivacyError(
                f"floating_point='hardened' needs as many random bits as a rounding takes, and generator={generator!r} "
                "has 53 for each element: choose generator='chacha20'"
            )
        self.standard_deviation = float(standard_deviation)
        self.generator = generator
        self.floating_point = floating_point
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
            "floating_point_mode": self.floating_point,
            "floating_point": (
                "results are the ideal Gaussian's, rounded to the grid; epsilon needs a sensitivity that covers the "
                "rounding errors of clipping and summing"
                if self.floating_point == "hardened"
                else "epsilon is for real arithmetic; noised sums are snapped to the grid"
            ),
        }

    @torch.no_grad()
    def add_noise(self, sums: Sums) -> Sums:
        """Adds noise to the sums of one logical step, in place, and returns the same object.

        Sums on a GPU are noised there by a Triton kernel, where Triton is installed; all others, and all in the
        hardened mode, on the CPU by `torch.get_num_threads()` threads. Both read the same words of the same keystream;
        their factors differ by a few units in the last place of float32.

        Args:
            sums: float32 or float64 tensors of any shape on any device, the clipped sums over the whole logical batch
                after every reduction over micro-batches and ranks. An empty batch is a step too: pass zeros (P7).

        Returns:
            `sums`. Each element is (sum + noise), computed in float64, rounded to a multiple of `grid` and then to the
            tensor's dtype; no zero is negative. The extra memory is 6 MiB a thread, 8 MiB in the hardened mode, plus a
            copy of every tensor that is not contiguous.

        Raises:
            PrivacyError: if there is no tensor, a tensor is below float32 or appears twice (before anything is noised),
                or a result is not finite (the step is then void: discard all sums).
        """
        named = list(sums.items()) if isinstance(sums, dict) else [(str(i), tensor) for i, tensor in enumerate(sums)]
        _check(named)
        if self.standard_deviation == 0:
            return sums
        tensors = [tensor.detach() for _, tensor in named]
        flats = {index: tensor.reshape(-1) for index, tensor in enumerate(tensors)}
        if self.generator == "torch":
            private_generator = _fresh_mersenne_twister(self._key_source)
            broken = _noise_chunks(flats, lambda: self._from_torch(private_generator), threads=1)
        else:
            key = self._key_source(32)
            on_gpu = {} if self.floating_point == "hardened" else {i: x for i, x in flats.items() if can_add_noise(x)}
            pending = self._add_on_gpus(on_gpu, key)
            elsewhere = {index: flat for index, flat in flats.items() if index not in on_gpu}
            broken = _noise_chunks(elsewhere, lambda: self._from_chacha20(key), threads=torch.get_num_threads())
            for indices, flags in pending:
                broken |= {index for index, flag in zip(indices, flags.tolist(), strict=True) if flag}
        if broken:
            raise PrivacyError(
                f"the noised sum of {named[min(broken)][0]!r} is not finite: a clipped sum must be (P15), check the "
                "clipping of that module"
            )
        for index, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                tensor.copy_(flats[index].view(tensor.shape))
        return sums

    def _add_on_gpus(self, flats: Mapping[int, torch.Tensor], key: bytes) -> list[tuple[list[int], torch.Tensor]]:
        """Starts the noise of each device; returns indices and, still on the device, whether a result is not finite."""
        pending = []
        for device in {flat.device for flat in flats.values()}:
            here = {index: flat for index, flat in flats.items() if flat.device == device}
            flags = add_gaussian_noise(
                list(here.values()), list(here), key, standard_deviation=self.standard_deviation, grid=self.grid
            )
            pending.append((list(here), flags))
        return pending

    def _from_chacha20(self, key: bytes) -> NoiseChunk:
        tiles = _CHUNK // NORMALS_PER_TILE
        if self.floating_point == "hardened":
            from dpfa_hf.hardened_noise import RoundedGaussian

            return RoundedGaussian(key, self.standard_deviation, self.grid, tiles)
        box_muller = BoxMuller(tiles)

        def noise_chunk(index: int, start: int, sums: torch.Tensor) -> torch.Tensor:
            words = tile_words(key, index, start // NORMALS_PER_TILE, -(-sums.numel() // NORMALS_PER_TILE))
            return self._snapped(box_muller(words, self.standard_deviation / self.grid)[: sums.numel()], sums)

        return noise_chunk

    def _from_torch(self, generator: torch.Generator) -> NoiseChunk:
        def noise_chunk(index: int, start: int, sums: torch.Tensor) -> torch.Tensor:
            normals = torch.randn(sums.numel(), dtype=torch.float64, generator=generator)
            return self._snapped(normals.mul_(self.standard_deviation / self.grid), sums)

        return noise_chunk

    def _snapped(self, noise: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Sums plus noise that is in units of the grid, in the noise's memory."""
        return scale_by_grid(noise.add_(sums, alpha=1.0 / self.grid).round_(), self.grid)


def scale_by_grid(integers: torch.Tensor, grid: float) -> torch.Tensor:
    """Multiplies in place, and makes every zero positive: the sign of one would tell on which side of it a sum lay."""
    return torch.add(_ZERO, integers, alpha=grid, out=integers)


def _noise_chunks(
    flats: Mapping[int, torch.Tensor], make_noise_chunk: Callable[[], NoiseChunk], *, threads: int
) -> set[int]:
    """Noises tensors of one dimension in place, by as many threads; returns the indices of those not finite."""
    chunks = ((index, start) for index, flat in flats.items() for start in range(0, flat.numel(), _CHUNK))
    lock = threading.Lock()

    def work() -> set[int]:
        noise_chunk, buffer, broken = make_noise_chunk(), torch.empty(_CHUNK, dtype=torch.float64), set()
        for index, start in _taken(chunks, lock):
            chunk = flats[index][start : start + _CHUNK]
            chunk.copy_(noise_chunk(index, start, buffer[: chunk.numel()].copy_(chunk)))
            if not np.isfinite(chunk.cpu().numpy()).all():
                broken.add(index)
        return broken

    threads = min(threads, sum(-(-flat.numel() // _CHUNK) for flat in flats.values()))
    if threads <= 1:
        return work()
    # These threads are all there are: none calls for more of PyTorch's own. What `set_num_threads` says holds for the
    # thread that says it and for those that start later, so it is said again here.
    of_pytorch = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return set().union(*(running.result() for running in [pool.submit(work) for _ in range(threads)]))
    finally:
        torch.set_num_threads(of_pytorch)


def _taken(chunks: Iterator[tuple[int, int]], lock: threading.Lock) -> Iterator[tuple[int, int]]:
    """What one thread takes of the chunks that all share."""
    while True:
        with lock:
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk


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
