"""A logical batch -> the engine's sums, so that a row that cannot be computed costs itself alone (P23). No Trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dpfa_hf.batch_selection import DrawnUnits, LogicalBatches
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.processes import Processes


class Accumulation:
    """Adds one process's share of a draw to the clipped sums.

    Args:
        engine: that clips and sums.
        batches: where a unit is read again, to be tried by itself.
        prepare: collated micro-batch -> the same on the model's device.
        autocast: a context for every forward pass.
        processes: who else has a share.
        filler: a prepared micro-batch of synthetic rows, for models that FSDP2 spreads.

    Guarantee:
        If anything raises, the share starts over one unit at a time, each read and collated by itself: a row that
        cannot be computed, or a user with one, then adds zero, and neither its padding nor its columns change what its
        neighbours add (P23). Where FSDP2 spreads the model, all processes compute as often as any does, and so cannot
        begin again one by one: a unit with impossible ids is left out beforehand, and any other row that cannot be
        computed ends the run in all of them. Synthetic rows, which add zero, take the place of what a process has less.
    """

    def __init__(
        self,
        engine: PerExampleGradients,
        batches: LogicalBatches,
        *,
        prepare: Callable[[Mapping[str, Any]], dict[str, Any]],
        autocast: Callable[[], contextlib.AbstractContextManager],
        processes: Processes,
        filler: Mapping[str, Any],
    ) -> None:
        self.engine, self.batches, self.processes, self.filler = engine, batches, processes, filler
        self._prepare, self._autocast = prepare, autocast

    def __call__(self, units: DrawnUnits, micro_batches: list[Any]) -> torch.Tensor:
        """The sum of the losses, float64 and private, of what was added.

        Args:
            units: this process's share, as `batches.units` returns it.
            micro_batches: `batches[units]`.

        Raises:
            PrivacyError: a process was lost; of a model in one piece, only `engine` knows of it, later.
        """
        if self.engine.shards is not None:
            return self._in_step(units, micro_batches)
        total = torch.zeros((), dtype=torch.float64)
        try:
            return sum((self.loss_of(batch) for batch in micro_batches), total)
        except Exception:  # whatever a row makes the model raise must not be seen
            self.engine.discard()
        for unit in units:
            with contextlib.suppress(Exception):
                total = sum((self.loss_of(batch) for batch in self.batches[[unit]]), total)
        return total

    def _in_step(self, units: DrawnUnits, micro_batches: list[Any]) -> torch.Tensor:
        try:
            for batch in micro_batches:
                self._raise_for_impossible_ids(batch)
        except IndexError:
            micro_batches = [batch for unit in units for batch in self._possible(self.batches[[unit]])]
        total = torch.zeros((), dtype=torch.float64)
        try:
            for number in range(self.processes.largest(len(micro_batches))):
                if number < len(micro_batches):
                    total = total + self.loss_of(micro_batches[number])
                else:
                    self._add(self.filler, counted=False)
        except RuntimeError:
            self.processes.meet()  # names the ranks that are lost, if that was the reason
            raise
        return total

    def _possible(self, batches: list[Any]) -> list[Any]:
        """A unit's micro-batches; none if it has impossible ids."""
        with contextlib.suppress(IndexError):
            for batch in batches:
                self._raise_for_impossible_ids(batch)
            return batches
        return []

    def loss_of(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Adds one micro-batch; the sum of its losses that are finite."""
        self._raise_for_impossible_ids(batch)
        return self._add(self._prepare(batch))

    def _add(self, prepared: Mapping[str, Any], *, counted: bool = True) -> torch.Tensor:
        with self._autocast():
            losses = self.engine.accumulate(prepared, counted=counted)
        return losses.double().nan_to_num(posinf=0.0, neginf=0.0).sum()

    def _raise_for_impossible_ids(self, batch: Mapping[str, Any]) -> None:
        """Here, where it costs its row alone: on a GPU the lookup itself would end the process."""
        embeddings = getattr(self.engine.model, "get_input_embeddings", lambda: None)()
        rows = getattr(embeddings, "num_embeddings", math.inf)
        for name in ("input_ids", "decoder_input_ids"):
            ids = batch.get(name)
            if isinstance(ids, torch.Tensor) and bool(((ids < 0) | (ids >= rows)).any()):
                raise IndexError(name)
