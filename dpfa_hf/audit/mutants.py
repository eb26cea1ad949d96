"""Bugs that the audit plants itself, so that its result says that this very audit could have failed.

Each takes a private trainer and breaks its guarantee; the check that is named must then fail. They are tried on a tiny
language model with a tied embedding, whose canaries are far apart, in seconds. Not here, since no such audit sees them:
bugs of several processes, of resuming, of documents, and of what the card says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from dpfa_hf.audit import canaries, draws, noise_law, replay
from dpfa_hf.audit.results import Check, Mutant
from dpfa_hf.audit.subject import Subject, own_plan, subject_of
from dpfa_hf.batch_selection import TruncatedPoissonSampler
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example import layers

Mutate = Callable[[Any], None]
_CANARY_SECONDS = 20.0


def tiny_subject(folder: Path) -> Subject:
    """What mutants are planted in."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = GPT2Config(
            vocab_size=1000,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
        model = GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    return subject_of(model, "causal_lm", own_plan(), folder)


# ---- clipped sums ---------------------------------------------------------------------------------------------------


def clipping_off(trainer: Any) -> None:
    trainer._engine.coefficients = lambda norms: torch.isfinite(norms).double()


def clipping_by_batch(trainer: Any) -> None:
    """The mean of a micro-batch is clipped, not each unit."""

    def coefficients(norms: torch.Tensor) -> torch.Tensor:
        mean = torch.where(torch.isfinite(norms), norms, 0.0).mean()
        return torch.isfinite(norms) * (trainer._engine.clipping_norm / mean.clamp_min(trainer._engine.clipping_norm))

    trainer._engine.coefficients = coefficients


def tied_term_dropped(trainer: Any) -> None:
    """A tied weight's uses are taken for weights of their own."""
    engine, whole, together = trainer._engine, trainer._engine.norms, trainer._engine._uses

    def apart(calls: Any) -> Any:
        with mock.patch.object(layers, "write_out", lambda parts: parts):  # which adds them up where rows are long
            return together(calls)

    def norms(uses: Any, size: int, device: torch.device) -> torch.Tensor:
        each = [{name: [part]} for name, parts in uses.items() for part in parts]
        squares = [whole(use, size, device).square() for use in each]
        return sum(squares, torch.zeros_like(squares[0])).sqrt()

    engine._uses, engine.norms = apart, norms


def batch_mean_loss(trainer: Any) -> None:
    """Trainer's default: divided by the tokens of the whole micro-batch, however many its units have."""
    own, step = trainer._engine.loss, trainer.training_step

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        mask = batch["attention_mask"]
        return own(model, batch) * mask.shape[0] * 4 / mask.sum()

    def training_step(*inputs: Any) -> torch.Tensor:
        trainer._engine.loss = loss  # only now: the checks before step 1 would refuse it
        return step(*inputs)

    trainer.training_step = training_step


# ---- after the noise, and in every step -----------------------------------------------------------------------------


def divided_by_the_batch(trainer: Any) -> None:
    step = trainer.training_step

    def training_step(model: nn.Module, inputs: tuple, *rest: Any) -> torch.Tensor:
        loss = step(model, inputs, *rest)
        for parameter in model.parameters():
            parameter.grad *= trainer.privacy_plan.expected_batch_size / max(len(inputs[0]), 1)
        return loss

    trainer.training_step = training_step


def gradient_scaled_by_the_loss(trainer: Any) -> None:
    """A callback touches the gradients, and looks at the rows."""
    accumulate, seen = trainer._accumulate, []

    def accumulating(*inputs: Any) -> torch.Tensor:
        seen.append(float(accumulate(*inputs)))
        return torch.tensor(seen[-1], dtype=torch.float64)

    class Scale(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for parameter in kwargs["model"].parameters():
                parameter.grad *= 1 / (1 + seen[-1])

    trainer._accumulate = accumulating
    trainer.add_callback(Scale())


def training_loss_logged(trainer: Any) -> None:
    accumulate, log, seen = trainer._accumulate, trainer.log, []

    def accumulating(*inputs: Any) -> torch.Tensor:
        seen.append(accumulate(*inputs))
        return seen[-1]

    def logging(logs: dict, *rest: Any, **kwargs: Any) -> None:
        log({**logs, "batch_loss": float(seen[-1])}, *rest, **kwargs)

    trainer._accumulate, trainer.log = accumulating, logging


def empty_batch_skipped(trainer: Any) -> None:
    step = trainer.training_step

    def training_step(model: nn.Module, inputs: tuple, *rest: Any) -> torch.Tensor:
        if len(inputs[0]):
            return step(model, inputs, *rest)
        return torch.full((), math.nan)

    trainer.training_step = training_step


def ledger_written_late(trainer: Any) -> None:
    """A step is written when the next one begins."""
    charge = trainer._ledger.charge_step
    waiting: list[tuple[str, int]] = []

    def charge_step(run: str, step: int) -> int:
        if waiting:
            charge(*waiting.pop())
        waiting.append((run, step))
        return step

    trainer._ledger.charge_step = charge_step


# ---- noise ----------------------------------------------------------------------------------------------------------


def replaced_noise(law: Callable[[dict, GaussianNoise, Any], Any]) -> Mutate:
    def mutate(trainer: Any) -> None:
        noise = GaussianNoise(trainer.privacy_plan.noise_standard_deviation)
        trainer._step.noise.add_noise = lambda sums: law(sums, noise, trainer) or sums

    return mutate


def smaller_noise(divisor: Callable[[Any], float]) -> Mutate:
    def law(sums: dict, noise: GaussianNoise, trainer: Any) -> None:
        GaussianNoise(noise.standard_deviation / divisor(trainer)).add_noise(sums)

    return replaced_noise(law)


def keyed(source: Callable[[Any], Callable[[int], bytes]]) -> Mutate:
    def mutate(trainer: Any) -> None:
        deviation = trainer.privacy_plan.noise_standard_deviation
        trainer._step.noise = GaussianNoise(deviation, _key_source=source(trainer))

    return mutate


def _one_tensor_left_out(sums: dict, noise: GaussianNoise, trainer: Any) -> None:
    left_out = list(sums)[-1]
    noise.add_noise({name: tensor for name, tensor in sums.items() if name != left_out})


def _bfloat16(sums: dict, noise: GaussianNoise, trainer: Any) -> None:
    for tensor in sums.values():
        tensor += noise.add_noise([torch.zeros_like(tensor)])[0].bfloat16().to(tensor.dtype)


def _short_tails(sums: dict, noise: GaussianNoise, trainer: Any) -> None:
    """The 32-bit generator of a GPU stops here."""
    for tensor in sums.values():
        bound = 5.68 * noise.standard_deviation
        tensor += noise.add_noise([torch.zeros_like(tensor)])[0].clamp(-bound, bound)


def _key_of_every_second_step(trainer: Any) -> Callable[[int], bytes]:
    steps = itertools.count()
    return lambda length: (next(steps) // 2).to_bytes(length, "little")


no_noise = replaced_noise(lambda sums, noise, trainer: None)
noise_over_the_batch = smaller_noise(lambda trainer: trainer.privacy_plan.expected_batch_size)

# ---- draws ----------------------------------------------------------------------------------------------------------


class _FixedSize(TruncatedPoissonSampler):
    def _draw(self) -> np.ndarray:
        size = min(round(self.num_units * self.sampling_probability), self.max_batch_size)
        return np.random.default_rng().choice(self.num_units, size, replace=False)


class _ShuffledEpochs(TruncatedPoissonSampler):
    def __iter__(self) -> Iterator[np.ndarray]:
        size = max(round(self.num_units * self.sampling_probability), 1)
        while True:
            order = np.random.default_rng().permutation(self.num_units)
            yield from (order[start : start + size] for start in range(0, self.num_units - size + 1, size))


class _FirstKept(TruncatedPoissonSampler):
    def _draw(self) -> np.ndarray:
        drawn = np.flatnonzero(np.random.default_rng().random(self.num_units) < self.sampling_probability)
        return drawn[: self.max_batch_size]


def drawn_by(kind: type[TruncatedPoissonSampler]) -> Mutate:
    def mutate(trainer: Any) -> None:
        trainer._sampler.__class__ = kind

    return mutate


@dataclass(frozen=True)
class Planted:
    """A bug, and the check that must see it."""

    mutate: Mutate
    check: str
    quick: bool = False  # planted with every audit


MUTANTS = {
    "clipping off": Planted(clipping_off, replay.CLIPPED_SUM),
    "clipping by batch": Planted(clipping_by_batch, replay.CLIPPED_SUM),
    "tied term dropped": Planted(tied_term_dropped, replay.CLIPPED_SUM),
    "batch-mean loss": Planted(batch_mean_loss, replay.CLIPPED_SUM, quick=True),
    "divided by the batch": Planted(divided_by_the_batch, replay.AFTER_NOISE),
    "callback scales the gradient by the loss": Planted(gradient_scaled_by_the_loss, replay.AFTER_NOISE, quick=True),
    "training loss logged": Planted(training_loss_logged, replay.AFTER_NOISE),
    "empty batch skipped": Planted(empty_batch_skipped, replay.EVERY_STEP, quick=True),
    "ledger written late": Planted(ledger_written_late, replay.EVERY_STEP),
    "no noise": Planted(no_noise, noise_law.NOISE_LAW),
    "noise over the batch": Planted(noise_over_the_batch, noise_law.NOISE_LAW),
    "noise over the root of two": Planted(smaller_noise(lambda _: math.sqrt(2)), noise_law.NOISE_LAW, quick=True),
    "one tensor without noise": Planted(replaced_noise(_one_tensor_left_out), noise_law.NOISE_LAW, quick=True),
    "bfloat16 noise": Planted(replaced_noise(_bfloat16), noise_law.NOISE_LAW),
    "fixed key": Planted(keyed(lambda trainer: bytes), noise_law.NOISE_LAW),
    "key of every second step": Planted(keyed(_key_of_every_second_step), noise_law.NOISE_LAW),
    "key from the arguments' seed": Planted(
        keyed(lambda trainer: np.random.default_rng(trainer.args.seed).bytes), noise_law.NOISE_LAW, quick=True
    ),
    "noise that stops at 5.68": Planted(replaced_noise(_short_tails), noise_law.NOISE_SUPPORT),
    "batches of a fixed size": Planted(drawn_by(_FixedSize), draws.DRAWS),
    "shuffled epochs": Planted(drawn_by(_ShuffledEpochs), draws.DRAWS, quick=True),
    "the first units kept at the ceiling": Planted(drawn_by(_FirstKept), draws.DRAWS),
    "no noise, by attack": Planted(no_noise, canaries.CANARIES),
    "noise over the batch, by attack": Planted(noise_over_the_batch, canaries.CANARIES, quick=True),
}


def tried(name: str, folder: Path, subject: Subject | None = None) -> list[Check]:
    """The checks that look where the mutant is, on a trainer that has it."""
    subject = tiny_subject(folder) if subject is None else subject
    planted = MUTANTS[name]
    if planted.check == canaries.CANARIES:
        return [canaries.canaries(subject, seconds=_CANARY_SECONDS, mutate=planted.mutate).check]
    if planted.check == draws.DRAWS:
        return draws.draws(subject, planted.mutate)
    if planted.check in (noise_law.NOISE_LAW, noise_law.NOISE_SUPPORT):
        return noise_law.noise_law(subject, planted.mutate)
    return replay.replay(subject, folder / f"mutant-{list(MUTANTS).index(name)}", planted.mutate)


def plant(folder: Path, *, quick: bool, tick: Callable[[str], None]) -> list[Mutant]:
    """Plants all mutants, or the quick ones; `tick` hears the name of each before it is tried."""
    subject, found, threads = tiny_subject(folder), [], torch.get_num_threads()
    torch.set_num_threads(1)  # for a model as small as this, more only wait for each other
    try:
        for name, planted in MUTANTS.items():
            if quick and not planted.quick:
                continue
            tick(name)
            failed = [check.name for check in tried(name, folder, subject) if not check.passed]
            found.append(Mutant(name, planted.check in failed, planted.check if planted.check in failed else ""))
    finally:
        torch.set_num_threads(threads)
    return found
