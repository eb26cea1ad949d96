"""Holds trainers x adapters x architectures against a loop of autograd, and writes docs/trainers.md.

    python benchmarks/trainers.py            compute all cells: benchmarks/results/trainers.json and the page
    python benchmarks/trainers.py --render   write the page from the stored results

A cell is one step without noise of a real trainer under `privatize`, with its own preparation of texts and pairs, that
drew every row and clipped some of them. The gradient that it hands to the optimizer must be the clipped sum of those
that autograd gives in float64 for one text or pair at a time, by definitions that know nothing of TRL.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from adapters import ADAPTERS, EXACT, INEXACT, NOT_APPLICABLE, REFUSED, Places, Words, first_line, replaced, shaken
from torch import nn
from torch.nn import functional as F

from dpfa_hf import PrivacyError, privatize

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "trainers.json"
PAGE = ROOT / "docs" / "trainers.md"
TOLERANCE = 1e-4  # of float32, beside float64
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1, "hidden_size": 16, "intermediate_size": 24},
    "qwen3": {"num_key_value_heads": 1, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma2": {"num_key_value_heads": 1, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8},
}
TRAINERS = ("completion", "completion, padding-free", "dpo", "reward")
NAMES = {
    "completion": "`SFTTrainer`",
    "completion, padding-free": "`SFTTrainer`, padding-free",
    "dpo": "`DPOTrainer`",
    "reward": "`RewardTrainer`",
}
KINDS = (
    "all weights", "LoRA", "DoRA", "LoRA on embeddings", "trainable tokens", "prompt tuning", "prefix tuning", "IA3",
    "LN tuning", "VeRA",
)  # fmt: skip


def load_texts() -> ModuleType:
    """The tests' tokenizer, texts and definitions of losses."""
    spec = importlib.util.spec_from_file_location("texts_of_trl", ROOT / "tests" / "test_trl.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stock(texts: ModuleType, architecture: str, kind: str) -> Any:
    """A tiny model for a trainer, float32."""
    import transformers

    torch.manual_seed(0)
    given = {"num_hidden_layers": 1, "num_attention_heads": 2} if architecture != "gpt2" else {}
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=len(texts.WORDS), pad_token_id=texts.PAD, eos_token_id=texts.END, bos_token_id=None,
        **given, **ARCHITECTURES[architecture],
    )  # fmt: skip
    if kind == "reward":
        config.num_labels = 1
    head = transformers.AutoModelForSequenceClassification if kind == "reward" else transformers.AutoModelForCausalLM
    return head.from_config(config, attn_implementation="dp_flash")


def outcome(
    texts: ModuleType, trainer_name: str, adapter: str, architecture: str, mutate: Callable[[Any], None] | None = None
) -> tuple[str, str]:
    """What becomes of one cell, as in `adapters.outcome`; `mutate` plants a bug in the private trainer."""
    import peft

    kind = trainer_name.split(",")[0]
    settings, private = texts.SETTINGS[trainer_name]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        model = stock(texts, architecture, kind)
        options: dict[str, Any] = dict(settings)
        if adapter != "all weights":
            places = Places.of(model)._replace(task="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
            configuration = ADAPTERS[adapter](peft, places)
            if adapter == "trainable tokens":  # of this vocabulary
                configuration.token_indices = list(range(5, len(texts.WORDS)))
            options["peft_config"] = configuration
        elif kind == "dpo":
            options["ref_model"] = shaken(copy.deepcopy(model))
        with tempfile.TemporaryDirectory() as folder:
            try:
                trainer = texts.build(kind, Path(folder), model=model, **options)
            except Exception as error:  # whatever TRL or PEFT says
                return NOT_APPLICABLE, first_line(error)
            shaken(trainer.model)
            try:
                parts = gradients(texts, trainer, kind)
            except Exception as error:
                return NOT_APPLICABLE, f"without privacy the model fails: {first_line(error)}"
            norm = sorted(map(texts.norm, parts))[texts.N // 2]
            try:
                asked = texts.privacy(Path(folder), per_example_max_grad_norm=norm, expected_batch_size=5, **private)
                privatize(trainer, asked)
                texts.inject(trainer, [list(range(texts.N))])
                if mutate is not None:
                    mutate(trainer)
                handed = released(trainer)
            except PrivacyError as error:
                return REFUSED, re.sub(r"^\w+(?= failed on)", "the model", str(error))
    error = texts.gap({name: 5 * mean for name, mean in handed.items()}, texts.clipped_sum(parts, norm))
    return (EXACT if error < TOLERANCE else INEXACT), f"{error:.0e}"


def released(trainer: Any) -> dict[str, torch.Tensor]:
    """What the step hands to the optimizer, float64."""
    found: dict[str, torch.Tensor] = {}
    private_step = trainer.training_step

    def step(model: Any, *args: Any) -> torch.Tensor:
        loss = private_step(model, *args)
        found.update({name: p.grad.double().clone() for name, p in model.named_parameters() if p.requires_grad})
        return loss

    trainer.training_step = step
    trainer.train()
    return found


def gradients(texts: ModuleType, trainer: Any, kind: str) -> list[dict[str, torch.Tensor]]:
    """By autograd, of each text's or pair's loss alone; float64."""
    model = copy.deepcopy(trainer.model).double().train()
    for module in model.modules():
        module.__dict__.pop("forward", None)  # TRL's, which is bound to the model that was copied
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reference = copy.deepcopy(trainer.ref_model).double() if getattr(trainer, "ref_model", None) is not None else None
    found = []
    for i in range(texts.N):
        loss = dpo_loss(texts, model, reference, i) if kind == "dpo" else LOSSES[kind](texts, model, i)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        pairs = zip(named.items(), grads, strict=True)
        found.append({name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in pairs})
    return found


def answer_cost(texts: ModuleType, model: nn.Module, i: int, answer: str) -> torch.Tensor:
    """[T]: minus the log-probability of every token of an answer and its end, after its prompt."""
    prompt = texts.ids(texts.PROMPTS[i])
    tokens = prompt + texts.ids(answer) + [texts.END]
    logits = model(input_ids=torch.tensor([tokens])).logits[0, -len(tokens) :].log_softmax(-1)
    return torch.stack([-logits[t - 1, tokens[t]] for t in range(len(prompt), len(tokens))])


def completion_loss(texts: ModuleType, model: nn.Module, i: int) -> torch.Tensor:
    return answer_cost(texts, model, i, texts.ANSWERS[i]).mean()


def reward_loss(texts: ModuleType, model: nn.Module, i: int) -> torch.Tensor:
    rewards = []
    for answer in (texts.ANSWERS[i], texts.WORSE[i]):
        tokens = [*texts.ids(texts.PROMPTS[i]), *texts.ids(answer), texts.END]
        rewards.append(model(input_ids=torch.tensor([tokens])).logits[0, 0])
    return F.softplus(rewards[1] - rewards[0])


def dpo_loss(texts: ModuleType, model: Any, reference: nn.Module | None, i: int) -> torch.Tensor:
    """Without a reference of its own, a model with an adapter is its own reference without it."""
    gains = []
    for answer in (texts.ANSWERS[i], texts.WORSE[i]):
        with torch.no_grad(), model.disable_adapter() if reference is None else contextlib.nullcontext():
            before = answer_cost(texts, model if reference is None else reference, i, answer).sum()
        gains.append(before - answer_cost(texts, model, i, answer).sum())
    return F.softplus(-0.1 * (gains[0] - gains[1]))


LOSSES = {"completion": completion_loss, "reward": reward_loss}


def compute(texts: ModuleType) -> dict[str, Any]:
    words = Words()
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for trainer in TRAINERS:
        cells[trainer] = {
            adapter: {each: words.cell(*outcome(texts, trainer, adapter, each)) for each in ARCHITECTURES}
            for adapter in KINDS
        }
        print(trainer, flush=True)
    return {"words": words.all, "cells": cells}


def render(results: dict[str, Any]) -> dict[str, str]:
    """The table, one row for a trainer and an adapter; and what is refused, by its number."""
    lines = ["| | | " + " | ".join(ARCHITECTURES) + " |", "|" + "---|" * (2 + len(ARCHITECTURES))]
    for trainer, row in results["cells"].items():
        for adapter, cells in row.items():
            shown = [_shown(cells[each]) for each in ARCHITECTURES]
            lines.append(f"| {NAMES[trainer]} | {adapter} | " + " | ".join(shown) + " |")
    notes = [f"{number}. {word.strip()}" for number, word in enumerate(results["words"], 1)]
    return {"matrix": "\n".join([*lines, "", *notes])}


def _shown(cell: str) -> str:
    kind, _, detail = cell.rpartition(" ")
    if kind in (EXACT, INEXACT):
        return detail if kind == EXACT else f"**{detail}**"
    return f"{'refused' if kind == REFUSED else 'none'} ({int(detail) + 1})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="use the stored results")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if not arguments.render:
        RESULTS.write_text(json.dumps(compute(load_texts()), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(replaced(PAGE.read_text(), render(results)))
    wrong = [cell for row in results["cells"].values() for cells in row.values() for cell in cells.values()]
    if any(cell.startswith(INEXACT) for cell in wrong):
        sys.exit("a cell was accepted and is not exact")


if __name__ == "__main__":
    main()
