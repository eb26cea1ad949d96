"""Several rows of one unit, such as a user's: one loss, the mean of theirs, and one gradient to be clipped once.

A layer's per-example gradient is a sum over the positions of a row, so that a unit's is the sum over the positions of
all its rows: the rows' tokens, one row after another, are to the norms and sums what a longer row's would be. The rules
of `layers.py` see rows and know nothing of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dpfa_hf.per_example.layers import Dense, Lookup, Outer, PerExampleGradient
from dpfa_hf.per_example.packing import Segments

# Stands in a collated micro-batch beside the model's inputs, and is taken out before the model is called: a tuple with
# the number of rows of each unit, in the order of the rows. No argument of a model's forward can have this name.
ROWS_PER_UNIT = ".rows_per_unit"


class Units:
    """Which rows of one micro-batch are whose.

    Args:
        rows: at least one row for each of U units, whose rows stand together and in this order.

    Guarantee:
        Entry u of what `mean` and `gathered` return depends on the rows of unit u alone. No row is added to fill up a
        unit, so nothing is multiplied by zero to get rid of it.
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self._segments: dict[int, Segments] = {}

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Units | None:
        """The units of a collated micro-batch, or None where every row is one."""
        return cls(batch[ROWS_PER_UNIT]) if ROWS_PER_UNIT in batch else None

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """[B] -> [U]: the mean over each unit's rows; not finite if one of them is not."""
        return torch.stack([part.mean() for part in losses.split(self.rows)])

    def gathered(self, gradient: PerExampleGradient) -> PerExampleGradient:
        """The rows' gradients as those of the units: each is the sum of its rows'."""
        if isinstance(gradient, Outer):
            left, segments = self._tokens(gradient.left)
            return Outer(left, self._tokens(gradient.right)[0], segments)
        if isinstance(gradient, Lookup):
            grad, segments = self._tokens(gradient.grad)
            return replace(gradient, index=self._tokens(gradient.index)[0], grad=grad, segments=segments)
        mass = gradient.mass_of_terms
        return Dense(self._sum(gradient.grads), None if mass is None else self._sum(mass))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """[B, ...] -> [U, ...] float64."""
        return torch.stack([part.sum(0, dtype=torch.float64) for part in values.split(self.rows)])

    def _tokens(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Segments | None]:
        """[B, T, ...] -> [U, rows * T, ...] if all units have as many rows, or else [B * T, ...] and the segments."""
        rows, length = self.rows, tensor.shape[1]
        tokens = tensor.flatten(0, 1)
        if len(set(rows)) == 1:
            return tokens.unflatten(0, (len(rows), rows[0] * length)), None
        if length not in self._segments:
            ends = torch.tensor([0, *rows]).cumsum(0) * length
            self._segments[length] = Segments(ends.to(tensor.device), len(tokens), max(rows) * length)
        return tokens, self._segments[length]
