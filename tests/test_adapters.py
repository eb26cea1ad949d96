"""docs/adapters.md says what the stored results say, and the check that filled them catches what it must."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

from dpfa_hf import DPTrainer, PrivacyArguments, refusals
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import adapters, layers, preflight
from dpfa_hf.refusals import refuse_adapter

ROOT = Path(__file__).resolve().parent.parent
# Computed again: every group of adapters, every kind of model, every outcome.
SAMPLE = [
    ("all weights", "falcon"),
    ("all weights", "nemotron"),
    ("all weights", "swin"),
    ("LoRA", "mixtral"),
    ("LoRA, `modules_to_save`", "xlm-roberta"),
    ("LoRA on embeddings", "gemma"),
    ("LoRA on convolutions", "whisper"),
    ("LoRA, `trainable_token_indices`", "llama-tied"),
    ("DoRA", "bert"),
    ("DoRA on embeddings", "bert"),
    ("prompt tuning", "llama-cls"),
    ("P-tuning", "bart"),
    ("prefix tuning", "t5"),
    ("IA3", "gpt2"),
    ("LN tuning", "opt"),
    ("VB-LoRA", "distilbert-qa"),
    ("C3A", "gpt2"),
    ("OSF", "bert"),
    ("LoRA dropout under DoRA", "bert"),
]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return load(ROOT / "benchmarks" / "adapters.py")


@pytest.fixture(scope="module")
def lab(table: ModuleType) -> ModuleType:
    return table.load_lab()


@pytest.fixture(scope="module")
def results(table: ModuleType) -> dict:
    return table.read()


def refuses(match: str) -> Any:
    """A refusal in one line."""
    return pytest.raises(PrivacyError, match=rf"\A(?=.*(?:{match})).*\Z")


# ---------------------------------------------------------------------------------------------------------------------
# The page and its results


def test_the_page_holds_the_tables_of_the_stored_results(table: ModuleType, results: dict) -> None:
    page = table.PAGE.read_text()
    assert table.replaced(page, table.render(results)) == page


def test_no_cell_was_accepted_and_is_inexact_and_30_architectures_are_there(table: ModuleType, results: dict) -> None:
    assert table.inexact(results) == []
    assert list(results["cells"]) == list(table.ADAPTERS)
    for row in results["cells"].values():
        assert len(row) >= 30 and all(table.split(cell)[0] in table.MARKS for cell in row.values())
    exact = [sum(cell.startswith(table.EXACT) for cell in row.values()) for row in results["cells"].values()]
    assert results["cells"]["LoRA"]["bert"].startswith(table.EXACT) and sum(exact) > 1000


def test_results_are_of_the_pinned_versions(results: dict) -> None:
    assert {name: PINNED[name] for name in results["versions"]} == {
        name: version.partition("+")[0] for name, version in results["versions"].items()
    }
    assert set(results["versions"]) == {"torch", "transformers", "peft"}


@pytest.mark.parametrize(("adapter", "family"), SAMPLE, ids=str)
def test_a_cell_computed_again_is_the_stored_one(
    table: ModuleType, lab: ModuleType, results: dict, adapter: str, family: str
) -> None:
    kind, detail = table.split(results["cells"][adapter][family])
    found, again = table.outcome(lab, family, adapter)
    assert found == kind
    if kind == table.EXACT:
        assert float(again) < max(table.TOLERANCE.values()) and float(detail) < max(table.TOLERANCE.values())
    else:
        assert again == results["words"][int(detail)]


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ("bitsandbytes, NF4", "LoRA"),
        ("bitsandbytes, int8, threshold 6", "LoRA"),
        ("torchao, int8 weights", "IA3"),
    ],
)
def test_a_quantised_base_computed_again_is_the_stored_one(
    table: ModuleType, lab: ModuleType, results: dict, base: str, adapter: str
) -> None:
    pytest.importorskip(table.BASES[base][0], reason="an optional package of 26 to 125 MB, not in the test extra")
    kind, _ = table.split(results["quantised"]["cells"][base][adapter])
    assert table.outcome(lab, table.FAMILY_OF_BASES, adapter, table.quantised(base))[0] == kind


def test_a_page_without_its_markers_and_an_inexact_cell_do_not_pass_in_silence(table: ModuleType) -> None:
    with pytest.raises(SystemExit, match="0 pairs of markers <!-- counts -->"):
        table.replaced("nothing here", {"counts": ""})
    cells = {adapter: {"bert": "exact 3e-16", "gpt2": "refused 0"} for adapter in table.ADAPTERS}
    cells["LoRA"]["bert"] = "INEXACT 5e-01"
    quantised = {"bitsandbytes, NF4": dict.fromkeys(table.ON_QUANTISED, "exact 4e-07")}
    made = {"versions": {"torch": "2.13.0+cpu"}, "words": ["because | of"], "cells": cells,
            "quantised": {"cells": quantised, "words": [], "versions": {}}}  # fmt: skip
    assert table.inexact(made) == ["LoRA in bert: INEXACT 5e-01"]
    blocks = table.render(made)
    assert "**1 inexact**" in blocks["counts"] and "**!**" in blocks["matrix-0"] and "**" not in blocks["matrix-1"]
    assert "because \\| of" in blocks["refusals"] and blocks["versions"] == "torch 2.13.0"


# ---------------------------------------------------------------------------------------------------------------------
# Refused by name


def test_every_kind_of_adapter_is_judged_and_none_twice() -> None:
    kinds = {kind.value for kind in peft.PeftType}
    assert kinds == set(refusals._EXACT_ADAPTERS) | set(refusals._INEXACT_ADAPTERS)
    assert not set(refusals._EXACT_ADAPTERS) & set(refusals._INEXACT_ADAPTERS)


def holding(config: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.peft_config = {"default": config}  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("kind", sorted(refusals._INEXACT_ADAPTERS) + ["INVENTED_TOMORROW"])
def test_other_kinds_are_refused_with_a_reason_and_the_way_out(kind: str) -> None:
    with refuses(f"'default' is {kind}, which .*: use LoraConfig"):
        refuse_adapter(holding(SimpleNamespace(peft_type=kind)))


@pytest.mark.parametrize("initial", [True, False, "gaussian", "olora", "orthogonal", "pissa", "pissa_niter_4", "loftq"])
def test_initialisations_without_data_pass(initial: bool | str) -> None:
    config = peft.LoraConfig(target_modules=["q"])
    config.init_lora_weights = initial  # type: ignore[assignment]
    refuse_adapter(holding(config))


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("init_lora_weights", "eva", "'eva' computes the adapter from data"),
        ("init_lora_weights", "corda", "'corda' computes the adapter from data"),
        ("init_lora_weights", "lora_ga", "'lora_ga' computes the adapter from data"),
        ("init_lora_weights", "by_rows", "'by_rows' is not known here and may read data"),
        ("target_parameters", ["experts.gate_up_proj"], "target_parameters .* leave it out"),
        ("alora_invocation_tokens", [1], "alora_invocation_tokens .* leave it out"),
        ("layer_replication", [(0, 2)], "layer_replication .* leave it out"),
    ],
)
def test_options_of_lora_that_are_not_known_to_be_exact_are_refused(option: str, value: Any, match: str) -> None:
    config = peft.LoraConfig(target_modules=["q"])
    setattr(config, option, value)
    with refuses(match):
        refuse_adapter(holding(config))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (peft.PromptEncoderConfig(encoder_reparameterization_type="LSTM"), "is LSTM.*use 'MLP'"),
        (peft.OFTConfig(oft_block_size=4, coft=True), "coft changes weights.*set it to False"),
        (peft.ShiraConfig(mask_type="fisher"), "mask_type may choose weights by private data.*use 'random'"),
    ],
    ids=["LSTM", "coft", "mask"],
)
def test_options_of_other_adapters_are_refused(config: Any, match: str) -> None:
    with refuses(match):
        refuse_adapter(holding(config))


def test_mixed_adapters_are_refused() -> None:
    with refuses("PeftMixedModel.*use PeftModel"):
        refuse_adapter(type("PeftMixedModel", (nn.Linear,), {})(2, 2))


def quantised_by(method: str, **options: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(quantization_config={"quant_method": method, **options})  # type: ignore[assignment]
    return model


class Int8WeightOnlyConfig:
    """As torchao names it."""


class Int8DynamicActivationInt8WeightConfig:
    """As torchao names it."""


def test_bases_that_round_activations_or_were_not_tried_are_refused() -> None:
    refuse_adapter(quantised_by("bitsandbytes", load_in_4bit=True))
    refuse_adapter(quantised_by("torchao", quant_type=Int8WeightOnlyConfig()))
    with refuses("Int8DynamicActivationInt8WeightConfig rounds activations too.*use Int8WeightOnlyConfig"):
        refuse_adapter(quantised_by("torchao", quant_type=Int8DynamicActivationInt8WeightConfig()))
    for method in ("gptq", "awq", "hqq", "fp8", "None"):
        with refuses(f"quantised by {method} .*; use bitsandbytes"):
            refuse_adapter(quantised_by(method))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_threshold_that_looks_at_the_whole_batch_is_refused(threshold: float) -> None:
    layer = type("Linear8bitLt", (nn.Linear,), {})(2, 2)
    layer.state = SimpleNamespace(threshold=threshold)
    with refuses("0: with llm_int8_threshold=6.0 .*threshold=0.0") if threshold else contextlib.nullcontext():
        refuse_adapter(nn.Sequential(layer))


def test_with_a_threshold_one_row_does_change_another(tmp_path: Path) -> None:
    """What the refusal is for; the checks on synthetic rows cannot see it, for their rows have no outliers."""
    pytest.importorskip("bitsandbytes", reason="an optional package of 125 MB, not in the test extra")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=53, **sizes))
    with torch.no_grad():
        stock.model.embed_tokens.weight.normal_()
        stock.model.embed_tokens.weight[7, 3] = 40.0
    stock.save_pretrained(tmp_path)
    rows = torch.tensor([[5, 9, 11], [4, 6, 8]]), torch.tensor([[5, 9, 11], [7, 7, 7]])
    moved = []
    for threshold in (6.0, 0.0):
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        model = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        with torch.no_grad():
            moved.append(float((model(rows[0]).logits[0] - model(rows[1]).logits[0]).abs().max()))
    assert moved[0] > 1e-6 and moved[1] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Mutants: planted bugs in the very check that fills the table


def tied_without_cross_term(uses: Any) -> torch.Tensor:
    return sum(use.squared_norm() for use in uses)  # type: ignore[return-value]


@contextlib.contextmanager
def one_prompt_for_all(model: Any) -> Iterator[None]:
    """The same values in every row, with a gradient that is the batch's."""

    def get_prompt(batch_size: int, *args: object, **kwargs: object) -> torch.Tensor:
        encoder, tokens = model.prompt_encoder[model.active_adapter], model.prompt_tokens[model.active_adapter]
        each = encoder(tokens.expand(batch_size, -1))
        return each.mean(0, keepdim=True).expand_as(each)

    model.get_prompt = get_prompt
    yield
    del model.get_prompt


def allow(monkeypatch: pytest.MonkeyPatch, kind: str, layer: str) -> None:
    """Takes a refusal by name away, gives the adapter the rule that others have, and hides what it draws."""
    monkeypatch.setattr(adapters, "_random_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(refusals, "_EXACT_ADAPTERS", (*refusals._EXACT_ADAPTERS, kind))
    monkeypatch.setitem(layers._RULES, f"peft.tuners.{layer}.forward", adapters.adapted_layer)


def drop_cross_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.Outer, "long", False)  # or else both uses are one gradient
    monkeypatch.setattr(layers, "combined_squared_norm", tied_without_cross_term)


MUTANTS: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = {
    "cross term dropped": (
        "LoRA, `trainable_token_indices`",
        "llama-tied",
        drop_cross_term,
    ),
    "prompt shared by the batch": (
        "prompt tuning",
        "llama",
        lambda patch: patch.setattr(adapters, "prompts_by_example", one_prompt_for_all),
    ),
    "refusal of PVeRA taken away": ("PVeRA", "llama", lambda patch: allow(patch, "PVERA", "pvera.layer.Linear")),
    "refusal of Lily taken away": ("Lily", "llama", lambda patch: allow(patch, "LILY", "lily.layer.Linear")),
    "refusal of OSF taken away": ("OSF", "llama", lambda patch: allow(patch, "OSF", "osf.layer.Linear")),
}


@pytest.mark.parametrize("checked", [True, False], ids=["", "unchecked"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_not_exact(
    table: ModuleType, lab: ModuleType, mutant: str, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before step 1; and with the checks before step 1 switched off, inexact by the comparison."""
    adapter, family, plant = MUTANTS[mutant]
    plant(monkeypatch)
    if not checked:
        for name in ("_check_isolation", "_check_rows_alone", "_check_model_loss"):
            monkeypatch.setattr(preflight, name, lambda *args: None)
        monkeypatch.setattr(preflight, "_check_gradients", layouts_alone)
    kind = table.outcome(lab, family, adapter)[0]
    assert kind == (table.REFUSED if checked else table.INEXACT)


def layouts_alone(engine: Any, batch: Any, tolerance: float) -> None:
    with engine.attached(), torch.enable_grad():
        engine.backward(batch, infer_layouts=True)


# ---------------------------------------------------------------------------------------------------------------------
# From end to end


class Rows(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = [3 + (index * 7 + i * i) % 30 for i in range(4 + index % 5)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    fill = {"labels": -100}
    tensors = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    return {k: nn.utils.rnn.pad_sequence(v, True, fill.get(k, 0)) for k, v in tensors.items()}


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=33, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash")


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"]),
        peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4, 5, 6, 7, 8]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["DoRA", "tokens", "IA3", "prompt", "prefix"],
)
def test_a_trained_adapter_is_saved_and_loads_again(config: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    args = transformers.TrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_strategy="no",
        per_device_train_batch_size=8, learning_rate=0.1,
    )  # fmt: skip
    privacy = PrivacyArguments(
        target_epsilon=math.inf, noise_multiplier=0.5, target_delta=1e-3, ledger=f"sqlite:///{tmp_path}/ledger.db"
    )
    trainer = DPTrainer(model=model, args=args, train_dataset=Rows(), data_collator=pad, privacy_args=privacy)
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    trainer.save_model()
    again = peft.PeftModel.from_pretrained(llama(), args.output_dir).eval()
    batch = {name: value for name, value in pad([Rows()[0], Rows()[3]]).items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, model.eval()(**batch).logits, atol=1e-6)
    assert (Path(args.output_dir) / "privacy.json").exists()
