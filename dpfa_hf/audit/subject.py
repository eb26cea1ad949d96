"""What is audited: a model's folder, or a script that builds a private trainer of the user's own."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from dpfa_hf import models
from dpfa_hf.accounting import EpsilonCurve, make_plan
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.audit.steps import Row, Units, seed_everything
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import losses, preflight
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.report import REPORT_NAME, read_report
from dpfa_hf.trainer import DPTrainer, DPTrainerMixin

# The plan of an audit of its own, where none was made: canaries enough for minutes could refute its epsilon, about 1.
OWN_UNITS, OWN_BATCH, OWN_STEPS, OWN_NOISE = 512, 256, 8, 4.0
_MICRO_BATCH = 16
_MIN_UNITS = 32  # by-standers, newcomers, and some units that are nobody
_LENGTH = 8


@dataclass(frozen=True)
class Subject:
    """What is audited.

    Attributes:
        kind: "model" or "script".
        name: the class of the model, or the script's file name.
        build: (whether the newcomers' rows are other ones) -> a new, untrained private trainer; the same weights each
            time.
        num_units: n.
        run: id of the run whose plan is audited, if any.
        plan_sha256: hash of that plan, if any.
        told: what differs from that run and must be said.
    """

    kind: str
    name: str
    build: Callable[[bool], DPTrainerMixin]
    num_units: int
    run: str | None
    plan_sha256: str | None
    told: tuple[str, ...]

    def plan_epsilon(self) -> float:
        """What is claimed for the whole plan."""
        return self.build(False).privacy_plan.epsilon

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "run": self.run, "plan_sha256": self.plan_sha256}


def model_subject(path: str, *, task: str, attention: str, lora: int | None, folder: Path) -> Subject:
    """A model's folder, or the Hub id of one already downloaded; with `privacy.json`, under the plan that is in it.

    Raises:
        PrivacyError: the model cannot be built or trained privately, or `privacy.json` is damaged.
    """
    told = ["weights in float32 on the CPU, dropout off"]
    model, found = _load(path, task, attention, lora)
    run = digest = plan = None
    if (Path(path) / REPORT_NAME).exists():
        report = read_report(path)
        plan, run, digest = PrivacyPlan.from_dict(report["plan"]), report["run"], report["plan_sha256"]
        if plan.sha256() != digest:
            raise PrivacyError(f"{path}/{REPORT_NAME} has a plan that does not fit its hash; restore the file")
        if plan.floating_point == "hardened":
            told.append("micro-batches of one, as the hardened mode asks")
        if plan.privacy_unit == "user":
            told.append("users of one row each")
    else:
        plan = own_plan()
        told.append("no privacy.json: a plan of the audit's own")
    if plan.num_units < _MIN_UNITS:
        raise PrivacyError(
            f"{path} was trained on {plan.num_units} units, and an audit plants {_MIN_UNITS} of its own; audit the "
            "model without its privacy.json, in a copy of the folder"
        )
    return subject_of(model, found, plan, folder, run=run, plan_sha256=digest, told=tuple(told))


def subject_of(
    model: nn.Module,
    task: str,
    plan: PrivacyPlan,
    folder: Path,
    *,
    run: str | None = None,
    plan_sha256: str | None = None,
    told: tuple[str, ...] = (),
) -> Subject:
    """A model in memory, under a plan."""
    numbers = itertools.count()
    hardened = plan.floating_point == "hardened"

    def build(other: bool) -> DPTrainerMixin:
        columns = preflight.default_columns(model, task)
        first = preflight.synthetic_rows(model, task, columns, [_LENGTH])[0]
        trainer = DPTrainer(
            model=copy.deepcopy(model),
            args=TrainingArguments(
                str(folder / f"model-{next(numbers)}"),
                per_device_train_batch_size=1 if hardened else min(_MICRO_BATCH, plan.num_units),
                max_steps=1,
                use_cpu=True,
                bf16=False,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                max_grad_norm=0.0,
                ignore_data_skip=True,
                average_tokens_across_devices=False,
                optim="sgd",
                learning_rate=1e-3,
            ),
            train_dataset=Units(plan.num_units, {0: first}),
            data_collator=functools.partial(preflight.pad_rows, model),
            privacy_args=PrivacyArguments(
                target_epsilon=math.inf,
                noise_multiplier=1.0,
                expected_batch_size=1,
                per_example_max_grad_norm=plan.clipping_norm,
                floating_point=plan.floating_point,  # type: ignore[arg-type]
                noise_generator=plan.noise_generator,  # type: ignore[arg-type]
            ),
        )
        trainer._adopt(plan, trainer._engine.loss)
        return trainer

    name = type(losses.base_model(model)).__name__
    return Subject("model", name, build, plan.num_units, run, plan_sha256, told)


def script_subject(path: str, *, folder: Path) -> Subject:
    """A Python file with `make_trainer(train_dataset, output_dir)`, which builds a private trainer as the user does.

    It may also define `example_row(index)`, an invented row with the columns that its code expects (by default token
    ids, an attention mask and a label), and `NUM_UNITS`, the public n of the real data set (by default 512).

    `make_trainer` gets a `datasets.Dataset` of n such rows. What it makes of them gives the columns; the audit then
    puts rows of its own in their place, so that no row but the audit's reaches a step whatever the script loads.

    Raises:
        PrivacyError: the file cannot be run, or has no such function.
    """
    file = Path(path).resolve()
    module = _run_script(file)
    make = getattr(module, "make_trainer", None)
    if not callable(make):
        raise PrivacyError(f"SCRIPT {path} defines no make_trainer(train_dataset, output_dir); see docs/audit.md")
    example_row: Callable[[int], Row] = getattr(module, "example_row", _example_row)
    number = getattr(module, "NUM_UNITS", OWN_UNITS)
    if isinstance(number, bool) or not isinstance(number, int) or number < _MIN_UNITS:
        raise PrivacyError(f"SCRIPT {path} has NUM_UNITS={number!r}; it must be an integer of at least {_MIN_UNITS}")
    numbers = itertools.count()

    def build(other: bool) -> DPTrainerMixin:
        import datasets

        # Another index for another row and user; all of them odd, so that labels that alternate are no longer even.
        places = [2 * (number + index) + 1 if other and index in NEWCOMERS else index for index in range(number)]
        rows = [example_row(place) for place in places]
        output = folder / f"script-{next(numbers)}"
        seed_everything()
        try:
            trainer = make(datasets.Dataset.from_list(rows), str(output))
        except PrivacyError:
            raise
        except Exception as error:  # any script may raise anything; it is reported, and nothing is passed over
            raise PrivacyError(
                f"SCRIPT {path}: make_trainer raised {type(error).__name__}: {error}; it must take the rows of "
                "example_row (by default input_ids, attention_mask and labels)"
            ) from error
        if not isinstance(trainer, DPTrainerMixin):
            raise PrivacyError(
                f"SCRIPT {path}: make_trainer returned a {type(trainer).__name__}, not a DPTrainer or a trainer that "
                "dpfa_hf.privatize made private; a PrivateLoop cannot be audited this way"
            )
        if trainer._run_budget is not None:
            raise PrivacyError(f"SCRIPT {path}: make_trainer has trained; return the trainer before train() is called")
        if trainer.privacy_plan.num_units != number:
            raise PrivacyError(
                f"SCRIPT {path}: the trainer counts {trainer.privacy_plan.num_units} units, and make_trainer was given "
                f"{number}; it must train on the train_dataset that it is given, one row for one unit"
            )
        return trainer

    return Subject("script", file.name, build, number, None, None, ("no row of the script's own; dropout off",))


# The units that one of two neighbouring data sets has other rows for.
NEWCOMERS = frozenset(range(16, 24))


def own_plan() -> PrivacyPlan:
    return make_plan(
        PrivacyArguments(target_epsilon=8.0, noise_multiplier=OWN_NOISE, private_loss_weight=0.0),
        num_units=OWN_UNITS,
        expected_batch_size=OWN_BATCH,
        max_steps=OWN_STEPS,
    )


def scaled(plan: PrivacyPlan, steps: int) -> PrivacyPlan:
    """`plan` for its first `steps` steps alone, with the epsilon of these."""
    if steps >= plan.max_steps:
        return plan
    epsilon = EpsilonCurve(plan).at(steps) if plan.is_private else math.inf
    return replace(plan, max_steps=steps, epsilon=epsilon)


def _load(path: str, task: str, attention: str, lora: int | None) -> tuple[nn.Module, str]:
    adapter = Path(path) / "adapter_config.json"
    if adapter.exists() and not (Path(path) / "config.json").exists():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        if not base:
            raise PrivacyError(f"{adapter} does not say which model it adapts; write base_model_name_or_path into it")
        if lora is not None:
            raise PrivacyError(f"{path} is an adapter already; leave out --lora")
        model, found, _ = models.build(base, models.read_configuration(base), task, attention)
        try:
            from peft import PeftModel
        except ImportError:
            raise PrivacyError(f"{path} adapts a model, which needs PEFT: pip install 'dpfa-hf[peft]'") from None
        return PeftModel.from_pretrained(model.float(), path, is_trainable=True), found
    model, found, _ = models.build(path, models.read_configuration(path), task, attention)
    model = model.float()
    return (model if lora is None else models.with_lora(model, lora, found)), found


def _example_row(index: int) -> Row:
    tokens = [1 + (7 * index + 3 * place) % 50 for place in range(_LENGTH)]
    return {"input_ids": tokens, "attention_mask": [1] * _LENGTH, "labels": index % 2}


def _run_script(file: Path) -> Any:
    if not file.is_file():
        raise PrivacyError(f"SCRIPT {file} is not there; name a Python file")
    spec = importlib.util.spec_from_file_location("dpfa_audited_script", file)
    if spec is None or spec.loader is None:
        raise PrivacyError(f"SCRIPT {file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except PrivacyError:
        raise
    except Exception as error:  # any script may raise anything; it is reported, and nothing is passed over
        raise PrivacyError(
            f"SCRIPT {file.name} cannot be run ({type(error).__name__}: {error}); see whether python runs it"
        ) from error
    finally:
        sys.path.remove(str(file.parent))
    return module


def trainable(trainer: Any) -> int:
    """Number of trainable coordinates."""
    return sum(parameter.numel() for _, parameter in trainer._engine.parameters.values())


def half_precision(trainer: Any) -> bool:
    """Whether a row's rounding may follow the padding that its micro-batch needs."""
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in trainer.model.parameters())
    return bool(narrow or trainer.args.bf16)
