"""Private training with `transformers.Trainer`: glue, and no privacy arithmetic.

What is refused is in `refusals`; what is forced and withheld, in `_private_copy` and `WITHHELD`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, logging
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from dpfa_hf import sharded_checkpoint, trl
from dpfa_hf.accounting import make_plan
from dpfa_hf.accumulation import Accumulation
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.batch_selection import DrawnUnits, LogicalBatches, RankSlices, TruncatedPoissonSampler, Users
from dpfa_hf.budget import UNNAMED, PrivacyBudget, PrivacySpent, open_run
from dpfa_hf.callbacks import PrivacyBudgetCallback, PrivacyCallback, PrivateRun, watchers
from dpfa_hf.errors import PrivacyError
from dpfa_hf.host_memory import freed_memory_kept
from dpfa_hf.ledger import Ledger
from dpfa_hf.per_example import losses as per_example_losses
from dpfa_hf.per_example import packing, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients, PerExampleLoss
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.private_step import PrivateStep
from dpfa_hf.processes import Processes
from dpfa_hf.refusals import (
    NO_SEARCH,
    checked_privacy_arguments,
    refuse_arguments,
    refuse_callback,
    refuse_dataset,
    refuse_other_rows,
    refuse_packing,
    refuse_reentrant,
    refuse_trainer,
    sample_of,
)
from dpfa_hf.report import build_report, read_report, write_report
from dpfa_hf.statistics import StepStatistics, public_loss_scale

logger = logging.get_logger(__name__)

# Log keys that depend on private data beyond what the noise protects (P23); removed, never set to 0.
WITHHELD = frozenset(
    {
        "loss",
        "train_loss",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_tokens_per_second",
        "total_flos",
        "num_input_tokens_seen",
    }
)
# Fields of a plan that name its accountant rather than the mechanism: a newer dp_accounting may change them.
_ACCOUNTANT_FIELDS = ("epsilon", "accountant_version", "truncation_delta")
_CLIPPING_STATE_NAME = "clipping_norm.json"


# For type checkers the mixin is a Trainer; at run time it stands in front of whichever Trainer it is mixed with.
if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class _WithUnits(Dataset[tuple[DrawnUnits, list[Any]]]):
    """A logical batch together with the units that it was made of."""

    def __init__(self, batches: LogicalBatches) -> None:
        self.batches = batches

    def __getitem__(self, indices: np.ndarray) -> tuple[DrawnUnits, list[Any]]:
        units = self.batches.units(indices)
        return units, self.batches[units]


class DPTrainerMixin(_Base):
    """Makes a Trainer private: put it before the Trainer in the bases of your own subclass.

    Args:
        privacy_args: what must be kept; see `PrivacyArguments`.
        per_example_loss_fn: (model, batch) -> one loss per example, [B]; by default the loss of the model's task.

    All other arguments are the Trainer's own. Raises `PrivacyError` for whatever would make epsilon untrue.

    Guarantee:
        The weights that `train` leaves in the model, at any step, are (`privacy_plan.epsilon`, `privacy_plan.delta`)-DP
        with respect to `train_dataset`, for the plan's privacy unit and adjacency, under the assumptions that
        `privacy.json` lists. Ending early does not make epsilon smaller (P20).
    """

    # What Trainer declares as optional is there once the checks have passed.
    args: TrainingArguments
    callback_handler: CallbackHandler
    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    privacy_plan: PrivacyPlan

    def __init__(
        self,
        *args: Any,
        privacy_args: PrivacyArguments | None = None,
        per_example_loss_fn: PerExampleLoss | None = None,
        **kwargs: Any,
    ) -> None:
        training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        asked = checked_privacy_arguments(privacy_args)
        if training_args is not None:
            refuse_arguments(training_args, asked)  # before Trainer acts on any of them
        if "train_dataset" in kwargs:
            refuse_dataset(kwargs["train_dataset"])
        super().__init__(*args, **kwargs)
        self._make_private(asked, per_example_loss_fn)

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def _make_private(self, privacy_args: PrivacyArguments, loss_fn: PerExampleLoss | None) -> None:
        refuse_arguments(self.args, privacy_args)
        refuse_trainer(self, privacy_args, loss_fn, private=DPTrainerMixin)
        self._privacy_args = privacy_args
        self._run_budget: PrivacyBudget | None = None
        self._resumed = 0
        self._observed = True
        self._packed = False
        self._synthetic_batch: dict[str, Any] = {}
        self.args, self._micro_batch_size, expected = _private_copy(self.args, privacy_args)
        self._processes = Processes(self.args.ddp_timeout)
        if self._processes.count > 1:
            sample = self._processes.from_first(lambda: sample_of(self.train_dataset))
            self._processes.together(lambda: refuse_other_rows(self.train_dataset, sample))
        column = privacy_args.privacy_unit_column
        self._users = None if column is None else Users.of(self.train_dataset, column)
        self._users_named_by = self.train_dataset
        self._trl = trl.adapt(self, privacy_args) if loss_fn is None else None
        if self._trl is not None:
            loss_fn = self._trl.loss
        self._task: str | None = None
        if loss_fn is None:
            self._task = per_example_losses.task_of(self.model)
            loss_fn = per_example_losses.per_example_loss(self.model, self._task)
        self._adopt(self._processes.from_first(lambda: self._make_plan(expected)), loss_fn)
        self._ledger: Ledger | None = None
        self._processes.from_first(self._open_ledger)
        self._keep_one_budget_callback()

    def _num_units(self) -> int:
        return trl.num_rows(self) if self._users is None else len(self._users)

    def _make_plan(self, expected_batch_size: int) -> PrivacyPlan:
        num_units = self._num_units()
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * math.ceil(num_units / expected_batch_size))
        config = getattr(per_example_losses.base_model(self.model), "config", None)
        return make_plan(
            self._privacy_args,
            num_units=num_units,
            expected_batch_size=expected_batch_size,
            max_steps=steps,
            loss_scale=public_loss_scale(config, self._task),
        )

    def _adopt(self, plan: PrivacyPlan, loss_fn: PerExampleLoss) -> None:
        """Builds what reads the plan."""
        self.privacy_plan = plan
        released = plan.private_loss_weight or plan.clipping_quantile_weight
        statistics = StepStatistics(plan) if released else None
        self._private_losses: list[float] = []  # since the last log
        self._engine = PerExampleGradients(
            self.model,
            loss_fn,
            clipping_norm=plan.clipping_norm,
            clipping="flat" if plan.clipping == "adaptive" else plan.clipping,
            statistics=statistics,
            exact_sums=plan.floating_point == "hardened",
        )
        self._sampler = self._new_sampler()
        self._step = PrivateStep(plan, self._engine, statistics=statistics, processes=self._processes)

    def _open_ledger(self) -> None:
        self._ledger = Ledger(self._privacy_args.ledger)

    def _new_sampler(self) -> TruncatedPoissonSampler:
        plan = self.privacy_plan
        return TruncatedPoissonSampler(
            plan.num_units,
            plan.sampling_probability,
            plan.max_batch_size,
            num_steps=math.ceil(plan.num_units / plan.expected_batch_size),
        )

    def _keep_one_budget_callback(self) -> None:
        ours = [c for c in self.callback_handler.callbacks if isinstance(c, PrivacyBudgetCallback)]
        for extra in ours[1:]:
            self.callback_handler.callbacks.remove(extra)
        if not ours:
            self.add_callback(PrivacyBudgetCallback)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """As in Trainer; a second `PrivacyBudgetCallback` is dropped and an unfit callback is refused."""
        kind = callback if isinstance(callback, type) else type(callback)
        if issubclass(kind, PrivacyBudgetCallback) and any(
            isinstance(c, PrivacyBudgetCallback) for c in self.callback_handler.callbacks
        ):
            return
        if hasattr(self, "_privacy_args"):
            refuse_callback(kind, self._privacy_args)
        super().add_callback(callback)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """As in Trainer, charging every step to the ledger before its noise is drawn.

        Raises:
            PrivacyError: a check on synthetic rows fails, the data set's budget does not allow the run, the run to be
                resumed is not in the ledger or had other settings, or its budget is used up.
        """
        if trial is not None:
            raise PrivacyError(NO_SEARCH)
        with watchers(self.callback_handler.callbacks) as watching:
            return self._train_watched(watching, resume_from_checkpoint, ignore_keys_for_eval, **kwargs)

    def _train_watched(
        self,
        watching: list[PrivacyCallback],
        resume_from_checkpoint: str | bool | None,
        ignore_keys_for_eval: list[str] | None,
        **kwargs: Any,
    ) -> TrainOutput:
        name = self._privacy_args.ledger_dataset

        def prepare() -> None:
            for callback in watching:
                callback.prepare(name)

        self._processes.from_first(prepare)
        refuse_arguments(self.args, self._privacy_args)  # either may have been changed since
        refuse_trainer(
            self, self._privacy_args, None if self._task is not None else self._engine.loss, private=DPTrainerMixin
        )
        if self._trl is not None:
            trl.refuse(self, self._privacy_args)
        replaced = self.train_dataset is not self._users_named_by
        if self._num_units() != self.privacy_plan.num_units or (self._users is not None and replaced):
            raise PrivacyError("train_dataset was replaced after its plan was made; build a new DPTrainer with it")
        for module in self.model.modules():
            refuse_reentrant(module)
        checkpoint = self._processes.from_first(lambda: self._checkpoint(resume_from_checkpoint))
        self._processes.together(self._check_on_synthetic_rows)
        if checkpoint is None:
            run = self._processes.from_first(self._open_run)
            self._run_budget = PrivacyBudget(self.privacy_plan, self._ledger, run)
        else:
            self._run_budget = self._resume_run(checkpoint)
        callbacks = tuple(self.callback_handler.callbacks)
        for callback in watching:
            callback.bind(PrivateRun(self._run_budget, name, self._processes.count, checkpoint is not None, callbacks))
        with freed_memory_kept() if self.args.device.type == "cpu" else contextlib.nullcontext():
            output = super().train(checkpoint, None, ignore_keys_for_eval, **kwargs)
        self._processes.from_first(functools.partial(self._end_run, self._run_budget))
        return output

    def _checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        if resume_from_checkpoint is None or resume_from_checkpoint is False:
            if self._run_budget is not None:
                raise PrivacyError(
                    "this trainer has trained already, and training on would pass its plan; build a new DPTrainer (a "
                    "run of its own in the ledger), or pass resume_from_checkpoint=True after an interruption"
                )
            return None
        if resume_from_checkpoint is True:
            found = _last_complete_checkpoint(self.args.output_dir or ".")
            if found is None:
                raise PrivacyError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint; leave it "
                    "out to start a new run"
                )
            return found
        return os.fspath(resume_from_checkpoint)

    def _open_run(self) -> str:
        assert self._ledger is not None
        return open_run(self._ledger, self.privacy_plan, self._privacy_args, self.train_dataset)

    def _end_run(self, budget: PrivacyBudget) -> None:
        assert self._ledger is not None
        self._ledger.end_run(budget.run, "completed" if budget.exhausted else "stopped early")

    def _resume_run(self, checkpoint: str) -> PrivacyBudget:
        plan, norm, run, steps = self._processes.from_first(lambda: self._read_run(checkpoint))
        if plan.expected_batch_size != self.privacy_plan.expected_batch_size:
            self._adopt(plan, self._engine.loss)
            self._processes.together(self._check_on_synthetic_rows)
        self.privacy_plan = plan
        self._step.clip_to(norm)
        self._resumed += 1
        return PrivacyBudget(plan, self._ledger, run, steps)

    def _read_run(self, checkpoint: str) -> tuple[PrivacyPlan, float, str, int]:
        """(plan, clipping norm reached, run, steps charged) of the run that the checkpoint is of, now open again."""
        assert self._ledger is not None
        report = read_report(checkpoint)
        record = self._ledger.run(report["run"])
        stored = PrivacyPlan.from_dict(record.plan)
        if record.steps < report["steps"]["charged"]:
            raise PrivacyError(
                f"{checkpoint} is of step {report['steps']['charged']} of run {record.run}, and ledger "
                f"{self._ledger.display_url} has charged {record.steps}: it is an older copy, and going on would not "
                "count the steps in between; restore a newer backup of the ledger (ledger or DPFA_LEDGER)"
            )
        ours, theirs = self.privacy_plan.to_dict(), stored.to_dict()
        if self._privacy_args.expected_batch_size is None and ours != theirs:
            # By default it follows the number of processes, which may be another one now: the run keeps its own (P19).
            ours = self._make_plan(stored.expected_batch_size).to_dict()
        changed = [name for name in ours if name not in _ACCOUNTANT_FIELDS and ours[name] != theirs[name]]
        if changed:
            raise PrivacyError(
                f"resuming run {record.run} with another {changed[0]} ({ours[changed[0]]!r}, the run has "
                f"{theirs[changed[0]]!r}); restore the arguments of the run, or start a new one"
            )
        named = self._privacy_args.ledger_dataset
        if named != (None if record.dataset.startswith(UNNAMED) else record.dataset):
            raise PrivacyError(
                f"resuming run {record.run} with another ledger_dataset ({named!r}): its steps would be charged to "
                "other people's data; restore the name that the run was started with, or start a new one"
            )
        norm = stored.clipping_norm
        if stored.clipping == "adaptive":
            norm = self._read_clipping_norm(self._ledger, checkpoint, record.run)
        # Before the entry that would show the run as running.
        PrivacyBudget(stored, self._ledger, record.run, record.steps).refuse_exhausted()
        record = self._ledger.resume_run(record.run, stored.sha256())
        return stored, norm, record.run, record.steps

    def _read_clipping_norm(self, ledger: Ledger, checkpoint: str, run: str) -> float:
        """The norm that adaptive clipping had reached, as `_save_optimizer_and_scheduler` wrote it."""
        try:
            state = json.loads((Path(checkpoint) / _CLIPPING_STATE_NAME).read_text())
            step = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"]
            norm = float.fromhex(state["clipping_norm"])
            whole = state["seal"] == _clipping_seal(ledger, run, step, norm)
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            whole = False
        if not whole:
            raise PrivacyError(
                f"{checkpoint} has no {_CLIPPING_STATE_NAME} of run {run} and its step, or another than was written: "
                "adaptive clipping does not know the norm that it had reached; resume from another checkpoint"
            )
        return norm

    def _check_on_synthetic_rows(self) -> None:
        dataset, collate = self._collated_dataset()
        batch = preflight.synthetic_batch(
            self.model,
            self._task,
            preflight.declared_columns(dataset),
            collate,
            documents=self.privacy_plan.privacy_unit == "document",
        )
        self._packed = packing.is_packed(batch)
        if self._packed and self.privacy_plan.floating_point == "hardened":
            raise PrivacyError(
                "data_collator packs documents, and floating_point='hardened' computes each in a row of its own: use "
                "one that pads, such as DataCollatorForLanguageModeling, or floating_point='snapped'"
            )
        refuse_packing(self._engine, batch)
        self._synthetic_batch = batch = dict(self._prepare_inputs(batch))
        with self.accelerator.autocast():
            preflight.check(
                self._engine,
                batch,
                compare_with_model_loss=self._task is not None,
                trainer_loss=None if self._trl is None else trl.loss_alone(self),
                autocast=self.args.bf16,
            )

    # ---- what Trainer calls -----------------------------------------------------------------------------------------

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader, *rest: Any) -> tuple:
        """The plan's steps, so that schedule, progress bar and last save fall on the true last step."""
        plan, steps_per_epoch = self.privacy_plan, len(dataloader)
        epochs = math.ceil(plan.max_steps / steps_per_epoch)
        samples = plan.max_steps * plan.expected_batch_size
        return (
            epochs,
            steps_per_epoch,
            plan.num_units,
            samples,
            plan.expected_batch_size,
            steps_per_epoch,
            plan.max_steps,
        )

    def _collated_dataset(self) -> tuple[Any, Callable]:
        """The training set without columns that the model does not take, the user's among them, and the collator, as
        Trainer pairs them."""
        if hasattr(self.train_dataset, "column_names") and hasattr(self.train_dataset, "remove_columns"):
            dataset = self.train_dataset
            if self._users is not None:
                dataset = dataset.remove_columns(self.privacy_plan.privacy_unit_column)
            collate = self.data_collator if self._trl is None else self._trl.collator(self.data_collator)
            return self._remove_unused_columns(dataset, description="training"), collate
        return self.train_dataset, self._get_collator_with_removed_columns(self.data_collator, description="training")

    def get_train_dataloader(self) -> DataLoader:
        """A plain DataLoader of which one item is this process's share of a logical batch: its units and a list of
        micro-batches, both possibly empty (P7)."""
        dataset, collate = self._collated_dataset()
        workers = self.args.dataloader_num_workers
        self._batches = LogicalBatches(
            dataset,
            collate,
            self._micro_batch_size,
            packed=self._packed,
            users=self._users,
            max_examples_per_user=self.privacy_plan.max_examples_per_user,
        )
        self._accumulation = Accumulation(
            self._engine,
            self._batches,
            prepare=lambda batch: dict(self._prepare_inputs(dict(batch))),
            autocast=self._forward_context,
            processes=self._processes,
            filler=self._synthetic_batch,
        )
        return DataLoader(
            _WithUnits(self._batches),
            batch_size=None,
            sampler=RankSlices(self._sampler, self._processes),
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    @contextlib.contextmanager
    def _forward_context(self) -> Iterator[None]:
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            yield

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple:
        """As in Trainer, but without DistributedDataParallel: it would reduce gradients that nobody has clipped.

        What it does else is done here: all processes begin with the first one's weights.
        """
        if self._processes.count == 1 and self._engine.shards is None:
            return super()._prepare_for_training(*args, **kwargs)
        accelerator = cast(Any, self.accelerator)
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        try:
            prepared = super()._prepare_for_training(*args, **kwargs)
        finally:
            del accelerator.prepare_model
        self._processes.copy_model_from_first(self.model)
        return prepared

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, *rest: Any) -> tuple[list, None]:
        """One logical batch; no count of tokens over the batch exists for a loss to use (P10)."""
        for batch in epoch_iterator:
            return [batch], None
        return [], None

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: tuple[DrawnUnits, list[Any]], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One logical step: clipped sums over micro-batches and processes, the ledger, noise, division by a constant.

        Leaves the noised mean in `p.grad`, so that everything that Trainer reads afterwards is covered by the noise.
        Returns NaN, or with `log_private_metrics` what has the mean loss for its mean over the processes.
        """
        assert self._run_budget is not None
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        total = self._accumulate(*inputs).to(self.args.device)
        loss = self._step(self._run_budget)
        if loss is not None:
            self._private_losses.append(loss)
        if self._privacy_args.log_private_metrics:
            return (total * self._processes.count / self.privacy_plan.expected_batch_size).float()
        return torch.full((), math.nan, device=self.args.device)

    def _accumulate(self, units: DrawnUnits, micro_batches: list[Any]) -> torch.Tensor:
        return self._accumulation(units, micro_batches)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the count follows the private batch size (P23)."""
        return 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Trainer, with epsilon and the noised statistics, and without what the noise does not protect (P23).

        `private_loss` is the mean of the noised estimates of all steps since the last training log.
        """
        if not self._observed:
            return
        if "loss" in logs and self._private_losses:
            logs["private_loss"] = math.fsum(self._private_losses) / len(self._private_losses)
            self._private_losses.clear()
        if "loss" in logs and self.privacy_plan.clipping == "adaptive":
            logs["clipping_norm"] = self._engine.clipping_norm
        if not self._privacy_args.log_private_metrics:
            for key in WITHHELD & logs.keys():
                del logs[key]
        if self._run_budget is not None:
            logs["epsilon"] = self._run_budget.epsilon
        trl.withhold(self)
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super()._finalize_training(*args, **kwargs)
        if self._privacy_args.log_private_metrics:
            return output
        metrics = {key: value for key, value in output.metrics.items() if key not in WITHHELD}
        return TrainOutput(output.global_step, math.nan, metrics)

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer for `eval_data="public"`; "private" returns to the caller and shows nobody else."""
        with self._evaluation(kwargs.get("eval_dataset", args[0] if args else None)):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer for `eval_data="public"`; "private" returns to the caller and shows nobody else."""
        with self._evaluation(kwargs.get("test_dataset", args[0] if args else None)):
            return super().predict(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluation(self, dataset: Any) -> Iterator[None]:
        if self._privacy_args.eval_data is None:
            raise PrivacyError(
                "evaluation releases figures about its data; say whose they are with PrivacyArguments(eval_data="
                "'public') or eval_data='private'"
            )
        if self._privacy_args.eval_data == "public":
            if self.train_dataset is (self.eval_dataset if dataset is None else dataset):
                raise PrivacyError("eval_data='public', but the data set is train_dataset; use eval_data='private'")
            yield
            return
        handler, self._observed = self.callback_handler, False
        self.callback_handler = CallbackHandler(
            [], self.model, self.processing_class, self.optimizer, self.lr_scheduler
        )
        try:
            yield
        finally:
            self.callback_handler, self._observed = handler, True
            trl.forget(self)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise PrivacyError(NO_SEARCH)

    # ---- saying so --------------------------------------------------------------------------------------------------

    def privacy_spent(self) -> PrivacySpent:
        """(epsilon, delta) at the plan's last step, which is the guarantee, and the steps charged so far."""
        if self._run_budget is None:
            return PrivacySpent(self.privacy_plan.epsilon, self.privacy_plan.delta, 0)
        return self._run_budget.spent()

    def privacy_report(self) -> dict[str, Any]:
        """What `privacy.json` holds: every number, and every assumption marked enforced, tested or operator's word."""
        budget, asked = self._run_budget, self._privacy_args
        if self._ledger is None:
            raise PrivacyError(
                "privacy_report reads the ledger, which the first process alone has open; call it there "
                "(trainer.is_world_process_zero())"
            )
        dataset_spent = None
        if budget is not None:
            name = self._ledger.run(budget.run).dataset
            dataset_spent = next((d.epsilon, d.delta) for d in self._ledger.datasets() if d.dataset == name)
        config = getattr(per_example_losses.base_model(self.model), "config", None)
        peft = getattr(self.model, "peft_config", None)
        return build_report(
            plan=self.privacy_plan,
            clipping_norm=self._engine.clipping_norm,
            run=None if budget is None else budget.run,
            steps=0 if budget is None else budget.steps,
            dataset=asked.ledger_dataset,
            dataset_spent=dataset_spent,
            ledger_url=self._ledger.display_url,
            model={
                "class": type(per_example_losses.base_model(self.model)).__name__,
                "base_model": getattr(config, "_name_or_path", None) or None,
                "adapter": None if peft is None else next(iter(peft.values())).peft_type.value,
                "trainable_parameters": sum(p.numel() for _, p in self._engine.parameters.values()),
                "total_parameters": sum(p.numel() for p in self.model.parameters()),
            },
            loss=self._describe_loss(),
            sampler=self._sampler.describe(self._processes.count),
            noise=self._step.noise.describe(),
            log_private_metrics=asked.log_private_metrics,
            eval_data=asked.eval_data,
            resumed=self._resumed,
            seeded=self._sampler.injected or self._step.noise.seeded_by_caller,
            curve=None if budget is None else budget.curve(),
            processes=self._processes.count,
            spread=self._engine.shards is not None,
        )

    def _describe_loss(self) -> str:
        if self._trl is not None:
            return self._trl.describe
        return f"task: {self._task}" if self._task is not None else "given by the operator (per_example_loss_fn)"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, with `privacy.json` and the model card's section beside the weights.

        Of a model that FSDP2 spreads, checkpoints hold every process's own part (`sharded_checkpoint`); called by you,
        in all processes, it writes the whole model as for any other.
        """
        push, self.args.push_to_hub = self.args.push_to_hub, False
        folder = output_dir or self.args.output_dir or "."
        try:
            if self._engine.shards is None or self.is_distributed_loading_by_transformers:
                super().save_model(output_dir, _internal_call=_internal_call)
            elif _internal_call:
                sharded_checkpoint.save_model(folder, self.model)
            else:
                self._save(folder, state_dict=sharded_checkpoint.gathered(self.model))
        finally:
            self.args.push_to_hub = push
        if self.args.should_save:
            write_report(folder, self.privacy_report())
        if push and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=getattr(self.args, "hub_revision", None))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in Trainer, with the norm that adaptive clipping has reached: a resumed run goes on from there."""
        if self._engine.shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            sharded_checkpoint.save_optimizer(output_dir, self.model, _unwrapped(self.optimizer))
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        if self.privacy_plan.clipping == "adaptive" and self.args.should_save:
            assert self._run_budget is not None and self._ledger is not None
            norm = self._engine.clipping_norm
            seal = _clipping_seal(self._ledger, self._run_budget.run, self.state.global_step, norm)
            state = {"clipping_norm": norm.hex(), "seal": seal}
            (Path(output_dir) / _CLIPPING_STATE_NAME).write_text(json.dumps(state) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Trainer; also parts that another number of processes has written."""
        if not sharded_checkpoint.is_sharded(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            sharded_checkpoint.load_model(resume_from_checkpoint, self.model if model is None else model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer; also parts that another number of processes has written."""
        if checkpoint is None or not sharded_checkpoint.is_sharded(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded_checkpoint.load_optimizer(checkpoint, self.model, _unwrapped(self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing is saved: how far dropout has advanced the generators tells how large the private batches were (P23).

        A resumed run starts its dropout masks afresh, which costs nothing.
        """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, keeping the section on privacy."""
        super().create_model_card(*args, **kwargs)
        if self.args.should_save:
            write_report(self.args.output_dir or ".", self.privacy_report())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            write_report(self.args.output_dir or ".", self.privacy_report())
        super()._push_from_checkpoint(checkpoint_folder)


class DPTrainer(DPTrainerMixin, Trainer):
    """`transformers.Trainer` with differential privacy: the same arguments, and `privacy_args`.

    Example::

        trainer = DPTrainer(
            model=model, args=TrainingArguments(...), train_dataset=train, processing_class=tokenizer,
            privacy_args=PrivacyArguments(target_epsilon=3.0, target_delta=1e-5),
        )
        trainer.train()
        trainer.privacy_spent()
    """


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Accelerate's wrapper taken off."""
    return getattr(optimizer, "optimizer", optimizer)


def _clipping_seal(ledger: Ledger, run: str, step: int, clipping_norm: float) -> str:
    """Made with the ledger's secret, so that whoever can write to the checkpoint alone cannot choose a norm."""
    return ledger.fingerprint(f"clipping norm:{run}:{step}:{clipping_norm.hex()}".encode())


def _last_complete_checkpoint(folder: str) -> str | None:
    """The newest checkpoint that is whole: Trainer writes its state last, and may have been killed before."""
    complete = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        with contextlib.suppress(OSError, ValueError):
            complete.append((json.loads((path / TRAINER_STATE_NAME).read_text())["global_step"], str(path)))
    return max(complete)[1] if complete else None


def privatize(
    trainer: Trainer, privacy_args: PrivacyArguments, *, per_example_loss_fn: PerExampleLoss | None = None
) -> Trainer:
    """Make any built Trainer private, in place; returns the same object, still an instance of its class.

    Raises:
        PrivacyError: the trainer has begun training, is private already, or has something that would make epsilon
            untrue (see `DPTrainerMixin`).
    """
    if not isinstance(trainer, Trainer):
        raise PrivacyError(f"privatize takes a transformers.Trainer, not {type(trainer).__name__}")
    if isinstance(trainer, DPTrainerMixin):
        raise PrivacyError(f"{type(trainer).__name__} is private already")
    if trainer.state.global_step > 0 or trainer.is_in_train:
        raise PrivacyError("training has begun without privacy; privatize a trainer before its first step")
    asked = checked_privacy_arguments(privacy_args)
    original = type(trainer)
    trainer.__class__ = type(f"DP{original.__name__}", (DPTrainerMixin, original), {})
    try:
        cast(DPTrainerMixin, trainer)._make_private(asked, per_example_loss_fn)
    except BaseException:
        trainer.__class__ = original
        raise
    return trainer


def _private_copy(args: TrainingArguments, privacy_args: PrivacyArguments) -> tuple[TrainingArguments, int, int]:
    """(arguments for Trainer, micro-batch, expected batch); the caller's object is not changed."""
    micro_batch = args.per_device_train_batch_size
    expected = privacy_args.expected_batch_size
    if expected is None:
        expected = micro_batch * args.gradient_accumulation_steps * args.world_size
    elif args.gradient_accumulation_steps != 1:
        logger.warning_once(
            "gradient_accumulation_steps is ignored: expected_batch_size is set, and micro-batches of "
            "per_device_train_batch_size are accumulated as needed"
        )
    private = copy.copy(args)
    forced = {
        "max_grad_norm": (0.0, "it would shrink the step again after the noise"),
        "ignore_data_skip": (True, "a resumed run draws afresh"),
        "average_tokens_across_devices": (False, "no count of tokens over the batch is used"),
    }
    for name, (value, why) in forced.items():
        if getattr(args, name, value) != value and args.process_index == 0:
            logger.warning_once(f"{name} is set to {value}: {why}")
        setattr(private, name, value)
    private.gradient_accumulation_steps = 1
    return private, micro_batch, expected
