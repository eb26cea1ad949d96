"""Whether the noise of real steps is what the plan says: its law, its independence, its grid, its keys.

Residuals are what the trainer's own step adds to its clipped sums. Under the plan they are independent normal numbers
with one known standard deviation, so that each statistic has a known law, and a threshold can be set for a stated
probability of a false alarm over all of them together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dpfa_hf import noise as noise_module
from dpfa_hf.audit.results import Check
from dpfa_hf.audit.steps import Observer, Tensors, Units, columns_of, invented_rows, run_steps, seed_everything
from dpfa_hf.audit.subject import Subject, trainable
from dpfa_hf.keystream import TileWords

NOISE_LAW, NOISE_SUPPORT = "noise law", "noise support"
FALSE_ALARM = 1e-6
"""Probability that sound noise fails "noise law": divided evenly among its tests, and within each among what it looks
at."""
_TESTS = 8
_WANTED, _MOST_STEPS, _MOST_NUMBERS = 300_000, 64, 60_000_000
_TAILS = (1.0, 2.0, 3.0, 4.0)
_LEAST_SUPPORT = 9.0  # standard deviations (P17)
_UNITS = 6


class _Residuals(Observer):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.steps: list[Tensors] = []
        self.sums: list[np.ndarray] = []
        self.alone: list[np.ndarray] = []  # noised sums of empty steps, which are nothing but noise
        self.grid_kept = True

    @torch.no_grad()
    def noise(self, step: int, sums: Tensors, add_noise: Callable[[Tensors], None]) -> None:
        before = {name: total.detach().clone() for name, total in sums.items()}
        add_noise(sums)
        scale = self.trainer.privacy_plan.clipping_norm / self.trainer._engine.clipping_norm
        self.steps.append({n: ((t.double() - before[n].double()) * scale).float().flatten() for n, t in sums.items()})
        grid = getattr(self.trainer._step.noise, "grid", 0.0)
        flat = torch.cat([total.flatten().double()[: 2**17] for total in sums.values()])
        self.grid_kept &= grid > 0 and torch.equal(flat, (flat / grid).round() * grid)
        before_flat = torch.cat([total.flatten() for total in before.values()]).numpy()
        if before_flat.any():
            self.sums.append(before_flat)
        else:
            self.alone.append(flat.numpy())


def noise_law(subject: Subject, mutate: Callable[[Any], None] | None = None) -> list[Check]:
    """Two checks, on two runs that began with the same seeds."""
    runs = []
    for _ in range(2):
        trainer = subject.build(False)
        if mutate is not None:
            mutate(trainer)
        rows = dict(enumerate(invented_rows(trainer, columns_of(trainer, trainer._task), [8] * _UNITS)))
        size = trainable(trainer)
        # Both runs together: enough numbers for a small model, and no more than memory has room for in a large one.
        steps = max(min(math.ceil(_WANTED / size / 2), _MOST_STEPS, _MOST_NUMBERS // size), 2)
        observer = _Residuals(trainer)
        seed_everything()
        run_steps(trainer, Units(subject.num_units, rows), observer, draws=[[], range(_UNITS)] * (steps // 2))
        runs.append(observer)
    plan = trainer.privacy_plan
    return [_law(runs, plan.noise_standard_deviation, snapped=True), _support(trainer)]


def _law(runs: list[_Residuals], deviation: float, *, snapped: bool) -> Check:
    from scipy import stats

    what = "The noise of real steps has the planned law, in every tensor, and no two steps or runs share any of it."
    steps = [step for run in runs for step in run.steps]
    if deviation == 0 or not steps or len({tuple(step) for step in steps}) != 1:
        return Check(NOISE_LAW, False, what, {"broken": ["no noise"], "false_alarm": FALSE_ALARM})
    vectors = [torch.cat(list(step.values())).numpy() / np.float32(deviation) for step in steps]
    count = sum(map(len, vectors))
    total = float(sum(np.sum(vector, dtype=np.float64) for vector in vectors))
    squares = [float(np.dot(vector, vector)) if len(vector) < 2**16 else _dot(vector, vector) for vector in vectors]
    alarm = FALSE_ALARM / _TESTS
    broken = []

    def off(squared: float, number: int, among: int) -> bool:
        return bool(2 * min(stats.chi2.cdf(squared, number), stats.chi2.sf(squared, number)) < alarm / among)

    def correlated(x: np.ndarray, y: np.ndarray, among: int) -> bool:
        # Given y, the inner product with normal noise x is exactly normal, with standard deviation |y|.
        size = min(len(x), len(y))
        length = math.sqrt(_dot(y[:size], y[:size]))
        return length > 0 and abs(_dot(x[:size], y[:size])) / length > stats.norm.isf(alarm / among / 2)

    if abs(total) / math.sqrt(count) > stats.norm.isf(alarm / 2):
        broken.append("mean")
    if any(off(squared, len(vector), len(vectors) + 1) for squared, vector in zip(squares, vectors, strict=True)):
        broken.append("variance of a step")
    if off(sum(squares), count, len(vectors) + 1):
        broken.append("variance")
    names = list(steps[0])
    by_tensor = {name: sum(_dot(step[name].numpy(), step[name].numpy()) for step in steps) for name in names}
    for name, squared in by_tensor.items():
        if off(squared / deviation**2, sum(step[name].numel() for step in steps), len(names)):
            broken.append(f"variance of {name}")
            break
    for bound in _TAILS:
        beyond = sum(int((np.abs(vector) > bound).sum()) for vector in vectors)
        probability = 2 * float(stats.norm.sf(bound))
        tail = min(stats.binom.cdf(beyond, count, probability), stats.binom.sf(beyond - 1, count, probability))
        if 2 * tail < alarm / len(_TAILS):
            broken.append(f"share beyond {bound:g} standard deviations")
            break
    pairs = list(itertools.combinations(vectors, 2))
    if any(correlated(x, y, len(pairs)) for x, y in pairs):
        broken.append("steps or runs share noise")
    lags = [1, 2, 3, 1024]
    if any(correlated(vector[lag:], vector[:-lag], len(lags) * len(vectors)) for lag in lags for vector in vectors):
        broken.append("neighbouring coordinates share noise")
    with_units = [vector for run in runs for vector, step in _with_sums(run)]
    sums = [total for run in runs for total in run.sums]
    if any(correlated(x / np.float32(deviation), y, len(sums)) for x, y in zip(with_units, sums, strict=True)):
        broken.append("noise follows the clipped sum")
    # Not by chance: sound noise has thousands of points within one standard deviation, half precision 128 in an octave.
    coarse = float(np.mean([_in_half_precision(alone) for run in runs for alone in run.alone] or [1.0]))
    if coarse > 0.5:
        broken.append("half precision")
    if snapped and not all(run.grid_kept for run in runs):
        broken.append("grid")
    largest = max(float(np.abs(vector).max()) for vector in vectors)
    return Check(
        NOISE_LAW,
        not broken,
        what,
        {
            "broken": broken,
            "false_alarm": FALSE_ALARM,
            "numbers": count,
            "steps": len(vectors),
            "runs": len(runs),
            "standard_deviation_over_planned": math.sqrt(sum(squares) / count),
            "largest_in_standard_deviations": largest,
        },
    )


def _with_sums(run: _Residuals) -> list[tuple[np.ndarray, int]]:
    """The residuals of steps that had units; empty ones alternate with them."""
    return [(torch.cat(list(step.values())).numpy(), place) for place, step in enumerate(run.steps) if place % 2]


def _dot(x: np.ndarray, y: np.ndarray) -> float:
    chunk = 2**20
    return float(
        sum(
            x[start : start + chunk].astype(np.float64) @ y[start : start + chunk].astype(np.float64)
            for start in range(0, len(x), chunk)
        )
    )


def _in_half_precision(values: np.ndarray) -> float:
    """Share of the numbers that are bfloat16's."""
    numbers = torch.from_numpy(values).float()
    return float((numbers.bfloat16().float() == numbers).float().mean())


def _support(trainer: Any) -> Check:
    """The largest noise that the trainer's own generator can give, from the rarest word of its keystream (P17)."""
    noise = trainer._step.noise
    what = f"The rarest word of the keystream gives noise beyond {_LEAST_SUPPORT:g} standard deviations."
    if noise.generator != "chacha20" or noise.floating_point != "snapped":
        return Check(NOISE_SUPPORT, True, f"Not looked at: noise is {noise.generator}, {noise.floating_point}.")
    original = noise_module.tile_words

    def rarest(key: bytes, nonce: int, first_tile: int, tiles: int) -> TileWords:
        words = original(key, nonce, first_tile, tiles)
        return TileWords(*(torch.zeros_like(each) for each in words))

    sums = {"a": torch.zeros(1024), "b": torch.zeros(1024)}
    noise_module.tile_words = rarest
    try:
        noise.add_noise(sums)
    finally:
        noise_module.tile_words = original
    deviation = trainer.privacy_plan.noise_standard_deviation_at(trainer._engine.clipping_norm)
    largest = float(sums["a"].abs().max()) / deviation if deviation else 0.0
    return Check(NOISE_SUPPORT, largest > _LEAST_SUPPORT, what, {"largest_in_standard_deviations": largest})
