"""Documents packed into one row, held against each document alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import gradients, losses, packing, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.per_example.packing import Segments
from dpfa_hf.per_example.preflight import Column

BOUND = 1 + 2.0**-10
COLUMNS = {"input_ids": Column("int", (None,)), "labels": Column("int", (None,))}
Row = dict[str, Any]


def trl(rows: list[Row]) -> Row:
    """What TRL's padding-free collators return."""
    labels = torch.cat([torch.tensor([-100, *list(row["labels"])[1:]]) for row in rows])[None]
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    return {
        "input_ids": torch.cat([torch.as_tensor(row["input_ids"]) for row in rows])[None],
        "labels": labels,
        "position_ids": positions,
    }


Flattening = transformers.DataCollatorWithFlattening
COLLATORS: dict[str, Callable[[list[Row]], Any]] = {
    "positions": Flattening(),
    "positions and boundaries": Flattening(return_flash_attn_kwargs=True),
    "boundaries alone": Flattening(return_flash_attn_kwargs=True, return_position_ids=False),
    "everything": Flattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "trl": trl,
}


def packed(rows: Sequence[Row]) -> Row:
    """Rows end to end with every label kept, unlike in Transformers' collator."""
    row = {name: torch.cat([each[name] for each in rows])[None] for name in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(len(each["input_ids"])) for each in rows])[None]
    return packing.normalise(row, len(rows))


def refuses(match: str) -> Any:
    """A refusal in one line."""
    return pytest.raises(PrivacyError, match=rf"\A(?=.*(?:{match})).*\Z")


# ---------------------------------------------------------------------------------------------------------------------
# The form


def rows_of_lengths(lengths: Sequence[int]) -> list[Row]:
    tokens = iter(range(1, 1000))
    ids = [[next(tokens) for _ in range(length)] for length in lengths]
    return [{"input_ids": each, "labels": [token + 1000 for token in each]} for each in ids]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.sampled_from(sorted(COLLATORS)))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_padding_free_collator_comes_to_one_form(lengths: list[int], name: str) -> None:
    rows = rows_of_lengths(lengths)
    batch = packing.normalise(COLLATORS[name](rows), len(rows))
    assert packing.lengths(batch) == lengths and gradients.batch_size(batch) == len(rows)
    assert batch["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert {batch[f"cu_seq_lens_{side}"].dtype for side in "qk"} == {torch.int32}
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    for document, row in zip(packing.split(batch), rows, strict=True):
        assert document["input_ids"].tolist() == [row["input_ids"]] and packing.is_packed(document)
        assert document.get("seq_idx", torch.zeros(1)).unique().tolist() == [0]
    again = packing.join(packing.split(batch))
    assert all(np.array_equal(np.asarray(again[k]), np.asarray(batch[k])) for k in batch) and list(again) == list(batch)
    assert list(packing.alone(batch, 0)) == ["input_ids", "labels"]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_documents_are_laid_out_and_packed_again_without_touching_their_neighbours(lengths: list[int]) -> None:
    segments = Segments.of(packing.normalise(trl(rows_of_lengths(lengths)), len(lengths)))
    assert segments is not None
    tokens = torch.randn(sum(lengths), 2)
    tokens[segments.owner == len(lengths) - 1] = math.nan
    for fill in (None, 0.0):
        documents = segments.unpack(tokens, fill)
        assert not documents[:-1].isnan().any()
        for i, own in enumerate(tokens.split(lengths)):
            expected = own[-1].expand(2) if fill is None else torch.zeros(2)
            assert torch.equal(documents[i, : len(own)].nan_to_num(7), own.nan_to_num(7))
            assert (documents[i, len(own) :].nan_to_num(7) == expected.nan_to_num(7)).all()
        assert torch.equal(segments.pack(documents).nan_to_num(7), tokens.nan_to_num(7))


def one_row(tokens: int = 5, **columns: Any) -> Row:
    return {"input_ids": torch.arange(tokens)[None], **{k: torch.tensor(v) for k, v in columns.items()}}


BAD_ROWS: dict[str, tuple[Row, str]] = {
    "no boundaries": (one_row(), "position_ids.*return_flash_attn_kwargs"),
    "too few documents": (one_row(position_ids=[[0, 1, 2, 3, 4]]), "1 documents of 2 rows"),
    "too many documents": (one_row(position_ids=[[0, 1, 0, 1, 0]]), "3 documents of 2 rows"),
    "an empty document": (one_row(cu_seq_lens_q=[0, 0, 5]), "empty"),
    "too short": (one_row(cu_seq_lens_q=[0, 2, 4]), "number of tokens"),
    "not from 0": (one_row(cu_seq_lens_q=[1, 2, 5]), "rise from 0"),
    "falling": (one_row(cu_seq_lens_q=[0, 6, 5]), "rise from 0"),
    "other keys": (one_row(cu_seq_lens_q=[0, 2, 5], cu_seq_lens_k=[0, 3, 5]), "contradict"),
    "positions that run on": (one_row(position_ids=[[0, 1, 2, 3, 4]], cu_seq_lens_q=[0, 2, 5]), "contradict"),
    "masked tokens": (one_row(position_ids=[[0, 1, 0, 1, 2]], attention_mask=[[1, 1, 1, 1, 0]]), "padding"),
    "a label too many": (one_row(position_ids=[[0, 1, 0, 1, 2]], labels=[[1] * 6]), "unequal form"),
    "one label a row": (one_row(position_ids=[[0, 1, 0, 1, 2]], labels=[1, 0]), "unequal form"),
    "text beside the tokens": ({**one_row(position_ids=[[0, 1, 0, 1, 2]]), "text": ["a", "b"]}, "unequal form"),
    "tokens without a row": ({"input_ids": torch.arange(5)}, "unequal form"),
    "two rows": ({"input_ids": torch.ones(2, 3).long()}, "unequal form"),
    "no tokens": (one_row(0, position_ids=[[]]), "documents of 2 rows"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_of_which_the_documents_are_not_known_is_refused(name: str) -> None:
    collated, match = BAD_ROWS[name]
    with refuses(match):
        packing.normalise(collated, 2)


@pytest.mark.parametrize("column", ["seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "seq_idx"])
@pytest.mark.parametrize("documents", [False, True])
def test_data_sets_packed_before_sampling_are_refused_by_their_columns(column: str, documents: bool) -> None:
    with refuses(f"{column}.*before sampling.*privacy_unit='document'"):
        packing.refuse_packed_columns({**COLUMNS, column: Column("int", (None,))}, documents=documents)


def test_position_ids_may_stand_in_examples_and_not_in_documents() -> None:
    columns = {**COLUMNS, "position_ids": Column("int", (None,))}
    packing.refuse_packed_columns(columns, documents=False)
    with refuses("position_ids"):
        packing.refuse_packed_columns(columns, documents=True)


# ---------------------------------------------------------------------------------------------------------------------
# Losses

LOSS_FAMILIES = ("llama", "gpt2", "bert-mlm", "bert-tokens")


def token_classifier(lab: SimpleNamespace) -> Any:
    torch.manual_seed(0)
    config = lab.build("bert-mlm").config
    config.num_labels = 3
    return transformers.BertForTokenClassification(config).double().eval()


def model_and_rows(lab: SimpleNamespace, family: str) -> tuple[Any, list[Row]]:
    model = token_classifier(lab) if family == "bert-tokens" else lab.build(family)
    rows = lab.rows_of("bert-mlm" if family == "bert-tokens" else family, model)
    if family == "bert-tokens":
        for row in rows:
            row["labels"] = torch.where(row["labels"] < 0, row["labels"], row["labels"] % 3)
    model.set_attn_implementation("dpfa")
    return model, rows


def document_losses(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    with torch.no_grad():
        return losses.per_example_loss(model, losses.task_of(model))(model, packed(rows))


@pytest.mark.parametrize("family", LOSS_FAMILIES)
def test_a_packed_document_has_the_loss_that_the_model_gives_it_alone(lab: SimpleNamespace, family: str) -> None:
    model, rows = model_and_rows(lab, family)
    with torch.no_grad():
        own = torch.stack([model(**{k: v[None] for k, v in row.items()}).loss for row in rows])
    found = document_losses(model, rows)
    assert torch.allclose(found, own.double(), rtol=1e-5)  # Transformers' own loss is in float32
    padded = losses.per_example_loss(model, losses.task_of(model))(model, lab.collate(model, rows))
    assert torch.allclose(found, padded, rtol=1e-10)


@pytest.mark.parametrize("family", LOSS_FAMILIES)
def test_an_impossible_label_zeroes_its_own_document_alone(lab: SimpleNamespace, family: str) -> None:
    model, rows = model_and_rows(lab, family)
    before = document_losses(model, rows)
    for label in (10**6, -7):
        bad = {**rows[1], "labels": rows[1]["labels"].clone()}
        bad["labels"][2] = label
        after = document_losses(model, [rows[0], bad, *rows[2:]])
        assert after[1] == 0 and torch.equal(after[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


def test_a_document_of_one_token_has_nothing_to_predict(lab: SimpleNamespace) -> None:
    model, rows = model_and_rows(lab, "llama")
    short = {name: value[:1] for name, value in rows[1].items()}
    assert document_losses(model, [rows[0], short, rows[2]])[1] == 0


@pytest.mark.parametrize("task", sorted(set(losses.TASKS) - set(losses.PACKABLE_TASKS)))
def test_a_task_that_pools_a_row_is_refused(lab: SimpleNamespace, task: str) -> None:
    model, rows = model_and_rows(lab, "llama")
    batch = {**packed(rows), "start_positions": torch.zeros(5), "end_positions": torch.zeros(5)}
    with refuses(f"{task}.*DataCollatorWithPadding"):
        losses.per_example_loss(model, task)(model, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


def engine_of(model: Any, **options: Any) -> PerExampleGradients:
    """An engine that has passed the checks on packed synthetic rows, as the trainer makes it."""
    task = losses.task_of(model)
    engine = PerExampleGradients(model, losses.per_example_loss(model, task), clipping_norm=1.0, **options)
    batch = preflight.synthetic_batch(model, task, COLUMNS, COLLATORS["positions"], documents=True)
    preflight.check(engine, batch, compare_with_model_loss=True)
    assert set(engine.layouts.values()) <= {f"packed along dimension {axis}" for axis in range(3)}
    return engine


def private_sum(engine: PerExampleGradients, rows: list[Row], clipping_norm: float, size: int) -> dict:
    engine.clipping_norm = clipping_norm
    for start in range(0, len(rows), size):
        engine.accumulate(packed(rows[start : start + size]))
    return engine.take()


def worst_error(lab: SimpleNamespace, model: Any, rows: list[Row], engine: PerExampleGradients) -> float:
    """Against the loop of autograd over single documents: two clipping regimes, micro-batches of 1, 3 and all."""
    each = lab.row_gradients(model, rows)
    return max(
        lab.relative_error(private_sum(engine, rows, norm, size), lab.clipped_sum(each, norm))
        for norm in lab.regimes(each)
        for size in (1, 3, len(rows))
    )


def built(
    lab: SimpleNamespace, family: str, adapter: str = "full", attention: str | None = None, **options: Any
) -> Any:
    model = lab.build(family, **options)
    if attention is not None:
        model.set_attn_implementation(attention)
    return lab.with_lora(model) if adapter == "lora" else model


@pytest.mark.parametrize(
    ("family", "attention", "adapter"),
    [
        ("llama", "sdpa", "full"),
        ("llama", "dpfa", "lora"),
        ("llama-tied", "eager", "full"),
        ("llama-tied", "sdpa", "lora"),
        ("gpt2", "sdpa", "full"),
        ("gpt2", "dpfa", "lora"),
        ("qwen3", "eager", "full"),
        ("qwen3", "sdpa", "lora"),
        ("gemma3", "sdpa", "full"),
        ("mistral", "dpfa", "full"),
        ("bert-mlm", "dpfa", "full"),
    ],
)
def test_clipped_sum_equals_a_loop_of_autograd_over_documents(
    lab: SimpleNamespace, family: str, attention: str, adapter: str
) -> None:
    model = built(lab, family, adapter, attention)
    assert worst_error(lab, model, lab.rows_of(family, model), engine_of(model)) < 1e-5


@pytest.mark.parametrize("clipping", ["automatic", "per_layer"])
def test_other_clippings_take_the_same_sum_packed_and_one_by_one(lab: SimpleNamespace, clipping: str) -> None:
    model = built(lab, "llama-tied")
    engine, rows = engine_of(model, clipping=clipping), lab.rows_of("llama-tied", model)
    assert lab.relative_error(private_sum(engine, rows, 0.3, 5), private_sum(engine, rows, 0.3, 1)) < 1e-10


def test_float32_models_agree_to_1e_4(lab: SimpleNamespace) -> None:
    reference = lab.build("llama-tied")
    rows = lab.rows_of("llama-tied", reference)
    each = lab.row_gradients(reference, rows)
    engine = engine_of(lab.build("llama-tied", dtype=torch.float32))
    for norm in lab.regimes(each):
        found = private_sum(engine, rows, norm, 3)
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert lab.relative_error(found, lab.clipped_sum(each, norm)) < 1e-4


def test_bfloat16_autocast_keeps_norms_and_sums_in_float32(lab: SimpleNamespace) -> None:
    model = lab.build("llama-tied", dtype=torch.float32)
    engine, rows = engine_of(model), lab.rows_of("llama-tied", model)
    with torch.autocast("cpu", torch.bfloat16):
        engine.accumulate(packed(rows))
    assert {value.dtype for value in engine.take().values()} == {torch.float32}


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_exact_with_gradient_checkpointing_and_dropout(lab: SimpleNamespace, family: str) -> None:
    """The reference draws the same masks: one forward pass of the same packed row from the same seed."""
    model = lab.build(family, dropout=0.3)
    engine, batch = engine_of(model), packed(lab.rows_of(family, model))
    names = [name for name, _ in engine.parameters.values()]
    torch.manual_seed(5)
    each = engine.loss(model, batch)
    parameters = [model.get_parameter(name) for name in names]
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in each]
    reference = [dict(zip(names, grads, strict=True)) for grads in found]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for norm in lab.regimes(reference):
        engine.clipping_norm = norm
        torch.manual_seed(5)
        assert torch.allclose(engine.accumulate(batch), each.detach(), rtol=1e-12)
        assert lab.relative_error(engine.take(), lab.clipped_sum(reference, norm)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Isolation


def document_quantities(engine: PerExampleGradients, rows: list[Row]) -> list[list[torch.Tensor]]:
    """For each document: its logits, loss, norm and whole gradient."""
    batch = packed(rows)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = engine.model(**inputs, use_cache=False).logits[0].split(packing.lengths(batch))
    with engine.attached(), torch.enable_grad():
        each, calls = engine.backward(batch)
    with torch.no_grad():
        uses = engine._uses(calls)
        norms = engine.norms(uses, len(rows), torch.device("cpu"))[0]
        grads = [torch.cat([u.example(i).flatten() for use in uses.values() for u in use]) for i in range(len(rows))]
    return [[logits[i], each[i].detach(), norms[i], grads[i]] for i in range(len(rows))]


def largest_change(engine: PerExampleGradients, rows: list[Row], document: Row) -> float:
    """How much putting another document in the place of document 1 changes anything of the others."""
    before = document_quantities(engine, rows)
    after = document_quantities(engine, [rows[0], document, *rows[2:]])
    assert not torch.equal(before[1][3], after[1][3]), "the test tried nothing"
    pairs = [(a, b) for i in (0, 2, 3, 4) for a, b in zip(before[i], after[i], strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs)


def other_document(row: Row) -> Row:
    return {name: value.flip(0) for name, value in row.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "dpfa"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma3"])
def test_changing_one_document_changes_nothing_of_the_others(lab: SimpleNamespace, family: str, attention: str) -> None:
    model = built(lab, family, attention=attention)
    engine, rows = engine_of(model), lab.rows_of(family, model)
    assert largest_change(engine, rows, other_document(rows[1])) == 0
    for length in (1, 2, 9):
        resized = {name: value.repeat(3)[:length] for name, value in rows[1].items()}
        assert largest_change(engine, rows, resized) < 1e-10


def test_mutant_packing_that_is_not_looked_for_is_caught(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(lab, "llama-tied", attention="sdpa")
    engine, rows = engine_of(model), lab.rows_of("llama-tied", model)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    assert largest_change(engine, rows, other_document(rows[1])) > 1e-3
    assert worst_error(lab, model, rows, engine) > 1e-3
    with refuses("another's: the documents of a packed row.*dp_flash"):
        engine_of(model)


def test_mutant_boundaries_lost_on_the_way_to_the_kernel_are_caught(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpfa_hf import attention

    model = built(lab, "bert-mlm", attention="dpfa")
    exact = attention.exact_attention
    lost = {"cu_seq_lens_q": None, "cu_seq_lens_k": None}
    monkeypatch.setattr(attention, "exact_attention", lambda *args, **kwargs: exact(*args, **{**kwargs, **lost}))
    with refuses("another's: the documents of a packed row"):
        engine_of(model)


def shifted_across_boundaries(
    logits: torch.Tensor, labels: torch.Tensor, segments: Segments, *, predicts_next: bool
) -> torch.Tensor:
    each = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")
    targets = segments.unpack(F.pad(labels[0, 1:], (0, 1), value=-100), -100)
    return segments.unpack(F.pad(each, (0, 1)), 0).sum(1) / (targets != -100).sum(1)


def test_mutant_labels_shifted_across_a_boundary_are_caught(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(lab, "llama")
    rows, engine = lab.rows_of("llama", model), engine_of(model)
    monkeypatch.setattr(losses, "_document_mean", shifted_across_boundaries)
    assert worst_error(lab, model, rows, engine) > 1e-3
    # In the synthetic batch of Transformers' collator every document's first label is left out already.
    batch = preflight.synthetic_batch(model, "causal_lm", COLUMNS, packed_from_lists, documents=True)
    with refuses("document"):
        preflight.check(PerExampleGradients(model, engine.loss, clipping_norm=1.0), batch)


def packed_from_lists(rows: list[Row]) -> Row:
    return packed([{name: torch.tensor(value) for name, value in row.items()} for row in rows])


def test_mutant_row_clipped_instead_of_its_documents_is_caught(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(lab, "llama-tied")
    rows, engine = lab.rows_of("llama-tied", model), engine_of(model)

    def one_factor_for_the_row(self: PerExampleGradients, norms: torch.Tensor) -> torch.Tensor:
        return torch.full_like(norms, self.clipping_norm / max(float(norms.sum()), self.clipping_norm))

    monkeypatch.setattr(PerExampleGradients, "coefficients", one_factor_for_the_row)
    assert worst_error(lab, model, rows, engine) > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Documents that are not finite, and gradients that cancel (P15)


def non_finite(engine: PerExampleGradients, rows: list[Row], how: str) -> Callable[[], None]:
    """Makes document 1 non-finite and nothing else; returns what takes it back."""
    if how == "forward":
        token = int(rows[1]["input_ids"][0])
        assert all(token not in row["input_ids"] for i, row in enumerate(rows) if i != 1)
        table = engine.model.get_input_embeddings().weight
        with torch.no_grad():
            before, table[token] = table[token].clone(), math.inf

        def undo() -> None:
            with torch.no_grad():
                table[token] = before

        return undo
    own, length = engine.loss, len(rows[1]["input_ids"])
    factor = {"loss": math.inf, "gradient": math.nan}[how]

    def hostile(model: Any, batch: Any) -> torch.Tensor:
        hit = batch["cu_seq_lens_q"].diff() == length
        return own(model, batch) * torch.where(hit, factor, 1.0)

    engine.loss = hostile
    return lambda: setattr(engine, "loss", own)


def loss_of_neighbours(lab: SimpleNamespace, family: str, adapter: str, how: str) -> float:
    """Relative error of the sum over five documents of which one is not finite, against the sum over the others."""
    model = built(lab, family, adapter)
    engine, rows = engine_of(model), lab.rows_of(family, model)
    rows[1]["input_ids"] = torch.full_like(rows[1]["input_ids"], 1)
    expected = private_sum(engine, [row for i, row in enumerate(rows) if i != 1], 0.3, 4)
    undo = non_finite(engine, rows, how)
    found = private_sum(engine, rows, 0.3, 5)
    undo()
    return lab.relative_error(found, expected) if lab.norm(found) else math.inf


@pytest.mark.parametrize("how", ["forward", "loss", "gradient"])
@pytest.mark.parametrize(("family", "adapter"), [("llama", "full"), ("llama", "lora")])
def test_a_document_that_is_not_finite_adds_zero_and_leaves_the_others_exact(
    lab: SimpleNamespace, family: str, adapter: str, how: str
) -> None:
    assert loss_of_neighbours(lab, family, adapter, how) < 1e-10


def test_mutant_neighbours_of_a_non_finite_document_lost_are_caught(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PerExampleGradients, "_entangled", lambda self, norms: False)
    assert min(loss_of_neighbours(lab, "llama", "full", how) for how in ("forward", "gradient")) > 0.5


WIDTH, POSITIONS = 96, 8


class Bilinear(nn.Module):
    """The gradient of a document is whatever it says: the sum over its tokens of g_t x_t^T."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def bilinear_loss(model: nn.Module, batch: Row) -> torch.Tensor:
    segments = Segments.of(batch)
    assert segments is not None
    return segments.unpack((model(batch["x"]) * batch["g"]).sum(2)[0], 0).sum(1)


def cancelling(seed: int, ratio: float) -> Row:
    """Its gradient is 3 long; without cancellation between its tokens it would be `ratio` times as long."""
    generator = torch.Generator().manual_seed(seed)
    u, v, rest = (F.normalize(torch.randn(WIDTH, generator=generator).double(), dim=0) for _ in range(3))
    signs = torch.tensor([1.0, -1.0]).double().repeat(POSITIONS // 2)
    x = u.repeat(POSITIONS, 1)
    x[0] += F.normalize(rest - (rest @ u) * u, dim=0) * POSITIONS / ratio
    return document(x.float(), (signs[:, None] * v * 3 * ratio / POSITIONS).float())


def document(x: torch.Tensor, g: torch.Tensor) -> Row:
    return packing._with_boundaries({"x": x[None], "g": g[None]}, [len(x)])


def worst_cancellation(ratio: float) -> float:
    engine = PerExampleGradients(Bilinear(), bilinear_loss, clipping_norm=1.0)
    synthetic = [document(torch.randn(n, WIDTH), torch.randn(n, WIDTH)) for n in preflight.ROW_LENGTHS]
    preflight.check(engine, packing.join(synthetic))
    bystanders = [cancelling(seed, 2.0) for seed in range(100, 103)]
    sums = []
    for newcomer in [None, *(cancelling(seed, ratio) for seed in range(12))]:
        engine.accumulate(packing.join(bystanders + ([newcomer] if newcomer else [])))
        sums.append(engine.take()["linear.weight"].double())
    return max(float((found - sums[0]).norm()) for found in sums[1:])


@pytest.mark.parametrize("ratio", [1.0, 250.0, 2.0**13, 2.0**18])
def test_tokens_that_cancel_move_a_packed_sum_no_further_than_c(ratio: float) -> None:
    assert worst_cancellation(ratio) <= BOUND


# ---------------------------------------------------------------------------------------------------------------------
# What the check before step 1 refuses


class Pooling(nn.Module):
    """A causal language model of sorts in which a trainable layer sees the whole row at once."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(53, 6), nn.Linear(6, 53)
        self.what, self.extra = what, nn.Linear(6, 6) if what == "pooled" else nn.Embedding(4, 6)

    def forward(self, batch: Row) -> torch.Tensor:
        hidden = self.table(batch["input_ids"])
        if self.what == "pooled":
            return self.head(hidden + self.extra(hidden.mean(1))[:, None])
        return self.head(hidden + self.extra(torch.arange(4)).sum(0))


def pooling_loss(model: nn.Module, batch: Row) -> torch.Tensor:
    segments = Segments.of(batch)
    assert segments is not None
    return losses._document_mean(model(batch), batch["labels"], segments, predicts_next=True)


@pytest.mark.parametrize(("what", "match"), [("pooled", "independent"), ("shared", "extra returned.*pads")])
def test_a_layer_shared_by_documents_or_pooled_over_them_is_refused(what: str, match: str) -> None:
    engine = PerExampleGradients(Pooling(what), pooling_loss, clipping_norm=1.0)
    with refuses(match):
        preflight.check(engine, packed(rows_as_tensors((11, 13, 7))))


def test_a_pooled_layer_is_named_by_the_engine_itself() -> None:
    engine = PerExampleGradients(Pooling("pooled"), pooling_loss, clipping_norm=1.0)
    with engine.attached(), refuses(r"extra returned \(1, 6\) for a packed row of 31 tokens.*freeze it"):
        engine.backward(packed(rows_as_tensors((11, 13, 7))), infer_layouts=True)


def rows_as_tensors(lengths: Sequence[int]) -> list[Row]:
    return [{"input_ids": torch.arange(n) % 53, "labels": torch.arange(n) % 53} for n in lengths]


def test_an_engine_checked_on_one_form_refuses_the_other(lab: SimpleNamespace) -> None:
    model = built(lab, "llama")
    engine, rows = engine_of(model), lab.rows_of("llama", model)
    with refuses("unlike what it did on synthetic rows"):
        engine.accumulate(lab.collate(model, rows))
    preflight.check(other := PerExampleGradients(model, engine.loss, clipping_norm=1.0), lab.collate(model, rows[:3]))
    with refuses("unlike what it did on synthetic rows"):
        other.accumulate(packed(rows))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_does_not_look_for_packing_is_refused(lab: SimpleNamespace, attention: str) -> None:
    with refuses("another's: the documents of a packed row.*attn_implementation='dp_flash'"):
        engine_of(built(lab, "bert-mlm", attention=attention))


@pytest.mark.parametrize("family", ["opt", "gpt-oss"])
def test_models_that_leak_in_transformers_are_refused_by_name(lab: SimpleNamespace, family: str) -> None:
    model = lab.build(family).requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    with refuses(f"{model.config.model_type} lets documents.*padding"):
        engine_of(model)


def test_modernbert_is_refused_by_name() -> None:
    config = SimpleNamespace(model_type="modernbert")
    with refuses("modernbert"):
        packing.refuse_leaking_model(config)


def test_a_cache_would_make_documents_leak_and_is_caught(lab: SimpleNamespace) -> None:
    model = built(lab, "llama")

    def with_cache(called: nn.Module, batch: Row) -> torch.Tensor:
        logits = called(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=True).logits
        segments = Segments.of(batch)
        assert segments is not None
        return losses._document_mean(logits, batch["labels"], segments, predicts_next=True)

    engine = PerExampleGradients(model, with_cache, clipping_norm=1.0)
    with refuses("another's"):
        preflight.check(engine, packed(rows_as_tensors((11, 13, 7))))


def test_lengths_that_change_a_neighbour_are_caught_although_no_gradient_shows_them(lab: SimpleNamespace) -> None:
    model = built(lab, "llama")
    own = losses.per_example_loss(model, "causal_lm")

    def by_the_longest(called: nn.Module, batch: Row) -> torch.Tensor:
        return own(called, batch) * 10 / batch["max_length_q"]

    engine = PerExampleGradients(model, by_the_longest, clipping_norm=1.0)
    with refuses("their lengths"):
        preflight.check(engine, packed(rows_as_tensors((11, 13, 7))))


def test_positions_that_start_elsewhere_than_in_the_model_are_refused(lab: SimpleNamespace) -> None:
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=53, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).double()  # fmt: skip
    model.set_attn_implementation("dpfa")
    task = losses.task_of(model)
    for start, refused in ((0, True), (model.config.pad_token_id + 1, False)):
        engine = PerExampleGradients(model, losses.per_example_loss(model, task), clipping_norm=1.0)
        collate = Flattening(position_ids_start=start)
        batch = preflight.synthetic_batch(model, task, COLUMNS, collate, documents=True)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.pad_token_id, 5)
        if not refused:
            preflight.check(engine, batch, compare_with_model_loss=True)
            continue
        with refuses("position_ids_start"):
            preflight.check(engine, batch, compare_with_model_loss=True)


def test_packing_without_the_unit_of_documents_is_refused_and_names_it(lab: SimpleNamespace) -> None:
    model = built(lab, "llama")
    for collate in COLLATORS.values():
        with refuses("turned 3 rows into 1.*privacy_unit='document'"):
            preflight.synthetic_batch(model, "causal_lm", COLUMNS, collate)


def mixes(rows: list[Row]) -> Row:
    """The first token of every row stands in front of the last one's."""
    first, *rest = rows
    return trl([first, *({**row, "input_ids": [first["input_ids"][0], *row["input_ids"][1:]]} for row in rest)])


def reorders(rows: list[Row]) -> Row:
    return trl(sorted(rows, key=lambda row: len(row["input_ids"])))


def joins_two(rows: list[Row]) -> Row:
    joined = {name: [*rows[0][name], *rows[1][name]] for name in rows[0]}
    return trl([joined, *rows[2:]])


@pytest.mark.parametrize(
    ("collate", "match"), [(mixes, "change another"), (reorders, "change another"), (joins_two, "2 documents of 3")]
)
def test_collators_that_mix_reorder_or_join_documents_are_refused(
    lab: SimpleNamespace, collate: Callable, match: str
) -> None:
    with refuses(match):
        preflight.synthetic_batch(built(lab, "llama"), "causal_lm", COLUMNS, collate, documents=True)
