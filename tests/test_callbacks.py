from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import Dataset

from dpfa_hf import DPTrainer, PrivacyArguments, PrivacyBudgetCallback, PrivacyError, accounting, privatize
from dpfa_hf import trainer as trainer_module
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan

N, STEPS = 20, 4
ASKED = {"target_epsilon": 4.0, "noise_multiplier": 2.0, "target_delta": 1e-3, "accountant": "rdp"}


class Rows(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [index % 7 + 1] * 5, "attention_mask": [1] * 5, "labels": index % 2}


def build(
    folder: Path, cls: type = DPTrainer, *, asked: dict[str, Any] = ASKED, callbacks: Any = None, **args: Any
) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
    model: nn.Module = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")
    usual = {
        "output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": STEPS,
        "logging_steps": 100, "per_device_train_batch_size": 4, "save_strategy": "no",
    }  # fmt: skip
    parts = {"model": model, "args": tf.TrainingArguments(**{**usual, **args}), "train_dataset": Rows()}
    if cls is DPTrainer:
        parts["privacy_args"] = PrivacyArguments(ledger=f"sqlite:///{folder}/ledger.db", **asked)
    return cls(**parts, callbacks=callbacks)


@pytest.fixture(scope="module")
def real_plan() -> PrivacyPlan:
    asked = {**ASKED, "target_epsilon": 2.0, "accountant": "pld"}
    plan = accounting.make_plan(PrivacyArguments(**asked), num_units=N, expected_batch_size=4, max_steps=STEPS)
    assert plan.max_steps == STEPS and 0 < plan.epsilon <= 2
    return plan


@pytest.fixture
def planned(real_plan: PrivacyPlan, monkeypatch: pytest.MonkeyPatch) -> PrivacyPlan:
    monkeypatch.setattr(trainer_module, "make_plan", lambda *args, **kwargs: real_plan)
    return real_plan


def ours(trainer: Any) -> list[Any]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, PrivacyBudgetCallback)]


def test_alone_it_makes_no_trainer_private_and_says_what_does(tmp_path: Path) -> None:
    trainer = build(tmp_path, tf.Trainer, callbacks=[PrivacyBudgetCallback()])
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(PrivacyError) as info:
        trainer.train()
    assert "DPTrainer" in str(info.value) and "privatize" in str(info.value) and "\n" not in str(info.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_second_one_is_dropped(tmp_path: Path, planned: PrivacyPlan) -> None:
    trainer = build(tmp_path, callbacks=[PrivacyBudgetCallback(), PrivacyBudgetCallback])
    trainer.add_callback(PrivacyBudgetCallback)
    trainer.add_callback(PrivacyBudgetCallback())
    assert len(ours(trainer)) == 1
    assert len(ours(build(tmp_path))) == 1
    trainer.train()
    assert trainer.privacy_spent().steps == STEPS


def test_privatize_binds_one_that_was_there(tmp_path: Path, planned: PrivacyPlan) -> None:
    stock = build(tmp_path, tf.Trainer, callbacks=[PrivacyBudgetCallback()])
    trainer: Any = privatize(stock, PrivacyArguments(ledger=f"sqlite:///{tmp_path}/ledger.db", **ASKED))
    trainer.train()
    assert len(ours(trainer)) == 1 and trainer.privacy_spent().steps == STEPS


def test_epsilon_is_in_the_progress_bar_and_never_falls(tmp_path: Path, planned: PrivacyPlan) -> None:
    shown = []

    class Look(tf.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            bars = [c.training_bar for c in trainer.callback_handler.callbacks if hasattr(c, "training_bar")]
            shown.append(bars[0].postfix)

    trainer = build(tmp_path, disable_tqdm=False)
    trainer.add_callback(Look)
    trainer.train()
    values = [float(text.removeprefix("epsilon=")) for text in shown]
    assert len(values) == STEPS and values == sorted(values) and values[0] > 0
    assert values[-1] == pytest.approx(planned.epsilon, rel=1e-3)


def test_the_halt_saves_and_evaluates_at_the_true_last_step(tmp_path: Path, planned: PrivacyPlan) -> None:
    trainer = build(
        tmp_path, asked={**ASKED, "eval_data": "public"}, max_steps=50, save_strategy="steps", save_steps=100,
    )  # fmt: skip
    trainer.args.eval_strategy, trainer.args.eval_steps, trainer.eval_dataset = tf.IntervalStrategy.STEPS, 100, Rows()
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == STEPS
    assert (tmp_path / "out" / f"checkpoint-{STEPS}" / "privacy.json").exists()
    assert any("eval_loss" in line and line["step"] == STEPS for line in trainer.state.log_history)


def states_the_guarantee(folder: Path, plan: PrivacyPlan) -> bool:
    return json.loads((folder / "privacy.json").read_text())["guarantee"]["epsilon"] == plan.epsilon


@pytest.mark.parametrize("how", ["stopped", "interrupted"])
def test_ending_early_does_not_lower_the_stated_epsilon(how: str, tmp_path: Path, planned: PrivacyPlan) -> None:
    class End(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2 and how == "interrupted":
                raise KeyboardInterrupt
            control.should_training_stop = state.global_step == 2

    trainer = build(tmp_path, callbacks=[End], save_strategy="steps", save_steps=1)
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    trainer.save_model()
    spent = trainer.privacy_spent()
    assert (spent.epsilon, spent.steps) == (planned.epsilon, 2)
    folders = [tmp_path / "out", tmp_path / "out" / "checkpoint-1"]
    assert all(states_the_guarantee(folder, planned) for folder in folders)
    assert f"ε = {float(f'{planned.epsilon:.3g}'):.2g}"[:6] in (tmp_path / "out" / "README.md").read_text()
    assert Ledger(f"sqlite:///{tmp_path}/ledger.db").runs()[0].epsilon == planned.epsilon
    # The mutant states epsilon as of the stop.
    so_far = trainer._run_budget.epsilon
    assert 0 < so_far < planned.epsilon
    report = trainer.privacy_report()
    report["guarantee"]["epsilon"] = so_far
    trainer_module.write_report(tmp_path / "mutant", report)
    assert not states_the_guarantee(tmp_path / "mutant", planned)


def test_an_exhausted_budget_raises_before_a_step(tmp_path: Path, planned: PrivacyPlan) -> None:
    trainer = build(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    again = build(tmp_path)
    with pytest.raises(PrivacyError) as info:
        again.train(resume_from_checkpoint=True)
    assert "used up" in str(info.value) and "new DPTrainer" in str(info.value) and "\n" not in str(info.value)
    (record,) = Ledger(f"sqlite:///{tmp_path}/ledger.db").runs()
    assert record.steps == STEPS and record.status == "completed"
    assert math.isfinite(again.privacy_spent().epsilon)
