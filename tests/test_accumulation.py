"""A row that cannot be computed costs itself alone; what many processes do together is in `tests/test_processes.py`."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpfa_hf.accumulation import Accumulation
from dpfa_hf.batch_selection import LogicalBatches
from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.processes import Processes

N = 6
Sums = dict[str, torch.Tensor]


class Words(nn.Module):
    """Raises where a row has more words than there are positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 5:
            raise RuntimeError("too long")
        own = input_ids > 0  # padding must not be seen: rows that are tried alone have less of it
        return (self.head(self.words(input_ids)).squeeze(-1) * own).sum(1) / own.sum(1)


class InStep(Processes):
    """Another process has two micro-batches more than this one, whatever this one has."""

    def largest(self, value: int) -> int:
        return value + 2


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": [i + 1] * (2 + i % 3)} for i in range(N)]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    return {"input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])}


def accumulation(data: list[dict[str, list[int]]], *, spread: bool = False) -> Accumulation:
    engine = PerExampleGradients(Words(), lambda model, batch: model(**batch).square(), clipping_norm=1.0)
    engine.layouts = {"words": "batched", "head": "batched"}
    if spread:
        engine.shards = {}  # type: ignore[assignment]  # none of its parameters is spread, but all keep in step
    return Accumulation(
        engine,
        LogicalBatches(data, collate, 2),
        prepare=dict,
        autocast=contextlib.nullcontext,
        processes=InStep() if spread else Processes(),
        filler=collate(rows()[:3]),
    )


def sums(data: list[dict[str, list[int]]], units: list[int], **options: Any) -> tuple[Sums, float]:
    add, drawn = accumulation(data, **options), np.array(units)
    loss = add(drawn, add.batches[drawn])
    return add.engine.take(), float(loss)


def same(found: tuple[Sums, float], wanted: tuple[Sums, float]) -> bool:
    return found[1] == pytest.approx(wanted[1]) and all(
        torch.allclose(found[0][name], total, rtol=1e-5, atol=1e-7) for name, total in wanted[0].items()
    )


BAD = {"impossible ids": [99, 1], "negative ids": [-1], "too long for the model": [1] * 8}


@pytest.mark.parametrize("bad", BAD)
def test_a_row_that_cannot_be_computed_costs_itself_alone(bad: str) -> None:
    data = [*rows()[:-1], {"input_ids": BAD[bad]}]
    without = sums(data, [0, 1, 2, 3, 4])
    assert same(sums(data, [0, 1, 5, 2, 3, 4]), without)
    assert not same(sums(rows(), [0, 1, 5, 2, 3, 4]), without), "a row that can be computed would have been seen"


def test_in_step_with_others_synthetic_rows_fill_up_and_add_zero() -> None:
    for units in ([0, 1, 2, 3, 4], []):
        assert same(sums(rows(), units, spread=True), sums(rows(), units))


def test_in_step_with_others_impossible_ids_are_left_out_and_other_rows_end_the_run() -> None:
    for bad, ids in BAD.items():
        data = [*rows()[:-1], {"input_ids": ids}]
        if "ids" in bad:
            assert same(sums(data, [0, 1, 5, 2], spread=True), sums(data, [0, 1, 2]))
        else:
            with pytest.raises(RuntimeError, match="too long"):
                sums(data, [0, 1, 5, 2], spread=True)


def test_in_step_with_others_a_lost_process_is_named() -> None:
    class Losing(InStep):
        def largest(self, value: int) -> int:
            raise RuntimeError("connection closed by peer")

        def meet(self) -> None:
            raise PrivacyError("rank 3 died or hangs")

    add = accumulation(rows(), spread=True)
    add.processes = Losing()
    with pytest.raises(PrivacyError, match="rank 3"):
        add(np.array([0]), add.batches[np.array([0])])
