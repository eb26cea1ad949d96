"""Private training without a Trainer: your own loop and your own optimiser."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dpfa_hf.accounting import make_plan
from dpfa_hf.accumulation import Accumulation
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.batch_selection import LogicalBatches, RankSlices, TruncatedPoissonSampler
from dpfa_hf.budget import PrivacyBudget, PrivacySpent, open_run
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger
from dpfa_hf.per_example import losses, packing, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients, PerExampleLoss
from dpfa_hf.private_step import PrivateStep
from dpfa_hf.processes import Processes
from dpfa_hf.refusals import (
    checked_privacy_arguments,
    refuse_adapter,
    refuse_dataset,
    refuse_other_rows,
    refuse_packing,
    refuse_parallel,
    refuse_reentrant,
    sample_of,
)
from dpfa_hf.report import build_report, write_report
from dpfa_hf.statistics import StepStatistics, public_loss_scale


class PrivateLoop:
    """Iterate over it: each turn draws a batch and leaves its noised gradients for your optimiser. It ends by itself.

    Example::

        loop = PrivateLoop(
            model, dataset, PrivacyArguments(target_epsilon=3.0, expected_batch_size=256), collate=collate,
            micro_batch_size=16, max_steps=500,
        )
        for private_loss in loop:
            optimizer.step()
        loop.save_report("output")

    Args:
        model: on its device, as `Accelerator.prepare` returns it or as it is; what is trainable in it is trained.
        dataset: map-style; a row is a privacy unit.
        privacy_args: what must be kept; `expected_batch_size` is needed.
        collate: list of rows -> collated micro-batch.
        micro_batch_size: rows that are computed at once, a memory and speed knob without effect on the result.
        max_steps: steps to plan for; `plan.max_steps` are taken, which a given noise_multiplier may make fewer.
        per_example_loss_fn: (model, batch) -> one loss per example, [B]; by default the loss of the model's task.
        accelerator: its mixed precision is used.

    Of several processes (`torchrun`, `accelerate launch`) each builds a loop over the same data set and takes its share
    of every draw; the first one alone has the ledger open and writes the report. Models may be spread with FSDP2, but
    not wrapped in DistributedDataParallel.

    Attributes:
        plan: the `PrivacyPlan`.

    A killed loop cannot be resumed: what it charged stays charged, and the next one is a run of its own.

    Raises:
        PrivacyError: for whatever would make epsilon untrue; all checks are done here, on synthetic rows, but for the
            data set's budget in the ledger, which is asked when the loop begins.

    Guarantee:
        The weights that the optimiser makes of the gradients, at any turn, are (`plan.epsilon`, `plan.delta`)-DP with
        respect to `dataset`, provided that nothing else in the loop reads it. Ending early does not make epsilon
        smaller (P20).
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        privacy_args: PrivacyArguments,
        *,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        micro_batch_size: int,
        max_steps: int,
        per_example_loss_fn: PerExampleLoss | None = None,
        accelerator: Any = None,
    ) -> None:
        _refuse(model, dataset, privacy_args, accelerator)
        assert privacy_args.expected_batch_size is not None
        self._model, self._dataset, self._asked, self._accelerator = model, dataset, privacy_args, accelerator
        self._task = losses.task_of(model) if per_example_loss_fn is None else None
        self._processes = processes = Processes()
        if processes.count > 1:
            sample = processes.from_first(lambda: sample_of(dataset))
            processes.together(lambda: refuse_other_rows(dataset, sample))
        config = getattr(losses.base_model(model), "config", None)
        expected = privacy_args.expected_batch_size
        self.plan = processes.from_first(
            lambda: make_plan(
                privacy_args,
                num_units=len(dataset),
                expected_batch_size=expected,
                max_steps=max_steps,
                loss_scale=public_loss_scale(config, self._task),
            )
        )
        released = self.plan.private_loss_weight or self.plan.clipping_quantile_weight
        statistics = StepStatistics(self.plan) if released else None
        self._engine = PerExampleGradients(
            model,
            per_example_loss_fn or losses.per_example_loss(model, losses.task_of(model)),
            clipping_norm=self.plan.clipping_norm,
            clipping="flat" if self.plan.clipping == "adaptive" else self.plan.clipping,
            statistics=statistics,
        )
        self._step = PrivateStep(self.plan, self._engine, statistics=statistics, processes=processes)
        filler = processes.together(lambda: self._check_on_synthetic_rows(collate))
        packed = packing.is_packed(filler)
        self._batches = LogicalBatches(dataset, collate, micro_batch_size, packed=packed)
        self._accumulate = Accumulation(
            self._engine,
            self._batches,
            prepare=self._on_device,
            autocast=self._autocast,
            processes=processes,
            filler=filler,
        )
        self._sampler = TruncatedPoissonSampler(
            self.plan.num_units, self.plan.sampling_probability, self.plan.max_batch_size, self.plan.max_steps
        )
        self._ledger: Ledger | None = None
        processes.from_first(self._open_ledger)
        self._budget: PrivacyBudget | None = None

    def _open_ledger(self) -> None:
        self._ledger = Ledger(self._asked.ledger)

    def _check_on_synthetic_rows(self, collate: Callable) -> dict[str, Any]:
        """The rows; raises unless everything holds that must before the first step (P11)."""
        batch = preflight.synthetic_batch(
            self._model,
            self._task,
            preflight.declared_columns(self._dataset),
            collate,
            documents=self.plan.privacy_unit == "document",
        )
        refuse_packing(self._engine, batch)
        half = self._accelerator is not None and self._accelerator.mixed_precision == "bf16"
        batch = self._on_device(batch)
        with self._autocast():
            preflight.check(self._engine, batch, compare_with_model_loss=self._task is not None, autocast=half)
        return batch

    def __iter__(self) -> Iterator[float | None]:
        """Yields, with the gradients in place, the noised estimate of the mean loss, or None if the plan has none.

        Raises:
            PrivacyError: the loop has run before, or the ledger does not allow the run or the step.
        """
        if self._budget is not None:
            raise PrivacyError("this PrivateLoop has run already, and running on would pass its plan; build a new one")
        run = self._processes.from_first(self._open_run)
        self._budget = budget = PrivacyBudget(self.plan, self._ledger, run)
        self._processes.copy_model_from_first(self._model)
        try:
            for share in RankSlices(self._sampler, self._processes):
                self._model.train()
                self._accumulate(share, self._batches[share])
                yield self._step(budget)
        finally:
            if self._ledger is not None:
                self._ledger.end_run(budget.run, "completed" if budget.exhausted else "stopped early")

    def _open_run(self) -> str:
        assert self._ledger is not None
        return open_run(self._ledger, self.plan, self._asked, self._dataset)

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = next(self._model.parameters()).device
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def _autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._accelerator is None else self._accelerator.autocast()

    def privacy_spent(self) -> PrivacySpent:
        """(epsilon, delta) at the plan's last step, which is the guarantee, and the steps charged so far."""
        if self._budget is None:
            return PrivacySpent(self.plan.epsilon, self.plan.delta, 0)
        return self._budget.spent()

    def save_report(self, directory: str | os.PathLike[str]) -> None:
        """Writes `privacy.json`, and the section on privacy into the card `README.md`, beside the weights; of several
        processes, the first does.

        Raises:
            PrivacyError: the loop has not begun.
        """
        if self._budget is None:
            raise PrivacyError("nothing has been spent yet; save the report after the loop, or in it")
        if self._ledger is None:
            return  # the first process writes it
        budget = self._budget
        dataset = self._ledger.run(budget.run).dataset
        base, peft = losses.base_model(self._model), getattr(self._model, "peft_config", None)
        report = build_report(
            plan=self.plan,
            clipping_norm=self._engine.clipping_norm,
            run=budget.run,
            steps=budget.steps,
            dataset=self._asked.ledger_dataset,
            dataset_spent=next((d.epsilon, d.delta) for d in self._ledger.datasets() if d.dataset == dataset),
            ledger_url=self._ledger.display_url,
            model={
                "class": type(base).__name__,
                "base_model": getattr(getattr(base, "config", None), "_name_or_path", None) or None,
                "adapter": None if peft is None else next(iter(peft.values())).peft_type.value,
                "trainable_parameters": sum(p.numel() for _, p in self._engine.parameters.values()),
                "total_parameters": sum(p.numel() for p in self._model.parameters()),
            },
            loss="given by the operator (per_example_loss_fn)" if self._task is None else f"task: {self._task}",
            sampler=self._sampler.describe(self._processes.count),
            noise=self._step.noise.describe(),
            log_private_metrics=False,
            eval_data=None,
            seeded=self._sampler.injected or self._step.noise.seeded_by_caller,
            curve=budget.curve(),
            processes=self._processes.count,
            spread=self._engine.shards is not None,
        )
        write_report(directory, report)


def _refuse(model: nn.Module, dataset: Any, privacy_args: PrivacyArguments, accelerator: Any) -> None:
    checked_privacy_arguments(privacy_args)
    refuse_dataset(dataset)
    packing.refuse_packed_columns(
        preflight.declared_columns(dataset), documents=privacy_args.privacy_unit == "document"
    )
    refuse_adapter(model)
    refuse_parallel(model)
    for module in model.modules():
        refuse_reentrant(module)
    if privacy_args.expected_batch_size is None:
        raise PrivacyError("PrivateLoop has no batch size to go by; set PrivacyArguments.expected_batch_size")
    if privacy_args.privacy_unit == "user":
        raise PrivacyError(
            "privacy_unit='user' is for DPTrainer, which knows whose the rows are; in PrivateLoop a row is a unit: use "
            "'example'"
        )
    if privacy_args.floating_point == "hardened":
        raise PrivacyError("floating_point='hardened' is for DPTrainer; use 'snapped' with PrivateLoop")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise PrivacyError(
            f"model is wrapped in {type(model).__name__}, which averages gradients before they can be clipped; pass "
            "the model itself to PrivateLoop, in every process"
        )
    if accelerator is not None and accelerator.mixed_precision not in ("no", "bf16"):
        raise PrivacyError(
            f"Accelerator(mixed_precision={accelerator.mixed_precision!r}) scales what is accumulated by what it sees "
            "in the data; use 'bf16' or 'no'"
        )
    if accelerator is not None and accelerator.gradient_accumulation_steps != 1:
        raise PrivacyError(
            "Accelerator(gradient_accumulation_steps) would leave out steps of the optimiser; a turn of PrivateLoop is "
            "a whole batch already: set it to 1"
        )
