"""The memory plan: what it recommends, that it stops in time, and that what dies in a child is a result."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner, Result

from dpfa_hf import cli, memory_plan
from dpfa_hf.errors import PrivacyError
from dpfa_hf.memory_plan import Measurement, Request

GIB = 2**30
TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(BertConfig(**TINY)).save_pretrained(folder)
    return str(folder)


class Machine:
    """Stands for children: memory grows by `slope` a row, and speed saturates at `fastest` rows a second."""

    def __init__(self, slope: int, fastest: float = 1e9) -> None:
        self.slope, self.fastest, self.tried = slope, fastest, []

    def __call__(self, request: Request, rows: int, limit: int) -> Measurement:
        self.tried.append(rows)
        peak = GIB + rows * self.slope
        return Measurement(rows, "fits" if peak <= limit else "over the limit", peak, min(10.0 * rows, self.fastest))


def plan(machine: Machine, limit: int) -> memory_plan.MemoryPlan:
    return memory_plan.measure(Request("model", 8), limit_bytes=limit, run=machine)


def test_search_stops_before_a_size_that_would_pass_the_limit() -> None:
    machine = Machine(GIB)
    found = plan(machine, 12 * GIB)
    assert machine.tried == [1, 2, 4, 8] and found.recommended == 8
    assert all(each.outcome == "fits" for each in found.measurements)


def test_mutant_without_the_forecast_would_try_a_size_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "_expected_peak", lambda found: 0.0)
    machine = Machine(GIB)
    found = plan(machine, 12 * GIB)
    assert machine.tried[-1] == 16 and found.measurements[-1].outcome == "over the limit" and found.recommended == 8


def test_recommended_is_the_smallest_size_that_is_nearly_as_fast_as_any() -> None:
    machine = Machine(1, fastest=41.0)
    found = plan(machine, 12 * GIB)
    assert machine.tried == [1, 2, 4, 8, 16] and found.recommended == 4


def test_nothing_is_recommended_where_not_one_row_fits() -> None:
    found = plan(Machine(GIB), GIB)
    assert found.recommended is None and [each.outcome for each in found.measurements] == ["over the limit"]


def test_search_ends_at_a_size_that_dies_and_keeps_what_fitted() -> None:
    def run(request: Request, rows: int, limit: int) -> Measurement:
        return Measurement(rows, "fits", GIB, float(rows)) if rows < 4 else Measurement(rows, "out of memory")

    found = memory_plan.measure(Request("model", 8), limit_bytes=2 * GIB, run=run)
    assert found.recommended == 2 and found.measurements[-1] == Measurement(4, "out of memory")
    assert json.loads(json.dumps(found.to_dict()))["recommended"] == 2


@pytest.mark.parametrize("status", [-9, 137, 77])
def test_a_killed_child_is_a_measurement(status: int) -> None:
    assert memory_plan._judge(status, "", "whatever", 4, GIB) == Measurement(4, "out of memory")


@pytest.mark.parametrize("status", [1, -11, 0])
def test_a_child_that_fails_otherwise_is_refused_with_its_reason(status: int) -> None:
    with pytest.raises(PrivacyError, match="^no such layer$"):
        memory_plan._judge(status, "", "a warning\nno such layer\n", 4, GIB)


def test_a_child_that_ends_above_the_limit_does_not_fit() -> None:
    assert memory_plan._judge(0, "noise\n[3, 2.5]\n", "", 4, 2) == Measurement(4, "over the limit", 3, 2.5)


def test_real_children_measure_a_tiny_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "LARGEST_MICRO_BATCH", 1)
    found = memory_plan.measure(Request(model, tokens=16, lora=2, gradient_checkpointing=True), limit_bytes=4 * GIB)
    (only,) = found.measurements
    assert only.outcome == "fits" and found.recommended == 1
    assert only.peak_bytes is not None and 2**27 < only.peak_bytes < 4 * GIB and (only.rows_per_second or 0) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells how large a process is")
def test_a_real_child_beyond_the_limit_is_ended_and_the_caller_lives(model: str) -> None:
    found = memory_plan.measure(Request(model, tokens=16), limit_bytes=64 * 2**20)
    assert found.measurements == (Measurement(1, "out of memory"),) and found.recommended is None


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(PrivacyError, match="--memory-limit"):
        memory_plan.measure(Request("model", 8), limit_bytes=0)


def test_available_memory_is_within_the_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_plan.available_memory("cpu") < total


def test_peak_memory_sees_what_was_allocated_and_freed() -> None:
    torch.ones(2**27)  # 512 MiB
    assert memory_plan.peak_memory(torch.device("cpu")) > 2**29


def test_out_of_memory_is_recognised_behind_other_errors() -> None:
    error = PrivacyError("the model failed on synthetic rows")
    error.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    assert memory_plan._is_out_of_memory(error) and not memory_plan._is_out_of_memory(PrivacyError("no rule"))


def dpfa(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["plan", *arguments])


def test_dpfa_plan_measure_prints_the_sizes_and_the_recommended_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(request: Request, *, limit_bytes: int | None) -> memory_plan.MemoryPlan:
        asked.append((request, limit_bytes))
        sizes = (Measurement(1, "fits", GIB, 10.0), Measurement(2, "out of memory"))
        return memory_plan.MemoryPlan(limit_bytes or GIB, sizes, 1)

    monkeypatch.setattr(memory_plan, "measure", measure)
    result = dpfa(
        "--measure",
        "./model",
        "--tokens",
        "64",
        "--memory-limit",
        "1.5",
        "--lora",
        "4",
        "--json",
        "--gradient-checkpointing",
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recommended"] == 1
    assert asked == [(Request("./model", 64, lora=4, gradient_checkpointing=True), 3 * 2**29)]
    printed = dpfa("--measure", "./model").stdout
    assert "out of memory" in printed and "per_device_train_batch_size=1" in printed


@pytest.mark.parametrize("arguments", [(), ("--tokens", "64"), ("--measure", "./model", "--num-units", "100")])
def test_dpfa_plan_takes_a_number_of_units_or_a_model_to_measure(arguments: tuple[str, ...]) -> None:
    assert dpfa(*arguments).exit_code == 2


def test_dpfa_plan_measure_exits_1_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = memory_plan.MemoryPlan(GIB, (Measurement(1, "out of memory"),), None)
    monkeypatch.setattr(memory_plan, "measure", lambda request, *, limit_bytes: nothing)
    result = dpfa("--measure", "./model")
    assert result.exit_code == 1 and "not even one row" in result.stderr and result.stderr.count("\n") == 1


def test_dpfa_plan_measure_refuses_a_wrong_path_in_one_line(tmp_path: Path) -> None:
    result = dpfa("--measure", str(tmp_path), "--memory-limit", "4")
    assert result.exit_code == 1 and result.stderr.startswith("dpfa: MODEL") and result.stderr.count("\n") == 1
