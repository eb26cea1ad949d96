"""README's tables of families and features are what the tests' stored results say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def families() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_holds_the_tables_of_the_stored_results(families: ModuleType) -> None:
    results = json.loads(families.RESULTS.read_text())
    readme = families.README.read_text()
    assert families.replaced(readme, families.render(results)) == readme
    assert "**" not in families.render(results)["families"] + families.render(results)["features"]


def test_results_are_of_the_pinned_versions(families: ModuleType) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    versions = json.loads(families.RESULTS.read_text())["versions"]
    assert {name: version.partition("+")[0] for name, version in versions.items()} == {
        name: pinned[name] for name in versions
    }
    assert versions["transformers"] == transformers.__version__ and versions["torch"].startswith(
        torch.__version__.partition("+")[0]
    )


def test_a_failed_test_shows_in_its_cell_and_a_skipped_one_does_not_count(families: ModuleType) -> None:
    outcomes = {
        "test_outputs_and_gradients_equal_eager[left-llama]": "passed",
        "test_outputs_and_gradients_equal_eager[right-llama]": "failed",
        "test_generation_equals_eager[llama-static]": "skipped",
        "test_vit_equals_eager": "passed",
        "test_documents_packed_by_position_ids_alone_leak_in_these_families[bert]": "passed",
        "test_clipped_sum_equals_a_loop_of_autograd[gpt-neox-lora]": "passed",
    }
    upstream = [{"family": "llama", "outcomes": {"a": {"stock": "passed", "dp_flash": "failed"},
                                                 "b": {"stock": "skipped", "dp_flash": "passed"}}}]  # fmt: skip
    found = families.summarise(outcomes, upstream)["families"]
    assert found["llama"] == {"equals eager": [1, 2], "Transformers' own tests": [0, 1]}
    assert found["vit"] == {"equals eager": [1, 1]} and found["gpt_neox"] == {"per-example gradients": [1, 1]}
    assert families.cell(found["llama"]["equals eager"]) == "**1 of 2 fail**"
    assert families.cell(found["bert"]["packed, `position_ids`"]) == "leaks in Transformers"
    assert families.cell(None) == ""
