"""Runs a real private trainer on the audit's own units, and shows each step from clipped sums to optimiser."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from dpfa_hf.batch_selection import Users
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example import preflight
from dpfa_hf.per_example.losses import base_model
from dpfa_hf.per_example.preflight import Column

Row = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class RefusedError(PrivacyError):
    """The private trainer itself refused to train."""


class Units(Dataset[Row]):
    """n privacy units, of which those in `rows` exist; reading any other raises, so that it contributes zero (P5)."""

    def __init__(self, number: int, rows: Mapping[int, Row]) -> None:
        self.number, self.rows = number, dict(rows)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Row:
        return dict(self.rows[int(index)])

    @property
    def data(self) -> Units:
        """TRL counts the rows of the table behind a data set."""
        return self

    num_rows = property(__len__)


class Observer:
    """What is looked at while a trainer runs, and what is put in the place of its parts."""

    def before_step(self, step: int) -> None:
        """The weights are those of the first step; nothing of step `step` has been computed."""

    def noise(self, step: int, sums: Tensors, add_noise: Callable[[Tensors], None]) -> None:
        """In the place of the noise: `sums` are the step's clipped sums, and `add_noise` what the trainer would do."""
        add_noise(sums)

    def released(self, step: int, gradients: Tensors) -> None:
        """What the optimiser is about to take: all that the weights will ever hear of the step."""


@dataclass
class Run:
    """How a run went, step by step, beside what its observer saw."""

    noised: list[int] = field(default_factory=list)  # calls of the noise
    charged: list[bool] = field(default_factory=list)  # whether the ledger knew of the step when its noise was drawn
    optimised: list[int] = field(default_factory=list)  # steps of the optimiser
    drawn: list[int] = field(default_factory=list)  # units that arrived
    logs: list[str] = field(default_factory=list)
    weights_moved: bool = False  # by anything but the optimiser


def run_steps(trainer: Any, units: Units, observer: Observer, *, draws: Sequence[Sequence[int]] | int) -> Run:
    """Trains on `units` for the given draws, or for so many steps of the trainer's own draws; dropout is off.

    The optimiser takes its steps, and is then set back: every step begins with the same weights. `trainer` can train
    but once, and no row but those of `units` can reach a step.
    """
    give_units(trainer, units)
    _quieten(trainer)
    without_dropout(trainer.model)
    steps = draws if isinstance(draws, int) else len(draws)
    # No guarantee comes of an audit's run, and none is worth computing for its log lines; nor does a budget hold here.
    plan = replace(trainer.privacy_plan, max_steps=steps, target_epsilon=math.inf, epsilon=math.inf)
    trainer.privacy_plan = trainer._step.plan = plan
    trainer._privacy_args = replace(trainer._privacy_args, dataset_budget_epsilon=None, dataset_budget_delta=None)
    trainer._sampler.num_steps = min(trainer._sampler.num_steps or steps, steps)
    if not isinstance(draws, int):
        trainer._sampler._draws, trainer._sampler.num_steps = [list(draw) for draw in draws], steps
    watch = _Watch(trainer, observer)
    trainer.add_callback(watch)
    try:
        trainer.train()
    except PrivacyError as error:
        raise RefusedError(str(error)) from error
    return watch.run


def give_units(trainer: Any, units: Units) -> None:
    """Puts the audit's units in the place of whatever the trainer was built with."""
    trainer.train_dataset = units
    if trainer._users is not None:
        trainer._users = Users(np.arange(len(units)))
    trainer._users_named_by = units


def seed_everything() -> None:
    """The generators that noise and draws must not come from."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def ready_to_compute(trainer: Any, units: Units) -> None:
    """Checks the trainer on synthetic rows, as before step 1, so that its engine can be asked about `units`."""
    give_units(trainer, units)
    without_dropout(trainer.model)
    try:
        trainer._check_on_synthetic_rows()
    except PrivacyError as error:
        raise RefusedError(str(error)) from error
    trainer.get_train_dataloader()
    trainer.model.train()


def columns_of(trainer: Any, task: str | None) -> dict[str, Column]:
    """What a row of the trainer's data set holds, as it is collated; read from its declaration."""
    columns = preflight.declared_columns(trainer._collated_dataset()[0])
    return columns or preflight.default_columns(trainer.model, task or "causal_lm")


def invented_rows(trainer: Any, columns: Mapping[str, Column], lengths: Iterable[int]) -> list[Row]:
    """Rows of the given lengths, with random tokens and labels, the same at every call."""
    rows = preflight.synthetic_rows(trainer.model, trainer._task, columns, list(lengths))
    letters = np.random.default_rng(1)
    for row in rows:
        for name, column in columns.items():
            if column.kind == "string":
                words = letters.integers(ord("a"), ord("z") + 1, (max(len(row[name].split()) // 2, 1), 5))
                row[name] = " ".join(bytes(word.astype(np.uint8)).decode() for word in words)
    return rows


def longest(model: nn.Module) -> int:
    """Tokens of a very long row: as many as the model takes, but no more than 64, for the audit's time."""
    config = getattr(base_model(model), "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 64
    return max(min(64, most - 2), 2)


def _quieten(trainer: Any) -> None:
    """No saving, no evaluation on other rows, no experiment trackers; a log line for every step, to be looked at."""
    args = trainer.args
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.logging_strategy, args.logging_steps, args.logging_first_step = IntervalStrategy.STEPS, 1, True
    args.eval_on_start = args.push_to_hub = False
    args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_prefetch_factor = 0, False, None
    trainer.eval_dataset = None
    for callback in list(trainer.callback_handler.callbacks):
        tracker = type(callback).__module__.startswith("transformers.integrations")
        if tracker or isinstance(callback, PrinterCallback) or hasattr(callback, "training_bar"):
            trainer.callback_handler.callbacks.remove(callback)


def without_dropout(model: nn.Module) -> None:
    """The sensitivity is that for one choice of masks, and two data sets would draw different ones."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))) and isinstance(value, float):
                    setattr(holder, name, 0.0)


class _Watch(TrainerCallback):
    def __init__(self, trainer: Any, observer: Observer) -> None:
        self.trainer, self.observer, self.run = trainer, observer, Run()
        self._step = -1
        self._training_step, self._add_noise = trainer.training_step, trainer._step._add_noise
        trainer.training_step, trainer._step._add_noise = self.training_step, self.add_noise

    def training_step(self, model: nn.Module, inputs: tuple, *rest: Any, **kwargs: Any) -> torch.Tensor:
        self._step += 1
        for counts in (self.run.noised, self.run.optimised):
            counts.append(0)
        self.run.charged.append(True)
        self.run.drawn.append(len(inputs[0]))
        self.observer.before_step(self._step)
        return self._training_step(model, inputs, *rest, **kwargs)

    def add_noise(self, sums: Tensors) -> None:
        self.run.noised[-1] += 1
        budget = self.trainer._run_budget
        recorded = self.trainer._ledger.run(budget.run).steps
        self.run.charged[-1] = self.run.charged[-1] and recorded == self._step + 1
        self.observer.noise(self._step, sums, self._add_noise)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._named = [(name, parameter) for name, parameter in self.trainer._engine.parameters.values()]
        self._kept = [parameter.detach().clone() for _, parameter in self._named]
        optimizer.register_step_pre_hook(self._before_optimizer)
        optimizer.register_step_post_hook(self._after_optimizer)

    def _before_optimizer(self, *_: Any) -> None:
        self.run.optimised[-1] += 1
        for (_, parameter), kept in zip(self._named, self._kept, strict=True):
            self.run.weights_moved |= not torch.equal(parameter.detach(), kept)
        self.observer.released(
            self._step, {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in self._named}
        )

    @torch.no_grad()
    def _after_optimizer(self, *_: Any) -> None:
        for (_, parameter), kept in zip(self._named, self._kept, strict=True):
            parameter.copy_(kept)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.run.logs.append(json.dumps(logs, sort_keys=True, default=str))
