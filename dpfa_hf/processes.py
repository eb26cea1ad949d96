"""The processes that train one model together: one draws, charges and adds noise, all of them clip and sum.

Within a micro-batch no process speaks to another, so that ranks may have as many micro-batches as their slices need;
but where FSDP2 spreads the model, all of them compute as many as the largest share has. A step meets three times: for
the draw, for the sum, and for the noised sum. This module knows no Trainer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dpfa_hf.errors import PrivacyError

T = TypeVar("T")

# Elements that travel together: enough that a message costs more than its start, little beside the sums themselves.
_BUCKET = 2**22


class Processes:
    """All processes of torch.distributed's default group, or this one alone where there is none.

    Args:
        timeout_s: seconds after which a process that does not answer is given up, and the others raise.

    Raises:
        PrivacyError: a launcher has started several processes, and they do not know of each other.

    Guarantee:
        Whatever the number of processes, a step is one draw, one charge and, of what all of them hold, one call of the
        noise, all by the first process (P8, P16, P21): `from_first` is the only way in which anything random reaches
        the others. Of a model that is spread, each adds to its own rows, which nobody else has. A process that
        has died or hangs is found before the sum is taken, and so before the step is charged and its noise is drawn;
        if it is lost later, the others raise before they use the noised sum.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        begun = dist.is_available() and dist.is_initialized()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and not begun:
            raise PrivacyError(
                f"this is one of {launched} processes (WORLD_SIZE), but torch.distributed has not begun, so each would "
                "train a model of its own: build Accelerator(), or TrainingArguments, first; on a CPU with cpu=True, "
                "or use_cpu=True and ddp_backend='gloo'"
            )
        several = begun and dist.get_world_size() > 1
        self.count = dist.get_world_size() if several else 1
        self.rank = dist.get_rank() if several else 0
        self._timeout = timedelta(seconds=timeout_s)
        # Draws, errors and barriers go from host to host, whatever carries the sums.
        self._control = dist.new_group(backend="gloo", timeout=self._timeout) if several else None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that draws, charges and adds noise."""
        return self.rank == 0

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` returns in the first process, which alone calls it; picklable.

        Raises:
            PrivacyError: in the others, if it raised in the first; there, whatever it raised.
        """
        if self._control is None:
            return function()
        if not self.is_first:
            answer: list[Any] = [None]
            dist.broadcast_object_list(answer, src=0, group=self._control)
            value, failure = answer[0]
            if failure is not None:
                raise PrivacyError(f"the first process stopped: {failure}")
            return value
        try:
            value = function()
        except Exception as exception:
            dist.broadcast_object_list([(None, _one_line(exception))], src=0, group=self._control)
            raise
        dist.broadcast_object_list([(value, None)], src=0, group=self._control)
        return value

    def together(self, function: Callable[[], T]) -> T:
        """Calls `function` in every process.

        Raises:
            PrivacyError: naming the rank, in those where it did not raise, if it raised in any; there, what it raised.
        """
        if self._control is None:
            return function()
        failures: list[str | None] = [None] * self.count
        try:
            value = function()
        except Exception as exception:
            dist.all_gather_object(failures, _one_line(exception), group=self._control)
            raise
        dist.all_gather_object(failures, None, group=self._control)
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise PrivacyError(f"rank {rank} stopped: {failure}")
        return value

    def own_slice(self, draw: np.ndarray) -> np.ndarray:
        """This process's share of a draw, int64 [K]: every unit goes to one process, and shares differ by one unit."""
        return draw[self.rank :: self.count]

    def sum_to_first(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Adds up all processes' tensors into the first one's, in place; in the others they are of no use afterwards.

        Raises as `meet` does.
        """
        if self._control is None:
            return
        self.meet()
        for bucket in _buckets(sums):
            flat = _joined(bucket)
            dist.reduce(flat, dst=0)
            if self.is_first:
                _split(flat, bucket)

    def meet(self) -> None:
        """Goes on when all processes have come here.

        Raises:
            PrivacyError: in the first process, if another has not come here in time; it names the ranks.
            RuntimeError: in the others.
        """
        if self._control is not None and (lost := self._lost()):
            raise PrivacyError(
                f"rank {', '.join(map(str, lost))} died or hangs, and the step is void, neither charged nor noised; "
                "restart the job with resume_from_checkpoint=True (TrainingArguments.ddp_timeout sets the patience)"
            )

    def largest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self._control is None:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._control)
        return int(found)

    def _lost(self) -> list[int]:
        """In the first process, the ranks that have not come here in time; the others say that they have."""
        if not self.is_first:
            dist.send(torch.zeros(1), dst=0, group=self._control)
            return []
        deadline = time.monotonic() + self._timeout.total_seconds()
        messages = torch.zeros(self.count, 1)
        coming, lost = {}, []
        for rank in range(1, self.count):
            try:
                coming[rank] = cast(dist.Work, dist.irecv(messages[rank], src=rank, group=self._control))
            except RuntimeError:
                lost.append(rank)
        for rank, message in coming.items():
            try:
                message.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except RuntimeError:
                lost.append(rank)
        return sorted(lost)

    def copy_from_first(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies the first process's tensors into all others', in place."""
        if self._control is None:
            return
        for bucket in _buckets(tensors):
            flat = _joined(bucket)
            dist.broadcast(flat, src=0)
            if not self.is_first:
                _split(flat, bucket)

    def copy_model_from_first(self, model: nn.Module) -> None:
        """Gives all processes the first one's parameters and buffers; what is spread by FSDP2 is there once already."""
        state = [*model.named_parameters(remove_duplicate=True), *model.named_buffers(remove_duplicate=True)]
        with torch.no_grad():
            self.copy_from_first({name: each.detach() for name, each in state if not isinstance(each, DTensor)})


def _one_line(exception: Exception) -> str:
    return " ".join(f"{type(exception).__name__}: {exception}".split())


def _buckets(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one dtype and device together, in an order that all processes share."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors.values():
        like = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and not (like and sum(each.numel() for each in bucket) + tensor.numel() <= _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _joined(bucket: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of one dimension; the tensor itself where it is alone and contiguous."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0].view(-1)
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def _split(flat: torch.Tensor, bucket: list[torch.Tensor]) -> None:
    """Undoes `_joined`, in place."""
    if flat.data_ptr() == bucket[0].data_ptr():
        return
    for tensor, part in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))
