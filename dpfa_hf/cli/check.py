"""`dpfa check`: whether a model can be trained privately, and by which rules."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpfa_hf import models
from dpfa_hf.cli.options import AsJson, Attention, Task
from dpfa_hf.cli.printing import print_json, print_table
from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from torch import nn


def check(
    model: Annotated[str, typer.Argument(help="A model's directory, or the Hub id of one already downloaded.")],
    task: Task = "auto",
    attn_implementation: Attention = "dp_flash",
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train a LoRA adapter of this rank on all linear layers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Can this model be trained privately, and how is each trainable layer covered?

    Builds the model, lists its trainable layers with the rule that gives their per-example gradients, and tries on
    invented rows that examples do not touch each other and that the gradients are autograd's. These are the checks that
    DPTrainer makes before its first step. No training data are read.

    Example: dpfa check ./my-model --task sequence_classification --lora 16
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result: dict[str, Any] = {
        "model": model,
        "class": None,
        "task": None,
        "weights": None,
        "layers": [],
        "attention": [],
    }
    refusal = None
    configuration = models.read_configuration(model)
    try:
        built, result["task"], result["weights"] = models.build(model, configuration, task, attn_implementation)
        result["class"] = type(built).__name__
        if lora is not None:
            built = models.with_lora(built, lora, result["task"])
        result["layers"] = _trainable_layers(built)
        _preflight(built, result["task"])
        result["attention"] = _attention_backends(built, result["task"])
    except PrivacyError as error:
        refusal = str(error)
    result |= {"covered": refusal is None, "refusal": refusal}
    if as_json:
        print_json(result)
    elif result["class"]:
        typer.echo(f"{result['class']}, task {result['task']}, weights {result['weights']}")
        print_table(
            ("trainable layer", "rule", "layers", "type", "parameters"),
            [
                (each["name"], each["rule"] or "NONE", f"×{each['count']}", each["type"], f"{each['parameters']:,}")
                for each in result["layers"]
            ],
        )
        if result["attention"]:
            print_table(
                ("dp_flash attention", "layers", "computed here by", "on CUDA in bfloat16 by"),
                [(each["call"], f"×{each['count']}", each["here"], each["cuda"]) for each in result["attention"]],
            )
    if refusal is not None:
        raise PrivacyError(refusal)
    if not as_json:
        typer.echo("Covered: every trainable parameter has a rule, and the rules were right on synthetic rows.")


def _trainable_layers(model: nn.Module) -> list[dict[str, Any]]:
    """One entry for all layers of one place, type and rule: the numbers of repeated blocks become "*".

    The rule is None where there is none, and "tied" where the layers that share the parameters have one.
    """
    from dpfa_hf.per_example.layers import find_rule, rule_name

    groups: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    seen: set[int] = set()
    owners = [(name, module, find_rule(module)) for name, module in model.named_modules()]
    ruled = {id(each) for _, module, rule in owners if rule for each in module.parameters(recurse=False)}
    for name, module, rule in owners:
        own = [each for each in module.parameters(recurse=False) if each.requires_grad]
        if not own:
            continue
        tied = "tied" if all(id(each) in ruled for each in own) else None
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), type(module).__name__, rule_name(rule) if rule else tied)
        group = groups.setdefault(key, dict(zip(("name", "type", "rule"), key, strict=True), count=0, parameters=0))
        group["count"] += 1
        # A tied parameter is counted where it comes first.
        group["parameters"] += sum(each.numel() for each in own if id(each) not in seen)
        seen.update(map(id, own))
    return list(groups.values())


def _preflight(model: nn.Module, task: str) -> None:
    from dpfa_hf.per_example import preflight
    from dpfa_hf.per_example.gradients import PerExampleGradients
    from dpfa_hf.per_example.losses import per_example_loss

    engine = PerExampleGradients(model, per_example_loss(model, task), clipping_norm=1.0)
    preflight.check(engine, preflight.synthetic_batch(model, task, {}), compare_with_model_loss=True)


def _attention_backends(model: nn.Module, task: str) -> list[dict[str, Any]]:
    """Who computes the attention of the layers for plain, padded and, where the task allows it, packed rows; none
    without dp_flash.

    Decided by the form of the calls alone, so that a machine without a GPU can tell what one would take.
    """
    from collections import Counter

    import torch
    from transformers import DataCollatorWithFlattening

    from dpfa_hf._kernel import Call, choose, observed
    from dpfa_hf.per_example import losses, packing, preflight

    padded = preflight.synthetic_batch(model, task, {})
    forms = {"no padding": {k: v for k, v in padded.items() if k != "attention_mask"}, "padded": padded}
    if task in losses.PACKABLE_TASKS and getattr(model.config, "model_type", None) not in packing.LEAKING_MODEL_TYPES:
        inside = padded["attention_mask"].bool()
        rows = [
            {name: padded[name][i][each].tolist() for name in ("input_ids", "labels")} for i, each in enumerate(inside)
        ]
        forms["packed"] = packing.normalise(DataCollatorWithFlattening()(rows), len(rows))
    loss = losses.per_example_loss(model, task)
    found: Counter[tuple[str, Call, str]] = Counter()
    for form, batch in forms.items():

        def note(call: Call, backend: str, form: str = form) -> None:
            found[form, call, backend] += 1

        with torch.no_grad(), observed(note):
            loss(model.eval(), batch)
    return [
        {
            "call": ", ".join([form, *_described(call)]),
            "count": count,
            "here": backend,
            "cuda": choose(call._replace(device="cuda", dtype=torch.bfloat16)),
        }
        for (form, call, backend), count in found.items()
    ]


def _described(call: Any) -> list[str]:
    words = ["causal" if call.is_causal else "bidirectional"]
    if call.window is not None:
        words.append(f"window {call.window}")
    words += [name for name in ("softcap", "sinks", "dropout") if getattr(call, name)]
    return words + ["a written-out mask or bias"] * call.dense
