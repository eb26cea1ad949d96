"""`dpfa audit` from a shell: whole audits of models and of scripts, sound ones and such with a bug of their own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dpfa_hf import DPTrainer, PrivacyArguments
from dpfa_hf.audit import mutants, read_audit
from dpfa_hf.audit.steps import Units
from dpfa_hf.per_example.preflight import pad_rows
from dpfa_hf.report import read_report

SCRIPT = """
import torch
import transformers
from torch import nn

import dpfa_hf

NUM_UNITS = 200


def collate(rows):
    padded = {name: [torch.tensor(row[name]) for row in rows] for name in ("input_ids", "attention_mask")}
    padded = {name: nn.utils.rnn.pad_sequence(values, batch_first=True) for name, values in padded.items()}
    return padded | {"labels": torch.tensor([row["labels"] for row in rows])}


def make_trainer(train_dataset, output_dir, callbacks=(), **options):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=100,
        max_position_embeddings=64,
    )
    return dpfa_hf.DPTrainer(
        model=transformers.BertForSequenceClassification(config),
        args=transformers.TrainingArguments(
            output_dir, per_device_train_batch_size=8, max_steps=4, use_cpu=True, report_to=[], logging_steps=2,
        ),
        train_dataset=train_dataset,
        data_collator=collate,
        callbacks=list(callbacks),
        privacy_args=dpfa_hf.PrivacyArguments(
            target_epsilon=8.0, noise_multiplier=2.0, expected_batch_size=60, ledger="sqlite:///LEDGER",
            ledger_dataset="patients", dataset_budget_epsilon=9.0, dataset_budget_delta=1e-3,
        ),
        **options,
    )
"""

# What looks at nothing but noised gradients may do with them what it likes.
POST_PROCESSING = """
sound = make_trainer


class ByItsNorm(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def make_trainer(train_dataset, output_dir):
    return sound(train_dataset, output_dir, callbacks=[ByItsNorm()])
"""

# What its author did around the engine: the check that must fail, and the code.
BUGS = {
    "a loss averaged over the tokens of the batch": (
        "trains at all",
        """
sound = make_trainer


def loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none") * 8 / batch["attention_mask"].sum()


def make_trainer(train_dataset, output_dir):
    return sound(train_dataset, output_dir, per_example_loss_fn=loss)
""",
    ),
    "a loss with a memory of other units": (
        "clipped sum",
        """
sound = make_trainer
seen = [0]


def loss(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    longest, seen[0] = seen[0], max(seen[0], batch["input_ids"].shape[1] if model.training and len(losses) > 3 else 0)
    return losses / (1 + (longest > 40))


def make_trainer(train_dataset, output_dir):
    seen[0] = 0
    return sound(train_dataset, output_dir, per_example_loss_fn=loss)
""",
    ),
    "a callback that rescales the gradients by the batch": (
        "after the noise",
        """
sound = make_trainer


class ByTheBatch(transformers.TrainerCallback):
    def __init__(self):
        self.units = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.grad *= 60 / max(self.units, 1)


def make_trainer(train_dataset, output_dir):
    callback = ByTheBatch()
    trainer = sound(train_dataset, output_dir, callbacks=[callback])
    accumulate = trainer._accumulate

    def counting(units, micro_batches):
        callback.units = len(units)
        return accumulate(units, micro_batches)

    trainer._accumulate = counting
    return trainer
""",
    ),
    "weights made from the labels": (
        "before step 1",
        """
sound = make_trainer


def make_trainer(train_dataset, output_dir):
    trainer = sound(train_dataset, output_dir)
    with torch.no_grad():
        trainer.model.classifier.bias += torch.bincount(torch.tensor(train_dataset["labels"]), minlength=2)
    return trainer
""",
    ),
}


def dpfa_audit(*arguments: str, ledger: Path | None = None) -> tuple[int, Any, str]:
    """(exit code, what it printed as JSON, stderr)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if ledger is not None:
        environment["DPFA_LEDGER"] = f"sqlite:///{ledger}"
    command = [sys.executable, "-m", "dpfa_hf.cli", "audit", *arguments, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def failed(record: dict[str, Any]) -> set[str]:
    return {check["name"] for check in record["checks"] if not check["passed"]}


def tiny_bert() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=300,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def test_the_folder_of_a_private_run_is_audited_under_its_own_plan_and_costs_nobody_anything(tmp_path: Path) -> None:
    model, ledger, folder = tiny_bert(), tmp_path / "ledger.db", tmp_path / "model"
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 1}
    trainer = DPTrainer(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=16, max_steps=12, use_cpu=True, report_to=[],
            disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=Units(400, dict.fromkeys(range(400), row)),
        data_collator=lambda rows: pad_rows(model, rows),
        privacy_args=PrivacyArguments(
            target_epsilon=4.0, expected_batch_size=80, ledger=f"sqlite:///{ledger}", ledger_dataset="patients"
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))
    trainer._ledger.close()
    before = hashlib.sha256(ledger.read_bytes()).hexdigest()
    code, record, error = dpfa_audit(str(folder), "--seconds", "8", ledger=ledger)
    assert (code, failed(record), error.count("\n")) == (0, set(), 0), error
    report = read_report(folder)
    assert record["subject"]["run"] == report["run"] and record["subject"]["plan_sha256"] == report["plan_sha256"]
    assert record["epsilon_lower_bound"] <= record["epsilon_claimed"] <= record["epsilon_of_plan"] <= 4.0
    assert record["canaries"] >= 64 and all(mutant["caught"] for mutant in record["mutants"])
    assert read_audit(folder) == record
    assert hashlib.sha256(ledger.read_bytes()).hexdigest() == before


def test_lora_on_a_small_llama_is_audited(tmp_path: Path) -> None:
    """SmolLM2's form: tied head, grouped keys, rotary positions."""
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=128, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    code, record, error = dpfa_audit(str(tmp_path), "--lora", "4", "--seconds", "8")
    assert (code, failed(record)) == (0, set()), error
    assert record["subject"]["name"] == "LlamaForCausalLM" and record["passed"] and read_audit(tmp_path) == record


def test_a_sound_script_passes_and_neither_its_ledger_nor_its_budget_is_touched(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("LEDGER", str(tmp_path / "theirs.db")) + POST_PROCESSING)
    code, record, error = dpfa_audit(str(script), "--seconds", "10", "--out", str(tmp_path))
    assert (code, failed(record)) == (0, set()), error
    assert read_audit(tmp_path) == record and record["subject"]["kind"] == "script"
    assert not (tmp_path / "theirs.db").exists()


@pytest.mark.parametrize("bug", BUGS)
def test_a_script_with_a_bug_of_its_own_fails(bug: str, tmp_path: Path) -> None:
    check, code = BUGS[bug]
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("LEDGER", str(tmp_path / "theirs.db")) + code)
    status, record, error = dpfa_audit(str(script), "--seconds", "5")
    assert status == 1 and not record["passed"] and check in failed(record), record["checks"]
    assert error.strip().splitlines()[-1].startswith("dpfa: the audit failed: ")
    assert not (tmp_path / "theirs.db").exists()


def test_the_self_test_catches_every_bug_that_it_plants() -> None:
    code, record, error = dpfa_audit("--self-test")
    assert [mutant["name"] for mutant in record["mutants"] if not mutant["caught"]] == []
    assert [mutant["name"] for mutant in record["mutants"]] == list(mutants.MUTANTS)
    assert (code, failed(record)) == (0, set()), error
