"""Two neighbouring data sets, the same draws, no noise: how far one unit moves a step, and who else hears of it.

A private step is three things one after another: a clipped sum, which one unit moves by no more than the sensitivity;
noise; and whatever is made of the noised sum, which may be anything that does not look at the rows. Each is tried by
itself. The two data sets are trained on side by side, from the same weights and seeds. The sums that reach the noise
are compared. In the place of the noise both then get the same made-up numbers, so that all that comes later must be
equal, bit for bit: gradients at the optimiser, weights and logs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpfa_hf.audit.results import Check
from dpfa_hf.audit.steps import (
    Observer,
    Row,
    Run,
    Tensors,
    Units,
    columns_of,
    invented_rows,
    longest,
    ready_to_compute,
    run_steps,
)
from dpfa_hf.audit.subject import NEWCOMERS, Subject, half_precision, trainable

CLIPPED_SUM, AFTER_NOISE, EVERY_STEP, BEFORE_STEP_1 = "clipped sum", "after the noise", "every step", "before step 1"
# Beyond the plan's own slack, for models whose gradients are nearly zero: a few units in the last place.
_ROUNDING = 2.0**-10
_BYSTANDERS = range(12)
_ALIGNED = 12  # one more by-stander, and many times itself in its regime
_ALIGNED_COPIES = range(24, 31)
_MOST_BYTES = 3 * 2**30


@dataclass(frozen=True)
class _Pair:
    """One step on two data sets: the draw, and the unit that one of them has beside."""

    regime: str
    newcomer: str
    bystanders: tuple[int, ...]
    unit: int | None


class _Replay(Observer):
    """Keeps the sums, in files, and what comes after made-up noise, as digests."""

    def __init__(self, trainer: Any, norms: Sequence[float], folder: Path) -> None:
        self.trainer, self.norms, self.folder = trainer, norms, folder
        self.sums: list[Path] = []
        self.after: list[str] = []
        folder.mkdir()

    def before_step(self, step: int) -> None:
        self.trainer._engine.clipping_norm = self.norms[step]

    @torch.no_grad()
    def noise(self, step: int, sums: Tensors, add_noise: Callable[[Tensors], None]) -> None:
        path = self.folder / f"{step}.npy"
        if len(self.sums) == step:
            np.save(path, torch.cat([total.detach().flatten().float() for total in sums.values()]).numpy())
            self.sums.append(path)
        generator = torch.Generator().manual_seed(step)
        for total in sums.values():
            total.copy_(torch.randn(total.shape, generator=generator, dtype=torch.float32))

    def released(self, step: int, gradients: Tensors) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for gradient in gradients.values():
            digest.update(gradient.detach().float().contiguous().numpy().data)
        self.after.append(f"{step}:{digest.hexdigest()}")


def replay(subject: Subject, folder: Path, mutate: Callable[[Any], None] | None = None) -> list[Check]:
    """Four checks; `mutate` plants a bug into each trainer that is built. `folder` is created."""
    folder.mkdir()
    trainers = [subject.build(other) for other in (False, True)]
    same_start = _same_weights(*trainers)
    first = trainers[0]
    columns = columns_of(first, first._task)
    rows = _rows(first, columns)
    with torch.random.fork_rng(devices=[]):
        norms = _norms(trainers[0], rows)
    pairs, regimes = _pairs(first, norms)
    for trainer in trainers:
        if half_precision(trainer):
            trainer._micro_batch_size = 1
        if mutate is not None:
            mutate(trainer)
    units = Units(subject.num_units, rows)
    runs: list[Run] = []
    observers = []
    for number, trainer in enumerate(trainers):
        draws = [[*pair.bystanders, *([pair.unit] if number and pair.unit is not None else [])] for pair in pairs]
        observer = _Replay(trainer, [regimes[pair.regime] for pair in pairs], folder / f"replay-{number}")
        torch.manual_seed(0)
        runs.append(run_steps(trainer, units, observer, draws=draws))
        observers.append(observer)
    plan = first.privacy_plan
    return [
        _clipped_sum(pairs, observers, regimes, plan.joint_sensitivity, plan.sensitivity_slack, first),
        _after_noise(runs, observers, first),
        _every_step(runs, len(pairs)),
        Check(
            BEFORE_STEP_1,
            same_start,
            "Built anew with other rows in the place of some units, the trainer begins with the same weights.",
        ),
    ]


def _rows(trainer: Any, columns: Any) -> dict[int, Row]:
    length = longest(trainer.model)
    lengths = np.random.default_rng(0).integers(2, max(length // 4, 3), len(_BYSTANDERS)).tolist()
    rows = invented_rows(trainer, columns, [*lengths, max(min(length // 4, 4), 2), length, 2, length])
    found = dict(enumerate(rows[: _ALIGNED + 1]))
    newcomers = sorted(NEWCOMERS)
    found[newcomers[0]], found[newcomers[1]], repeated = rows[-3:]
    found[newcomers[2]] = {name: _repeated(value) for name, value in repeated.items()}
    if isinstance(repeated.get("labels"), list) and isinstance(repeated.get("input_ids"), list):
        found[newcomers[2]]["labels"] = found[newcomers[2]]["input_ids"]  # where a tied weight's two uses meet
    found[newcomers[3]] = found[_ALIGNED]
    found |= dict.fromkeys(_ALIGNED_COPIES, found[_ALIGNED])
    impossible = dict(rows[-3])
    for name, column in columns.items():
        if name in ("labels", "label") and column.kind == "int":
            impossible[name] = [10**6] * len(impossible[name]) if column.shape else 10**6
            found[newcomers[4]] = impossible
    return found


_NEWCOMERS = (
    "as long as the model takes",
    "two tokens",
    "one token repeated",
    "the same as the others",
    "an impossible label",
)


def _repeated(value: Any) -> Any:
    return value[-1:] * len(value) if isinstance(value, list) else value


def _norms(trainer: Any, rows: dict[int, Row]) -> dict[int, float]:
    """Norms of the by-standers' whole gradients."""
    ready_to_compute(trainer, Units(trainer.privacy_plan.num_units, rows))
    engine, found = trainer._engine, {}
    for unit in (*_BYSTANDERS, _ALIGNED):
        for batch in trainer._batches[trainer._batches.units(np.array([unit]))]:
            with trainer._forward_context(), engine.attached(), torch.enable_grad():
                _, calls = engine.backward(dict(trainer._prepare_inputs(dict(batch))))
            with torch.no_grad():
                norms = engine.norms(engine._uses(calls), 1, torch.device("cpu"))
            found[unit] = float(norms.square().sum().sqrt())
    return found


def _pairs(trainer: Any, norms: dict[int, float]) -> tuple[list[_Pair], dict[str, float]]:
    """The steps, and by regime the clipping norm: that of the plan, one that clips everybody, one that clips nobody."""
    usual = [norms[unit] for unit in _BYSTANDERS if norms.get(unit, 0.0) > 0]
    planned = trainer.privacy_plan.clipping_norm
    regimes = {
        "by-standers just below C": norms.get(_ALIGNED, 0.0) * 1.001 or planned,
        "everybody clipped": min(usual, default=8 * planned) / 8,
        "the plan's C": planned,
    }
    aligned = (_ALIGNED, *_ALIGNED_COPIES)
    newcomers = dict(zip(_NEWCOMERS, sorted(NEWCOMERS), strict=False))
    existing = newcomers if trainer._task is not None else dict(list(newcomers.items())[:4])
    pairs = [
        _Pair(regime, name, aligned if regime.startswith("by-standers") else tuple(_BYSTANDERS), unit)
        for regime in regimes
        for name, unit in existing.items()
    ]
    most = max(_MOST_BYTES // (8 * trainable(trainer)) - 2, 3)
    if len(pairs) > most:  # the very long newcomer in every regime is what tells most
        pairs = sorted(pairs, key=lambda pair: list(newcomers).index(pair.newcomer))[:most]
    nobody = _Pair("the plan's C", "alone in its batch", (), sorted(NEWCOMERS)[0])
    return [*pairs, nobody, _Pair("the plan's C", "nobody", tuple(_BYSTANDERS), None)], regimes


def _clipped_sum(
    pairs: list[_Pair], observers: list[_Replay], regimes: dict[str, float], joint: float, slack: float, trainer: Any
) -> Check:
    worst, where, moved, largest = 0.0, "", False, 0.0
    allowed = joint * (1 + max(slack, _ROUNDING))
    complete = all(len(observer.sums) == len(pairs) for observer in observers)
    for pair, *paths in zip(pairs, *(observer.sums for observer in observers), strict=False):
        with_it, without = (np.load(path, mmap_mode="r") for path in paths)
        distance = _distance(with_it, without) / regimes[pair.regime] if with_it.shape == without.shape else math.inf
        moved |= distance > 0.1
        # Two equal draws must give equal sums, but for rounding.
        share = distance / (allowed if pair.unit is not None else max(slack, _ROUNDING))
        if share >= worst:
            worst, largest, where = share, distance, f"{pair.regime}; newcomer: {pair.newcomer}"
    figures = {
        "largest_move": largest if math.isfinite(largest) else "inf",
        "allowed_move": largest / worst if 0 < worst < math.inf else allowed,
        "unit": "clipping norms",
        "where": where,
        "pairs_of_steps": len(pairs),
    }
    if half_precision(trainer):
        figures["micro_batch"] = 1
    return Check(
        CLIPPED_SUM,
        complete and moved and worst <= 1,
        "One unit more moves the sum that is noised by no more than the sensitivity, whoever the others are.",
        figures,
    )


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(a), 2**22):
        part = a[start : start + 2**22].astype(np.float64) - b[start : start + 2**22]
        total += float(part @ part)
    return math.sqrt(total) if math.isfinite(total) else math.inf


def _after_noise(runs: list[Run], observers: list[_Replay], trainer: Any) -> Check:
    same = observers[0].after == observers[1].after and len(observers[0].after) > 0
    logged = trainer._privacy_args.log_private_metrics
    figures = {
        "gradients_equal": same,
        "logs_equal": None if logged else runs[0].logs == runs[1].logs,
        "weights_moved_by_the_optimiser_alone": not any(run.weights_moved for run in runs),
    }
    what = "Once the noise is the same, nothing that follows tells the two data sets apart"
    what += ", logs aside, in which the operator wants private figures." if logged else ": gradients, weights and logs."
    return Check(AFTER_NOISE, all(value is not False for value in figures.values()), what, figures)


def _every_step(runs: list[Run], steps: int) -> Check:
    figures = {
        "steps": steps,
        "noised_once": all(run.noised == [1] * steps for run in runs),
        "optimised_once": all(run.optimised == [1] * steps for run in runs),
        "in_the_ledger_before_the_noise": all(run.charged == [True] * steps for run in runs),
    }
    what = "Every step, the empty one too, is written to the ledger, noised once, and taken by the optimiser once."
    return Check(EVERY_STEP, all(value is not False for value in figures.values()), what, figures)


def _same_weights(one: Any, other: Any) -> bool:
    left, right = dict(one.model.named_parameters()), dict(other.model.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[name].detach(), right[name].detach()) for name in left)
