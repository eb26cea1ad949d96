"""Trainer callbacks that watch a private run, and the one that keeps it within its budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from dpfa_hf.budget import PrivacyBudget
from dpfa_hf.errors import PrivacyError


@dataclass(frozen=True)
class PrivateRun:
    """What a private trainer tells its callbacks about a run, before step 1.

    Attributes:
        budget: plan, ledger, run id, and the steps charged so far; without a ledger in all processes but the first.
        dataset: the data set's name; None where it has none, since its fingerprint is shown nowhere (P22).
        processes: how many of them train the model.
        resumed: whether it goes on from a checkpoint.
        callbacks: all of the trainer's.
    """

    budget: PrivacyBudget
    dataset: str | None
    processes: int
    resumed: bool
    callbacks: tuple[TrainerCallback, ...]


class PrivacyCallback(TrainerCallback):
    """A callback that a private trainer tells about its run; on a Trainer that is not private it raises.

    A callback cannot make a stock Trainer private: by the time it runs, gradients have been averaged over the batch and
    logged.
    """

    _run: PrivateRun | None = None

    def prepare(self, dataset: str | None) -> None:
        """Called in the first process before anything is reserved in the ledger: what is refused here has no price."""

    def bind(self, run: PrivateRun) -> None:
        """Called in every process once the run is in the ledger, before training."""
        self._run = run

    def release(self, error: BaseException | None) -> None:
        """Called when `train` ends, with what ended it; must not raise."""
        self._run = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is None:
            raise PrivacyError(
                f"{type(self).__name__} was added to a Trainer that neither clips nor adds noise; use "
                "dpfa_hf.DPTrainer, or dpfa_hf.privatize(trainer, privacy_args)"
            )


@contextlib.contextmanager
def watchers(callbacks: Iterable[TrainerCallback]) -> Iterator[list[PrivacyCallback]]:
    """Those that want to be told about a run; at the end they are, however it ends, and let go of it."""
    watching = [callback for callback in callbacks if isinstance(callback, PrivacyCallback)]
    ended_by: BaseException | None = None
    try:
        yield watching
    except BaseException as error:
        ended_by = error
        raise
    finally:
        for callback in watching:
            callback.release(ended_by)


class PrivacyBudgetCallback(PrivacyCallback):
    """Shows epsilon in the progress bar and halts training before the budget is passed.

    `DPTrainer` and `privatize` add it themselves; epsilon reaches every logger through `Trainer.log`. On a Trainer that
    does not clip and add noise it raises when training starts.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert self._run is not None
        self._run.budget.refuse_exhausted()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        assert self._run is not None
        budget = self._run.budget
        for callback in self._run.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.set_postfix(epsilon=f"{budget.epsilon:.4g}", refresh=False)
        if budget.exhausted:
            control.should_training_stop = True
            control.should_log = True
            if args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH):
                control.should_save = True
            if args.eval_strategy != "no":
                control.should_evaluate = True
        return control
