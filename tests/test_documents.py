"""`privacy_unit="document"` through the trainer: rows are drawn, packed without padding, and clipped one by one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers as tf
from dpfa_hf._kernel import dispatch, reference
from torch import nn
from typer.testing import CliRunner

from dpfa_hf import DPTrainer, PrivacyArguments, PrivacyError, batch_selection, cli, privatize
from dpfa_hf.batch_selection import LogicalBatches, TruncatedPoissonSampler
from dpfa_hf.per_example import packing
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.report import read_report

Row = dict[str, Any]
VOCABULARY, LENGTH, N = 53, 24, 12
SLACK = 1 + 2**-10
FLAT = tf.DataCollatorWithFlattening()
ABSENT: Row = {}  # a unit that adjacency has replaced by nothing: it cannot be read


class Documents(list[Row]):
    """A map-style data set in which an absent unit raises, as any unreadable row may."""

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        row = super().__getitem__(index)
        if row is ABSENT:
            raise KeyError(index)
        return dict(row)


def text(tokens: list[int], labels: list[int] | None = None) -> Row:
    return {"input_ids": tokens, "labels": list(tokens if labels is None else labels)}


def texts(n: int = N, seed: int = 0) -> list[Row]:
    """Documents of 2 to 9 tokens."""
    generator = np.random.default_rng(seed)
    return [text(generator.integers(1, VOCABULARY, generator.integers(2, 10)).tolist()) for _ in range(n)]


def llama() -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def gpt2() -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash")


def lora() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


def padding(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    fillers = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([row[k] + [v] * (longest - len(row[k])) for row in rows]) for k, v in fillers.items()}


def training_args(folder: Path, **kwargs: Any) -> tf.TrainingArguments:
    usual: dict[str, Any] = {
        "output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 1,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "save_strategy": "no",
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    return tf.TrainingArguments(**{**usual, **kwargs})


def privacy(folder: Path, **kwargs: Any) -> PrivacyArguments:
    usual: dict[str, Any] = {
        "target_epsilon": math.inf, "noise_multiplier": 0.0, "expected_batch_size": 5, "sampling_probability": 1.0,
        "privacy_unit": "document", "ledger": f"sqlite:///{folder}/ledger.db",
    }  # fmt: skip
    return PrivacyArguments(**{**usual, **kwargs})


def make(folder: Path, model: nn.Module | None = None, rows: Any = None, **kwargs: Any) -> Any:
    parts = {
        "model": llama() if model is None else model,
        "args": kwargs.pop("args", None) or training_args(folder),
        "train_dataset": Documents(texts()) if rows is None else rows,
        "data_collator": FLAT,
        "privacy_args": privacy(folder),
    }
    return DPTrainer(**{**parts, **kwargs})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def clipped_sum(model: nn.Module, rows: list[Row], norm: float) -> torch.Tensor:
    """The definition: one document at a time, unpacked, the model's own loss, autograd in float64."""
    model = copy.deepcopy(model).double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for row in rows:
        batch = {name: torch.tensor([value]) for name, value in row.items()}
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(model(**batch).loss, parameters)])
        total += gradient * min(1.0, norm / float(gradient.norm()))
    return total


def step(trainer: Any) -> torch.Tensor:
    """What one noiseless step adds up, times -1."""
    before = weights(trainer.model)
    trainer.train()
    return (before - weights(trainer.model)) * trainer.privacy_plan.expected_batch_size


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro_batch", "norm"), [(1, 3.0), (3, 0.05), (100, 3.0)])
@pytest.mark.parametrize("build", [llama, gpt2, lora])
def test_one_step_equals_a_float64_loop_over_the_documents(
    build: Any, micro_batch: int, norm: float, tmp_path: Path
) -> None:
    model = build()
    expected = clipped_sum(model, texts(), norm)
    args = training_args(tmp_path, per_device_train_batch_size=micro_batch)
    trainer = make(tmp_path, model, args=args, privacy_args=privacy(tmp_path, per_example_max_grad_norm=norm))
    assert error(step(trainer), expected) < 1e-4
    batches = trainer._batches[np.arange(N)]
    assert len(batches) == math.ceil(N / micro_batch) and all(packing.is_packed(batch) for batch in batches)
    lengths = [length for batch in batches for length in packing.lengths(batch)]
    assert sorted(lengths) == sorted(len(row["input_ids"]) for row in texts())


def rows_clipped_instead_of_documents(self: PerExampleGradients, norms: torch.Tensor) -> torch.Tensor:
    return torch.full_like(norms, self.clipping_norm / max(float(norms.sum()), self.clipping_norm))


def test_mutant_rows_clipped_instead_of_documents_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PerExampleGradients, "coefficients", rows_clipped_instead_of_documents)
    trainer = make(tmp_path)
    assert error(step(trainer), clipped_sum(llama(), texts(), 1.0)) > 0.1


def data_set(rows: list[Row]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


COLLATORS: dict[str, tuple[Any, Any]] = {
    "boundaries": (tf.DataCollatorWithFlattening(return_flash_attn_kwargs=True), data_set),
    "everything": (tf.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True), Documents),
    "padding": (padding, data_set),
}


@pytest.fixture(scope="module")
def usual_step(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return step(make(tmp_path_factory.mktemp("usual")))


@pytest.mark.parametrize("name", COLLATORS)
def test_collators_of_all_forms_take_the_same_step(name: str, tmp_path: Path, usual_step: torch.Tensor) -> None:
    collate, kind = COLLATORS[name]
    assert error(step(make(tmp_path, rows=kind(texts()), data_collator=collate)), usual_step) < 1e-5


def test_privatize_takes_the_same_step(tmp_path: Path, usual_step: torch.Tensor) -> None:
    stock = tf.Trainer(
        model=llama(), args=training_args(tmp_path), train_dataset=Documents(texts()), data_collator=FLAT
    )
    trainer: Any = privatize(stock, privacy(tmp_path))
    assert error(step(trainer), usual_step) < 1e-6


def test_workers_hand_over_the_same_packed_batches(tmp_path: Path, usual_step: torch.Tensor) -> None:
    trainer = make(tmp_path, args=training_args(tmp_path, dataloader_num_workers=1))
    assert error(step(trainer), usual_step) < 1e-6


# ---- one document more or less --------------------------------------------------------------------------------------


def hostile(model_length: int = LENGTH) -> dict[str, Row]:
    generator = np.random.default_rng(7)
    long = generator.integers(1, VOCABULARY, model_length).tolist()
    return {
        "very long": text(long),
        "one token": text([5]),
        "one token repeated": text([5] * model_length),
        "no token": text([]),
        "impossible label": text(long, [*long[:-1], 10**6]),
        "a label too many": text(long[:6], long[:7]),
        "a label too few": text(long[:6], long[:5]),
        "a token outside the table": text([VOCABULARY + 5] * 4),
        "too long for the model": text([4] * (model_length + 3)),
        "raises in collation": text([4, 77], [4, 77]),
        "text for tokens": {"input_ids": "abc", "labels": "abc"},
    }


ADDS_NOTHING = ("one token", "no token", "impossible label", "a token outside the table", "too long for the model",
                "raises in collation", "text for tokens", "a label too many", "a label too few")  # fmt: skip


def raises_in_collation(rows: list[Row]) -> Any:
    if any(77 in row["labels"] for row in rows):
        raise RuntimeError("a private value")
    return FLAT(rows)


def moved_by(
    folder: Path,
    bystanders: list[Row],
    newcomers: list[Row],
    norm: float,
    mutate: Callable[[Any], None] = lambda t: None,
) -> torch.Tensor:
    """The noiseless update of one step over all bystanders and newcomers, in units of C / expected batch."""
    rows = [*bystanders, *newcomers, *[ABSENT] * (len(ADDS_NOTHING) - len(newcomers))]
    trainer = make(
        folder, gpt2(), Documents(rows), data_collator=raises_in_collation,
        privacy_args=privacy(folder, per_example_max_grad_norm=norm),
        args=training_args(folder, per_device_train_batch_size=5),
    )  # fmt: skip
    inject(trainer, [list(range(len(rows)))])
    mutate(trainer)
    return step(trainer) / norm


def inject(trainer: Any, draws: list[list[int]]) -> None:
    plan = trainer.privacy_plan
    trainer._sampler = TruncatedPoissonSampler(
        plan.num_units, plan.sampling_probability, plan.max_batch_size, len(draws), _draws=draws
    )


def everyone_clipped() -> tuple[list[Row], float]:
    return texts(8), 0.02


def aligned_below_c() -> tuple[list[Row], float]:
    row = texts(1)[0]
    return [row] * 8, float(clipped_sum(gpt2(), [row], math.inf).norm()) * 1.001


REGIMES = {"everyone clipped": everyone_clipped, "aligned below C": aligned_below_c}


@pytest.mark.parametrize("regime", REGIMES)
def test_no_document_moves_the_update_by_more_than_c_over_the_expected_batch(regime: str, tmp_path: Path) -> None:
    bystanders, norm = REGIMES[regime]()
    without = moved_by(tmp_path / "without", bystanders, [], norm)

    def moves(kind: str, newcomers: list[Row]) -> float:
        return float((moved_by(tmp_path / kind, bystanders, newcomers, norm) - without).norm())

    newcomers = {**hostile(), "aligned with the others": bystanders[0]}
    found = {kind: moves(kind, [row]) for kind, row in newcomers.items() if kind not in ADDS_NOTHING}
    assert 0.9 < max(found.values()) <= SLACK, found
    assert moves("nothing", [newcomers[kind] for kind in ADDS_NOTHING]) < 1e-3


def attention_with_one_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, *rest: Any,
    **options: Any,
) -> Any:  # fmt: skip
    segments = dispatch._segments(cu_q, query.shape[2]), dispatch._segments(cu_k, key.shape[2])
    return reference.attention(query, key, value, None, *segments, *rest, **options)


def test_a_document_that_is_not_finite_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(trainer: Any) -> None:
        own = trainer._engine.loss

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            return own(model, batch) * torch.where(batch["cu_seq_lens_q"].diff() == 21, math.inf, 1.0)

        trainer._engine.loss = loss

    bystanders, norm = everyone_clipped()
    without = moved_by(tmp_path / "without", bystanders, [], norm)
    newcomers = [text([7] * 21)]
    assert float((moved_by(tmp_path / "with", bystanders, newcomers, norm, overflow) - without).norm()) < 1e-3
    # The mutant counts the neighbours in the packed row, whose gradients it spoils, as not finite themselves; on a CPU,
    # where attention goes document by document, only if it is made to use one mask as elsewhere.
    monkeypatch.setattr(reference, "packed_attention", attention_with_one_mask)
    monkeypatch.setattr(PerExampleGradients, "_entangled", lambda self, norms: False)
    assert float((moved_by(tmp_path / "mutant", bystanders, newcomers, norm, overflow) - without).norm()) > SLACK


class Displaced(LogicalBatches):
    """A row holds at most 40 tokens; documents that do not fit are put off, that is, lost to this step."""

    def __getitem__(self, indices: np.ndarray) -> list[Any]:
        kept, tokens = [], 0
        for index in indices[::-1]:
            tokens += sum(len(row["input_ids"]) for row in self._read(int(index)))
            if tokens <= 40:
                kept.append(int(index))
        return super().__getitem__(np.array(kept))


def test_mutant_documents_drawn_and_then_displaced_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpfa_hf import trainer as trainer_module

    monkeypatch.setattr(trainer_module, "LogicalBatches", Displaced)
    bystanders, norm = everyone_clipped()
    newcomers = (ABSENT, hostile()["very long"])
    updates = [moved_by(tmp_path / str(i), bystanders, [row], norm) for i, row in enumerate(newcomers)]
    assert float((updates[1] - updates[0]).norm()) > SLACK


def packed_in(batches: LogicalBatches, draw: list[int]) -> dict[int, str]:
    """First token -> all that the model would be given of that document."""
    documents = [document for batch in batches[np.array(draw)] for document in packing.split(batch)]
    found = {
        int(each["input_ids"][0, 0]): str({k: np.asarray(v).tolist() for k, v in each.items()}) for each in documents
    }
    assert len(found) == len(documents)
    return found


def changed_by(row: Row) -> bool:
    """Whether a row in the draw changes what the model is given of any other."""
    good = [text([10 + i, *range(3 + i % 3)]) for i in range(6)]
    batches = LogicalBatches(Documents([row, *good]), raises_in_collation, 100, packed=True)
    before, after = packed_in(batches, list(range(1, 7))), packed_in(batches, list(range(7)))
    return any(after.get(token) != columns for token, columns in before.items())


# Two rows in one, whose labels are together as long as their tokens.
COMPENSATING = [text([10, 1, 2, 3], [10, 1, 2, 3, 4]), text([11, 1, 2, 3], [11, 1, 2])]


@pytest.mark.parametrize("kind", hostile())
def test_no_row_changes_what_the_model_is_given_of_another_document(kind: str) -> None:
    assert not changed_by(hostile()[kind])


def test_labels_that_are_displaced_into_a_neighbour_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(rows: list[Row]) -> dict[int, str]:
        return packed_in(LogicalBatches(Documents(rows), FLAT, 10, packed=True), list(range(len(rows))))

    assert given(COMPENSATING) == {}
    good = text([12, 1, 2, 3])
    assert given([*COMPENSATING, good]) == given([good])
    # The mutant looks at the tokens alone.
    monkeypatch.setattr(batch_selection.packing, "aligned_length", lambda row: len(row["input_ids"]))
    assert len(given(COMPENSATING)) == 2


def test_a_collator_that_truncates_sees_one_row_at_a_time() -> None:
    def truncating(rows: list[Row]) -> Any:
        return {k: v[:, :6] for k, v in FLAT(rows).items()}

    rows = Documents([text([10, 1, 2]), text([11, 1, 2, 3]), text([12] * 8)])
    batches = LogicalBatches(rows, truncating, 3, packed=True)[np.arange(3)]
    assert [packing.lengths(batch) for batch in batches] == [[3], [4], [6]]


# ---- refusals -------------------------------------------------------------------------------------------------------


def refuses(*words: str) -> Any:
    return pytest.raises(PrivacyError, match=r"\A" + "".join(f"(?=.*{word})" for word in words) + r".*\Z")


def test_a_packing_collator_is_refused_for_examples_and_the_way_out_works(tmp_path: Path) -> None:
    trainer = make(tmp_path, privacy_args=privacy(tmp_path, privacy_unit="example"))
    with refuses("turned 3 rows into 1", "privacy_unit='document'"):
        trainer.train()
    assert trainer._ledger.runs() == []
    make(tmp_path).train()


@pytest.mark.parametrize("unit", ["example", "document"])
def test_data_sets_packed_before_sampling_are_refused(unit: str, tmp_path: Path) -> None:
    for column in ("seq_lengths", "cu_seq_lens_q"):
        rows = [{**row, column: [len(row["input_ids"])]} for row in texts()]
        for kind in (Documents, data_set):
            with refuses(column, "before sampling"):
                make(tmp_path, gpt2(), kind(rows), privacy_args=privacy(tmp_path, privacy_unit=unit))
    args = training_args(tmp_path)
    args.packing = True
    with refuses("packing", "padding_free"):
        make(tmp_path, args=args, privacy_args=privacy(tmp_path, privacy_unit=unit))


def test_position_ids_in_the_data_are_refused_for_documents(tmp_path: Path) -> None:
    rows = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in texts()]
    with refuses("position_ids", "before sampling"):
        make(tmp_path, rows=Documents(rows))


def test_the_hardened_mode_takes_documents_that_are_padded_and_none_that_are_packed(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "args": training_args(tmp_path, per_device_train_batch_size=1),
        "privacy_args": privacy(tmp_path, floating_point="hardened"),
    }
    with pytest.raises(PrivacyError, match="packs documents.*one that pads") as caught:
        make(tmp_path, **parts).train()
    assert "\n" not in str(caught.value)
    make(tmp_path, data_collator=padding, **parts).train()


def test_a_task_that_pools_a_row_cannot_be_packed(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        pad_token_id=0,
    )  # fmt: skip
    trainer = make(tmp_path, tf.LlamaForSequenceClassification(config))
    with refuses("sequence_classification", "DataCollatorWithPadding"):
        trainer.train()
    assert trainer._ledger.runs() == []


# ---- a whole run ----------------------------------------------------------------------------------------------------


def private_run(folder: Path, **kwargs: Any) -> Any:
    args = training_args(folder, max_steps=4, save_strategy="steps", save_steps=1, learning_rate=0.1)
    asked = privacy(
        folder, target_epsilon=50.0, noise_multiplier=1.0, target_delta=1e-3, accountant="rdp", expected_batch_size=4,
        sampling_probability=None, ledger_dataset="letters",
    )  # fmt: skip
    return make(folder, lora(), data_set(texts()), args=args, privacy_args=asked, **kwargs)


class Interrupt(tf.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_resumes_from_its_checkpoint_and_says_that_documents_are_protected(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        private_run(tmp_path, callbacks=[Interrupt()]).train()
    trainer = private_run(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    (run,) = trainer._ledger.runs()
    assert run.steps == run.max_steps == 4 and run.privacy_unit == trainer.privacy_plan.privacy_unit == "document"

    report = read_report(trainer.args.output_dir)
    assert report["private"] and report["unit"]["privacy_unit"] == "document"
    said = {each["assumption"]: each["status"] for each in report["assumptions"]}
    assert "word" in next(status for what, status in said.items() if "one whole document" in what)
    assert "one document" in (Path(trainer.args.output_dir) / "README.md").read_text()

    url = trainer._privacy_args.ledger
    shown = CliRunner().invoke(cli.app, ["ledger", "show", "--json", "--ledger", url])
    assert shown.exit_code == 0 and '"document"' in CliRunner().invoke(
        cli.app, ["ledger", "show", "--json", "--run", run.run, "--ledger", url]
    ).stdout, shown.stdout  # fmt: skip
    assert json.loads(shown.stdout)[0]["dataset"] == "letters"

    # Another unit cannot continue the run, nor share the data set's budget.
    other = make(
        tmp_path, lora(), data_set(texts()), data_collator=padding, args=trainer.args,
        privacy_args=PrivacyArguments(**{**vars(trainer._privacy_args), "privacy_unit": "example"}),
    )  # fmt: skip
    with refuses("privacy_unit|unit"):
        other.train(resume_from_checkpoint=True)
    with refuses("unit"):
        other.train()


def test_nothing_of_the_batches_is_logged(tmp_path: Path) -> None:
    histories = []
    for name, newcomer in (("without", ABSENT), ("with", hostile()["very long"])):
        trainer = make(tmp_path / name, gpt2(), Documents([*texts(6), newcomer]), data_collator=raises_in_collation)
        inject(trainer, [list(range(7))])
        trainer.train()
        histories.append([{k: v for k, v in line.items() if k != "grad_norm"} for line in trainer.state.log_history])
    assert histories[0] == histories[1]
