"""The coordinates beside the gradient: what they estimate, the noise that they carry, and what they move.

The neighbours of the joint vector are in `test_neighbours.py`, its price in `test_accounting.py`. One set of checks
looks at a recorded run of `DPTrainer` and names the properties that it breaks; every planted bug must be named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from torch import nn

from dpfa_hf import DPTrainer, PrivacyArguments
from dpfa_hf.accounting import EpsilonCurve, make_plan
from dpfa_hf.batch_selection import TruncatedPoissonSampler
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example import losses
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.private_step import PrivateStep
from dpfa_hf.statistics import StepStatistics, next_clipping_norm, public_loss_scale

Mutate = Callable[[DPTrainer], None]

SIGMA, UNITS, EXPECTED, STEPS = 1.0, 48, 16, 64
BETA, S, GAMMA, ETA = 0.08, 0.16, 0.5, 0.2  # the defaults, written out again
MAX = 0.7  # about half of the rows lose more
FIRST_NORM = 150.0  # far above the norms, so that C has a way to go
MULTI = "multi_label_classification"
ALARM = 1e-7  # probability of a false alarm of one check


@pytest.fixture(scope="module", autouse=True)
def epsilon_is_not_looked_at() -> Iterator[None]:
    """For every log line it would cost more than the step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpsilonCurve, "at", lambda curve, step: curve._plan.epsilon)
        yield


def model() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    built = transformers.BertForSequenceClassification(config)
    nn.init.normal_(built.classifier.weight, std=3.0)  # losses that differ
    return built


def rows() -> list[dict]:
    return [{"input_ids": [i + 1] * 6, "attention_mask": [1] * 6, "labels": i % 2} for i in range(UNITS)]


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


class Reader(list):
    """Rows of which some raise when they are collated with others, or at all."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        super().__init__(rows())
        for index in broken:
            self[index] = {**self[index], "input_ids": [10**6] * 6}


def make_trainer(folder: Path, *, steps: int = STEPS, data: Any = None, **options: Any) -> DPTrainer:
    arguments = {name: options.pop(name) for name in list(options) if hasattr(transformers.TrainingArguments, name)}
    asked = {
        "target_epsilon": 400.0, "noise_multiplier": SIGMA, "accountant": "rdp", "expected_batch_size": EXPECTED,
        "private_loss_max": MAX, "per_example_max_grad_norm": FIRST_NORM, "ledger": f"sqlite:///{folder}.db",
    }  # fmt: skip
    usual = {
        "per_device_train_batch_size": 8, "max_steps": steps, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "optim": "sgd", "learning_rate": 0.0,
    }  # fmt: skip
    return DPTrainer(
        model=model(),
        args=transformers.TrainingArguments(str(folder), **{**usual, **arguments}),
        train_dataset=rows() if data is None else data,
        data_collator=collate,
        privacy_args=PrivacyArguments(**{**asked, **options}),
    )


@dataclass
class Recording:
    """Of every step: the rows drawn, the joint vector before its noise, and what was logged after it."""

    plan: PrivacyPlan
    draws: list[list[int]] = field(default_factory=list)
    sums: list[dict[str, torch.Tensor]] = field(default_factory=list)
    noised: list[dict[str, torch.Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)


def run(trainer: DPTrainer, mutate: Mutate | None = None, draws: list[list[int]] | None = None) -> Recording:
    plan = trainer.privacy_plan
    if draws is not None:
        trainer._sampler = TruncatedPoissonSampler(
            plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
        )
    if mutate is not None:
        mutate(trainer)
    record, accumulate, new_noise = Recording(plan), trainer._accumulate, trainer._step.new_noise

    def accumulating(indices: np.ndarray, micro_batches: list) -> torch.Tensor:
        record.draws.append([int(i) for i in indices])
        record.norms.append(trainer._engine.clipping_norm)
        return accumulate(indices, micro_batches)

    def recorded(noise: GaussianNoise) -> GaussianNoise:
        add_noise = noise.add_noise

        def adding(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            record.sums.append({name: total.clone() for name, total in sums.items()})
            record.deviations.append(noise.standard_deviation)
            found = add_noise(sums)
            record.noised.append({name: total.clone() for name, total in sums.items()})
            return found

        noise.add_noise = adding  # type: ignore[method-assign, assignment]
        return noise

    class Listener(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "learning_rate" in logs:
                record.logs.append(dict(logs))

    trainer._accumulate = accumulating  # type: ignore[method-assign, assignment]
    trainer._step.new_noise = lambda norm: recorded(new_noise(norm))  # type: ignore[method-assign]
    trainer._step.noise = recorded(trainer._step.noise)
    trainer.add_callback(Listener())
    trainer.train()
    return record


# ---------------------------------------------------------------------------------------------------------------------
# A recorded run against its definition


@dataclass(frozen=True)
class Truth:
    """Every row's loss and gradient norm, by autograd and one row at a time; the weights of these runs never move."""

    losses: list[float]
    norms: list[float]


@pytest.fixture(scope="module")
def truth() -> Truth:
    found, net = Truth([], []), model().double().train()
    for row in rows():
        net.zero_grad()
        loss = net(**collate([row])).loss
        loss.backward()
        squares = [p.grad.square().sum() for p in net.parameters() if p.grad is not None]
        found.losses.append(float(loss.detach()))
        found.norms.append(float(torch.stack(squares).sum().sqrt()))
    return found


def expected_units(plan: PrivacyPlan) -> float:
    sizes = np.arange(plan.num_units + 1)
    return float(np.minimum(sizes, plan.max_batch_size) @ stats.binom.pmf(sizes, plan.num_units, EXPECTED / UNITS))


def has_planned_law(residuals: list[float]) -> bool:
    """Exact tests of mean 0 and variance 1, each two-sided."""
    x = np.array(residuals)
    statistic = float((x**2).sum())
    tail = min(stats.chi2.cdf(statistic, len(x)), stats.chi2.sf(statistic, len(x)))
    return bool(2 * tail > ALARM and abs(x.mean()) * math.sqrt(len(x)) < stats.norm.isf(ALARM / 2))


def violations(record: Recording, truth: Truth) -> set[str]:
    """The properties of private loss and adaptive clipping that the recorded run breaks; log by log, without the code's
    own sums."""
    found: set[str] = set()
    units = expected_units(record.plan)
    loss_noise, bit_noise = [], []
    for step, draw in enumerate(record.draws):
        norm, line = record.norms[step], record.logs[step]
        mean_loss = sum(min(max(truth.losses[i], 0.0), MAX) for i in draw) / units
        loss_noise.append((line["private_loss"] - mean_loss) / MAX * BETA * units / SIGMA)
        if any(63 / 64 < truth.norms[i] / norm < 65 / 64 for i in draw):
            continue  # a bit that is neither 0 nor 1
        centred = sum(0.5 if truth.norms[i] < norm else -0.5 for i in draw) / units
        unclipped = GAMMA - math.log(line["clipping_norm"] / norm) / ETA
        bit_noise.append((unclipped - 0.5 - centred) * S * units / SIGMA)
    assert len(bit_noise) > STEPS / 2
    if not has_planned_law(loss_noise):
        found.add("private loss")
    if not has_planned_law(bit_noise):
        found.add("clipping norm")
    together = float(np.dot(loss_noise[: len(bit_noise)], bit_noise)) / math.sqrt(len(bit_noise))
    if abs(together) > stats.norm.isf(ALARM / 2):
        found.add("correlated")
    for norm, after, line in zip(record.norms, [*record.norms[1:], None], record.logs, strict=True):
        if after is not None and line["clipping_norm"] != after:
            found.add("norm in use")
        if not 0 < line["clipping_norm"] / norm < math.inf:
            found.add("norm")
    for name in ("gradient", "statistics"):
        residuals = []
        for step, (before, after) in enumerate(zip(record.sums, record.noised, strict=True)):
            deviation = SIGMA * record.norms[step]
            for key in before:
                if (key == StepStatistics.name) == (name == "statistics"):
                    residuals += ((after[key] - before[key]).double().flatten() / deviation).tolist()
        if not has_planned_law(residuals):
            found.add(f"noise on the {name}")
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return run(make_trainer(tmp_path_factory.mktemp("statistics") / "run", clipping="adaptive"))


def test_logged_loss_and_clipping_norm_are_the_true_ones_plus_the_planned_noise(
    recorded: Recording, truth: Truth
) -> None:
    assert violations(recorded, truth) == set()
    assert {"loss", "train_loss"}.isdisjoint(recorded.logs[0])
    assert all(set(step) == set(recorded.sums[0]) for step in recorded.sums) and len(recorded.sums) == STEPS


def test_the_joint_vector_is_the_sum_of_the_definition(recorded: Recording, truth: Truth) -> None:
    for draw, norm, sums in zip(recorded.draws, recorded.norms, recorded.sums, strict=True):
        loss, bit = sums[StepStatistics.name].tolist()
        assert loss / norm == pytest.approx(BETA * sum(min(truth.losses[i], MAX) / MAX for i in draw), rel=1e-5)
        if all(not 62 / 64 < truth.norms[i] / norm < 66 / 64 for i in draw):
            assert bit / norm == pytest.approx(S * sum(0.5 if truth.norms[i] < norm else -0.5 for i in draw), abs=1e-9)


def test_the_mean_of_the_logged_losses_is_that_of_the_data_set(recorded: Recording, truth: Truth) -> None:
    """Unbiased: over draws too, so that an empty or a large batch does not count for more than its rows."""
    clamped = np.minimum(truth.losses, MAX)
    assert 0.2 < np.mean(np.array(truth.losses) > MAX) < 0.8
    units, q = expected_units(recorded.plan), EXPECTED / UNITS
    variance = (SIGMA * MAX / (BETA * units)) ** 2 + q * (1 - q) * float((clamped**2).sum()) / units**2
    off = np.mean([line["private_loss"] for line in recorded.logs]) - clamped.mean()
    assert abs(off) < stats.norm.isf(ALARM / 2) * math.sqrt(variance / STEPS)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.75])
def test_the_clipping_norm_settles_at_the_quantile(quantile: float, truth: Truth) -> None:
    sizes = {"num_units": UNITS, "expected_batch_size": UNITS}
    plan = plan_of(sizes, clipping_quantile=quantile, per_example_max_grad_norm=FIRST_NORM)
    statistics, norm = StepStatistics(plan), plan.clipping_norm
    assert norm > 3 * max(truth.norms)
    for _ in range(100):
        statistics.add(torch.tensor(truth.losses), torch.tensor([truth.norms]), norm)
        noiseless = statistics.take(torch.device("cpu"))
        norm = next_clipping_norm(plan, norm, statistics.estimates(noiseless, norm).unclipped)
    assert np.quantile(truth.norms, quantile - 0.1) < norm < np.quantile(truth.norms, quantile + 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Planted bugs


def without_noise_on_the_statistics(trainer: DPTrainer) -> None:
    def partial(norm: float) -> GaussianNoise:
        noise = PrivateStep.new_noise(trainer._step, norm)
        whole = noise.add_noise
        noise.add_noise = lambda sums: whole({k: v for k, v in sums.items() if k != StepStatistics.name})  # type: ignore
        return noise

    trainer._step.new_noise = partial  # type: ignore[method-assign]
    trainer._step.noise = partial(trainer.privacy_plan.clipping_norm)


def taken_before_the_noise(part: str) -> Mutate:
    """The loss is logged, or C is moved, by sums that no noise was added to."""

    def mutate(trainer: DPTrainer) -> None:
        assert trainer._step.statistics is not None
        take, estimates, kept = trainer._engine.take, trainer._step.statistics.estimates, []

        def taking() -> dict[str, torch.Tensor]:
            sums = take()
            kept.append(sums[StepStatistics.name].clone())
            return sums

        def estimating(noised: torch.Tensor, norm: float) -> Any:
            return replace(estimates(noised, norm), **{part: getattr(estimates(kept[-1], norm), part)})

        trainer._engine.take = taking  # type: ignore[method-assign]
        trainer._step.statistics.estimates = estimating  # type: ignore[method-assign]

    return mutate


def noise_of_the_first_norm(trainer: DPTrainer) -> None:
    trainer._step.new_noise = lambda norm: GaussianNoise(SIGMA * FIRST_NORM)  # type: ignore[method-assign]


def divided_by_the_batch(trainer: DPTrainer) -> None:
    """A mean over the rows that were drawn, whose number is private."""
    accumulate, statistics = trainer._accumulate, trainer._step.statistics
    assert statistics is not None

    def accumulating(indices: np.ndarray, micro_batches: list) -> torch.Tensor:
        statistics._expected_units = max(len(indices) / 4, 1)
        return accumulate(indices, micro_batches)

    trainer._accumulate = accumulating  # type: ignore[method-assign]


def loss_not_clamped(trainer: DPTrainer) -> None:
    statistics = trainer._step.statistics
    assert statistics is not None
    add = statistics.add

    def adding(losses: torch.Tensor, norms: torch.Tensor, norm: float) -> None:
        add(losses, norms, norm)
        beyond = (losses.double() - MAX).clamp_min(0).sum() / MAX
        statistics._sums = statistics._sums + norm * BETA * 40 * torch.stack([beyond, beyond * 0])

    statistics.add = adding  # type: ignore[method-assign]


MUTANTS: dict[str, tuple[Mutate, set[str]]] = {
    "statistics without noise": (
        without_noise_on_the_statistics, {"private loss", "clipping norm", "noise on the statistics"},
    ),
    "loss taken before the noise": (taken_before_the_noise("loss"), {"private loss"}),
    "C moved by the quantile itself": (taken_before_the_noise("unclipped"), {"clipping norm"}),
    "noise that does not follow C": (
        noise_of_the_first_norm, {"private loss", "clipping norm", "noise on the gradient", "noise on the statistics"},
    ),
    "divided by the batch": (divided_by_the_batch, {"private loss"}),
    "loss beyond its largest": (loss_not_clamped, {"private loss"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_catch_mutant(name: str, truth: Truth, tmp_path: Path) -> None:
    mutate, expected = MUTANTS[name]
    assert expected <= violations(run(make_trainer(tmp_path / "run", clipping="adaptive"), mutate), truth)


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def test_a_log_line_holds_the_mean_of_the_steps_since_the_last_and_the_saved_state_has_it(tmp_path: Path) -> None:
    draws = [[1, 2, 3], [], [4], [], [5, 6], list(range(20))]  # an empty batch is a step, with noise
    each = make_trainer(tmp_path / "run", steps=6, logging_steps=3, save_strategy="steps", save_steps=6)
    record = run(each, draws=draws)
    units, norm = expected_units(record.plan), FIRST_NORM
    values = [float(step[StepStatistics.name][0]) / (norm * units * BETA) * MAX for step in record.noised]
    logged = [line["private_loss"] for line in record.logs]
    assert logged == pytest.approx([np.mean(values[:3]), np.mean(values[3:])], rel=1e-12)
    (state,) = Path(each.args.output_dir).glob("checkpoint-6/trainer_state.json")
    saved = [line["private_loss"] for line in json.loads(state.read_text())["log_history"] if "private_loss" in line]
    assert saved == logged and all("clipping_norm" not in line for line in record.logs)
    assert each.privacy_report()["releases"]["covered"][-1].startswith("private_loss")


@pytest.mark.parametrize(
    "options",
    [{"private_loss_weight": 0.0}, {"target_epsilon": math.inf}, {"target_epsilon": math.inf, "clipping": "adaptive"}],
)
def test_no_loss_is_logged_where_it_is_switched_off_or_nothing_would_protect_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", steps=2, **options)
    record = run(trainer)
    assert len(record.logs) == 2 and not any("private_loss" in line for line in record.logs)
    assert ("clipping_norm" in record.logs[0]) == ("clipping" in options)
    assert (StepStatistics.name in record.sums[0]) == ("clipping" in options)
    assert "private_loss" not in json.dumps(trainer.privacy_report()["releases"])


def test_without_adaptive_clipping_neither_norm_nor_noise_moves(tmp_path: Path) -> None:
    record = run(make_trainer(tmp_path / "run", steps=4))
    assert record.norms == [FIRST_NORM] * 4 and record.deviations == [SIGMA * FIRST_NORM] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Rows that cannot be computed, and documents


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_a_row_that_raises_is_counted_nowhere_and_no_other_twice(micro_batch: int, tmp_path: Path) -> None:
    """The batch starts over row by row when row 9, in whichever micro-batch, raises."""
    draw = [0, 3, 9, 11, 12, 20, 33]
    options: dict[str, Any] = {"steps": 1, "clipping": "adaptive", "per_device_train_batch_size": micro_batch}
    broken = run(make_trainer(tmp_path / "broken", data=Reader((9,)), **options), draws=[draw])
    whole = run(make_trainer(tmp_path / "whole", **options), draws=[[i for i in draw if i != 9]])
    twice = run(make_trainer(tmp_path / "twice", **options), draws=[[0, *[i for i in draw if i != 9]]])
    sums = [torch.cat([total.double().flatten() for total in r.sums[0].values()]) for r in (broken, whole, twice)]
    tail = [r.sums[0][StepStatistics.name] for r in (broken, whole, twice)]
    assert torch.allclose(sums[0], sums[1], rtol=1e-5, atol=1e-5)
    assert torch.allclose(tail[0], tail[1], rtol=1e-6, atol=0)
    assert not torch.allclose(tail[2], tail[1], rtol=1e-3, atol=0), "a row counted twice should have been seen"


def test_packed_documents_have_the_coordinates_of_padded_rows(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    texts = [{"input_ids": [1 + (i + j) % 30 for j in range(3 + i % 5)]} for i in range(UNITS)]

    def padded(batch: list[dict]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in batch]
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], True)
        return {"input_ids": pad(ids, True), "attention_mask": mask, "labels": pad(ids, True, -100)}

    found = []
    for unit, collator in (("example", padded), ("document", transformers.DataCollatorWithFlattening())):
        torch.manual_seed(0)
        trainer = DPTrainer(
            model=transformers.AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash"),
            args=transformers.TrainingArguments(
                str(tmp_path / unit), per_device_train_batch_size=5, max_steps=1, use_cpu=True, report_to=[],
                disable_tqdm=True, save_strategy="no", logging_steps=1,
            ),
            train_dataset=[row if unit == "example" else {**row, "labels": row["input_ids"]} for row in texts],
            data_collator=collator,
            privacy_args=PrivacyArguments(
                target_epsilon=400.0, noise_multiplier=SIGMA, accountant="rdp", expected_batch_size=EXPECTED,
                clipping="adaptive", per_example_max_grad_norm=3.0, privacy_unit=unit,  # type: ignore[arg-type]
                ledger=f"sqlite:///{tmp_path}/{unit}.db",
            ),
        )  # fmt: skip
        record = run(trainer, draws=[[2, 5, 6, 13, 14, 21, 22, 40]])
        assert record.plan.private_loss_max == 2 * math.log(31)
        found.append(record.sums[0][StepStatistics.name])
    assert torch.allclose(found[0], found[1], rtol=1e-5)
    assert 0 < float(found[0][0]) < 3.0 * BETA * 8


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic by itself


def plan_of(sizes: dict[str, int] | None = None, **options: Any) -> PrivacyPlan:
    sizes = sizes or {"num_units": 100, "expected_batch_size": 20}
    arguments = {"target_epsilon": 400.0, "noise_multiplier": 1.0, "accountant": "rdp", "private_loss_max": 2.0}
    return make_plan(PrivacyArguments(**{**arguments, "clipping": "adaptive", **options}), **sizes, max_steps=2)


def coordinates(plan: PrivacyPlan, losses_: list[float], norms: list[float], norm: float = 4.0) -> list[float]:
    statistics = StepStatistics(plan)
    statistics.add(torch.tensor(losses_), torch.tensor([norms], dtype=torch.float64), norm)
    return [value / norm for value in statistics.take(torch.device("cpu")).tolist()]


def test_the_coordinates_of_one_unit() -> None:
    plan = plan_of()
    assert coordinates(plan, [1.0], [3.0]) == pytest.approx([BETA / 2, S / 2])
    assert coordinates(plan, [9.0], [5.0]) == pytest.approx([BETA, -S / 2])
    assert coordinates(plan, [-9.0], [4.0]) == pytest.approx([0, 0])  # exactly C: neither within nor beyond
    for absent in (math.inf, math.nan, -math.inf):
        assert coordinates(plan, [absent], [3.0]) == [0, 0]
        assert coordinates(plan, [1.0], [abs(absent)]) == [0, 0]
    worst = max(math.hypot(*coordinates(plan, [loss], [norm])) for loss in (0, 1.0, 1e30) for norm in (0.0, 3.99, 1e30))
    assert math.hypot(1, worst) <= plan.joint_sensitivity * (1 + 1e-12)


def test_sums_grow_until_they_are_taken_or_discarded() -> None:
    statistics, device = StepStatistics(plan_of()), torch.device("cpu")
    for _ in range(2):
        statistics.add(torch.tensor([1.0]), torch.tensor([[3.0]]), 1.0)
    assert statistics.take(device)[0] == pytest.approx(BETA)
    assert statistics.take(device).tolist() == [0, 0]
    statistics.add(torch.tensor([1.0]), torch.tensor([[3.0]]), 1.0)
    statistics.discard()
    assert statistics.take(device).tolist() == [0, 0]


def test_half_precision_losses_are_summed_in_float64() -> None:
    statistics = StepStatistics(plan_of())
    statistics.add(torch.full((3000,), 1.0, dtype=torch.bfloat16), torch.full((1, 3000), 0.5), 1.0)
    assert statistics.take(torch.device("cpu")).tolist() == pytest.approx([1500 * BETA, 1500 * S], rel=1e-12)


def test_a_norm_near_c_that_rounds_otherwise_moves_its_bit_by_no_more_than_rounding() -> None:
    plan = plan_of()
    jump = max(
        abs(
            coordinates(plan, [0.0], [4.0 * (1 + shift)])[1] - coordinates(plan, [0.0], [4.0 * (1 + shift + 2**-23)])[1]
        )
        for shift in np.linspace(-0.02, 0.02, 2001)
    )
    assert jump < 2 * 2.0**-21  # what the slack allows a float32 sum of gradients for each row


def test_the_update_is_that_of_the_paper_and_stays_where_float32_can_follow() -> None:
    plan = plan_of(clipping_quantile=0.7, clipping_learning_rate=0.3)
    assert next_clipping_norm(plan, 2.0, 0.9) == pytest.approx(2.0 * math.exp(-0.3 * (0.9 - 0.7)))
    assert next_clipping_norm(plan, 2.0, None) == 2.0
    norm = plan.clipping_norm
    for _ in range(100):
        norm = next_clipping_norm(plan, norm, -50.0)
    assert norm == pytest.approx(plan.clipping_norm * 2.0**20)
    for _ in range(200):
        norm = next_clipping_norm(plan, norm, 50.0)
    assert norm == pytest.approx(plan.clipping_norm / 2.0**20)


def test_a_low_ceiling_and_another_divisor_do_not_bias_the_estimates() -> None:
    """q n and B_max decide how many units a step sees, `expected_batch_size` only divides the gradient."""
    plan = replace(plan_of(sampling_probability=0.3), max_batch_size=25)
    sizes = np.minimum(np.arange(101), 25)
    units = float(sizes @ stats.binom.pmf(np.arange(101), 100, 0.3))
    assert units < 25 < 30
    noised = torch.tensor([BETA * units, S * 0.25 * units], dtype=torch.float64)
    found = StepStatistics(plan).estimates(4.0 * noised, 4.0)
    assert (found.loss, found.unclipped) == (pytest.approx(2.0), pytest.approx(0.75))
    only_loss = StepStatistics(plan_of(clipping="flat")).estimates(noised, 1.0)
    only_bits = StepStatistics(plan_of(private_loss_weight=0.0)).estimates(noised, 1.0)
    assert only_loss.unclipped is None and only_bits.loss is None


@pytest.mark.parametrize(
    ("task", "config", "choices"),
    [
        ("causal_lm", transformers.GPT2Config(vocab_size=31), 31),
        ("masked_lm", transformers.BertConfig(vocab_size=33), 33),
        ("seq2seq_lm", transformers.BartConfig(vocab_size=35), 35),
        ("token_classification", transformers.BertConfig(num_labels=5), 5),
        ("sequence_classification", transformers.BertConfig(num_labels=3), 3),
        ("sequence_classification", transformers.ViTConfig(num_labels=7), 7),
        ("sequence_classification", transformers.BertConfig(num_labels=9, problem_type=MULTI), 2),
        ("question_answering", transformers.BertConfig(max_position_embeddings=64), 64),
        ("sequence_classification", transformers.BertConfig(num_labels=1), None),
        ("sequence_classification", transformers.BertConfig(num_labels=3, problem_type="regression"), None),
        ("question_answering", SimpleNamespace(), None),
        (None, transformers.BertConfig(num_labels=3), None),
        (None, None, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_public_scale_is_twice_the_loss_of_a_uniform_guess(task: str, config: Any, choices: int | None) -> None:
    assert task is None or task in losses.TASKS
    assert public_loss_scale(config, task) == (None if choices is None else 2 * math.log(choices))


def test_regression_and_a_loss_of_ones_own_need_a_largest_loss(tmp_path: Path) -> None:
    def built(name: str, **options: Any) -> PrivacyPlan:
        return DPTrainer(
            model=model(),
            args=transformers.TrainingArguments(str(tmp_path / name), max_steps=1, use_cpu=True, report_to=[]),
            train_dataset=rows(),
            data_collator=collate,
            per_example_loss_fn=lambda net, batch: net(input_ids=batch["input_ids"]).logits.square().mean(1),
            privacy_args=PrivacyArguments(
                target_epsilon=400.0,
                noise_multiplier=1.0,
                accountant="rdp",
                ledger=f"sqlite:///{tmp_path}/l.db",
                **options,
            ),
        ).privacy_plan

    assert built("none").private_loss_weight == 0 and built("none").joint_sensitivity == 1
    assert (built("given", private_loss_max=3.0).private_loss_weight, built("given").private_loss_max) == (0.08, 0)
