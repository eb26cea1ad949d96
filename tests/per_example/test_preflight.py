from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import losses, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.per_example.preflight import Column, declared_columns, synthetic_batch, synthetic_rows


def row_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def check(model: nn.Module, loss: Any = row_loss, features: int = 5) -> None:
    torch.manual_seed(0)
    engine = PerExampleGradients(model, loss, clipping_norm=1.0)
    preflight.check(engine, {"x": torch.randn(3, 13, features)})


def check_family(lab: SimpleNamespace, family: str, loss: Any = None, **changes: Any) -> None:
    model = lab.build(family, dtype=torch.float32)
    for name, value in changes.items():
        setattr(model.config, name, value)
    task = losses.task_of(model)
    engine = PerExampleGradients(model, loss or losses.per_example_loss(model, task), clipping_norm=1.0)
    preflight.check(engine, synthetic_batch(model, task, {}), compare_with_model_loss=loss is None)


def refuses(match: str) -> Any:
    """A refusal in one line."""
    return pytest.raises(PrivacyError, match=rf"\A(?=.*(?:{match})).*\Z")


# ---------------------------------------------------------------------------------------------------------------------
# Examples that depend on one another (P11)


class Frozen(nn.Module):
    """Something that mixes examples, between two layers that do not."""

    def __init__(self, mix: nn.Module) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(5, 5), mix.requires_grad_(False), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mix(self.first(x)))


class Mix(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def top_row_only(x: torch.Tensor) -> torch.Tensor:
    """Routing with a capacity of one over the whole batch: no gradient passes through the choice."""
    chosen = x.detach().sum((1, 2)).argmax()
    keep = torch.zeros(len(x)).index_fill(0, chosen, 1.0)
    return x * keep[:, None, None]


def test_separate_examples_pass() -> None:
    check(Frozen(Mix(torch.tanh)))


def test_a_trainable_batch_norm_is_refused_by_name() -> None:
    with refuses("1 is a BatchNorm1d.*LayerNorm"):
        check(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(13)))


def test_a_frozen_batch_norm_in_training_mode_is_refused() -> None:
    with refuses("one example has a gradient with respect to another"):
        check(Frozen(nn.BatchNorm1d(13, affine=False)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x / x.detach().abs().amax(),
        lambda x: x.roll(1, 0),
        lambda x: x + x.detach().sum(0, keepdim=True),
        top_row_only,
    ],
    ids=["mean", "detached-scale", "roll", "detached-sum", "top-k-over-the-batch"],
)
def test_examples_that_depend_on_one_another_are_refused(function: Any) -> None:
    with refuses("(another|one) example|rows beside it"):
        check(Frozen(Mix(function)))


def batch_mean(model: nn.Module, batch: Any) -> torch.Tensor:
    each = row_loss(model, batch)
    return each.mean().expand(len(each))


def contrastive(model: nn.Module, batch: Any) -> torch.Tensor:
    embedding = F.normalize(model(batch["x"]).mean(1), dim=1)
    logits = embedding @ embedding.t()
    return F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")


def divided_by_the_batch(model: nn.Module, batch: Any) -> torch.Tensor:
    each = row_loss(model, batch)
    return each / each.detach().mean()


@pytest.mark.parametrize("loss", [batch_mean, contrastive, divided_by_the_batch])
def test_losses_that_mix_examples_are_refused(loss: Any) -> None:
    with refuses("example.*per_example_loss_fn"):
        check(nn.Linear(5, 5), loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: row_loss(model, batch).sum(),
        lambda model, batch: model(batch["x"]).square().sum(2),
        lambda model, batch: row_loss(model, batch)[:, None],
    ],
    ids=["scalar", "per-token", "column"],
)
def test_a_loss_of_another_shape_is_refused(loss: Any) -> None:
    with refuses("shape.*one loss per example"):
        check(nn.Linear(5, 5), loss)


def test_the_length_of_a_neighbour_must_not_change_a_loss(lab: SimpleNamespace) -> None:
    """A mean over all positions, padding included: no gradient crosses, yet a longer neighbour changes it."""

    def over_padding(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return model(**inputs).logits.square().mean((1, 2))

    with refuses("padding"):
        check_family(lab, "llama", over_padding)


def test_left_padding_with_absolute_positions_is_refused(lab: SimpleNamespace) -> None:
    """GPT-2 numbers positions from the left edge, so a row's loss would depend on the longest row beside it."""
    model = lab.build("gpt2", dtype=torch.float32)
    engine = PerExampleGradients(model, losses.per_example_loss(model, "causal_lm"), clipping_norm=1.0)
    rows = lab.rows_of("gpt2", model, (11, 13, 7))
    with refuses("pad on the right"):
        preflight.check(engine, lab.collate(model, rows, left=True))
    preflight.check(engine, lab.collate(model, rows))


# ---------------------------------------------------------------------------------------------------------------------
# Losses that are not the model's own (P10)


def test_a_mixture_of_experts_with_router_loss_is_refused(lab: SimpleNamespace) -> None:
    model = lab.build("mixtral", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    model.config.output_router_logits = model.output_router_logits = True
    engine = PerExampleGradients(model, losses.per_example_loss(model, "causal_lm"), clipping_norm=1.0)
    with refuses("output_router_logits"):
        preflight.check(engine, synthetic_batch(model, "causal_lm", {}), compare_with_model_loss=True)


def test_a_model_with_another_loss_is_refused(lab: SimpleNamespace) -> None:
    model = lab.build("bert", dtype=torch.float32)
    engine = PerExampleGradients(model, losses.per_example_loss(model, "sequence_classification"), clipping_norm=1.0)
    batch = synthetic_batch(model, "sequence_classification", {})
    preflight.check(engine, batch, compare_with_model_loss=True)
    forward = model.forward

    def with_penalty(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 0.1
        return output

    model.forward = with_penalty
    with refuses("loss of its own.*per_example_loss_fn"):
        preflight.check(engine, batch, compare_with_model_loss=True)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients that no rule sees (P12)


class UsedOutside(nn.Module):
    """Reads a layer's weight without calling the layer, beside calling it."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        self.embed, self.linear, self.shared = nn.Linear(5, 5, bias=False), nn.Linear(5, 5), shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(self.embed(x) if self.shared else x)
        return F.linear(hidden, self.embed.weight)


@pytest.mark.parametrize("shared", [True, False])
def test_a_parameter_used_outside_its_layer_is_refused_by_name(shared: bool) -> None:
    with refuses("embed.weight differ.*requires_grad_"):
        check(UsedOutside(shared))


def test_a_weight_regulariser_in_the_loss_is_refused() -> None:
    def regularised(model: nn.Module, batch: Any) -> torch.Tensor:
        return row_loss(model, batch) + model.weight.square().sum()  # type: ignore[operator,union-attr]

    with refuses("weight differ"):
        check(nn.Linear(5, 5), regularised)


def test_a_loss_without_gradient_is_refused() -> None:
    with refuses("loss has no gradient"):
        check(nn.Linear(5, 5), lambda model, batch: row_loss(model, batch).detach())


@pytest.mark.parametrize("name", ["encoder_layerdrop", "decoder_layerdrop"])
def test_layers_skipped_at_random_are_refused(name: str, lab: SimpleNamespace) -> None:
    check_family(lab, "bart")
    with refuses(f"{name}=0.5.*set it to 0"):
        check_family(lab, "bart", **{name: 0.5})


def test_a_buffer_that_carries_data_is_refused() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)
            self.register_buffer("last", torch.zeros(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x.detach().mean((0, 1))
            return self.linear(x)

    with refuses("buffer last"):
        check(Remembers())


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is left behind


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mix", [Mix(torch.tanh), Mix(top_row_only)], ids=["passes", "refused"])
def test_generators_training_mode_gradients_and_hooks_are_as_before(training: bool, mix: nn.Module) -> None:
    model = Frozen(nn.Sequential(nn.Dropout(0.5), mix)).train(training)
    engine = PerExampleGradients(model, row_loss, clipping_norm=1.0)
    batch = {"x": torch.randn(3, 13, 5)}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    weights = [p.clone() for p in model.parameters()]
    if isinstance(mix, Mix) and mix.function is torch.tanh:
        preflight.check(engine, batch)
    else:
        with pytest.raises(PrivacyError):
            preflight.check(engine, batch)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(module.training == training for module in model.modules())
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(not module._forward_hooks for module in model.modules())
    assert not engine.layouts or all(not value.any() for value in engine.take().values())


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic rows

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "attention_mask": datasets.List(datasets.Value("int8")),
        "pair": datasets.List(datasets.Value("int64"), length=2),
        "labels": datasets.ClassLabel(names=["no", "yes", "maybe"]),
        "score": datasets.Value("float32"),
        "flag": datasets.Value("bool"),
        "image": datasets.Array3D((3, 8, 8), "float32"),
        "text": datasets.Value("string"),
        "nested": datasets.List(datasets.List(datasets.Value("float64"))),
    }
)
DECLARED = {
    "input_ids": Column("int", (None,)),
    "attention_mask": Column("int", (None,)),
    "pair": Column("int", (2,)),
    "labels": Column("int"),
    "score": Column("float"),
    "flag": Column("bool"),
    "image": Column("float", (3, 8, 8)),
    "text": Column("string"),
    "nested": Column("float", (None, None)),
}


def test_columns_are_read_from_declared_features() -> None:
    dataset = datasets.Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
    assert declared_columns(dataset) == DECLARED


def test_rows_have_the_declared_form_and_the_models_values(lab: SimpleNamespace) -> None:
    rows = synthetic_rows(lab.build("bert"), "sequence_classification", DECLARED)
    assert [len(row["input_ids"]) for row in rows] == [11, 13, 7]
    for row in rows:
        assert set(row) == set(DECLARED)
        assert all(0 <= token < 53 for token in row["input_ids"])
        assert set(row["attention_mask"]) == {1} and len(row["attention_mask"]) == len(row["input_ids"])
        assert len(row["pair"]) == 2 and row["labels"] in (0, 1, 2)
        assert isinstance(row["score"], float) and row["flag"] is True and isinstance(row["text"], str)
        assert torch.tensor(row["image"]).shape == (3, 8, 8)
        assert torch.tensor(row["nested"]).dim() == 2
    assert rows == synthetic_rows(lab.build("bert"), "sequence_classification", DECLARED)


class Plain(torch.utils.data.Dataset):
    """A torch data set; `first` is row 0, or raises."""

    def __init__(self, first: Any) -> None:
        self.first = first

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.first, Exception):
            raise self.first
        return self.first


def test_columns_of_a_plain_data_set_are_the_form_of_a_row() -> None:
    row = {
        "input_ids": [4, 5, 6],
        "mask": torch.ones(3, dtype=torch.long),
        "pixel_values": np.zeros((3, 8, 8), dtype=np.float32),
        "labels": 2,
        "score": 0.5,
        "flag": True,
        "text": "secret",
    }
    assert declared_columns(Plain(row)) == {
        "input_ids": Column("int", (None,)),
        "mask": Column("int", (None,)),
        "pixel_values": Column("float", (None, None, None)),
        "labels": Column("int"),
        "score": Column("float"),
        "flag": Column("bool"),
        "text": Column("string"),
    }


def test_synthetic_rows_hold_no_value_of_the_data(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    one = declared_columns(Plain({"input_ids": [4, 5, 6], "labels": 2}))
    other = declared_columns(Plain({"input_ids": [7] * 9, "labels": 0}))
    assert synthetic_rows(model, "sequence_classification", one) == synthetic_rows(
        model, "sequence_classification", other
    )


@pytest.mark.parametrize("first", [ValueError("a private value"), KeyError(0), None, [1, 2]], ids=repr)
def test_a_data_set_whose_first_row_cannot_be_read_does_not_abort(lab: SimpleNamespace, first: Any) -> None:
    assert declared_columns(Plain(first)) == {}
    model = lab.build("bert", dtype=torch.float32)
    batch = synthetic_batch(model, "sequence_classification", {}, lambda rows: {})
    assert batch["input_ids"].shape == (3, 13)


def test_no_columns_and_no_task_is_refused(lab: SimpleNamespace) -> None:
    with refuses("declares no columns.*datasets.Dataset"):
        synthetic_batch(lab.build("bert"), None, {})


@pytest.mark.parametrize("family", ["bert", "bert-multi-label", "bert-regression", "bert-mlm", "modernbert"])
def test_default_columns_suit_the_task(lab: SimpleNamespace, family: str) -> None:
    check_family(lab, family)


# ---------------------------------------------------------------------------------------------------------------------
# Collators

COLUMNS = {"input_ids": Column("int", (None,)), "labels": Column("int")}


def stack(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_a_collator_that_needs_equal_lengths_gets_them(lab: SimpleNamespace) -> None:
    batch = synthetic_batch(lab.build("bert"), "sequence_classification", COLUMNS, stack)
    assert batch["input_ids"].shape == (3, 13)


def test_a_collator_that_fails_is_refused_with_its_reason(lab: SimpleNamespace) -> None:
    def broken(rows: list[dict]) -> dict:
        raise KeyError("no such column\nand more")

    with refuses("data_collator failed.*KeyError"):
        synthetic_batch(lab.build("bert"), "sequence_classification", COLUMNS, broken)


def mixup(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = stack(rows)
    return {**batch, "labels": batch["labels"].float() - batch["input_ids"].float().mean()}


def packing(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: value.flatten()[None] for name, value in stack(rows).items()}


@pytest.mark.parametrize(("collate", "match"), [(mixup, "one row change another"), (packing, "packing")])
def test_a_collator_that_mixes_rows_is_refused(lab: SimpleNamespace, collate: Any, match: str) -> None:
    with refuses(match):
        synthetic_batch(lab.build("bert"), "sequence_classification", COLUMNS, collate)


def test_a_model_that_fails_on_what_the_collator_returns_is_refused(lab: SimpleNamespace) -> None:
    model = lab.build("bert", dtype=torch.float32)
    columns = {**COLUMNS, "inputs_embeds": Column("float", (13, 16))}
    batch = synthetic_batch(model, "sequence_classification", columns, stack)
    engine = PerExampleGradients(model, losses.per_example_loss(model, "sequence_classification"), clipping_norm=1.0)
    with refuses("BertForSequenceClassification failed.*inputs_embeds"):
        preflight.check(engine, batch)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("nested", [False, True])
def test_positions_that_follow_the_longest_row_of_a_batch_are_refused(
    lab: SimpleNamespace, kind: str, nested: bool
) -> None:
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with refuses(f"{kind}.*'yarn'"):
        check_family(lab, "llama", rope_parameters={"full_attention": parameters} if nested else parameters)


def test_dynamic_positions_do_follow_the_longest_row() -> None:
    """Why they are refused: beside a row longer than the model was made for, a short row's output is another."""
    row = torch.arange(6)[None]
    padded = torch.cat([row, torch.zeros(1, 14, dtype=torch.long)], 1)  # on the right, behind a causal mask
    changes = {}
    for kind in ("default", "dynamic"):
        config = transformers.LlamaConfig(
            vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=8, rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0},
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double()
        with torch.no_grad():
            changes[kind] = float((model(row).logits - model(padded).logits[:, :6]).abs().max())
    assert changes["default"] < 1e-12 < 1e-7 < changes["dynamic"]


# ---------------------------------------------------------------------------------------------------------------------
# A row alone has the same bits every time (P18)


class Remembering(nn.Module):
    """A layer of which the result depends, in its last digits, on the longest row that it has ever seen."""

    def __init__(self, remembered: float) -> None:
        super().__init__()
        self.linear, self.remembered, self.longest = nn.Linear(5, 5), remembered, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest + 1, x.shape[1])
        return self.linear(x) * (1 + self.remembered * self.longest)


@pytest.mark.parametrize("exact_sums", [False, True])
def test_with_exact_sums_a_model_that_remembers_is_refused(exact_sums: bool) -> None:
    def checked(remembered: float) -> None:
        engine = PerExampleGradients(Remembering(remembered), row_loss, clipping_norm=1.0, exact_sums=exact_sums)
        preflight.check(engine, {"x": torch.randn(3, 13, 5)})
        assert not any(bool(total.any()) for total in engine.take().values())

    checked(0.0)
    if exact_sums:
        with refuses("other bits.*snapped"):
            checked(1e-6)
    else:
        checked(1e-6)


def test_wide_layers_pass_under_autocast_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of more terms than one product has; the mutant takes them in autocast's half precision."""
    torch.manual_seed(0)
    model = nn.Linear(600, 300, bias=False)

    def check() -> None:
        engine = PerExampleGradients(model, lambda called, b: called(b["x"]).square().sum((1, 2)), clipping_norm=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            preflight.check(engine, {"x": torch.randn(3, 8, 600)}, autocast=True)

    check()
    monkeypatch.setattr(preflight, "exact_matmul", torch.no_grad)
    with pytest.raises(PrivacyError, match="failed on synthetic rows"):
        check()
