from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import layers, losses, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.rounding import summation_error

FAMILIES = (
    "bert",
    "bert-multi-label",
    "bert-regression",
    "bert-mlm",
    "roberta",
    "distilbert-qa",
    "modernbert",
    "albert",
    "electra",
    "gpt2",
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "vaultgemma",
    "phi3",
    "olmo2",
    "smollm3",
    "opt",
    "gpt-neox",
    "t5",
    "bart",
    "whisper",
    "vit",
)
BOUND = 1 + 2.0**-10


def engine_of(model: Any, clipping_norm: float = 1.0, **options: Any) -> PerExampleGradients:
    """An engine that has passed the checks, as the trainer makes it."""
    task = losses.task_of(model)
    engine = PerExampleGradients(model, losses.per_example_loss(model, task), clipping_norm=clipping_norm, **options)
    dtype = next(model.parameters()).dtype
    batch = preflight.synthetic_batch(model, task, {})
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    preflight.check(engine, batch, compare_with_model_loss=True)
    return engine


def private_sum(
    lab: SimpleNamespace, engine: PerExampleGradients, rows: list, clipping_norm: float, size: int, **options: Any
) -> dict[str, torch.Tensor]:
    engine.clipping_norm = clipping_norm
    for start in range(0, len(rows), size):
        engine.accumulate(lab.collate(engine.model, rows[start : start + size], **options))
    return engine.take()


def worst_error(lab: SimpleNamespace, model: Any, rows: list, engine: PerExampleGradients, **options: Any) -> float:
    """Against the loop of autograd: two clipping regimes, micro-batches of 1, 3 and all."""
    gradients = lab.row_gradients(model, rows)
    return max(
        lab.relative_error(
            private_sum(lab, engine, rows, clipping_norm, size, **options), lab.clipped_sum(gradients, clipping_norm)
        )
        for clipping_norm in lab.regimes(gradients)
        for size in (1, 3, len(rows))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("adapter", ["full", "lora", "full, none written out", "full, all written out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sum_equals_a_loop_of_autograd(
    lab: SimpleNamespace, family: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrices of models so small are narrow; those of real ones are not."""
    model = lab.build(family)
    if "written out" in adapter:
        monkeypatch.setattr(layers.Outer, "narrow", False)
        monkeypatch.setattr(layers.Outer, "long", "all" in adapter)
    if adapter == "lora":
        model = lab.with_lora(model)
    assert worst_error(lab, model, lab.rows_of(family, model), engine_of(model)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["classifier"]},
        {"bias": "all", "modules_to_save": ["classifier"], "use_rslora": True},
    ],
    ids=str,
)
def test_variants_of_lora_equal_a_loop_of_autograd(lab: SimpleNamespace, options: dict) -> None:
    model = lab.build("bert")
    targets = ["query", "value", "dense"] if "modules_to_save" in options else "all-linear"
    model = lab.with_lora(model, target_modules=targets, **options)
    assert worst_error(lab, model, lab.rows_of("bert", model), engine_of(model)) < 1e-5


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "gemma2", "opt", "bart", "vit"])
def test_float32_models_agree_to_1e_4(lab: SimpleNamespace, family: str) -> None:
    reference = lab.build(family)
    rows = lab.rows_of(family, reference)
    gradients = lab.row_gradients(reference, rows)
    engine = engine_of(lab.build(family, dtype=torch.float32))
    narrow = [{k: v.float() if v.is_floating_point() else v for k, v in row.items()} for row in rows]
    for clipping_norm in lab.regimes(gradients):
        found = private_sum(lab, engine, narrow, clipping_norm, 3)
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert lab.relative_error(found, lab.clipped_sum(gradients, clipping_norm)) < 1e-4


def test_left_padding_equals_a_loop_of_autograd(lab: SimpleNamespace) -> None:
    model = lab.build("llama")
    assert worst_error(lab, model, lab.rows_of("llama", model), engine_of(model), left=True) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama-tied", "opt", "modernbert"])
def test_exact_under_dp_flash(lab: SimpleNamespace, family: str) -> None:
    model = lab.build(family)
    model.set_attn_implementation("dpfa")
    assert worst_error(lab, model, lab.rows_of(family, model), engine_of(model)) < 1e-5


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-tied", "bart", "vit"])
def test_exact_with_gradient_checkpointing_and_dropout(lab: SimpleNamespace, family: str) -> None:
    """The reference draws the same masks: one forward pass of the same padded batch from the same seed."""
    model = lab.build(family, dropout=0.3 if family != "vit" else 0.0)
    engine = engine_of(model)
    batch = lab.collate(model, lab.rows_of(family, model))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    torch.manual_seed(5)
    each = engine.loss(model, batch)
    gradients = []
    for loss in each:
        found = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], retain_graph=True, allow_unused=True)
        pairs = zip(names, found, strict=True)
        gradients.append({n: torch.zeros_like(model.get_parameter(n)) if g is None else g for n, g in pairs})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for clipping_norm in lab.regimes(gradients):
        engine.clipping_norm = clipping_norm
        torch.manual_seed(5)
        assert torch.allclose(engine.accumulate(batch), each.detach(), rtol=1e-12)
        assert lab.relative_error(engine.take(), lab.clipped_sum(gradients, clipping_norm)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Mutants: the comparison above must notice each planted bug


def tied_without_cross_term(uses: Any) -> torch.Tensor:
    return sum(use.squared_norm() for use in uses)  # type: ignore[return-value]


def one_coefficient(engine: PerExampleGradients, norms: torch.Tensor) -> torch.Tensor:
    return torch.full_like(norms, engine.clipping_norm / max(float(norms.square().sum().sqrt()), engine.clipping_norm))


class Deep(nn.Module):
    """Wide layers on rows [B, T, 160], of which those beyond a row's length reach no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(160, 160, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def squares_within(model: nn.Module, batch: Any) -> torch.Tensor:
    inside = torch.arange(batch["x"].shape[1]) < batch["length"][:, None]
    return (model(batch["x"]).square().sum(2) * inside).sum(1)


def rows_of_length(length: int, padded: int) -> dict[str, torch.Tensor]:
    x = torch.randn(3, length, 160, generator=torch.Generator().manual_seed(0))
    return {"x": nn.functional.pad(x, (0, 0, 0, padded - length), value=0.3), "length": torch.full((3,), length)}


def deep_engine() -> PerExampleGradients:
    torch.manual_seed(0)
    engine = PerExampleGradients(Deep(), squares_within, clipping_norm=0.5)
    preflight.check(engine, rows_of_length(4, 4))
    return engine


@pytest.mark.parametrize("length", [20, 100])
def test_rows_add_the_same_whether_they_are_long_or_padded_to_be_and_what_autograd_says(
    lab: SimpleNamespace, length: int
) -> None:
    engine, found = deep_engine(), {}
    for padded in (length, 100):
        written = []
        with pytest.MonkeyPatch.context() as patch:
            write = layers.Outer.written_out
            patch.setattr(layers.Outer, "written_out", lambda self: written.append(self) or write(self))  # noqa: B023
            engine.accumulate(rows_of_length(length, padded))
        assert len(written) == (3 if padded == 100 else 0)
        found[padded] = {name: value.double() for name, value in engine.take().items()}
    assert lab.relative_error(found[length], found[100]) < 1e-6
    model, rows = engine.model.double(), {k: v.double() for k, v in rows_of_length(length, length).items()}
    names, parameters = zip(*model.named_parameters(), strict=True)
    each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in squares_within(model, rows)]
    expected = lab.clipped_sum([dict(zip(names, grads, strict=True)) for grads in each], 0.5)
    assert lab.relative_error(found[length], expected) < 1e-3


def most_alive_while_writing(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many layers' output gradients live while the last one's are made into gradients of its weight."""
    gradients: list[StorageWeakRef] = []
    alive: list[int] = []
    write = layers.Outer.written_out

    def noted(self: layers.Outer) -> layers.Dense:
        alive.append(sum(not ref.expired() for ref in gradients))
        gradients.append(StorageWeakRef(self.left.untyped_storage()))
        return write(self)

    with monkeypatch.context() as patch:
        patch.setattr(layers.Outer, "written_out", noted)
        engine = deep_engine()
        gradients.clear(), alive.clear()
        engine.accumulate(rows_of_length(100, 100))
    assert len(alive) == 3
    return alive[-1]


def test_what_gradients_were_made_of_goes_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.disable()
    try:
        assert most_alive_while_writing(monkeypatch) == 0
        uses = PerExampleGradients._uses

        def kept(self: PerExampleGradients, calls: list) -> dict:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(layers, "write_out", lambda parts: parts)
                found = uses(self, calls)
            return {name: layers.write_out(parts) for name, parts in found.items()}

        monkeypatch.setattr(PerExampleGradients, "_uses", kept)
        assert most_alive_while_writing(monkeypatch) == 2, "the mutant keeps all, and should have been seen"
    finally:
        gc.enable()


def no_clipping(engine: PerExampleGradients, norms: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(norms)


def test_mutant_tied_cross_term_dropped(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.build("llama-tied")
    engine = engine_of(model)
    monkeypatch.setattr(layers.Outer, "long", False)  # or else head and table are one gradient
    monkeypatch.setattr(layers, "combined_squared_norm", tied_without_cross_term)
    assert worst_error(lab, model, lab.rows_of("llama-tied", model), engine) > 1e-4
    with pytest.raises(PrivacyError, match="norms differ"):
        engine_of(model)


@pytest.mark.parametrize("mutant", [no_clipping, one_coefficient])
def test_mutants_of_clipping(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    model = lab.build("bert")
    engine = engine_of(model)
    monkeypatch.setattr(PerExampleGradients, "coefficients", mutant)
    assert worst_error(lab, model, lab.rows_of("bert", model), engine) > 1e-2


def test_mutant_one_use_of_an_embedding_dropped(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.build("llama-tied")
    engine = engine_of(model)
    uses = engine._uses

    def without_lookups(calls: list) -> dict:
        found = uses(calls)
        return {name: [p for p in parts if not isinstance(p, layers.Lookup)] for name, parts in found.items()}

    monkeypatch.setattr(engine, "_uses", without_lookups)
    assert worst_error(lab, model, lab.rows_of("llama-tied", model), engine) > 1e-2


def test_mutant_bias_dropped_from_the_norm(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lab.build("bert")
    engine = engine_of(model)
    norms = engine.norms

    def without_biases(uses: dict, *rest: Any) -> torch.Tensor:
        return norms({name: parts for name, parts in uses.items() if not name.endswith("bias")}, *rest)

    monkeypatch.setattr(engine, "norms", without_biases)
    assert worst_error(lab, model, lab.rows_of("bert", model), engine) > 1e-3


def test_mutant_batch_mean_loss(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    engine = engine_of(model)
    loss = engine.loss
    engine.loss = lambda called, batch: (each := loss(called, batch)).mean().expand(len(each)) / len(each)
    assert worst_error(lab, model, lab.rows_of("bert", model), engine) > 1e-2


# ---------------------------------------------------------------------------------------------------------------------
# Other kinds of clipping


def test_per_layer_groups_partition_the_parameters(lab: SimpleNamespace) -> None:
    model = lab.build("llama-tied")
    engine = PerExampleGradients(model, lambda m, b: b["x"], clipping_norm=1.0, clipping="per_layer")
    groups = engine.clipping_groups()
    assert list(groups) == [name for name, _ in model.named_parameters()]
    assert sorted(set(groups.values())) == list(range(max(groups.values()) + 1))
    owners = {name: name.rpartition(".")[0] for name in groups}
    assert len(set(zip(groups.values(), owners.values(), strict=True))) == len(set(groups.values()))
    assert "lm_head.weight" not in groups and "model.embed_tokens.weight" in groups


@pytest.mark.parametrize("family", ["bert", "llama-tied"])
def test_per_layer_clipping_equals_a_loop_group_by_group(lab: SimpleNamespace, family: str) -> None:
    model = lab.build(family)
    rows, clipping_norm = lab.rows_of(family, model), 0.5
    engine = engine_of(model, clipping_norm, clipping="per_layer")
    groups = engine.clipping_groups()
    share = clipping_norm / len(set(groups.values())) ** 0.5
    expected: dict[str, torch.Tensor] = {}
    for gradient in lab.row_gradients(model, rows):
        for group in set(groups.values()):
            part = {name: gradient[name] for name in groups if groups[name] == group}
            for name, value in lab.clipped_sum([part], share).items():
                expected[name] = expected[name] + value if name in expected else value
    expected = {name: expected[name] for name in groups}
    assert lab.relative_error(private_sum(lab, engine, rows, clipping_norm, 3), expected) < 1e-5
    for row in rows:
        alone = private_sum(lab, engine, [row], clipping_norm, 1)
        assert lab.norm(alone) <= clipping_norm * BOUND
        for group in set(groups.values()):
            assert lab.norm({name: alone[name] for name in groups if groups[name] == group}) <= share * BOUND


def test_automatic_clipping_equals_a_loop(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    rows, clipping_norm = lab.rows_of("bert", model), 0.5
    engine = engine_of(model, clipping="automatic")
    gradients = lab.row_gradients(model, rows)
    expected = {name: sum(clipping_norm / (lab.norm(g) + 0.01) * g[name] for g in gradients) for name in gradients[0]}
    assert lab.relative_error(private_sum(lab, engine, rows, clipping_norm, 3), expected) < 1e-5


def test_an_unknown_kind_of_clipping_is_refused() -> None:
    with pytest.raises(PrivacyError, match="clipping='adaptive'"):
        PerExampleGradients(nn.Linear(2, 2), lambda m, b: b["x"], clipping_norm=1.0, clipping="adaptive")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile examples


def weighted(engine: PerExampleGradients) -> None:
    """Multiplies each example's loss by the batch's own "factor"."""
    loss = engine.loss

    def times_factor(called: nn.Module, batch: Any) -> torch.Tensor:
        return loss(called, {k: v for k, v in batch.items() if k != "factor"}) * batch["factor"]

    engine.loss = times_factor


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("factor", [float("inf"), float("nan"), -float("inf")])
def test_a_non_finite_loss_adds_exactly_zero(lab: SimpleNamespace, factor: float, clipping: str) -> None:
    model = lab.build("llama-tied", dtype=torch.float32)
    engine = engine_of(model, clipping=clipping)
    weighted(engine)
    batch = lab.collate(model, lab.rows_of("llama-tied", model))
    engine.accumulate({**batch, "factor": torch.tensor([1.0, factor, 1.0, 1.0, 1.0])})
    found = engine.take()
    engine.accumulate({**batch, "factor": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])})
    expected = engine.take()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert lab.norm(expected) > 0


def test_a_non_finite_image_adds_exactly_zero(lab: SimpleNamespace) -> None:
    model = lab.build("vit", dtype=torch.float32)
    engine, rows = engine_of(model), lab.rows_of("vit", model)
    hostile = [*rows, {**rows[0], "pixel_values": torch.full((3, 8, 8), float("nan"))}]
    engine.accumulate(lab.collate(model, rows))
    expected = engine.take()
    engine.accumulate(lab.collate(model, hostile))
    found = engine.take()
    assert lab.relative_error(found, {name: value.double() for name, value in expected.items()}) < 1e-6


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_one_more_example_changes_the_sum_by_at_most_c(lab: SimpleNamespace, factor: float, clipping: str) -> None:
    model = lab.build("llama-tied", dtype=torch.float32)
    rows = lab.rows_of("llama-tied", model, (5, 3, 30))
    engine = engine_of(model, 1.0, clipping=clipping)
    weighted(engine)
    for bystanders in (1e-3, 1.0):
        factors = torch.tensor([bystanders, bystanders, factor])
        engine.accumulate({**lab.collate(model, rows[:2]), "factor": factors[:2]})
        without = engine.take()
        engine.accumulate({**lab.collate(model, rows), "factor": factors})
        with_it = engine.take()
        assert lab.norm({k: with_it[k].double() - without[k].double() for k in without}) <= BOUND


def test_an_example_without_a_token_adds_zero(lab: SimpleNamespace) -> None:
    model = lab.build("llama-tied")
    engine, rows = engine_of(model), lab.rows_of("llama-tied", model)
    empty = {**rows[0], "labels": torch.full_like(rows[0]["labels"], -100)}
    expected = private_sum(lab, engine, rows[1:], 1.0, 4)
    assert lab.relative_error(private_sum(lab, engine, [empty, *rows[1:]], 1.0, 5), expected) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16-weights"])
@pytest.mark.parametrize("family", ["bert", "llama-tied", "gemma2"])
def test_bfloat16_is_summed_in_float32_and_stays_within_c(lab: SimpleNamespace, family: str, autocast: bool) -> None:
    model = lab.build(family, dtype=torch.float32 if autocast else torch.bfloat16)
    engine = engine_of(model)
    rows = lab.rows_of(family, model)

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    alone = []
    for clipping_norm in (1e-3, 0.5):
        engine.clipping_norm = clipping_norm
        for row in rows:
            with context():
                engine.accumulate(lab.collate(model, [row]))
            alone.append(engine.take())
            assert {value.dtype for value in alone[-1].values()} == {torch.float32}
            assert lab.norm(alone[-1]) <= clipping_norm * BOUND
        assert lab.norm(alone[-1]) >= clipping_norm * 0.999


@pytest.mark.parametrize("family", ["bert", "llama-tied"])
def test_bfloat16_sums_match_float64_of_the_same_captured_values(lab: SimpleNamespace, family: str) -> None:
    model = lab.build(family, dtype=torch.bfloat16)
    engine = engine_of(model)
    batch = lab.collate(model, lab.rows_of(family, model))
    with engine.attached():
        _, calls = engine.backward(batch)
    with torch.no_grad():
        uses = engine._uses(calls)
    gradients = [
        {n: sum(use.example(i) for use in parts).reshape(model.get_parameter(n).shape) for n, parts in uses.items()}
        for i in range(len(batch["labels"]))
    ]
    norms = [lab.norm(gradient) for gradient in gradients]
    found = engine.norms(uses, len(norms), torch.device("cpu"))
    assert found.dtype == torch.float64
    assert torch.allclose(found[0], torch.tensor(norms, dtype=torch.float64), rtol=1e-5)
    engine.clipping_norm = sorted(norms)[2]
    engine.accumulate(batch)
    total = {name: value for name, value in engine.take().items() if name in uses}
    expected = lab.clipped_sum([{name: g[name] for name in total} for g in gradients], engine.clipping_norm)
    assert lab.relative_error(total, expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // value.element_size())
        return out


def largest(rows: int, columns: int, batch: int, length: int) -> int:
    model = nn.Linear(columns, rows, bias=False)
    engine = PerExampleGradients(model, lambda m, b: m(b["x"]).square().mean((1, 2)), clipping_norm=1.0)
    preflight.check(engine, {"x": torch.randn(3, length, columns)})
    x = torch.randn(batch, length, columns)
    with LargestTensor() as seen:
        engine.accumulate({"x": x})
    return seen.numel


@pytest.mark.parametrize("length", [8, 200], ids=["gram", "tiles"])
def test_no_per_example_gradient_of_a_large_layer_is_materialised(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(layers, "_MAX_TEMPORARY", 2**17)
    rows, columns, batch = 512, 512, 8
    activations = batch * length * rows
    assert largest(rows, columns, batch, length) <= max(rows * columns, activations) < batch * rows * columns


def test_the_memory_check_notices_a_materialised_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def materialised(outer: layers.Outer) -> torch.Tensor:
        return torch.bmm(outer.left.transpose(1, 2), outer.right).square().sum((1, 2), dtype=torch.float64)

    monkeypatch.setattr(layers.Outer, "squared_norm", materialised)
    assert largest(512, 512, 8, 8) >= 8 * 512 * 512


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("family", "named"), [("gpt-oss", r"self_attn.*sinks"), ("mixtral", r"(mlp|experts|gate).*trainable")]
)
def test_parameters_without_a_rule_are_refused_by_name(lab: SimpleNamespace, family: str, named: str) -> None:
    with pytest.raises(PrivacyError, match=named) as caught:
        engine_of(lab.build(family))
    assert "\n" not in str(caught.value) and "requires_grad_(False)" in str(caught.value)


def test_experts_are_refused_though_router_and_attention_are_frozen(lab: SimpleNamespace) -> None:
    model = lab.build("mixtral")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    with pytest.raises(PrivacyError, match="experts"):
        engine_of(model)


def test_t5_relative_bias_is_refused_by_name(lab: SimpleNamespace) -> None:
    with pytest.raises(PrivacyError, match="relative_attention_bias"):
        engine_of(lab.build("t5").requires_grad_(True))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale


def row_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


def test_a_raw_parameter_is_refused_by_name() -> None:
    with pytest.raises(PrivacyError, match=r"Raw; trainable: scale"):
        PerExampleGradients(nn.Sequential(Raw()), row_loss, clipping_norm=1.0)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no trainable parameter"):
        PerExampleGradients(nn.Linear(3, 3).requires_grad_(False), row_loss, clipping_norm=1.0)


def test_a_subclass_with_another_forward_does_not_inherit_the_rule() -> None:
    class Squared(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.square(), self.bias)

    with pytest.raises(PrivacyError, match="Squared"):
        PerExampleGradients(nn.Sequential(Squared(3, 3)), row_loss, clipping_norm=1.0)


def test_nothing_is_accumulated_before_the_checks() -> None:
    engine = PerExampleGradients(nn.Linear(3, 3), row_loss, clipping_norm=1.0)
    with pytest.raises(PrivacyError, match=r"preflight\.check"):
        engine.accumulate({"x": torch.randn(2, 3)})


class Fragile(nn.Module):
    """Raises when told to; changes its first layer's input in place when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.fail = self.in_place = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x := x.clone())
        if self.fail:
            raise RuntimeError("a bad row")
        if self.in_place:
            x.mul_(2)
        return self.second(hidden)


@pytest.fixture
def fragile() -> Iterator[PerExampleGradients]:
    torch.manual_seed(0)
    engine = PerExampleGradients(Fragile(), row_loss, clipping_norm=1.0)
    preflight.check(engine, {"x": torch.randn(3, 4, 3)})
    yield engine


@pytest.mark.parametrize(("fault", "error"), [("fail", RuntimeError), ("in_place", PrivacyError)])
def test_an_exception_leaves_the_sums_and_the_model_untouched(
    fragile: PerExampleGradients, fault: str, error: type[Exception]
) -> None:
    x = torch.randn(2, 4, 3)
    fragile.accumulate({"x": x})
    expected = {name: value.clone() for name, value in fragile.take().items()}
    fragile.accumulate({"x": x})
    setattr(fragile.model, fault, True)
    with pytest.raises(error):
        fragile.accumulate({"x": x})
    setattr(fragile.model, fault, False)
    assert all(not module._forward_hooks for module in fragile.model.modules())
    found = fragile.take()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_interrupted_addition_is_never_handed_out(
    fragile: PerExampleGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(layers.Dense, "add_weighted_sum", interrupted)
        with pytest.raises(MemoryError):
            fragile.accumulate({"x": torch.randn(2, 4, 3)})
    for call in (fragile.take, lambda: fragile.accumulate({"x": torch.randn(2, 4, 3)})):
        with pytest.raises(PrivacyError, match="interrupted"):
            call()


def test_a_change_of_a_layers_input_in_place_is_refused_by_name(fragile: PerExampleGradients) -> None:
    fragile.model.in_place = True  # type: ignore[assignment]
    with pytest.raises(PrivacyError, match="first: its input was changed in place"):
        fragile.accumulate({"x": torch.randn(2, 4, 3)})


def test_a_loss_of_another_shape_is_refused(fragile: PerExampleGradients) -> None:
    fragile.loss = lambda model, batch: row_loss(model, batch).mean()
    with pytest.raises(PrivacyError, match=r"shape \(\), not \(2,\)"):
        fragile.accumulate({"x": torch.randn(2, 4, 3)})


def test_tensors_of_different_numbers_of_rows_are_refused(fragile: PerExampleGradients) -> None:
    with pytest.raises(PrivacyError, match=r"first dimensions \[2, 3\]"):
        fragile.accumulate({"x": torch.randn(2, 4, 3), "y": torch.randn(3)})


def test_a_sum_of_nothing_is_zero_and_taking_starts_again(fragile: PerExampleGradients) -> None:
    assert all(not value.any() for value in fragile.take().values())
    fragile.accumulate({"x": torch.randn(2, 4, 3)})
    assert all(value.any() for value in fragile.take().values())
    assert all(not value.any() for value in fragile.take().values())


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
@pytest.mark.parametrize("clipping_norm", [1e-4, 1.0])
def test_no_coefficient_is_rounded_up_in_float32(clipping: str, clipping_norm: float) -> None:
    model = nn.Linear(2, 2)
    engine = PerExampleGradients(model, lambda m, b: m(b["x"]).sum(1), clipping_norm=clipping_norm, clipping=clipping)
    norms = torch.logspace(-3, 60, 20_000, dtype=torch.float64)[None]
    contributed = engine.coefficients(norms).float().double() * norms
    assert float(contributed.max()) <= clipping_norm * (1 + 2**-10)
    mutant = (clipping_norm / norms.clamp_min(clipping_norm)).float().double() * norms
    assert float(mutant.max()) > clipping_norm * (1 + 2**-10), "subnormal coefficients should have been seen"


# ---------------------------------------------------------------------------------------------------------------------
# Sums in float64 with a proven bound


def sum_and_its_error(exact_sums: bool, micro_batch: int = 8) -> tuple[float, float]:
    """Distance of a sum over sixteen rows that nearly cancel from the sum in rational arithmetic, and its bound."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(16, 16, 3, generator=generator) * torch.logspace(-6, 6, 16)[:, None]
    x = torch.cat([half, half.flip(1) * (1 + 1e-2)], 1)
    sign = torch.cat([torch.ones(16, 16), -torch.ones(16, 16)], 1)
    model = nn.Linear(3, 2, bias=False)
    direction = torch.tensor([0.7, -1.3])

    def loss(called: nn.Module, batch: Any) -> torch.Tensor:
        return (called(batch["x"]) @ direction * batch["sign"]).sum(1) * 3e4

    engine = PerExampleGradients(model, loss, clipping_norm=1.0, exact_sums=exact_sums)
    preflight.check(engine, {"x": torch.randn(3, 4, 3), "sign": torch.ones(3, 4)})
    expected = [[Fraction(0)] * 3 for _ in range(2)]
    for start in range(0, 16, micro_batch):
        batch = {"x": x[start : start + micro_batch], "sign": sign[start : start + micro_batch]}
        with engine.attached():
            _, calls = engine.backward(batch)
        (outer,) = engine._uses(calls)["weight"]
        norms = engine.norms({"weight": [outer]}, micro_batch, torch.device("cpu"))
        assert float(norms.min()) > 0 and float((norms[0] * 256 / outer.mass).min()) > 0.999
        for i, c in enumerate(engine.coefficients(norms)[0].tolist()):
            for left, right in zip(outer.left[i].tolist(), outer.right[i].tolist(), strict=True):
                for row in range(2):
                    for column in range(3):
                        expected[row][column] += Fraction(c) * Fraction(left[row]) * Fraction(right[column])
        engine.accumulate(batch)
    found = engine.take()["weight"]
    assert found.dtype == (torch.float64 if exact_sums else torch.float32)
    squares = sum((Fraction(found[r, c].item()) - expected[r][c]) ** 2 for r in range(2) for c in range(3))
    return math.sqrt(squares), summation_error(1.0, examples=16, terms=32)


@pytest.mark.parametrize("micro_batch", [16, 4, 1])
def test_exact_sums_stay_within_their_bound_of_rational_arithmetic(micro_batch: int) -> None:
    error, bound = sum_and_its_error(True, micro_batch)
    assert error <= bound < 1e-9


def test_mutant_sums_in_float32_pass_the_bound_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.Outer, "narrow", False)
    monkeypatch.setattr(layers.Outer, "long", False)
    error, bound = sum_and_its_error(False)
    assert error > bound


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize("family", ["bert", "llama-tied"])
def test_exact_sums_agree_with_the_others(lab: SimpleNamespace, family: str, clipping: str) -> None:
    model = lab.build(family, dtype=torch.float32)
    rows = lab.rows_of(family, model)
    found, exact = (
        private_sum(lab, engine_of(model, clipping=clipping, exact_sums=exact_sums), rows, 0.5, 3)
        for exact_sums in (False, True)
    )
    assert {value.dtype for value in exact.values()} == {torch.float64}
    assert lab.relative_error(found, exact) < 1e-4


def is_the_sum_of_the_rows_own(micro_batch: int) -> bool:
    """Whether the sum over sixteen rows is that of the sums over each, one added after the other in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, 24, generator=generator)
    direction = torch.randn(8, 40, generator=generator)
    engine = PerExampleGradients(
        nn.Linear(24, 40, bias=False),
        lambda model, batch: (model(batch["x"]) * direction).sum((1, 2)),
        clipping_norm=1.0,
        exact_sums=True,
    )
    preflight.check(engine, {"x": torch.randn(3, 8, 24)})

    def total(size: int, rows: torch.Tensor) -> torch.Tensor:
        for part in rows.split(size):
            engine.accumulate({"x": part})
        return engine.take()["weight"]

    expected = torch.zeros(40, 24, dtype=torch.float64)
    for row in x.split(1):
        expected += total(1, row)
    return torch.equal(total(micro_batch, x), expected)


@pytest.mark.parametrize("micro_batch", [1, 5, 16])
def test_with_exact_sums_every_example_is_one_addition(micro_batch: int) -> None:
    assert is_the_sum_of_the_rows_own(micro_batch)


@pytest.mark.parametrize("micro_batch", [1, 16])
def test_mutant_products_that_are_added_term_by_term_are_caught(
    micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers.Outer, "add_one_by_one", layers.Outer.add_weighted_sum)
    assert not is_the_sum_of_the_rows_own(micro_batch)


def test_exact_sums_refuse_a_layer_for_which_no_bound_is_proven() -> None:
    model = nn.Embedding(2**20 + 1, 1)
    with pytest.raises(PrivacyError, match="weight has shape"):
        PerExampleGradients(model, lambda m, b: m(b["x"]).sum((1, 2)), clipping_norm=1.0, exact_sums=True)
    PerExampleGradients(model, lambda m, b: m(b["x"]).sum((1, 2)), clipping_norm=1.0)


# ---------------------------------------------------------------------------------------------------------------------
# One backward pass


def test_autograd_computes_no_weight_gradient(lab: SimpleNamespace) -> None:
    model = lab.build("bert")
    engine = engine_of(model)
    batch = lab.collate(model, lab.rows_of("bert", model))
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    with engine.attached(), lab.Products() as seen:
        engine.backward(batch)
    assert len(seen.shapes) > 20 and not weights & set(seen.shapes)
    with lab.Products() as seen:
        engine.loss(model, batch).sum().backward()
    assert weights & set(seen.shapes), "the mutant, an ordinary backward pass, should have been seen"
