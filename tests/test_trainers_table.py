"""docs/trainers.md says what the stored results say, and the check that filled its table catches planted bugs."""

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

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
# Computed again: every trainer, and adapters of every form.
SAMPLE = [
    ("completion", "LoRA", "qwen3"),
    ("completion", "prompt tuning", "llama"),
    ("completion, padding-free", "DoRA", "gpt2"),
    ("completion, padding-free", "prefix tuning", "llama"),
    ("dpo", "IA3", "gemma2"),
    ("dpo", "all weights", "gpt2"),
    ("reward", "trainable tokens", "llama"),
    ("reward", "prompt tuning", "gpt2"),
]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    names = ("trainers", "adapters")
    before = {name: sys.modules.pop(name, None) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # TRL tells its makers of every trainer that is built elsewhere
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("trainers")
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update({name: module for name, module in before.items() if module is not None})


@pytest.fixture(scope="module")
def texts(table: ModuleType) -> ModuleType:
    return table.load_texts()


@pytest.fixture(scope="module")
def results(table: ModuleType) -> dict[str, Any]:
    return json.loads(table.RESULTS.read_text())


def test_the_page_is_written_from_the_results(table: ModuleType, results: dict[str, Any]) -> None:
    page = table.PAGE.read_text()
    assert table.replaced(page, table.render(results)) == page


def test_every_cell_is_there_and_none_was_accepted_and_is_inexact(table: ModuleType, results: dict[str, Any]) -> None:
    cells = results["cells"]
    assert list(cells) == list(table.TRAINERS) and all(list(row) == list(table.KINDS) for row in cells.values())
    shown = [cell for row in cells.values() for each in row.values() for cell in each.values()]
    assert len(shown) == len(table.TRAINERS) * len(table.KINDS) * len(table.ARCHITECTURES)
    assert not [cell for cell in shown if cell.startswith("INEXACT")]
    assert sum(cell.startswith("exact") for cell in shown) > 0.7 * len(shown)


@pytest.mark.parametrize(("trainer", "adapter", "architecture"), SAMPLE)
def test_a_cell_computed_again_is_what_was_recorded(
    table: ModuleType, texts: ModuleType, results: dict[str, Any], trainer: str, adapter: str, architecture: str
) -> None:
    kind, detail = table.outcome(texts, trainer, adapter, architecture)
    recorded, _, number = results["cells"][trainer][adapter][architecture].rpartition(" ")
    assert kind == recorded
    if kind != "exact":
        assert detail == results["words"][int(number)]


def batch_mean(trainer: Any) -> None:
    loss = trainer._engine.loss
    trainer._engine.loss = lambda model, batch: loss(model, batch).mean().expand(len(loss(model, batch)))


def no_clipping(trainer: Any) -> None:
    trainer._engine.coefficients = torch.ones_like


def noise(trainer: Any) -> None:
    trainer._step.noise.standard_deviation = 0.1


@pytest.mark.parametrize("mutate", [batch_mean, no_clipping, noise])
@pytest.mark.parametrize(("trainer", "adapter"), [("completion", "LoRA"), ("dpo", "all weights")])
def test_planted_bugs_are_refused_or_inexact(
    table: ModuleType, texts: ModuleType, trainer: str, adapter: str, mutate: Any
) -> None:
    assert table.outcome(texts, trainer, adapter, "llama", mutate)[0] in ("refused", "INEXACT")
