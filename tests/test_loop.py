"""Private training without a Trainer: the same steps as with one, in the order in which they are private."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import Dataset

import dpfa_hf
from dpfa_hf import PrivacyArguments, PrivacyError, PrivateLoop
from dpfa_hf.batch_selection import TruncatedPoissonSampler
from dpfa_hf.budget import PrivacyBudget
from dpfa_hf.ledger import Ledger
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.private_step import PrivateStep
from dpfa_hf.processes import Processes

N, VOCAB = 24, 41


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.BertConfig(vocab_size=VOCAB, max_position_embeddings=32, hidden_dropout_prob=0.0,
                           attention_probs_dropout_prob=0.0, **sizes)  # fmt: skip
    return tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")


class Rows(Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(N):
        tokens = torch.randint(3, VOCAB, (4 + i % 5,), generator=generator).tolist()
        made.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": i % 2})
    return made


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def pad(name: str) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in batch], batch_first=True)

    labels = torch.tensor([row["labels"] for row in batch])
    return {"input_ids": pad("input_ids"), "attention_mask": pad("attention_mask"), "labels": labels}


def privacy(folder: Path, **kwargs: Any) -> PrivacyArguments:
    usual = {"target_epsilon": math.inf, "noise_multiplier": 0.0, "ledger": f"sqlite:///{folder}/ledger.db",
             "expected_batch_size": 5}  # fmt: skip
    return PrivacyArguments(**{**usual, **kwargs})


def loop_of(folder: Path, made: Any = None, data: Any = None, draws: Any = None, **kwargs: Any) -> PrivateLoop:
    asked = kwargs.pop("privacy_args", None) or privacy(folder)
    options = {"collate": collate, "micro_batch_size": 3, "max_steps": 2, **kwargs}
    loop = PrivateLoop(made or model(), data or Rows(rows()), asked, **options)
    if draws is not None:
        plan = loop.plan
        loop._sampler = TruncatedPoissonSampler(
            plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
        )
    return loop


def gradient(made: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in made.parameters()])


def by_hand(made: nn.Module, indices: list[int], clipping_norm: float) -> torch.Tensor:
    """One row at a time, the model's own loss, autograd in float64; over the expected batch."""
    made = copy.deepcopy(made).double().train()
    total = None
    for i in indices:
        made.zero_grad()
        made(**collate([rows()[i]])).loss.backward()
        one = gradient(made)
        one *= min(1.0, clipping_norm / float(one.norm()))
        total = one if total is None else total + one
    return total / 5


# ---- what a turn leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping_norm", [0.1, 100.0])
def test_a_turn_leaves_the_clipped_mean_of_a_float64_loop(clipping_norm: float, tmp_path: Path) -> None:
    made, draw = model(), [3, 1, 4, 15, 9, 2, 6]
    asked = privacy(tmp_path, per_example_max_grad_norm=clipping_norm)
    expected = by_hand(made, draw, clipping_norm)
    loop = loop_of(tmp_path, made, draws=[draw], privacy_args=asked)
    next(iter(loop))
    error = float((gradient(made) - expected).norm() / expected.norm())
    assert error < 1e-5
    # The mutant divides by what was drawn.
    assert float((gradient(made) - expected * 5 / len(draw)).norm() / expected.norm()) > 0.1


def test_a_loop_takes_the_steps_of_dptrainer(tmp_path: Path) -> None:
    draws = [[1, 2, 3, 8], [], [5, 4]]

    def looped() -> Any:
        made = model()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
        for _ in loop_of(tmp_path, made, draws=draws, max_steps=3):
            optimizer.step()
        return made

    def trained() -> Any:
        args = tf.TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, optim="sgd",
            learning_rate=0.5, lr_scheduler_type="constant", save_strategy="no", per_device_train_batch_size=3,
        )  # fmt: skip
        trainer = dpfa_hf.DPTrainer(model=model(), args=args, train_dataset=Rows(rows()), data_collator=collate,
                                    privacy_args=privacy(tmp_path))  # fmt: skip
        plan = trainer.privacy_plan
        trainer._sampler = TruncatedPoissonSampler(
            plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
        )
        trainer.train()
        return trainer.model

    pairs = zip(looped().parameters(), trained().parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_an_empty_draw_leaves_noise_of_the_planned_width(tmp_path: Path) -> None:
    made = model()
    asked = privacy(tmp_path, noise_multiplier=2.0, per_example_max_grad_norm=0.5)
    next(iter(loop_of(tmp_path, made, draws=[[]], privacy_args=asked)))
    noise = gradient(made)
    assert len(noise) > 3000
    assert float(noise.std()) == pytest.approx(2.0 * 0.5 / 5, rel=0.06) and abs(float(noise.mean())) < 0.02


def test_a_row_that_cannot_be_computed_adds_nothing_and_harms_nobody(tmp_path: Path) -> None:
    made, data, draw = model(), rows(), [0, 7, 3]
    data[7] = {**data[7], "input_ids": [VOCAB + 5] * 4, "attention_mask": [1] * 4}
    expected = by_hand(made, [0, 3], 1.0)
    next(iter(loop_of(tmp_path, made, Rows(data), draws=[draw])))
    assert float((gradient(made) - expected).norm() / expected.norm()) < 1e-5


def test_accelerate_prepares_model_and_optimizer(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    made = model()
    before = [p.detach().clone() for p in made.parameters()]
    made, optimizer = accelerator.prepare(made, torch.optim.AdamW(made.parameters(), lr=0.01))
    for _ in loop_of(tmp_path, made, accelerator=accelerator):
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


# ---- order and end --------------------------------------------------------------------------------------------------


def order_of(loop: PrivateLoop, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in one turn, in order."""
    events: list[str] = []
    charge, add_noise = Ledger.charge_step, GaussianNoise.add_noise

    def charged(*args: Any) -> int:
        events.append("ledger")
        return charge(*args)

    def noised(*args: Any) -> None:
        events.append("noise")
        add_noise(*args)

    monkeypatch.setattr(Ledger, "charge_step", charged)
    monkeypatch.setattr(GaussianNoise, "add_noise", noised)
    next(iter(loop))
    return events


def test_a_step_is_charged_before_its_noise_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert order_of(loop_of(tmp_path), monkeypatch) == ["ledger", "noise"]

    def hasty(step: PrivateStep, budget: PrivacyBudget) -> None:  # the mutant
        sums = step.engine.take()
        step.noise.add_noise(sums)
        budget.charge()

    monkeypatch.setattr(PrivateStep, "__call__", hasty)
    assert order_of(loop_of(tmp_path), monkeypatch)[-2:] != ["ledger", "noise"]


def test_a_step_that_cannot_be_charged_draws_no_noise_and_sets_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise PrivacyError("the ledger cannot be written")

    made = model()
    loop = loop_of(tmp_path, made)
    monkeypatch.setattr(Ledger, "charge_step", full)
    monkeypatch.setattr(GaussianNoise, "add_noise", lambda *args: pytest.fail("noise was drawn"))
    with pytest.raises(PrivacyError, match="cannot be written"):
        next(iter(loop))
    assert all(parameter.grad is None for parameter in made.parameters())


def test_sums_of_other_processes_are_added_before_the_ledger_and_the_noise(tmp_path: Path) -> None:
    made = model()
    loop = loop_of(tmp_path, made, draws=[[0, 1], []])
    turns = iter(loop)
    next(turns)
    alone = gradient(made)

    class Twins(Processes):
        def sum_to_first(self, sums: Any) -> None:
            assert budget.steps == 1
            for tensor in sums.values():
                tensor.mul_(2)

    budget = loop._budget
    step = PrivateStep(loop.plan, loop._engine, processes=Twins())
    share = np.array([0, 1])
    loop._accumulate(share, loop._batches[share])
    step(budget)
    assert torch.allclose(gradient(made), 2 * alone, rtol=1e-6) and budget.steps == 2


def test_a_loop_ends_with_its_plan_and_does_not_run_again(tmp_path: Path) -> None:
    asked = privacy(tmp_path, target_epsilon=8.0, target_delta=0.01, noise_multiplier=4.0)
    loop = loop_of(tmp_path, max_steps=3, privacy_args=asked)
    assert loop.privacy_spent().steps == 0
    losses = list(loop)
    assert len(losses) == 3 == loop.privacy_spent().steps
    assert all(isinstance(loss, float) for loss in losses)  # noised, so that they may be shown
    assert loop.privacy_spent().epsilon == loop.plan.epsilon <= 8.0
    with pytest.raises(PrivacyError, match="has run already"):
        next(iter(loop))


def test_a_loop_that_is_left_early_keeps_its_whole_epsilon(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, max_steps=5)
    for _ in loop:
        break
    spent, run = loop.privacy_spent(), Ledger(f"sqlite:///{tmp_path}/ledger.db").runs()[0]
    assert spent.steps == run.steps == 1 and spent.epsilon == loop.plan.epsilon


def test_the_report_lies_beside_the_weights(tmp_path: Path) -> None:
    loop = loop_of(tmp_path)
    with pytest.raises(PrivacyError, match="nothing has been spent"):
        loop.save_report(tmp_path)
    list(loop)
    loop.save_report(tmp_path / "out")
    assert "sequence_classification" in (tmp_path / "out" / "privacy.json").read_text()
    assert "NOT PRIVATE" in (tmp_path / "out" / "README.md").read_text()


def test_adaptive_clipping_moves_the_norm_and_its_noise(tmp_path: Path) -> None:
    asked = privacy(tmp_path, target_epsilon=50.0, target_delta=0.01, noise_multiplier=4.0, clipping="adaptive")
    loop = loop_of(tmp_path, privacy_args=asked)
    list(loop)
    norm = loop._engine.clipping_norm
    assert norm != loop.plan.clipping_norm
    assert loop._step.noise.standard_deviation == loop.plan.noise_standard_deviation_at(norm)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"expected_batch_size": None}, "expected_batch_size"),
        ({"floating_point": "hardened"}, "hardened"),
        ({"privacy_unit": "user", "privacy_unit_column": "who"}, "a row is a unit"),
    ],
)
def test_arguments_that_a_loop_cannot_keep_are_refused(asked: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=message):
        loop_of(tmp_path, privacy_args=privacy(tmp_path, **asked))


def test_a_batch_norm_is_found_before_the_first_step(tmp_path: Path) -> None:
    made = model()
    made.classifier = nn.Sequential(nn.BatchNorm1d(16), made.classifier)
    with pytest.raises(PrivacyError, match="BatchNorm"):
        loop_of(tmp_path, made)


def test_an_accelerator_that_steps_less_often_is_refused(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.raises(PrivacyError, match="gradient_accumulation_steps"):
        loop_of(tmp_path, accelerator=accelerator)


def test_privacy_args_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="PrivacyArguments"):
        loop_of(tmp_path, privacy_args={"target_epsilon": 3.0})
