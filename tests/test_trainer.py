from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_utils import SaveStrategy

import dpfa_hf
from dpfa_hf import DPTrainer, DPTrainerMixin, PrivacyArguments, PrivacyError, privatize
from dpfa_hf import trainer as trainer_module
from dpfa_hf.batch_selection import TruncatedPoissonSampler
from dpfa_hf.ledger import Ledger
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.trainer import WITHHELD

N, VOCAB, PAD = 40, 61, 0
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**kwargs: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = tf.BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes, **NO_DROPOUT, **kwargs)
    return tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")


def gpt2() -> nn.Module:
    config = tf.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=VOCAB, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash")


def llama(tied: bool = True) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = tf.LlamaConfig(vocab_size=VOCAB, intermediate_size=24, tie_word_embeddings=tied, **sizes)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash")


def lora_llama() -> nn.Module:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def bart() -> nn.Module:
    layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers",)}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    width = {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
    config = tf.BartConfig(d_model=16, vocab_size=VOCAB, max_position_embeddings=32, dropout=0.0, pad_token_id=PAD,
                           **layers, **heads, **width)  # fmt: skip
    return tf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="dp_flash")


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.ViTConfig(image_size=8, patch_size=4, **sizes, **NO_DROPOUT)
    return tf.AutoModelForImageClassification.from_config(config, attn_implementation="dp_flash")


def rows_for(model: nn.Module, n: int = N) -> list[dict[str, Any]]:
    """Rows without padding, of unequal length."""
    generator = torch.Generator().manual_seed(1)
    name = type(dpfa_hf.per_example.losses.base_model(model)).__name__
    rows = []
    for i in range(n):
        tokens = torch.randint(3, VOCAB, (4 + i % 5,), generator=generator).tolist()
        if "ImageClassification" in name:
            rows.append({"pixel_values": torch.randn(3, 8, 8, generator=generator).tolist(), "labels": i % 2})
        elif "SequenceClassification" in name:
            rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": i % 2})
        else:
            rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens[:]})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = {}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        filler = -100 if name == "labels" else PAD
        stack = torch.stack if values[0].dim() != 1 else lambda v: nn.utils.rnn.pad_sequence(v, True, filler)  # noqa: B023
        batch[name] = stack(values)
    return batch


class Rows(Dataset):
    """A plain torch data set."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def training_args(folder: Path, **kwargs: Any) -> tf.TrainingArguments:
    usual: dict[str, Any] = {
        "output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 2,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "per_device_train_batch_size": 8,
    }  # fmt: skip
    return tf.TrainingArguments(**{**usual, **kwargs})


def privacy(folder: Path, **kwargs: Any) -> PrivacyArguments:
    usual = {"target_epsilon": math.inf, "noise_multiplier": 0.0, "ledger": f"sqlite:///{folder}/ledger.db"}
    return PrivacyArguments(**{**usual, **kwargs})


def build(folder: Path, model: nn.Module | None = None, cls: type = DPTrainer, **kwargs: Any) -> Any:
    model = bert() if model is None else model
    parts = {
        "model": model,
        "args": kwargs.pop("args", None) or training_args(folder),
        "train_dataset": Rows(rows_for(model)),
        "data_collator": collate,
        "privacy_args": privacy(folder),
    }
    return cls(**{**parts, **kwargs})


def inject(trainer: Any, draws: list[list[int]]) -> None:
    plan = trainer.privacy_plan
    trainer._sampler = TruncatedPoissonSampler(
        plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}


def gap(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of tensors."""
    distance = sum((left[name] - right[name]).square().sum() for name in left) ** 0.5
    return float(distance / sum(tensor.square().sum() for tensor in right.values()) ** 0.5)


def clipped_sum(model: nn.Module, rows: list[dict[str, Any]], norm: float) -> dict[str, torch.Tensor]:
    """The definition: one row at a time, the model's own loss, autograd in float64."""
    model = copy.deepcopy(model).double().train()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    total = {name: torch.zeros_like(dict(model.named_parameters())[name]) for name in names}
    for row in rows:
        batch = {k: v.double() if v.is_floating_point() else v for k, v in collate([row]).items()}
        grads = torch.autograd.grad(
            model(**batch).loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        length = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                total[name] += grad * min(1.0, norm / length)
    return total


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("make", [bert, gpt2, llama, bart, vit, lora_llama])
def test_one_step_equals_a_float64_loop_over_the_examples(make: Any, micro_batch: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, n, norm = make(), 7, 0.7
    rows, before = rows_for(model, n), weights(model)
    expected = clipped_sum(model, rows, norm)
    trainer = build(
        tmp_path, model, train_dataset=Rows(rows),
        args=training_args(tmp_path, max_steps=1, per_device_train_batch_size=micro_batch),
        privacy_args=privacy(tmp_path, expected_batch_size=5, sampling_probability=1.0, per_example_max_grad_norm=norm),
    )  # fmt: skip
    trainer.train()
    found = {name: before[name] - tensor for name, tensor in weights(model).items()}
    assert gap(found, {name: tensor / 5 for name, tensor in expected.items()}) < 1e-5
    # The mutant divides by the size of the draw, which is private.
    assert gap(found, {name: tensor / n for name, tensor in expected.items()}) > 0.1


def test_accumulation_multiplies_the_expected_batch_as_in_trainer(tmp_path: Path) -> None:
    args = training_args(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    plan = build(tmp_path, args=args).privacy_plan
    assert (plan.expected_batch_size, plan.sampling_probability) == (12, 12 / N)


def test_micro_batch_and_accumulation_change_nothing_once_the_batch_is_set(tmp_path: Path) -> None:
    results, plans = [], []
    for micro_batch, accumulation in ((1, 1), (5, 4), (100, 2)):
        torch.manual_seed(0)
        args = training_args(
            tmp_path, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation
        )
        trainer = build(tmp_path, args=args, privacy_args=privacy(tmp_path, expected_batch_size=6))
        inject(trainer, [[1, 2, 3, 4, 5], [7, 8, 9]])
        trainer.train()
        results.append(weights(trainer.model))
        plans.append(trainer.privacy_plan)
    assert plans[0] == plans[1] == plans[2]
    assert gap(results[1], results[0]) < 1e-6 and gap(results[2], results[0]) < 1e-6


def test_epochs_become_steps_of_the_expected_batch(tmp_path: Path) -> None:
    args = training_args(tmp_path, max_steps=-1, num_train_epochs=1.5, per_device_train_batch_size=7)
    trainer = build(tmp_path, args=args)
    assert trainer.privacy_plan.max_steps == math.ceil(1.5 * math.ceil(N / 7))
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == trainer.privacy_spent().steps == 9


def test_the_callers_arguments_are_left_alone(tmp_path: Path) -> None:
    args = training_args(tmp_path, gradient_accumulation_steps=2)
    before = copy.deepcopy(args.to_dict())
    trainer = build(tmp_path, args=args)
    trainer.train()
    assert args.to_dict() == before and args.max_grad_norm == 1.0
    forced = trainer.args
    assert forced is not args
    assert (forced.max_grad_norm, forced.gradient_accumulation_steps) == (0.0, 1)
    assert forced.ignore_data_skip is True and forced.average_tokens_across_devices is False


# ---- draws and rows -------------------------------------------------------------------------------------------------


def test_an_empty_batch_is_a_step_with_noise_and_is_charged(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, args=training_args(tmp_path, max_steps=3), privacy_args=privacy(tmp_path, noise_multiplier=1.0)
    )
    inject(trainer, [[], [], []])
    steps = []

    class Watch(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(weights(trainer.model))

    trainer.add_callback(Watch)
    before = weights(trainer.model)
    trainer.train()
    moved = [{k: a[k] - b[k] for k in a} for a, b in zip([before, *steps], steps, strict=False)]
    deviation = trainer.privacy_plan.noise_standard_deviation / trainer.privacy_plan.expected_batch_size
    for step in moved:
        flat = torch.cat([tensor.flatten() for tensor in step.values()])
        assert abs(float(flat.std()) / deviation - 1) < 5 / math.sqrt(2 * flat.numel())
    assert gap(moved[0], moved[1]) > 1
    assert trainer._ledger.run(trainer._run_budget.run).steps == 3
    # The mutant skips empty batches, and its weights do not move.
    lazy = build(tmp_path, privacy_args=privacy(tmp_path, noise_multiplier=1.0))
    inject(lazy, [[], []])
    lazy.training_step = lambda model, inputs, *rest: torch.zeros(())
    before = weights(lazy.model)
    lazy.train()
    assert gap(weights(lazy.model), before) == 0 and lazy.privacy_spent().steps == 0


class Poisoned(Rows):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.rows[index].get("unreadable"):
            raise OSError("a private name")
        return self.rows[index]


HOSTILE: dict[str, dict[str, Any]] = {
    "token out of range": {"input_ids": [10**6] * 5, "attention_mask": [1] * 5, "labels": 0},
    "longer than the positions": {"input_ids": [5] * 500, "attention_mask": [1] * 500, "labels": 0},
    "label out of range": {"input_ids": [5] * 5, "attention_mask": [1] * 5, "labels": 77},
    "not to be collated": {"input_ids": ["x"], "attention_mask": [1], "labels": 0},
    "without a label": {"input_ids": [5] * 5, "attention_mask": [1] * 5},
    "without anything": {},
    "unreadable": {"unreadable": True},
}


def after_two_steps(folder: Path, rows: list[dict[str, Any]], draws: list[list[int]], **kwargs: Any) -> Any:
    torch.manual_seed(3)
    trainer = build(folder, train_dataset=Poisoned(rows), args=training_args(folder, **kwargs))
    inject(trainer, draws)
    trainer.train()
    return trainer


def hardened(folder: Path, **kwargs: Any) -> Any:
    asked = privacy(folder, floating_point="hardened", expected_batch_size=8, **kwargs.pop("asked", {}))
    return build(folder, privacy_args=asked, args=training_args(folder, per_device_train_batch_size=1), **kwargs)


@pytest.mark.parametrize("case", ["label out of range", "longer than the positions", "unreadable"])
def test_in_the_hardened_mode_a_row_that_raises_changes_no_bit_of_the_others(case: str, tmp_path: Path) -> None:
    results = []
    for draw in ([1, 2, 3], [1, N - 1, 2, 3]):  # shortest first, so that starting over does not change the order
        torch.manual_seed(3)
        trainer = hardened(tmp_path, train_dataset=Poisoned([*rows_for(bert())[:-1], HOSTILE[case]]))
        inject(trainer, [draw])
        dataloader = trainer.get_train_dataloader()
        trainer._check_on_synthetic_rows()
        trainer._accumulate(*next(iter(dataloader)))
        results.append(trainer._engine.take())
    without, with_it = results
    assert all(total.dtype == torch.float64 for total in without.values())
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert any(bool(total.any()) for total in without.values())


def test_a_hardened_run_noises_exact_sums_to_a_grid_and_says_what_epsilon_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"target_epsilon": 50.0, "noise_multiplier": 1.0, "accountant": "rdp", "target_delta": 1e-3}
    seen = []
    add_noise = GaussianNoise.add_noise

    def watched(noise: Any, sums: Any) -> Any:
        dtypes = {total.dtype for total in sums.values()}
        noised = add_noise(noise, sums)
        whole = all(torch.equal((total / noise.grid).round() * noise.grid, total) for total in noised.values())
        seen.append((noise.floating_point, dtypes, whole))
        return noised

    monkeypatch.setattr(GaussianNoise, "add_noise", watched)
    trainer = hardened(tmp_path, asked={**asked, "clipping": "adaptive"})
    trainer.train()
    assert seen == [("hardened", {torch.float64}, True)] * 2
    plan, report = trainer.privacy_plan, trainer.privacy_report()
    assert plan.floating_point == report["plan"]["floating_point"] == report["noise"]["floating_point_mode"]
    rows = [each["assumption"] for each in report["assumptions"]]
    assert any("numbers in the machine" in row for row in rows) and not any("real arithmetic" in row for row in rows)


def test_the_hardened_mode_is_refused_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.TrainingArguments, "device", torch.device("cuda", 0))
    with pytest.raises(PrivacyError) as info:
        hardened(tmp_path)
    one_line(info, "use_cpu", "set it to True", "snapped")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_row_that_raises_contributes_zero_and_nothing_else_changes(case: str, tmp_path: Path) -> None:
    clean = rows_for(bert())
    rows = [*clean[:-1], HOSTILE[case]]
    without = after_two_steps(tmp_path, rows, [[1, 2, 3, 4], [5, 6]])
    with_it = after_two_steps(tmp_path, rows, [[1, 2, 3, 4], [5, N - 1, 6]])
    assert gap(weights(with_it.model), weights(without.model)) < 1e-6
    assert with_it.state.log_history[-1]["step"] == 2
    # The check sees a row that does contribute.
    ordinary = after_two_steps(tmp_path, clean, [[1, 2, 3, 4], [5, N - 1, 6]])
    assert gap(weights(ordinary.model), weights(without.model)) > 1e-4


@pytest.mark.parametrize("name", ["tp_size", "ep_size", "pp_size", "dp_replicate_size"])
def test_processes_that_compute_parts_of_each_others_rows_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = bert()
    model.config.distributed_config = SimpleNamespace(fsdp_size=2, **{name: 2})
    with pytest.raises(PrivacyError, match=rf"DistributedConfig\.{name}=2 .* fsdp_size alone"):
        build(tmp_path, model=model)
    model.config.distributed_config = SimpleNamespace(fsdp_size=2, **{name: 1})
    build(tmp_path, model=model)


def test_losing_the_neighbours_of_a_bad_row_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*rows_for(bert())[:-1], HOSTILE["longer than the positions"]]
    without = after_two_steps(tmp_path, rows, [[1, 2, 3, 4], [5, 6]])

    def careless(self: Any, indices: Any, micro_batches: Any) -> torch.Tensor:
        for batch in micro_batches:
            with contextlib.suppress(Exception):
                self._accumulation.loss_of(batch)
        return torch.zeros(())

    def slicing(self: Any, indices: Any, micro_batches: Any) -> torch.Tensor:
        # Rows of the collated batch keep the padding and the columns that the bad row gave them.
        rows = [{k: v[i : i + 1] for k, v in b.items()} for b in micro_batches for i in range(len(b["labels"]))]
        return careless(self, indices, rows)

    for mutant in (careless, slicing):
        monkeypatch.setattr(DPTrainerMixin, "_accumulate", mutant)
        caught = after_two_steps(tmp_path, rows, [[1, 2, 3, 4], [5, N - 1, 6]])
        assert gap(weights(caught.model), weights(without.model)) > 1e-4


def test_workers_and_kinds_of_data_set_give_the_same_steps(tmp_path: Path) -> None:
    rows, draws = rows_for(bert()), [[1, 2, 3, 9, 11], [], [4, 5]]
    plain = after_two_steps(tmp_path, rows, draws, max_steps=3)
    workers = after_two_steps(tmp_path, rows, draws, max_steps=3, dataloader_num_workers=2)
    torch.manual_seed(3)
    table = datasets.Dataset.from_list([{**row, "note": "not the model's"} for row in rows])
    arrow = build(tmp_path, train_dataset=table, args=training_args(tmp_path, max_steps=3))
    inject(arrow, draws)
    arrow.train()
    for other in (workers, arrow):
        assert gap(weights(other.model), weights(plain.model)) < 1e-6


def test_injected_draws_make_the_run_not_private(tmp_path: Path) -> None:
    trainer = build(tmp_path, privacy_args=privacy(tmp_path, noise_multiplier=1.0))
    inject(trainer, [[1], [2]])
    assert "injected" in trainer.privacy_report()["mechanism"]["sampler"]
    assert trainer.privacy_report()["private"] is False


# ---- what is withheld -----------------------------------------------------------------------------------------------


class Recorder(tf.TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("evaluate")

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("predict")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("prediction_step")


def leaks(trainer: Any, recorder: Recorder, output: Any) -> set[str]:
    """Withheld keys found anywhere outside the caller's hands."""
    saved = [
        entry
        for path in Path(trainer.args.output_dir).glob("checkpoint-*/trainer_state.json")
        for entry in json.loads(path.read_text())["log_history"]
    ]
    lines = [*trainer.state.log_history, *recorder.logs, *saved, output.metrics]
    return {key for line in lines for key in line} & WITHHELD


def test_withheld_figures_are_nowhere_and_epsilon_is_everywhere(tmp_path: Path) -> None:
    recorder = Recorder()
    args = training_args(tmp_path, save_strategy="steps", save_steps=1)
    trainer = build(tmp_path, args=args, callbacks=[recorder], privacy_args=privacy(tmp_path, noise_multiplier=1.0))
    output = trainer.train()
    assert leaks(trainer, recorder, output) == set()
    assert math.isnan(output.training_loss)
    assert all("epsilon" in line for line in [*recorder.logs, *trainer.state.log_history, output.metrics])
    assert [line["grad_norm"] for line in recorder.logs if "grad_norm" in line]
    states = [json.loads(path.read_text()) for path in Path(args.output_dir).glob("*/trainer_state.json")]
    assert len(states) == 2
    assert all(state["total_flos"] == 0 and state["num_input_tokens_seen"] == 0 for state in states)


def test_the_operator_may_switch_private_figures_on_and_the_report_says_so(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = build(tmp_path, callbacks=[recorder], privacy_args=privacy(tmp_path, log_private_metrics=True))
    output = trainer.train()
    assert {"loss", "train_loss"} <= leaks(trainer, recorder, output) and output.training_loss > 0
    assert any("training loss" in text for text in trainer.privacy_report()["releases"]["not_covered"])


def test_the_logged_norm_is_that_of_the_noised_gradient(tmp_path: Path) -> None:
    recorder = Recorder()
    args = training_args(tmp_path, max_steps=1)
    trainer = build(tmp_path, args=args, callbacks=[recorder], privacy_args=privacy(tmp_path, noise_multiplier=1.0))
    inject(trainer, [[]])
    before = weights(trainer.model)
    trainer.train()
    moved = sum((before[k] - after).square().sum() for k, after in weights(trainer.model).items()) ** 0.5
    assert float(moved) == pytest.approx(recorder.logs[0]["grad_norm"], rel=1e-4)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluating(folder: Path, eval_data: str | None, cls: type = DPTrainer) -> tuple[Any, Recorder]:
    recorder = Recorder()
    trainer = build(
        folder, cls=cls, callbacks=[recorder], privacy_args=privacy(folder, eval_data=eval_data),
        eval_dataset=Rows(rows_for(bert(), 6)),
    )  # fmt: skip
    return trainer, recorder


def test_undeclared_evaluation_is_refused(tmp_path: Path) -> None:
    trainer, _ = evaluating(tmp_path, None)
    for act in (trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset)):
        with pytest.raises(PrivacyError, match="eval_data"):
            act()


def test_private_evaluation_returns_to_the_caller_alone(tmp_path: Path) -> None:
    trainer, recorder = evaluating(tmp_path, "private")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (6, 2)
    trainer.train()
    trainer.evaluate()
    assert recorder.events == [] and recorder.logs
    assert not any(key.startswith("eval_") for line in [*recorder.logs, *trainer.state.log_history] for key in line)
    assert trainer.callback_handler.callbacks and trainer._observed


def test_public_evaluation_is_stocks(tmp_path: Path) -> None:
    trainer, recorder = evaluating(tmp_path, "public")
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert {"evaluate", "predict", "prediction_step"} <= set(recorder.events)
    assert any("eval_loss" in line for line in recorder.logs)


def test_public_evaluation_may_steer(tmp_path: Path) -> None:
    args = training_args(
        tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True
    )
    trainer = build(
        tmp_path, args=args, privacy_args=privacy(tmp_path, eval_data="public"), eval_dataset=Rows(rows_for(bert(), 6)),
        callbacks=[tf.EarlyStoppingCallback()],
    )  # fmt: skip
    trainer.train()
    assert any("eval_loss" in line for line in trainer.state.log_history) and trainer.state.best_metric is not None


# ---- privatize and subclasses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [tf.Trainer, tf.Seq2SeqTrainer])
def test_privatize_keeps_the_object_and_its_class(cls: type, tmp_path: Path) -> None:
    args = training_args(tmp_path)
    if cls is tf.Seq2SeqTrainer:
        args = tf.Seq2SeqTrainingArguments(**{k: getattr(args, k) for k in ("output_dir", "use_cpu", "report_to",
                                              "disable_tqdm", "max_steps", "save_strategy")})  # fmt: skip
    stock = cls(model=bart(), args=args, train_dataset=Rows(rows_for(bart())), data_collator=collate)
    trainer = privatize(stock, privacy(tmp_path, noise_multiplier=1.0))
    assert trainer is stock and isinstance(trainer, cls) and isinstance(trainer, DPTrainerMixin)
    trainer.train()
    assert trainer.privacy_spent().steps == 2
    assert all("loss" not in line for line in trainer.state.log_history)


@pytest.mark.parametrize("eval_data", ["public", "private"])
def test_seq2seq_generates_while_it_is_evaluated(eval_data: str, tmp_path: Path) -> None:
    model = bart()
    args = tf.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="no",
        predict_with_generate=True, generation_max_length=4,
    )  # fmt: skip
    stock = tf.Seq2SeqTrainer(
        model=model, args=args, train_dataset=Rows(rows_for(model)), data_collator=collate,
        compute_metrics=lambda prediction: {"tokens": float(prediction.predictions.dtype.kind == "i")},
    )  # fmt: skip
    trainer = privatize(stock, privacy(tmp_path, eval_data=eval_data))
    trainer.train()
    held_out = Rows(rows_for(model, 4))
    assert trainer.evaluate(held_out)["eval_tokens"] == 1  # logits, without generation
    assert trainer.predict(held_out).predictions.dtype.kind == "i"
    assert any("eval_tokens" in line for line in trainer.state.log_history) == (eval_data == "public")


def test_privatize_takes_the_same_step_as_dptrainer(tmp_path: Path) -> None:
    def run(make: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        trainer = make(bert())
        inject(trainer, [[1, 2, 3], [4]])
        trainer.train()
        return weights(trainer.model)

    def stock(model: nn.Module) -> Any:
        trainer = tf.Trainer(
            model=model, args=training_args(tmp_path), train_dataset=Rows(rows_for(model)), data_collator=collate
        )
        return privatize(trainer, privacy(tmp_path))

    assert gap(run(stock), run(lambda model: build(tmp_path, model))) == 0


def test_a_refused_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    stock = tf.Trainer(model=bert(), args=training_args(tmp_path), train_dataset=Rows(rows_for(bert())))
    with pytest.raises(PrivacyError, match="target_delta"):
        privatize(stock, privacy(tmp_path, target_delta=0.5))
    assert type(stock) is tf.Trainer


def test_the_mixin_makes_a_subclass_private(tmp_path: Path) -> None:
    class Named(tf.Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.made = True
            return super().create_optimizer(model)

    class Private(DPTrainerMixin, Named):
        pass

    trainer = build(tmp_path, cls=Private)
    trainer.train()
    assert trainer.made and trainer.privacy_spent().steps == 2 and isinstance(trainer, Named)


def test_a_loss_of_the_callers_own_is_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    rows, before = rows_for(model, 4), weights(model)

    def doubled(called: nn.Module, batch: Any) -> torch.Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return 2 * nn.functional.cross_entropy(called(**inputs).logits, batch["labels"], reduction="none")

    trainer = build(
        tmp_path, model, train_dataset=Rows(rows), per_example_loss_fn=doubled,
        args=training_args(tmp_path, max_steps=1),
        privacy_args=privacy(tmp_path, expected_batch_size=4, per_example_max_grad_norm=1e3),
    )  # fmt: skip
    expected = clipped_sum(model, rows, 1e3)
    trainer.train()
    found = {name: before[name] - tensor for name, tensor in weights(model).items()}
    assert gap(found, {name: tensor / 2 for name, tensor in expected.items()}) < 1e-5
    assert "operator" in trainer.privacy_report()["mechanism"]["loss"]


# ---- what a run leaves behind ---------------------------------------------------------------------------------------


def test_every_saved_folder_holds_report_and_card(tmp_path: Path) -> None:
    args = training_args(tmp_path, save_strategy="steps", save_steps=1)
    trainer = build(tmp_path, lora_llama(), args=args, privacy_args=privacy(tmp_path, noise_multiplier=1.0))
    trainer.train()
    trainer.save_model()
    folders = [Path(args.output_dir), *Path(args.output_dir).glob("checkpoint-*")]
    assert len(folders) == 3
    for folder in folders:
        report = json.loads((folder / "privacy.json").read_text())
        assert report["run"] == trainer._run_budget.run and report["guarantee"]["epsilon"] == "inf"
        assert "NOT PRIVATE" in (folder / "README.md").read_text()
    base = llama()
    base.load_state_dict({k.replace(".base_layer", "").removeprefix("base_model.model."): v
                          for k, v in trainer.model.state_dict().items() if "lora" not in k})  # fmt: skip
    again = peft.PeftModel.from_pretrained(base, args.output_dir)
    batch = collate(rows_for(base, 3))
    assert torch.equal(again.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


def saved_generators(folder: Path, draw: list[int]) -> list[bytes]:
    """The generator states in the checkpoint of one step over `draw`, with dropout."""
    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    trainer = build(folder, model, args=training_args(folder, max_steps=1, save_strategy="steps", save_steps=1))
    inject(trainer, [draw])
    trainer.train()
    files = sorted((folder / "out" / "checkpoint-1").glob("rng_state*"))
    return [torch.load(file, weights_only=False)["cpu"].numpy().tobytes() for file in files]


def test_no_checkpoint_tells_how_much_dropout_a_batch_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "large").mkdir()
    small, large = saved_generators(tmp_path / "small", [0]), saved_generators(tmp_path / "large", list(range(20)))
    assert small == large
    monkeypatch.setattr(DPTrainerMixin, "_save_rng_state", tf.Trainer._save_rng_state)
    small, large = saved_generators(tmp_path / "small", [0]), saved_generators(tmp_path / "large", list(range(20)))
    assert small != large, "the stock checkpoint should have told the batch's size"


def files_with(folder: Path, secret: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_no_written_file_holds_a_fingerprint_or_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list(rows_for(bert()))
    args = training_args(tmp_path, save_strategy="steps", save_steps=1)
    trainer = build(tmp_path, args=args, train_dataset=table)
    trainer._ledger.display_url = "postgresql://somebody:hunter2@host/db"
    trainer.train()
    trainer.save_model()
    fingerprint = trainer._ledger.run(trainer._run_budget.run).dataset.removeprefix("unnamed-")
    out = Path(args.output_dir)
    assert len(fingerprint) == 64 and files_with(out, trainer._run_budget.run)
    for secret in (fingerprint, table._fingerprint, "hunter2"):
        assert files_with(out, secret) == []
    # The search finds a fingerprint that is there.
    (out / "leak.txt").write_text(fingerprint)
    assert len(files_with(out, fingerprint)) == 1


def test_a_trainer_made_model_card_keeps_the_section(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="mine")
    assert "NOT PRIVATE" in (Path(trainer.args.output_dir) / "README.md").read_text()


# ---- the data set's budget ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def affordable_plan() -> Any:
    args = PrivacyArguments(target_epsilon=3.0, noise_multiplier=2.0, target_delta=1e-3, accountant="rdp")
    sizes = {"num_units": N, "expected_batch_size": 8, "max_steps": 2}
    return dpfa_hf.accounting.make_plan(args, **sizes, loss_scale=2 * math.log(2))


def limited(folder: Path, epsilon: float, name: str = "patients", **kwargs: Any) -> Any:
    args = privacy(
        folder, target_epsilon=3.0, noise_multiplier=2.0, target_delta=1e-3, accountant="rdp", ledger_dataset=name,
        dataset_budget_epsilon=epsilon, dataset_budget_delta=0.01,
    )  # fmt: skip
    return build(folder, privacy_args=args, **kwargs)


def test_the_second_run_over_a_budget_is_refused_before_step_one(tmp_path: Path, affordable_plan: Any) -> None:
    epsilon = 1.5 * affordable_plan.epsilon
    first = limited(tmp_path, epsilon)
    first.train()
    assert first.privacy_plan == affordable_plan
    second = limited(tmp_path, epsilon)
    before = weights(second.model)
    with pytest.raises(PrivacyError, match="budget"):
        second.train()
    assert gap(weights(second.model), before) == 0
    assert [run.steps for run in second._ledger.runs()] == [2]
    # Under another name, and under a larger budget for it, the same run is allowed.
    limited(tmp_path, epsilon, "others").train()


def test_a_failed_check_before_step_one_reserves_nothing(tmp_path: Path) -> None:
    def broken(rows: list[Any]) -> Any:
        raise RuntimeError("no")

    trainer = limited(tmp_path, 5.0, data_collator=broken)
    with pytest.raises(PrivacyError, match="data_collator"):
        trainer.train()
    assert trainer._ledger.runs() == []
    assert Ledger(f"sqlite:///{tmp_path}/ledger.db").datasets() == []


# ---- refusals -------------------------------------------------------------------------------------------------------


def one_line(info: pytest.ExceptionInfo[PrivacyError], *words: str) -> None:
    text = str(info.value)
    assert "\n" not in text and len(text) > 25
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


REFUSED_ARGUMENTS: list[tuple[str, Any, str]] = [
    ("auto_find_batch_size", True, "per_device_train_batch_size"),
    ("fp16", True, "bf16"),
    ("fp16_full_eval", True, "bf16_full_eval"),
    ("_n_gpu", 2, "CUDA_VISIBLE_DEVICES"),
    ("label_smoothing_factor", 0.1, "per_example_loss_fn"),
    ("neftune_noise_alpha", 5.0, "None"),
    ("use_liger_kernel", True, "False"),
    ("torch_compile", True, "False"),
    ("deepspeed", {"zero_optimization": {}}, "leave it out"),
    ("fsdp", "full_shard", "leave it out"),
    ("save_on_each_node", True, "share"),
    ("parallelism_config", SimpleNamespace(tp_size=2), "leave it out"),
    ("optim", "lomo", "adamw_torch"),
    ("optim", "adalomo", "adamw_torch"),
    ("optim", tf.training_args.OptimizerNames.GALORE_ADAMW_LAYERWISE, "adamw_torch"),
    ("optim", "galore_adafactor_layerwise", "adamw_torch"),
    ("train_sampling_strategy", "sequential", "random"),
    ("train_sampling_strategy", "group_by_length", "random"),
    ("train_sampling_strategy", "batch_rebalance", "random"),
    ("group_by_length", True, "False"),
    ("packing", True, "padding_free"),
    ("dataloader_drop_last", True, "False"),
    ("accelerator_config.split_batches", True, "False"),
    ("accelerator_config.dispatch_batches", True, "None"),
    ("accelerator_config.gradient_accumulation_kwargs", {"sync_with_dataloader": False}, "None"),
    ("include_num_input_tokens_seen", "all", "no"),
    ("include_num_input_tokens_seen", "non_padding", "no"),
    ("skip_memory_metrics", False, "True"),
    ("debug", [tf.debug_utils.DebugOption.UNDERFLOW_OVERFLOW], "empty"),
    ("lr_scheduler_type", "reduce_lr_on_plateau", "linear"),
    ("lr_scheduler_type", "greedy", "linear"),
    ("load_best_model_at_end", True, "public"),
    ("save_strategy", SaveStrategy.BEST, "public"),
    ("eval_strategy", "steps", "public"),
    ("eval_on_start", True, "public"),
    ("gradient_checkpointing_kwargs", {"use_reentrant": True}, "False"),
]


@pytest.mark.parametrize(("name", "value", "way_out"), REFUSED_ARGUMENTS)
def test_a_refused_argument_is_named_with_its_way_out(name: str, value: Any, way_out: str, tmp_path: Path) -> None:
    args = training_args(tmp_path)
    owner, _, field = name.rpartition(".")
    setattr(getattr(args, owner) if owner else args, field, value)
    with pytest.raises(PrivacyError) as info:
        build(tmp_path, args=args)
    one_line(info, {"_n_gpu": "n_gpu", "eval_on_start": "eval_strategy"}.get(name, name), way_out)
    stock = tf.Trainer(model=bert(), args=training_args(tmp_path), train_dataset=Rows(rows_for(bert())))
    stock.args = args
    with pytest.raises(PrivacyError):
        privatize(stock, privacy(tmp_path))


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_engines_of_accelerate_that_reduce_gradients_are_refused_by_name(tmp_path: Path, engine: str) -> None:
    stock = tf.Trainer(model=bert(), args=training_args(tmp_path), train_dataset=Rows(rows_for(bert())))
    stock.accelerator = SimpleNamespace(distributed_type=DistributedType(engine))
    with pytest.raises(PrivacyError) as info:
        privatize(stock, privacy(tmp_path))
    one_line(info, engine, "torchrun")


def test_no_harmless_argument_is_refused(tmp_path: Path) -> None:
    build(tmp_path, args=training_args(tmp_path, weight_decay=0.1, warmup_steps=1, dataloader_pin_memory=False, seed=7))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(rows_for(bert()))


class OwnLoss(tf.Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


class OwnLossOnTop(DPTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


class OwnStepOnTop(DPTrainer):
    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return tf.Trainer.training_step(self, model, inputs[0])


class OwnLoaderOnTop(DPTrainer):
    def get_train_dataloader(self) -> Any:
        return tf.Trainer.get_train_dataloader(self)


def adapter(**kwargs: Any) -> nn.Module:
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **kwargs))


def eva() -> nn.Module:
    model = adapter()
    model.peft_config["default"].init_lora_weights = "eva"
    return model


def pvera() -> nn.Module:
    return peft.get_peft_model(llama(), peft.PveraConfig(r=2, target_modules=["q_proj"]))


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, **kwargs: Any) -> Any:
        return self.weight


def normalised() -> nn.Module:
    model = bert()
    model.bert.encoder.layer[0].output.LayerNorm = nn.BatchNorm1d(16)
    return model


REFUSED_PARTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no data set": (lambda f: build(f, train_dataset=None), ("train_dataset", "missing")),
    "empty data set": (lambda f: build(f, train_dataset=Rows([])), ("train_dataset", "empty")),
    "stream": (lambda f: build(f, train_dataset=Stream()), ("IterableDataset", "map-style")),
    "stream by epochs": (
        lambda f: build(f, train_dataset=Stream(), args=training_args(f, max_steps=-1)),
        ("IterableDataset", "map-style"),
    ),
    "model_init": (lambda f: build(f, cls=without_model), ("model_init", "model=")),
    "compute_loss_func": (
        lambda f: build(f, compute_loss_func=lambda *a, **k: None),
        ("compute_loss_func", "per_example_loss_fn"),
    ),
    "own loss under the mixin": (
        lambda f: build(f, cls=type("Mine", (DPTrainerMixin, OwnLoss), {})),
        ("OwnLoss.compute_loss", "per_example_loss_fn"),
    ),
    "own loss over DPTrainer": (
        lambda f: build(f, cls=OwnLossOnTop),
        ("OwnLossOnTop.compute_loss", "per_example_loss_fn"),
    ),
    "own step over DPTrainer": (lambda f: build(f, cls=OwnStepOnTop), ("OwnStepOnTop.training_step", "remove")),
    "own loader over DPTrainer": (lambda f: build(f, cls=OwnLoaderOnTop), ("get_train_dataloader", "remove")),
    "early stopping": (lambda f: build(f, callbacks=[tf.EarlyStoppingCallback()]), ("EarlyStopping", "public")),
    "early stopping added": (
        lambda f: build(f).add_callback(tf.EarlyStoppingCallback),
        ("EarlyStopping", "drop"),
    ),
    "search": (lambda f: build(f).hyperparameter_search(), ("hyperparameter_search", "loop over DPTrainer")),
    "trial": (lambda f: build(f).train(trial={"lr": 1}), ("hyperparameter_search", "loop over DPTrainer")),
    "QA-LoRA": (lambda f: build(f, adapter(use_qalora=True, qalora_group_size=4)), ("use_qalora", "leave it out")),
    "EVA": (lambda f: build(f, eva()), ("eva", "gaussian")),
    "PVeRA": (lambda f: build(f, pvera()), ("PVERA", "LoraConfig")),
    "layer without a rule": (
        lambda f: build(f, Opaque(), per_example_loss_fn=lambda m, b: m.weight),
        ("Opaque", "requires_grad_(False)"),
    ),
    "model without a known loss": (lambda f: build(f, Opaque()), ("Opaque", "per_example_loss_fn")),
    "BatchNorm": (lambda f: build(f, normalised()), ("BatchNorm1d", "LayerNorm")),
    "nothing to train": (lambda f: build(f, bert().requires_grad_(False)), ("trainable", "requires_grad")),
    "delta of 1/n": (lambda f: build(f, privacy_args=privacy(f, target_delta=1 / N)), ("target_delta", "lower")),
    "batch above n": (
        lambda f: build(f, privacy_args=privacy(f, expected_batch_size=N + 1)),
        ("expected_batch_size", "lower"),
    ),
    "micro-batch above n": (
        lambda f: build(f, args=training_args(f, per_device_train_batch_size=N + 1)),
        ("expected_batch_size", "lower"),
    ),
    "budget without a name": (
        lambda f: build(f, privacy_args=privacy(f, dataset_budget_epsilon=1.0, dataset_budget_delta=0.1)),
        ("ledger_dataset",),
    ),
    "users": (
        lambda f: build(f, privacy_args=privacy(f, privacy_unit="user", privacy_unit_column="who")),
        ("privacy_unit", "datasets.Dataset"),
    ),
    "no PrivacyArguments": (lambda f: build(f, privacy_args=None), ("privacy_args", "PrivacyArguments(")),
    "a dict of them": (lambda f: build(f, privacy_args={"target_epsilon": 3}), ("privacy_args", "PrivacyArguments(")),
    "ledger of another kind": (
        lambda f: build(f, privacy_args=privacy(f, ledger="mysql://u:hunter2@h/d")),
        ("ledger", "sqlite"),
    ),
    "ledger in a missing folder": (
        lambda f: build(f, privacy_args=privacy(f, ledger="sqlite:////dev/null/no/ledger.db")),
        ("ledger",),
    ),
    "privatize a model": (lambda f: privatize(bert(), privacy(f)), ("Trainer", "privatize")),
    "privatize twice": (lambda f: privatize(build(f), privacy(f)), ("private already",)),
    "privatize with nothing": (lambda f: privatize(stock(f), None), ("privacy_args", "PrivacyArguments(")),
    "train twice": (lambda f: twice(build(f)), ("trained already", "new DPTrainer")),
    "other rows afterwards": (lambda f: shrunk(build(f)).train(), ("train_dataset", "new DPTrainer")),
    "two losses for a row": (
        lambda f: build(f, per_example_loss_fn=lambda m, b: m(**b).logits.mean()).train(),
        ("per-example loss", "one loss per example"),
    ),
    "hardened with neighbours": (
        lambda f: build(f, privacy_args=privacy(f, floating_point="hardened")),
        ("per_device_train_batch_size is 8", "set it to 1"),
    ),
    "hardened in float64": (
        lambda f: hardened(f, model=bert().double()),
        ("torch.float64", ".float()"),
    ),
    "loss over the batch": (lambda f: build(f, per_example_loss_fn=batch_mean).train(), ("another's", "remove")),
}


def without_model(model: Any, **kwargs: Any) -> Any:
    return DPTrainer(model_init=lambda: bert(), **kwargs)


def stock(folder: Path) -> Any:
    return tf.Trainer(
        model=bert(), args=training_args(folder), train_dataset=Rows(rows_for(bert())), data_collator=collate
    )


def twice(trainer: Any) -> None:
    trainer.train()
    trainer.train()


def shrunk(trainer: Any) -> Any:
    trainer.train_dataset = Rows(rows_for(bert(), N - 1))
    return trainer


def batch_mean(model: nn.Module, batch: Any) -> torch.Tensor:
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    return losses.mean().expand(len(losses))


@pytest.mark.parametrize("case", REFUSED_PARTS)
def test_a_wrong_use_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    act, words = REFUSED_PARTS[case]
    with pytest.raises(PrivacyError) as info:
        act(tmp_path)
    one_line(info, *words)
    assert "hunter2" not in str(info.value)


def test_privatize_after_a_step_without_privacy_is_refused(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    trainer.train()
    with pytest.raises(PrivacyError) as info:
        privatize(trainer, privacy(tmp_path))
    one_line(info, "begun", "before its first step")


def test_pushing_a_folder_with_the_ledger_in_it_is_refused(tmp_path: Path) -> None:
    args = training_args(tmp_path)
    args.push_to_hub = True
    for url in (f"sqlite:///{args.output_dir}/ledger.db", f"sqlite+pysqlite:///{args.output_dir}/deep/ledger.db"):
        with pytest.raises(PrivacyError) as info:
            build(tmp_path, args=args, privacy_args=privacy(tmp_path, ledger=url))
        one_line(info, "push_to_hub", "elsewhere")


def test_reentrant_checkpointing_switched_on_by_hand_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(PrivacyError) as info:
        trainer.train()
    one_line(info, "reentrant", "use_reentrant=False")
    assert trainer._ledger.runs() == []


def test_arguments_changed_after_construction_are_refused_too(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.args.neftune_noise_alpha = 5.0
    with pytest.raises(PrivacyError) as info:
        trainer.train()
    one_line(info, "neftune_noise_alpha")


def test_checkpointing_takes_the_same_step(tmp_path: Path) -> None:
    rows, results = rows_for(bert()), []
    for checkpointing in (False, True):
        trainer = after_two_steps(tmp_path, rows, [[1, 2, 3], [4]], gradient_checkpointing=checkpointing)
        results.append(weights(trainer.model))
    assert gap(results[1], results[0]) < 1e-6


def test_the_plan_cannot_be_changed(tmp_path: Path) -> None:
    plan = build(tmp_path).privacy_plan
    with pytest.raises(AttributeError):
        plan.noise_multiplier = 0.0
    assert replace(plan).sha256() == plan.sha256()
    assert trainer_module.DPTrainer is dpfa_hf.DPTrainer
    assert np.isinf(plan.epsilon)
