"""Rules for PEFT's adapters, in every way of clipping and packing; `tests/test_adapters.py` has all kinds of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import adapters, layers, losses, packing, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients, covered_layers
from dpfa_hf.per_example.units import ROWS_PER_UNIT

LINEAR = ["q_proj", "v_proj", "down_proj"]
# Every row holds some of them, and not only them.
TOKENS = list(range(3, 40))
CONFIGURATIONS: dict[str, Any] = {
    "DoRA": peft.LoraConfig(r=2, use_dora=True, target_modules=LINEAR),
    "IA3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "shared vectors": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=LINEAR),
    "LoRA on embeddings": peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "trained tokens": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
IN_LAYERS = [name for name in CONFIGURATIONS if "uning" not in name]
PROMPTS = ["prompt tuning", "P-tuning"]


def build(lab: SimpleNamespace, name: str, family: str = "llama-tied", **options: Any) -> Any:
    """A model with a tied head and an adapter whose every parameter is random."""
    model = peft.get_peft_model(lab.build(family, **options), CONFIGURATIONS[name])
    model = model.to(options.get("dtype", torch.float64)).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def engine_of(model: Any, batch: dict | None = None, **options: Any) -> PerExampleGradients:
    """An engine that has passed the checks, as the trainer makes it."""
    task = losses.task_of(model)
    engine = PerExampleGradients(model, losses.per_example_loss(model, task), **{"clipping_norm": 1.0, **options})
    preflight.check(engine, batch or preflight.synthetic_batch(model, task, {}), compare_with_model_loss=batch is None)
    return engine


def worst_error(lab: SimpleNamespace, engine: PerExampleGradients, rows: list) -> float:
    gradients = lab.row_gradients(engine.model, rows)
    worst = 0.0
    for clipping_norm in lab.regimes(gradients):
        for size in (1, 3):
            engine.clipping_norm = clipping_norm
            for start in range(0, len(rows), size):
                engine.accumulate(lab.collate(engine.model, rows[start : start + size]))
            worst = max(worst, lab.relative_error(engine.take(), lab.clipped_sum(gradients, clipping_norm)))
    return worst


def refuses(match: str) -> Any:
    """A refusal in one line."""
    return pytest.raises(PrivacyError, match=rf"\A(?=.*(?:{match})).*\Z")


# ---------------------------------------------------------------------------------------------------------------------
# Exactness, however rows are clipped, packed and drawn


@pytest.mark.parametrize("exact_sums", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_clipped_sum_equals_a_loop_of_autograd(lab: SimpleNamespace, name: str, exact_sums: bool) -> None:
    model = build(lab, name)
    engine = engine_of(model, exact_sums=exact_sums)
    assert worst_error(lab, engine, lab.rows_of("llama-tied", model)) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "opt"])
@pytest.mark.parametrize("name", ["LoRA on embeddings", "trained tokens"])
def test_scaled_tables_and_padding_tokens_equal_a_loop_of_autograd(
    lab: SimpleNamespace, name: str, family: str
) -> None:
    model = build(lab, name, family)
    assert worst_error(lab, engine_of(model), lab.rows_of(family, model)) < 1e-5


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_layer_by_layer_each_group_is_clipped_to_its_share(lab: SimpleNamespace, name: str) -> None:
    model = build(lab, name)
    rows = lab.rows_of("llama-tied", model)
    engine = engine_of(model, clipping="per_layer", clipping_norm=0.1)
    groups = engine.clipping_groups()
    share = 0.1 / len(set(groups.values())) ** 0.5
    expected: dict[str, torch.Tensor] = {}
    for gradient in lab.row_gradients(model, rows):
        for group in set(groups.values()):
            part = {each: gradient[each] for each in groups if groups[each] == group}
            for each, value in lab.clipped_sum([part], share).items():
                expected[each] = expected.get(each, 0) + value
    for start in (0, 3):
        engine.accumulate(lab.collate(model, rows[start : start + 3]))
    assert lab.relative_error(engine.take(), {each: expected[each] for each in groups}) < 1e-5


@pytest.mark.parametrize("counts", [(3, 1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["DoRA", "LoRA on embeddings", "trained tokens", "prompt tuning"])
def test_a_users_rows_are_clipped_once(lab: SimpleNamespace, name: str, counts: tuple[int, ...]) -> None:
    model = build(lab, name)
    rows = lab.rows_of("llama-tied", model)[: sum(counts)]
    each = lab.row_gradients(model, rows)
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    users = [each[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    means = [{key: sum(g[key] for g in user) / len(user) for key in user[0]} for user in users]
    engine = engine_of(model)
    for clipping_norm in lab.regimes(means):
        engine.clipping_norm = clipping_norm
        engine.accumulate({**lab.collate(model, rows), ROWS_PER_UNIT: counts})
        assert lab.relative_error(engine.take(), lab.clipped_sum(means, clipping_norm)) < 1e-5


def packed(rows: list) -> dict[str, Any]:
    """Rows end to end."""
    row = {name: torch.cat([each[name] for each in rows])[None] for name in ("input_ids", "labels")}
    row["position_ids"] = torch.cat([torch.arange(len(each["input_ids"])) for each in rows])[None]
    return packing.normalise(row, len(rows))


def packed_rows(lab: SimpleNamespace, model: Any) -> list:
    """Documents without a mask, which a packed row has no use for."""
    rows = lab.rows_of("llama-tied", model)
    return [{name: value for name, value in row.items() if name != "attention_mask"} for row in rows]


@pytest.mark.parametrize("name", IN_LAYERS)
def test_documents_of_a_packed_row_are_clipped_one_by_one(lab: SimpleNamespace, name: str) -> None:
    model = build(lab, name)
    model.set_attn_implementation("dpfa")
    rows = packed_rows(lab, model)
    gradients = lab.row_gradients(model, rows)
    engine = engine_of(model, packed(rows[:3]))
    for clipping_norm in lab.regimes(gradients):
        engine.clipping_norm = clipping_norm
        engine.accumulate(packed(rows))
        assert lab.relative_error(engine.take(), lab.clipped_sum(gradients, clipping_norm)) < 1e-5


@pytest.mark.parametrize("name", [*PROMPTS, "prefix tuning"])
def test_soft_prompts_that_packed_documents_would_share_are_refused(lab: SimpleNamespace, name: str) -> None:
    model = build(lab, name)
    model.set_attn_implementation("dpfa")
    with pytest.raises(PrivacyError):
        engine_of(model, packed(packed_rows(lab, model)[:3]))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_exact_under_dp_flash(lab: SimpleNamespace, name: str) -> None:
    model = build(lab, name)
    model.set_attn_implementation("dpfa")
    assert worst_error(lab, engine_of(model), lab.rows_of("llama-tied", model)) < 1e-5


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", IN_LAYERS)
def test_gradient_checkpointing_changes_nothing(lab: SimpleNamespace, name: str, clipping: str) -> None:
    model = build(lab, name)
    engine, batch = engine_of(model, clipping=clipping), lab.collate(model, lab.rows_of("llama-tied", model))
    engine.accumulate(batch)
    expected = engine.take()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine.accumulate(batch)
    assert lab.relative_error(engine.take(), {key: value.double() for key, value in expected.items()}) < 1e-12


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_non_finite_row_adds_exactly_zero(lab: SimpleNamespace, name: str) -> None:
    model = build(lab, name, dtype=torch.float32)
    engine, rows = engine_of(model), lab.rows_of("llama-tied", model)
    batch, loss = lab.collate(model, rows), engine.loss
    factor = torch.ones(len(rows))
    engine.loss = lambda called, given: loss(called, given) * factor
    sums = []
    for value in (float("nan"), 0.0):
        factor[1] = value
        engine.accumulate(batch)
        sums.append(engine.take())
    assert all(torch.equal(sums[0][each], sums[1][each]) for each in sums[0]) and lab.norm(sums[1]) > 0


def test_bfloat16_adapters_have_float32_norms_and_sums(lab: SimpleNamespace) -> None:
    for name in ("DoRA", "IA3", "LoRA on embeddings", "trained tokens"):
        model = build(lab, name, dtype=torch.bfloat16)
        engine = engine_of(model)
        batch = lab.collate(model, lab.rows_of("llama-tied", model))
        engine.accumulate(batch)
        found = engine.take()
        assert {value.dtype for value in found.values()} == {torch.float32} and lab.norm(found) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Whose a parameter is


def test_an_adapted_layer_answers_for_all_that_is_in_it_and_plain_lora_for_nothing(lab: SimpleNamespace) -> None:
    dora = covered_layers(build(lab, "DoRA"))
    assert {type(module).__name__ for module in dora.values()} == {"Linear"} and all(
        map(adapters.is_whole, dora.values())
    )
    first = adapters.trainable(next(iter(dora.values())))
    assert sorted(first) == [
        "lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight",
    ]  # fmt: skip
    plain = peft.get_peft_model(lab.build("llama"), peft.LoraConfig(r=2, target_modules=LINEAR))
    assert all(name.endswith(("lora_A.default", "lora_B.default")) for name in covered_layers(plain))
    assert not any(map(adapters.is_whole, plain.modules()))


def test_a_type_named_for_a_rule_is_found_by_where_its_forward_is_defined() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Inherits(Named):
        pass

    class Differs(Named):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    path = f"{Named.__module__}.{Named.__qualname__}"
    rule = layers.register_rule(path)(lambda call: {})
    try:
        assert layers.find_rule(Named()) is layers.find_rule(Inherits()) is rule
        assert layers.find_rule(Differs()) is None
    finally:
        del layers._RULES[f"{path}.forward"]


def test_synthetic_rows_hold_trained_tokens_and_others(lab: SimpleNamespace) -> None:
    configuration = peft.TrainableTokensConfig(token_indices=[50])
    model = peft.get_peft_model(lab.build("llama"), configuration).to(torch.float64)
    for row in preflight.synthetic_batch(model, "causal_lm", {})["input_ids"]:
        assert (row == 50).any() and (row != 50).any()
    engine_of(model)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_computed_by_row_for_a_forward_pass_only(lab: SimpleNamespace, name: str) -> None:
    model = build(lab, name)
    stock = model.get_prompt(batch_size=4)
    with pytest.raises(KeyError), adapters.prompts_by_example(model):
        assert torch.allclose(model.get_prompt(batch_size=4), stock)
        raise KeyError
    assert "get_prompt" not in vars(model)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_token_listed_twice_is_refused(lab: SimpleNamespace) -> None:
    model = peft.get_peft_model(lab.build("llama"), peft.TrainableTokensConfig(token_indices=[5, 7, 5]))
    with refuses("embed_tokens.*listed twice"):
        engine_of(model.to(torch.float64))


@pytest.mark.parametrize(
    "configuration",
    [
        peft.LoraConfig(r=2, use_dora=True, lora_dropout=0.2, target_modules=LINEAR),
        peft.VeraConfig(r=2, vera_dropout=0.2, target_modules=LINEAR),
        peft.LoHaConfig(r=2, rank_dropout=0.2, target_modules=LINEAR),
        peft.LoKrConfig(r=2, module_dropout=0.2, target_modules=LINEAR),
        peft.BOFTConfig(boft_block_size=4, boft_dropout=0.2, target_modules=LINEAR),
    ],
    ids=lambda configuration: configuration.peft_type.value,
)
def test_dropout_that_cannot_be_drawn_again_is_refused(lab: SimpleNamespace, configuration: Any) -> None:
    model = peft.get_peft_model(lab.build("llama"), configuration).to(torch.float64).train()
    with refuses("draws random numbers.*dropout to 0"):
        engine_of(model)


def test_weights_trained_beside_some_of_their_own_rows_are_refused(lab: SimpleNamespace) -> None:
    model = build(lab, "trained tokens", "llama")
    model.get_input_embeddings().token_adapter.base_layer.weight.requires_grad_()
    with pytest.raises(PrivacyError):
        engine_of(model)


# ---------------------------------------------------------------------------------------------------------------------
# Mutants: the checks before step 1 must notice, and so must the comparison where they are switched off


@contextlib.contextmanager
def unshared(model: Any) -> Iterator[None]:
    yield


def tied_without_cross_term(uses: Any) -> torch.Tensor:
    return sum(use.squared_norm() for use in uses)  # type: ignore[return-value]


def first_row_alone(call: layers.LayerCall) -> dict:
    found = adapters.adapted_layer(call)
    return {name: layers.Dense(each.grads.mean(0, keepdim=True).expand_as(each.grads)) for name, each in found.items()}


def test_mutant_prompt_shared_by_the_batch(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "prompts_by_example", unshared)
    with pytest.raises(PrivacyError):
        engine_of(build(lab, "prompt tuning"))


def test_mutant_tied_tokens_without_the_cross_term(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(lab, "trained tokens")
    engine = engine_of(model)
    monkeypatch.setattr(layers.Outer, "long", False)  # or else head and table are one gradient
    monkeypatch.setattr(layers, "combined_squared_norm", tied_without_cross_term)
    assert worst_error(lab, engine, lab.rows_of("llama-tied", model)) > 1e-4
    with refuses("norms differ"):
        engine_of(model)


def test_mutant_rows_that_share_their_gradient(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(lab, "IA3")
    engine = engine_of(model)
    for name in [key for key, rule in layers._RULES.items() if rule is adapters.adapted_layer]:
        monkeypatch.setitem(layers._RULES, name, first_row_alone)
    monkeypatch.setattr(adapters, "is_whole", lambda module: layers.find_rule(module) is first_row_alone)
    assert worst_error(lab, engine, lab.rows_of("llama-tied", model)) > 1e-3
    with refuses("differ"):
        engine_of(model)


def test_mutant_repeated_tokens_not_added_up(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(lab, "LoRA on embeddings")
    engine, rows = engine_of(model), lab.rows_of("llama-tied", model, (30, 20, 25))
    assert worst_error(lab, engine, rows) < 1e-5
    monkeypatch.setattr(layers.Lookup, "squared_norm", lambda use: use.grad.double().square().sum((1, 2)))
    assert worst_error(lab, engine, rows) > 1e-4


@pytest.mark.parametrize("what", ["scale", "slot"])
def test_mutants_of_table_rules(lab: SimpleNamespace, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(lab, "trained tokens" if what == "slot" else "LoRA on embeddings", "gemma2")
    if what == "scale":
        monkeypatch.setattr(adapters, "_embed_scale", lambda module: 1.0)
    else:
        monkeypatch.setattr(adapters, "_without_padding", lambda module, index, grad: grad.roll(1, 1))
    with refuses("differ"):
        engine_of(model)


def test_mutant_dropout_drawn_again(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_random_state", lambda device: torch.zeros(1))
    configuration = peft.VeraConfig(r=2, vera_dropout=0.2, target_modules=LINEAR)
    model = peft.get_peft_model(lab.build("llama"), configuration).to(torch.float64).train()
    with refuses("differ"):
        engine_of(model)
