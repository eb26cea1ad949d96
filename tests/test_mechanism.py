"""The mechanism as a whole: what `DPTrainer` adds to the clipped sums, which rows it draws, and in which order it acts.

One set of checks looks at a recorded run and names the properties that it breaks; every planted bug must be named.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import nn

from dpfa_hf import DPTrainer, PrivacyArguments
from dpfa_hf.batch_selection import TruncatedPoissonSampler
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example.gradients import PerExampleGradients

Mutate = Callable[[DPTrainer], None]

SIGMA, C, EXPECTED = 0.7, 0.5, 16  # a power of two divides without rounding, so the grid stays visible
SD = SIGMA * C
GRID = 2.0**-14  # floor(log2(0.35)) - 12
UNITS, SEED = 48, 42
ALARM = 1e-7  # probability of a false alarm of one check, over all its comparisons
# Several micro-batches, an empty batch, one row, one micro-batch.
DRAWS = [list(range(20)), [], [3], [7, 1, 30, 2]]


def model() -> nn.Module:
    """119,680 parameters in tensors from 64 to 57,344 elements; the largest is the head too."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=896, n_embd=64, n_layer=1, n_head=2, n_positions=64, n_inner=512, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    built = transformers.GPT2LMHeadModel(config)
    assert sum(p.numel() for p in built.parameters()) >= 100_000
    assert built.lm_head.weight is built.transformer.wte.weight
    return built


def rows() -> list[dict]:
    """Row i holds i + 1 in every position, so that it is known wherever it arrives."""
    return [{"input_ids": [i + 1] * 6, "attention_mask": [1] * 6, "labels": [i + 2] * 6} for i in range(UNITS)]


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


@dataclass
class Recording:
    """Of every step: the clipped sums by an engine of the test's own, p.grad, and the weights before; and who acted."""

    clipped: list[dict[str, torch.Tensor]]
    gradients: list[dict[str, torch.Tensor]]
    weights: list[dict[str, torch.Tensor]]
    events: list[str]

    def residuals(self, step: int) -> dict[str, torch.Tensor]:
        """What the step added to the clipped sums, told from the weights: SGD with learning rate 1."""
        before, after, clipped = self.weights[step], self.weights[step + 1], self.clipped[step]
        return {k: ((before[k] - after[k]) * EXPECTED - clipped[k]).flatten() for k in clipped}


def record_steps(trainer: DPTrainer) -> Recording:
    record, private_step = Recording([], [], [], []), trainer.training_step

    def training_step(model: nn.Module, inputs: tuple, num_items_in_batch: Any = None) -> torch.Tensor:
        record.events.append("step")
        engine = PerExampleGradients(model, trainer._engine.loss, clipping_norm=C)
        engine.layouts = trainer._engine.layouts
        for batch in inputs[1]:
            engine.accumulate(batch)
        record.clipped.append({name: total.double() for name, total in engine.take().items()})
        record.weights.append(copies(model))
        loss = private_step(model, inputs, num_items_in_batch)
        record.gradients.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
        return loss

    trainer.training_step = training_step  # type: ignore[method-assign, assignment]
    record_order(trainer, record.events)
    return record


def record_order(trainer: DPTrainer, events: list[str]) -> None:
    charge, add_noise = trainer._ledger.charge_step, trainer._step.noise.add_noise

    def charging(*args: Any, **kwargs: Any) -> int:
        steps = charge(*args, **kwargs)
        events.append("charge")  # durable by now
        return steps

    def adding(sums: Any) -> Any:
        events.append("noise")
        return add_noise(sums)

    trainer._ledger.charge_step, trainer._step.noise.add_noise = charging, adding  # type: ignore[method-assign]


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().double() for name, parameter in module.named_parameters()}


def make_trainer(folder: Path, *, micro_batch: int = 8, seed: int = SEED, expected: int = EXPECTED) -> DPTrainer:
    return DPTrainer(
        model=model(),
        args=transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=micro_batch, max_steps=len(DRAWS), seed=seed, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", optim="sgd", learning_rate=1.0,
            lr_scheduler_type="constant",
        ),
        train_dataset=rows(),
        data_collator=collate,
        privacy_args=PrivacyArguments(
            target_epsilon=math.inf, noise_multiplier=SIGMA, per_example_max_grad_norm=C, expected_batch_size=expected,
            max_batch_size=UNITS, ledger=f"sqlite:///{folder}.db",
        ),
    )  # fmt: skip


def run(
    folder: Path, mutate: Mutate | None = None, draws: list[list[int]] = DRAWS, *, torch_seed: int = 0, **options: Any
) -> Recording:
    trainer = make_trainer(folder, **options)
    plan = trainer.privacy_plan
    trainer._sampler = TruncatedPoissonSampler(
        plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
    )
    if mutate is not None:
        mutate(trainer)
    torch.manual_seed(torch_seed)
    record = record_steps(trainer)
    trainer.train()
    record.weights.append(copies(trainer.model))
    return record


# ---------------------------------------------------------------------------------------------------------------------
# The law of the noise


def variance_is_off(x: torch.Tensor, comparisons: int = 1) -> bool:
    """Exact two-sided test of the variance SD^2 about a mean of 0."""
    statistic = float(x.square().sum()) / SD**2
    tail = min(stats.chi2.cdf(statistic, len(x)), stats.chi2.sf(statistic, len(x)))
    return bool(2 * tail < ALARM / comparisons)


def standard_errors(comparisons: int = 1) -> float:
    return float(stats.norm.isf(ALARM / comparisons / 2))


def mean_is_off(x: torch.Tensor) -> bool:
    return abs(float(x.mean())) > standard_errors() * SD / math.sqrt(len(x))


def correlated(x: torch.Tensor, y: torch.Tensor, comparisons: int) -> bool:
    """Whether two vectors, of which one is noise of the planned law, have an inner product that chance cannot give."""
    x, y = x / (x.norm() + 1e-300), y / (y.norm() + 1e-300)
    return abs(float(x @ y)) * math.sqrt(len(x)) > standard_errors(comparisons)


def violations(record: Recording) -> set[str]:
    """The properties of the planned mechanism that the recorded steps break."""
    found: set[str] = set()
    steps = [record.residuals(step) for step in range(len(record.clipped))]
    vectors = [torch.cat(list(step.values())) for step in steps]
    everything = torch.cat(vectors)
    assert len(steps) == len(DRAWS) and len(everything) >= 400_000
    if variance_is_off(everything):
        found.add("variance")
    if abs(float(everything.var()) / SD**2 - 1) > 5 * math.sqrt(2 / len(everything)):
        found.add("variance")
    if any(variance_is_off(vector, len(vectors)) for vector in vectors):
        found.add("variance per step")
    names = list(steps[0])
    if any(variance_is_off(torch.cat([step[name] for step in steps]), len(names)) for name in names):
        found.add("variance per tensor")
    if mean_is_off(everything):
        found.add("mean")
    pairs = list(itertools.combinations(vectors, 2))
    if any(correlated(x, y, len(pairs)) for x, y in pairs):
        found.add("steps")
    tensors = [(step[a], step[b]) for step in steps for a, b in itertools.combinations(names, 2)]
    shortest = ((x[: len(y)], y[: len(x)]) for x, y in tensors)
    if any(correlated(x, y, len(tensors)) for x, y in shortest):
        found.add("tensors")
    clipped = [torch.cat([tensor.flatten() for tensor in step.values()]) for step in record.clipped]
    if any(correlated(x, y, len(vectors)) for x, y in zip(vectors, clipped, strict=True) if y.norm() > 0):
        found.add("clipped sum")
    sums = torch.cat([gradient.flatten() * EXPECTED / GRID for gradient in record.gradients[0].values()])
    if not torch.equal(sums, sums.round()):
        found.add("grid")
    if len(torch.unique((vectors[0] / GRID).round())) < 10_000:
        found.add("resolution")
    if record.events != ["step", "charge", "noise"] * len(steps):
        found.add("order")
    return found


def independent(one: Recording, other: Recording) -> bool:
    """Whether two runs have noise of their own, step by step and crosswise."""
    vectors = [[torch.cat(list(r.residuals(t).values())) for t in range(len(DRAWS))] for r in (one, other)]
    return not any(correlated(x, y, len(DRAWS) ** 2) for x, y in itertools.product(*vectors))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return run(tmp_path_factory.mktemp("mechanism") / "run")


def test_a_step_adds_the_planned_noise_once_to_every_coordinate(recorded: Recording) -> None:
    assert violations(recorded) == set()
    assert [float(sum(v.norm() for v in step.values())) > 0 for step in recorded.clipped] == [True, False, True, True]


def test_the_noise_depends_neither_on_micro_batches_nor_on_seeds(recorded: Recording, tmp_path: Path) -> None:
    again = run(tmp_path / "run", micro_batch=3)
    assert violations(again) == set()
    assert independent(recorded, again)
    for mine, theirs in zip(recorded.clipped[:1], again.clipped[:1], strict=True):
        for name in mine:  # the same weights and rows, cut otherwise
            assert float((mine[name] - theirs[name]).norm()) < 1e-5


def test_the_noise_has_the_planned_law_when_every_batch_is_empty_and_when_every_batch_is_full(tmp_path: Path) -> None:
    for name, draw in (("empty", []), ("full", list(range(UNITS)))):
        record = run(tmp_path / name, draws=[draw] * len(DRAWS), seed=7, torch_seed=3)
        assert violations(record) == set()


def replace_noise(law: Callable[[dict[str, torch.Tensor], GaussianNoise], Any]) -> Mutate:
    def mutate(trainer: DPTrainer) -> None:
        noise = GaussianNoise(SD)
        trainer._step.noise.add_noise = lambda sums: law(sums, noise) or sums  # type: ignore[method-assign]

    return mutate


def keyed(source: Callable[[int], Callable[[int], bytes]]) -> Mutate:
    """`source(step)` is the key source of a step."""

    def mutate(trainer: DPTrainer) -> None:
        steps = itertools.count()
        trainer._step.noise = GaussianNoise(SD, _key_source=lambda length: source(next(steps))(length))

    return mutate


def one_tensor_left_out(sums: dict[str, torch.Tensor], noise: GaussianNoise) -> None:
    noise.add_noise({name: tensor for name, tensor in sums.items() if name != "transformer.h.0.mlp.c_proj.bias"})


def bfloat16_noise(sums: dict[str, torch.Tensor], noise: GaussianNoise) -> None:
    for tensor in sums.values():
        tensor += noise.add_noise([torch.zeros_like(tensor)])[0].bfloat16().float()


def global_generator(sums: dict[str, torch.Tensor], noise: GaussianNoise) -> None:
    for tensor in sums.values():
        tensor.add_(torch.randn_like(tensor) * SD).div_(GRID).round_().mul_(GRID)


def seeded_from_the_arguments(trainer: DPTrainer) -> None:
    generator = np.random.default_rng(trainer.args.seed)
    trainer._step.noise = GaussianNoise(SD, _key_source=generator.bytes)


def noise_in_every_micro_batch(trainer: DPTrainer) -> None:
    accumulate, noise = trainer._engine.accumulate, GaussianNoise(SD)

    def accumulate_and_add_noise(batch: Any) -> torch.Tensor:
        losses = accumulate(batch)
        trainer._engine._sums = noise.add_noise(trainer._engine.take())
        return losses

    trainer._engine.accumulate = accumulate_and_add_noise  # type: ignore[method-assign]
    trainer._step.noise.add_noise = lambda sums: sums  # type: ignore[method-assign, assignment, return-value]


def charge_after(trainer: DPTrainer) -> None:
    """Swaps the two lines of `training_step`: the charge is put off until the noise has been added."""
    take = trainer._engine.take

    def take_and_add_noise() -> dict[str, torch.Tensor]:
        sums = trainer._step.noise.add_noise(take())
        adding = trainer._step.noise.add_noise
        trainer._step.noise.add_noise = lambda sums: setattr(trainer._step.noise, "add_noise", adding) or sums  # type: ignore
        return sums

    trainer._engine.take = take_and_add_noise  # type: ignore[method-assign]


MUTANTS: dict[str, tuple[Mutate, set[str]]] = {
    "no noise": (replace_noise(lambda sums, noise: None), {"variance", "resolution"}),
    "noise over the batch": (replace_noise(lambda sums, _: GaussianNoise(SD / EXPECTED).add_noise(sums)), {"variance"}),
    "noise over root two": (replace_noise(lambda sums, _: GaussianNoise(SD / 2**0.5).add_noise(sums)), {"variance"}),
    "one tensor without noise": (replace_noise(one_tensor_left_out), {"variance per tensor"}),
    "bfloat16 noise": (replace_noise(bfloat16_noise), {"resolution", "grid"}),
    "fixed key": (keyed(lambda step: bytes), {"steps"}),
    "key of every second step": (
        keyed(lambda step: lambda length: (step // 2).to_bytes(length, "little")), {"steps"},
    ),
    "noise in every micro-batch": (noise_in_every_micro_batch, {"variance", "variance per step"}),
    "ledger after the noise": (charge_after, {"order"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_catches_mutant(name: str, tmp_path: Path) -> None:
    mutate, expected = MUTANTS[name]
    assert expected <= violations(run(tmp_path / "run", mutate))


@pytest.mark.parametrize("mutate", [seeded_from_the_arguments, replace_noise(global_generator)])
def test_independence_catches_noise_from_a_seed(mutate: Mutate, tmp_path: Path) -> None:
    records = [run(tmp_path / name, mutate) for name in ("one", "other")]
    assert not independent(*records)


# ---------------------------------------------------------------------------------------------------------------------
# Which rows arrive, through the trainer's data loader

SPARSE = 3  # expected batch: 4 % of the batches are empty
EPOCHS = 200


def arrivals(folder: Path, mutate: Mutate | None = None) -> np.ndarray:
    """[steps, units] counts of the rows in every item of the data loader; one item is one step."""
    trainer = make_trainer(folder, expected=SPARSE)
    if mutate is not None:
        mutate(trainer)
    items = itertools.chain.from_iterable(itertools.repeat(trainer.get_train_dataloader(), EPOCHS))
    counted = []
    for item in items:
        counts = np.zeros(UNITS)
        for batch in item[1]:
            assert 1 <= len(batch["input_ids"]) <= 8
            np.add.at(counts, batch["input_ids"][:, 0].numpy() - 1, 1)
        counted.append(counts)
    return np.array(counted)


def sampling_violations(counts: np.ndarray) -> set[str]:
    """The properties of Poisson sampling with q = SPARSE / UNITS that the recorded batches break."""
    q, steps = SPARSE / UNITS, EPOCHS * math.ceil(UNITS / SPARSE)
    found: set[str] = set()
    if len(counts) != steps:
        found.add("number of steps")
    if counts.max() > 1:
        found.add("distinct")
    deviation = math.sqrt(q * (1 - q))
    z = (counts.mean(0) - q) / deviation * math.sqrt(len(counts))
    if np.abs(z).max() > standard_errors(UNITS):
        found.add("inclusion")
    sizes = counts.sum(1)
    law = UNITS * q * (1 - q)
    kurtosis = stats.binom.stats(UNITS, q, moments="k")
    error = law * math.sqrt((2 + float(kurtosis)) / len(sizes))
    if abs(np.mean((sizes - UNITS * q) ** 2) - law) > standard_errors(1) * error:
        found.add("variance of the size")
    empty = (1 - q) ** UNITS
    if abs((sizes == 0).mean() - empty) > standard_errors(1) * math.sqrt(empty * (1 - empty) / len(sizes)):
        found.add("empty batches")
    standard = (counts - q) / deviation
    for lag in (1, 2, 5):
        z_lag = (standard[lag:] * standard[:-lag]).sum() / math.sqrt(UNITS * (len(counts) - lag))
        if abs(z_lag) > standard_errors(3):
            found.add("steps")
    return found


def test_rows_arrive_as_poisson_sampling_says_and_empty_batches_arrive(tmp_path: Path) -> None:
    assert sampling_violations(arrivals(tmp_path / "run")) == set()


def test_two_trainers_with_one_seed_draw_other_rows(tmp_path: Path) -> None:
    counts = []
    for name in ("one", "other"):
        trainer = make_trainer(tmp_path / name)
        torch.manual_seed(0)
        counts.append([sorted(draw.tolist()) for _ in range(5) for draw in trainer._sampler])
    assert counts[0] != counts[1]


def test_an_empty_batch_is_a_step_that_is_charged_and_noised(tmp_path: Path) -> None:
    record = run(tmp_path / "run", draws=[[], [], [1], []])
    assert record.events == ["step", "charge", "noise"] * 4


def replace_sampler(draws: Callable[[np.random.Generator], Iterator[np.ndarray]]) -> Mutate:
    class Planted(TruncatedPoissonSampler):
        def __iter__(self) -> Iterator[np.ndarray]:
            return draws(np.random.default_rng())

    def mutate(trainer: DPTrainer) -> None:
        plan = trainer.privacy_plan
        trainer._sampler = Planted(UNITS, plan.sampling_probability, plan.max_batch_size, math.ceil(UNITS / SPARSE))

    return mutate


def shuffled_epochs(generator: np.random.Generator) -> Iterator[np.ndarray]:
    return iter(generator.permutation(UNITS).reshape(-1, SPARSE))


def fixed_size(generator: np.random.Generator) -> Iterator[np.ndarray]:
    return (generator.choice(UNITS, SPARSE, replace=False) for _ in range(math.ceil(UNITS / SPARSE)))


def with_replacement(generator: np.random.Generator) -> Iterator[np.ndarray]:
    sizes = generator.binomial(UNITS, SPARSE / UNITS, math.ceil(UNITS / SPARSE))
    return (generator.integers(0, UNITS, size) for size in sizes)


def same_rows_for_two_steps(generator: np.random.Generator) -> Iterator[np.ndarray]:
    for _ in range(math.ceil(UNITS / SPARSE) // 2):
        draw = np.flatnonzero(generator.random(UNITS) < SPARSE / UNITS)
        yield from (draw, draw)


def empty_batches_skipped(generator: np.random.Generator) -> Iterator[np.ndarray]:
    draws = (np.flatnonzero(generator.random(UNITS) < SPARSE / UNITS) for _ in range(math.ceil(UNITS / SPARSE)))
    return (draw for draw in draws if len(draw))


def empty_batches_redrawn(generator: np.random.Generator) -> Iterator[np.ndarray]:
    draws = (np.flatnonzero(generator.random(UNITS) < SPARSE / UNITS) for _ in itertools.count())
    return itertools.islice((draw for draw in draws if len(draw)), math.ceil(UNITS / SPARSE))


@pytest.mark.parametrize(
    ("draws", "caught_by"),
    [
        (shuffled_epochs, {"variance of the size", "steps"}),
        (fixed_size, {"variance of the size"}),
        (with_replacement, {"distinct"}),
        (same_rows_for_two_steps, {"steps"}),
        (empty_batches_skipped, {"number of steps", "empty batches"}),
        (empty_batches_redrawn, {"empty batches"}),
    ],
)
def test_the_moments_catch_planted_sampling_bugs(draws: Callable, caught_by: set[str], tmp_path: Path) -> None:
    assert caught_by <= sampling_violations(arrivals(tmp_path / "run", replace_sampler(draws)))


class WithoutEmpty:
    def __init__(self, whole: Any) -> None:
        self.whole = whole

    def __iter__(self) -> Iterator[tuple]:
        return (item for item in self.whole if item[1])


def loader_without_empty(trainer: DPTrainer) -> None:
    loader = WithoutEmpty(trainer.get_train_dataloader())
    trainer.get_train_dataloader = lambda: loader  # type: ignore[method-assign, assignment, return-value]


def test_the_moments_catch_a_loader_that_drops_empty_batches(tmp_path: Path) -> None:
    assert "number of steps" in sampling_violations(arrivals(tmp_path / "run", loader_without_empty))
