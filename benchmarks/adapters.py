"""Holds every adapter of PEFT in every architecture against a loop of autograd, and writes docs/adapters.md.

    python benchmarks/adapters.py            compute all cells, write benchmarks/results/adapters.json and the page
    python benchmarks/adapters.py --render   write the page from the stored results

A cell is what happened: "exact" is said only where the checks before step 1 pass and norms and clipped sums equal those
of autograd, one row at a time in float64. Nothing in the tables is typed by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import losses, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.refusals import refuse_adapter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "adapters.json"
PAGE = ROOT / "docs" / "adapters.md"
# Of models in float64, in which some compute their logits in float32 all the same, and in float32.
TOLERANCE = {True: 1e-5, False: 1e-4}
EXACT, REFUSED, NOT_APPLICABLE, INEXACT = "exact", "refused", "not applicable", "INEXACT"
# Outside of what an adapter's layers are: a row of the table needs their names.
_HEADS = ("lm_head", "embed_out", "score", "classifier", "cls", "qa_outputs", "decoder", "proj_out", "dense_prediction")
_TASKS = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
}


def load_lab() -> ModuleType:
    """The tests' tiny models, rows and reference loop, which import nothing of dpfa_hf."""
    spec = importlib.util.spec_from_file_location("lab", ROOT / "tests" / "per_example" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Places(NamedTuple):
    """Where adapters go in a model: names for PEFT's target_modules. `task` is PEFT's name, None where it has none."""

    linear: list[str]
    convolutions: list[str]
    norms: list[str]
    embedding: list[str]
    task: str | None

    @classmethod
    def of(cls, model: Any) -> Places:
        linear, convolutions, norms = {}, {}, {}
        for path, module in model.named_modules():
            name = path.rpartition(".")[2]
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                if not (path.split(".")[0] in _HEADS and "layers" not in path):
                    linear[name] = None
            elif isinstance(module, nn.Conv1d | nn.Conv2d):
                convolutions[name] = None
            elif "Norm" in type(module).__name__ and not list(module.children()):
                norms[name] = None
        is_text = model.main_input_name == "input_ids"
        table = model.get_input_embeddings() if is_text else None
        paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is table]
        embedding = dict.fromkeys(path.rpartition(".")[2] for path in paths)
        task = _TASKS.get(losses.task_of(model)) if is_text else None
        return cls(list(linear), list(convolutions), list(norms), list(embedding), task)


Configuration = Callable[[Any, Places], Any]


def _linear(kind: str, **options: Any) -> Configuration:
    """A kind of adapter on the linear layers."""
    return lambda peft, at: getattr(peft, kind)(task_type=at.task, target_modules=at.linear, **options)


def _lora(**options: Any) -> Configuration:
    return _linear("LoraConfig", r=2, **options)


def _prompt(kind: str, **options: Any) -> Configuration:
    return lambda peft, at: at.task and getattr(peft, kind)(task_type=at.task, num_virtual_tokens=4, **options)


# So many that every row holds one, and not all.
_TOKENS = list(range(3, 40))
# Name in the table -> the adapter's configuration, or None where a model has no place for it; by groups.
GROUPS: dict[str, dict[str, Configuration]] = {
    "All weights, and LoRA": {
        "all weights": lambda peft, at: None,
        "LoRA": _lora(),
        "rsLoRA": _lora(use_rslora=True),
        "LoRA, `lora_bias`": _lora(lora_bias=True),
        'LoRA, `bias="all"`': _lora(bias="all"),
        "LoRA, PiSSA": _lora(init_lora_weights="pissa"),
        "LoRA, OLoRA": _lora(init_lora_weights="olora"),
        "LoRA, orthogonal": _lora(init_lora_weights="orthogonal"),
        "LoRA, MiCA": _lora(init_lora_weights="mica"),
        "DoRA": _lora(use_dora=True),
        "LoRA, `modules_to_save`": lambda peft, at: _or_none(
            at.embedding, lambda: peft.LoraConfig(r=2, target_modules=at.linear, modules_to_save=at.embedding)
        ),
        "LoRA on embeddings": lambda peft, at: _or_none(
            at.embedding, lambda: peft.LoraConfig(r=2, task_type=at.task, target_modules=at.embedding)
        ),
        "DoRA on embeddings": lambda peft, at: _or_none(
            at.embedding, lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=at.embedding)
        ),
        "LoRA on convolutions": lambda peft, at: _or_none(
            at.convolutions, lambda: peft.LoraConfig(r=2, target_modules=at.convolutions)
        ),
        "DoRA on convolutions": lambda peft, at: _or_none(
            at.convolutions, lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=at.convolutions)
        ),
        "LoRA, `trainable_token_indices`": lambda peft, at: _or_none(
            at.embedding,
            lambda: peft.LoraConfig(
                r=2, target_modules=at.linear, trainable_token_indices=dict.fromkeys(at.embedding, _TOKENS)
            ),
        ),
    },
    "Tokens, prompts, vectors": {
        "trainable tokens": lambda peft, at: _or_none(
            at.embedding, lambda: peft.TrainableTokensConfig(token_indices=_TOKENS, target_modules=at.embedding)
        ),
        "prompt tuning": _prompt("PromptTuningConfig"),
        "P-tuning": _prompt("PromptEncoderConfig", encoder_hidden_size=8),
        "P-tuning, LSTM": _prompt("PromptEncoderConfig", encoder_reparameterization_type="LSTM"),
        "prefix tuning": _prompt("PrefixTuningConfig"),
        "prefix tuning, projected": _prompt("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=8),
        "IA3": lambda peft, at: peft.IA3Config(
            task_type=at.task, target_modules=at.linear, feedforward_modules=at.linear[::2]
        ),
        "LN tuning": lambda peft, at: _or_none(
            at.norms, lambda: peft.LNTuningConfig(task_type=at.task, target_modules=at.norms)
        ),
        "BEFT": _linear("BeftConfig"),
    },
    "Other adapters of linear layers": {
        "VeRA": _linear("VeraConfig", r=2),
        # By default its scale is so large that autograd in float32 differs from itself, in a batch and alone, by 3e-4.
        "RandLoRA": _linear("RandLoraConfig", r=2, randlora_alpha=16),
        "LoHa": _linear("LoHaConfig", r=2),
        "LoKr": _linear("LoKrConfig", r=2),
        "OFT": _linear("OFTConfig", oft_block_size=4),
        "BOFT": _linear("BOFTConfig", boft_block_size=4),
        "HRA": _linear("HRAConfig", r=2),
        "MiSS": _linear("MissConfig", r=2),
        "FourierFT": _linear("FourierFTConfig", n_frequency=8),
        "WaveFT": _linear("WaveFTConfig", n_frequency=8),
        "C3A": _linear("C3AConfig", block_size=4),
        "RoAd": _linear("RoadConfig", group_size=4),
        "SHiRA": _linear("ShiraConfig", r=1),
        "VB-LoRA": _linear("VBLoRAConfig", r=2, num_vectors=8, vector_length=4),
        "Uni-LoRA": _linear("UniLoraConfig", r=2, theta_d_length=8),
        "TinyLoRA": _linear("TinyLoraConfig", r=2, u=4),
        "DeLoRA": _linear("DeloraConfig", r=2),
        "GraLoRA": _linear("GraloraConfig", r=2, gralora_k=2),
        "GLoRA": _linear("GloraConfig", r=2),
        "HiRA": _linear("HiraConfig", r=2),
        "DEFT": _linear("DeftConfig", r=2),
        "FRoD": _linear("FrodConfig", progressbar=False),
        "PEANuT": _linear("PeanutConfig", r=2),
        "PSOFT": _linear("PsoftConfig", r=2),
        "SuperTuning": _linear("SupertuningConfig", sparsity=0.5),
    },
    "Refused by name": {
        "AdaLoRA": _linear("AdaLoraConfig", init_r=2, target_r=2, total_step=10),
        "AdaMSS": _linear("AdamssConfig", r=4, num_subspaces=2),
        "AdaptionPrompt": lambda peft, at: peft.AdaptionPromptConfig(
            task_type=at.task, adapter_len=3, adapter_layers=1
        ),
        "Cartridge": _prompt("CartridgeConfig"),
        "CPT": lambda peft, at: peft.CPTConfig(
            task_type=at.task, cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]
        ),
        "Lily": _linear("LilyConfig", r=2, num_B=2, stride_A=1),
        "multitask prompt tuning": _prompt("MultitaskPromptTuningConfig", num_tasks=2),
        "OSF": _linear("OSFConfig", effective_rank=4),
        "Poly": _linear("PolyConfig", r=2, n_tasks=2, n_skills=2),
        "PVeRA": _linear("PveraConfig", r=2),
        "Shadow": _linear("ShadowConfig", r=2),
        "LoRA dropout under DoRA": _lora(use_dora=True, lora_dropout=0.2),
        "QA-LoRA": _lora(use_qalora=True, qalora_group_size=4),
        "aLoRA": _lora(alora_invocation_tokens=[3]),
    },
}
ADAPTERS = {name: configuration for group in GROUPS.values() for name, configuration in group.items()}


def _or_none(place: object, configuration: Callable[[], Any]) -> Any:
    return configuration() if place else None


class Norms:
    """The norms that clip, as the engine hands them to statistics."""

    name = "norms"

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def add(self, losses: torch.Tensor, norms: torch.Tensor, clipping_norm: float) -> None:
        self.seen.append(norms[0])

    def take(self, device: torch.device) -> torch.Tensor:
        seen, self.seen = torch.cat(self.seen), []
        return seen

    def discard(self) -> None:
        self.seen = []


def adapted(lab: ModuleType, family: str, adapter: str) -> tuple[Any, str]:
    """A tiny model with an adapter whose every parameter is random, or None and why there is none."""
    import peft

    # Some initialisations are written for float32 alone, and so are the products of experts.
    model = lab.build(family, dtype=torch.float32)
    if adapter != "all weights":
        places = Places.of(model)
        try:
            configuration = ADAPTERS[adapter](peft, places)
            if not configuration:
                return None, "the model has no place for it"
            model = peft.get_peft_model(model, configuration)
        except Exception as error:  # whatever PEFT says of a model that it does not serve
            return None, f"PEFT: {first_line(error)}"
    return shaken(model.to(torch.float32 if family in ("gpt-oss", "mixtral") else torch.float64).train()), ""


def outcome(lab: ModuleType, family: str, adapter: str, adapt: Callable = adapted) -> tuple[str, str]:
    """What becomes of one adapter in one architecture: ("exact", error), ("refused", why), ("not applicable", why) or
    ("INEXACT", error), which must not be."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        model, why = adapt(lab, family, adapter)
        if model is None:
            return NOT_APPLICABLE, why
        try:
            refuse_adapter(model)
        except PrivacyError as error:
            return REFUSED, str(error)
        rows = lab.rows_of(family, model)
        try:
            gradients = lab.row_gradients(model, rows)
        except Exception as error:  # the stock model's, with one row and its own loss
            return NOT_APPLICABLE, f"without privacy the model fails: {first_line(error)}"
        try:
            engine = checked_engine(model)
        except PrivacyError as error:
            return REFUSED, str(error)
        worst = worst_error(lab, engine, rows, gradients)
    in_double = next(model.parameters()).dtype == torch.float64
    return (EXACT if worst < TOLERANCE[in_double] else INEXACT), f"{worst:.0e}"


def checked_engine(model: Any) -> PerExampleGradients:
    """An engine that has passed the checks before step 1."""
    task = losses.task_of(model)
    loss = losses.per_example_loss(model, task)
    engine = PerExampleGradients(model, loss, clipping_norm=1.0, statistics=Norms())
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = preflight.synthetic_batch(model, task, {})
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    preflight.check(engine, batch, compare_with_model_loss=True)
    engine.discard()
    return engine


def worst_error(lab: ModuleType, engine: PerExampleGradients, rows: list, gradients: list) -> float:
    """The largest relative error of norms and of clipped sums: where all are clipped, where some are and where none is;
    in micro-batches of two, of one and of all."""
    norms = torch.tensor([lab.norm(gradient) for gradient in gradients], dtype=torch.float64)
    worst = 0.0
    regimes = ((float(norms.min()) / 10, 2), (float(norms.median()), 1), (float(norms.max()) * 2, len(rows)))
    for clipping_norm, size in regimes:
        engine.clipping_norm = clipping_norm
        for start in range(0, len(rows), size):
            engine.accumulate(lab.collate(engine.model, rows[start : start + size]))
        found = engine.take()
        worst = max(worst, float(((found.pop("norms") - norms) / norms).abs().max()))
        worst = max(worst, lab.relative_error(found, lab.clipped_sum(gradients, clipping_norm)))
    return worst


# Frozen bases of fewer bits: name in the table -> package, and what `quantization_config` is made of.
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bitsandbytes, NF4": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "bitsandbytes, FP4, double": (
        "bitsandbytes",
        "BitsAndBytesConfig",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ),
    "bitsandbytes, int8, threshold 0": (
        "bitsandbytes",
        "BitsAndBytesConfig",
        {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    ),
    "bitsandbytes, int8, threshold 6": ("bitsandbytes", "BitsAndBytesConfig", {"load_in_8bit": True}),
    "torchao, int8 weights": ("torchao", "TorchAoConfig", {"quant_type": "Int8WeightOnlyConfig"}),
    "torchao, float8 weights": ("torchao", "TorchAoConfig", {"quant_type": "Float8WeightOnlyConfig"}),
    "torchao, int4 weights": ("torchao", "TorchAoConfig", {"quant_type": "Int4WeightOnlyConfig"}),
    "torchao, int8 activations too": (
        "torchao",
        "TorchAoConfig",
        {"quant_type": "Int8DynamicActivationInt8WeightConfig"},
    ),
}
ON_QUANTISED = ("LoRA", "rsLoRA", "DoRA", "LoRA, `trainable_token_indices`", "IA3", "VeRA", "prompt tuning")
FAMILY_OF_BASES = "llama"


def quantised(base: str) -> Callable[[ModuleType, str, str], tuple[Any, str]]:
    """`adapted` on a base that was saved, and loaded in fewer bits, on the CPU."""
    _, name, options = BASES[base]

    def adapt(lab: ModuleType, family: str, adapter: str) -> tuple[Any, str]:
        import peft
        import transformers

        head, configuration, arguments = lab.FAMILIES[family]
        # bitsandbytes rounds in blocks of 64 numbers.
        arguments = {**arguments, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        torch.manual_seed(0)
        stock = getattr(transformers, head)(getattr(transformers, configuration)(**arguments))
        given = dict(options)
        if name == "TorchAoConfig":
            from torchao import quantization

            given["quant_type"] = getattr(quantization, given["quant_type"])()
        try:
            with tempfile.TemporaryDirectory() as folder:
                stock.save_pretrained(folder)
                config = getattr(transformers, name)(**given)
                model = getattr(transformers, head).from_pretrained(
                    folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
                )
            model = peft.get_peft_model(model, ADAPTERS[adapter](peft, Places.of(stock))).train()
        except Exception as error:  # whatever a package says of this machine
            return None, first_line(error)
        return shaken(model), ""

    return adapt


def shaken(model: Any) -> Any:
    """The model with every trainable parameter moved, so that no gradient vanishes by an initial zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return model


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# All cells, and the page


class Words:
    """Reasons, each kept once: a cell is "exact 8e-08", or "refused 3", the number of its reason."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def cell(self, kind: str, detail: str) -> str:
        if kind in (EXACT, INEXACT):
            return f"{kind} {detail}"
        if detail not in self.all:
            self.all.append(detail)
        return f"{kind} {self.all.index(detail)}"


def compute(lab: ModuleType) -> dict:
    """Every adapter in every architecture."""
    words = Words()
    cells: dict[str, dict[str, str]] = {adapter: {} for adapter in ADAPTERS}
    for family in lab.FAMILIES:
        for adapter in ADAPTERS:
            cells[adapter][family] = words.cell(*outcome(lab, family, adapter))
        print(family, flush=True)
    return {"versions": _versions("torch", "transformers", "peft"), "words": words.all, "cells": cells}


def compute_quantised(lab: ModuleType) -> dict:
    """Adapters on bases of fewer bits, with the packages that this machine has."""
    words = Words()
    cells = {
        base: {
            adapter: words.cell(*outcome(lab, FAMILY_OF_BASES, adapter, quantised(base))) for adapter in ON_QUANTISED
        }
        for base, (package, _, _) in BASES.items()
        if importlib.util.find_spec(package)
    }
    return {"versions": _versions("torch", "bitsandbytes", "torchao"), "words": words.all, "cells": cells}


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.import_module(name).__version__ for name in names if importlib.util.find_spec(name)}


# In the file a cell is a sign and a number, and an adapter's row one line of them, in the order of the architectures.
_SIGNS = {EXACT: "=", REFUSED: "r", NOT_APPLICABLE: "-", INEXACT: "!"}


def read() -> dict[str, Any]:
    """The stored results, by adapter and architecture."""
    results = json.loads(RESULTS.read_text())
    kinds = {sign: kind for kind, sign in _SIGNS.items()}
    families = results.pop("architectures")
    for adapter, row in results["cells"].items():
        cells = [f"{kinds[cell[0]]} {cell[1:]}" for cell in row.split()]
        results["cells"][adapter] = dict(zip(families, cells, strict=True))
    return results


def write(results: Mapping[str, Any]) -> None:
    """Stores results so that `read` gives them back."""
    cells = {
        adapter: " ".join(f"{_SIGNS[kind]}{detail}" for kind, detail in map(split, row.values()))
        for adapter, row in results["cells"].items()
    }
    families = list(next(iter(results["cells"].values())))
    stored = {**results, "architectures": families, "cells": cells}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


MARKS = {EXACT: "=", REFUSED: "r", NOT_APPLICABLE: "", INEXACT: "**!**"}


def split(cell: str) -> tuple[str, str]:
    """A cell's kind, and its error or the number of its reason."""
    kind, _, detail = cell.rpartition(" ")
    return kind, detail


def render(results: Mapping[str, Any]) -> dict[str, str]:
    """The text between the page's markers, by the markers' name."""
    cells = results["cells"]
    blocks = {
        "versions": _named(results["versions"]),
        "counts": _counts(cells),
        "refusals": _refusals(results),
    }
    for number, (group, adapters) in enumerate(GROUPS.items()):
        if group == "Refused by name":
            continue
        families = list(next(iter(cells.values())))
        rows = [[family, *(MARKS[split(cells[adapter][family])[0]] for adapter in adapters)] for family in families]
        blocks[f"matrix-{number}"] = _table(["", *adapters], rows)
    quantised = results["quantised"]
    rows = []
    for base, row in quantised["cells"].items():
        shown = [_shown(split(row[adapter]), quantised["words"]) for adapter in ON_QUANTISED]
        rows.append([base, *(shown if len(set(shown)) > 1 else [shown[0], *[""] * (len(shown) - 1)])])
    blocks["quantised"] = f"Run with {_named(quantised['versions'])}.\n\n" + _table(["", *ON_QUANTISED], rows)
    return blocks


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version.partition('+')[0]}" for name, version in versions.items())


def _shown(cell: tuple[str, str], words: list[str]) -> str:
    kind, detail = cell
    if kind in (EXACT, INEXACT):
        return detail if kind == EXACT else f"**{detail}**"
    text = re.sub(r"^[\w.]+: (?=with)", "", words[int(detail)])
    return f"{kind}: {text}".replace("|", "\\|")


def _counts(cells: Mapping[str, Mapping[str, str]]) -> str:
    rows = []
    for adapter, row in cells.items():
        kinds = [split(cell) for cell in row.values()]
        count = {kind: sum(kind == each for each, _ in kinds) for kind in MARKS}
        errors = [float(detail) for kind, detail in kinds if kind == EXACT]
        exact = str(count[EXACT]) + (f" (**{count[INEXACT]} inexact**)" if count[INEXACT] else "")
        rows.append([adapter, exact, count[REFUSED], count[NOT_APPLICABLE], f"{max(errors):.0e}" if errors else ""])
    return _table(["", "exact", "refused", "no place, or fails without privacy", "largest error"], rows)


def _refusals(results: Mapping[str, Any]) -> str:
    """What is refused and why, with the modules of one kind taken together."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for adapter, row in results["cells"].items():
        for family, cell in row.items():
            kind, detail = split(cell)
            if kind == REFUSED:
                message = results["words"][int(detail)].replace("adapter 'default' is ", "")
                message = re.sub(
                    r"\b(\w+\.)+[\w.*]+ (?=\(Linear\) draws)", "layer ", re.sub(r"\.\d+(?=\.)", ".*", message)
                )
                message = re.sub(r"\b(\w+\.)+[\w.*]+(?= \(DoraEmbeddingLayer)", "the embedding", message)
                found.setdefault(message, {}).setdefault(adapter, {})[family] = None
    rows = []
    for message, adapters in found.items():
        families = list(dict.fromkeys(family for row in adapters.values() for family in row))
        where = ", ".join(families) if len(families) < 6 else f"{len(families)} architectures"
        what = ", ".join(adapters) if len(adapters) < 6 else f"{len(adapters)} adapters"
        rows.append([what, where, message.replace("|", "\\|")])
    return _table(["adapters", "in", "message"], sorted(rows))


def _table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {each} " if str(each) else " " for each in line) + "|" for line in lines)


def replaced(text: str, blocks: Mapping[str, str]) -> str:
    """`text` with what stands between <!-- NAME --> and <!-- /NAME --> replaced."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"docs/adapters.md has {found} pairs of markers <!-- {name} -->, not one")
    return text


def inexact(results: Mapping[str, Any]) -> list[str]:
    """Cells that were accepted and are wrong."""
    return [
        f"{adapter} in {family}: {cell}"
        for table in (results["cells"], results["quantised"]["cells"])
        for adapter, row in table.items()
        for family, cell in row.items()
        if split(cell)[0] == INEXACT
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="use the stored results")
    parser.add_argument("--quantised", action="store_true", help="compute the quantised bases alone")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    results = read() if RESULTS.exists() else {}
    if not arguments.render:
        lab = load_lab()
        # What this machine has no package for stays as it was computed where there was one.
        found = compute_quantised(lab)
        kept = results.get("quantised", found)
        results = results if arguments.quantised else compute(lab)
        results["quantised"] = found if found["cells"] else kept
        write(results)
    PAGE.write_text(replaced(PAGE.read_text(), render(results)))
    if wrong := inexact(results):
        sys.exit("accepted, and not exact: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
