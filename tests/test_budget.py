from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils.data import Dataset

from dpfa_hf import DPTrainer, PrivacyArguments, PrivacyError, accounting
from dpfa_hf.budget import PrivacyBudget, PrivacySpent
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan

N, EXPECTED, DELTA, MOST = 30, 3, 1e-3, 12
BUDGETS = [(sigma, low + 0.12 * i, "rdp") for sigma, low in ((1.0, 1.2), (1.5, 0.8)) for i in range(7)]
BUDGETS += [(1.0, epsilon, "pld") for epsilon in (0.9, 1.1, 1.25, 1.4, 1.5, 9.0)]


def asked(sigma: float, epsilon: float, accountant: str, folder: Path | None = None) -> PrivacyArguments:
    ledger = None if folder is None else f"sqlite:///{folder}/ledger.db"
    return PrivacyArguments(
        target_epsilon=epsilon, noise_multiplier=sigma, target_delta=DELTA, accountant=accountant, ledger=ledger
    )


@functools.cache
def step_pld(sigma: float, ceiling: int, sensitivity: float) -> Any:
    """dp_accounting called directly."""
    from dp_accounting.pld.privacy_loss_distribution import from_truncated_subsampled_gaussian_mechanism
    from dp_accounting.privacy_accountant import NeighboringRelation

    return from_truncated_subsampled_gaussian_mechanism(
        dataset_size=N, sampling_probability=EXPECTED / N, truncated_batch_size=ceiling,
        noise_multiplier=sigma / sensitivity, neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )  # fmt: skip


def epsilon_after(plan: PrivacyPlan, steps: int) -> float:
    if plan.accountant == "pld":
        sensitivity = math.hypot(1, plan.private_loss_weight) * (1 + plan.sensitivity_slack)
        pld = step_pld(plan.noise_multiplier, plan.max_batch_size, sensitivity)
        return pld.self_compose(steps).get_epsilon_for_delta(DELTA)
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    event = PoissonSampledDpEvent(plan.sampling_probability, GaussianDpEvent(plan.accounted_noise_multiplier))
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    return accountant.compose(event, steps).get_epsilon(DELTA - plan.truncation_delta)


class Rows(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [index % 7 + 1] * 5, "attention_mask": [1] * 5, "labels": index % 2}


def train(folder: Path, privacy_args: PrivacyArguments) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
    model = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")
    args = tf.TrainingArguments(
        str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=MOST, logging_strategy="no",
        per_device_train_batch_size=EXPECTED, save_strategy="no",
    )  # fmt: skip
    trainer = DPTrainer(model=model, args=args, train_dataset=Rows(), privacy_args=privacy_args)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("sigma", "epsilon", "accountant"), BUDGETS)
def test_the_run_stops_at_the_last_step_within_its_budget(
    sigma: float, epsilon: float, accountant: str, tmp_path: Path
) -> None:
    trainer = train(tmp_path, asked(sigma, epsilon, accountant, tmp_path))
    plan, record = trainer.privacy_plan, trainer._ledger.runs()[0]
    steps = trainer.state.global_step
    assert steps == plan.max_steps == record.steps == record.max_steps == trainer.privacy_spent().steps
    assert record.status == "completed" and record.epsilon == plan.epsilon == trainer.privacy_spent().epsilon
    assert plan.epsilon <= epsilon
    assert epsilon_after(plan, steps) == pytest.approx(plan.epsilon, rel=2e-3)
    assert steps == MOST or epsilon_after(plan, steps + 1) > epsilon * (1 - 2e-3)


def test_the_budgets_stop_runs_at_many_different_steps() -> None:
    assert len(BUDGETS) == 20
    plans = [
        accounting.make_plan(asked(*budget), num_units=N, expected_batch_size=EXPECTED, max_steps=MOST)
        for budget in BUDGETS
        if budget[2] == "rdp"
    ]
    assert len({plan.max_steps for plan in plans}) > 5


@pytest.fixture
def plan() -> PrivacyPlan:
    return accounting.make_plan(asked(1.5, 1.5, "rdp"), num_units=N, expected_batch_size=EXPECTED, max_steps=3)


def open_budget(folder: Path, plan: PrivacyPlan) -> PrivacyBudget:
    ledger = Ledger(f"sqlite:///{folder}/ledger.db")
    run = ledger.open_run(
        dataset="d", plan=plan.to_dict(), plan_hash=plan.sha256(), epsilon=plan.epsilon, delta=plan.delta,
        max_steps=plan.max_steps, privacy_unit=plan.privacy_unit, adjacency=plan.adjacency, budget=None,
    )  # fmt: skip
    return PrivacyBudget(plan, ledger, run)


def test_every_charge_is_in_the_ledger_when_it_returns(tmp_path: Path, plan: PrivacyPlan) -> None:
    budget = open_budget(tmp_path, plan)
    for step in range(1, plan.max_steps + 1):
        assert not budget.exhausted
        budget.charge()
        assert Ledger(f"sqlite:///{tmp_path}/ledger.db").run(budget.run).steps == budget.steps == step
    assert budget.exhausted


def test_no_step_past_the_plan_can_be_charged(tmp_path: Path, plan: PrivacyPlan) -> None:
    budget = open_budget(tmp_path, plan)
    for _ in range(plan.max_steps):
        budget.charge()
    with pytest.raises(PrivacyError) as info:
        budget.charge()
    assert "used up" in str(info.value) and "new DPTrainer" in str(info.value) and "\n" not in str(info.value)
    # The ledger would refuse a budget that did not look ahead.
    budget.steps -= 1
    with pytest.raises(PrivacyError):
        budget.charge()
    assert budget.ledger.run(budget.run).steps == plan.max_steps


def test_what_was_spent_is_the_guarantee_from_the_start(tmp_path: Path, plan: PrivacyPlan) -> None:
    budget = open_budget(tmp_path, plan)
    assert budget.spent() == PrivacySpent(plan.epsilon, plan.delta, 0) and budget.epsilon == 0
    budget.charge()
    assert budget.spent() == PrivacySpent(plan.epsilon, plan.delta, 1)


def test_progress_epsilon_is_never_below_the_truth(tmp_path: Path, plan: PrivacyPlan) -> None:
    budget, seen = open_budget(tmp_path, plan), []
    for step in range(1, plan.max_steps + 1):
        budget.charge()
        seen.append(budget.epsilon)
        assert budget.epsilon >= epsilon_after(plan, step) * (1 - 1e-9)
    assert seen == sorted(seen) and seen[-1] == plan.epsilon < math.inf
