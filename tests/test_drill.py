"""Six kills of a real job; `make drill` makes fifty. And what the drill looks for is found when it is there."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    before = {name: sys.modules.pop(name, None) for name in ("drill", "sentiment")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("drill")
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_six_kills_lose_no_budget_leave_no_process_and_spoil_no_weights(
    benchmark: ModuleType, tmp_path: Path, postgresql: Any
) -> None:
    records = list(benchmark.drill(6, 0, tmp_path / "drill", postgresql))
    assert [record for record in records if record["broken"]] == []
    assert {record["victim"] for record in records} == {*benchmark.VICTIMS, None}
    assert max(record["charged"] for record in records) >= benchmark.STEPS

    job = next(record["job"] for record in records if record["victim"] is None)
    assert benchmark.problems(job) == []
    weights = next(job.folder.glob("long/out/checkpoint-*/model.safetensors"))
    sound = load_file(weights)
    save_file({name: tensor * torch.nan for name, tensor in sound.items()}, weights, {"format": "pt"})
    assert any("not finite" in problem for problem in benchmark.problems(job))
    state = weights.parent / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 999}))
    assert any("more steps than the ledger" in problem for problem in benchmark.problems(job))
