"""Writes README's tables of model families and of attention features from the tests' own results.

    python benchmarks/families.py            run the tests, write benchmarks/results/families.json and the README
    python benchmarks/families.py --render   write the README from the stored results

A cell counts the tests that passed; nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
README = ROOT / "README.md"

# Column -> the tests that fill it, by name.
COLUMNS = {
    "equals eager": (
        "test_outputs_and_gradients_equal_eager",
        "test_encoder_decoder_equals_eager",
        "test_vit_equals_eager",
        "test_whisper_equals_eager",
    ),
    "rows isolated": ("test_a_row_and_its_gradient_do_not_depend_on_other_rows_or_padding",),
    "packed, `cu_seq_lens`": ("test_documents_packed_by_cu_seq_lens_are_isolated_from_one_another",),
    "packed, `position_ids`": ("test_documents_packed_by_position_ids_are_isolated_from_one_another",),
    "generation": ("test_generation_equals_eager",),
    "on the kernels": ("test_model_on_the_kernels_equals_eager",),
    "per-example gradients": ("test_clipped_sum_equals_a_loop_of_autograd",),
    "per document": ("test_clipped_sum_equals_a_loop_of_autograd_over_documents",),
}
LEAKS = "test_documents_packed_by_position_ids_alone_leak_in_these_families"
UPSTREAM = "Transformers' own tests"
SUITES = (
    ("not interpreter", {}, ("tests/test_attention.py", "tests/transformers_common", "tests/per_example")),
    ("interpreter", {"TRITON_INTERPRET": "1"}, ("tests/test_attention_operator.py", "tests/kernels/test_flash.py")),
)
FEATURES = "test_every_pair_of_features_is_as_exact_as_its_dtype_allows"
# How a case of that test is named: its levels in this order.
FACTORS = (
    "dtype", "causal", "window", "softcap", "sinks", "padding", "packing", "heads", "dropout", "width", "length",
    "layout",
)  # fmt: skip
# Query and key heads, query and value width: _4_2_ in the name is 4/2 in the table.
_PAIRS = ("heads", "width")
DTYPES = ("float32", "float16", "bfloat16")


def family_of(name: str) -> str:
    """The family in a test's parameters: the part that is no option, in one spelling."""
    options = {"left", "right", "none", "plain", "packed", "static", "dynamic", "full", "lora", "tied", "untied"}
    options |= {"sdpa", "eager", "dpfa", "dp_flash", "mlm", "cls"}
    parts = name.replace("gpt-neox", "gpt_neox").replace("gpt-oss", "gpt_oss").split("-")
    return next((part for part in parts if part not in options), name)


def run(folder: Path) -> dict[str, str]:
    """Test (name with parameters) -> "passed", "failed" or "skipped"."""
    outcomes = {}
    for number, (expression, environment, paths) in enumerate(SUITES):
        report = folder / f"{number}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", expression, f"--junit-xml={report}", *paths]
        environment = os.environ | {"DPFA_RESULTS": str(folder), "HF_HUB_OFFLINE": "1"} | environment
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        for case in ElementTree.parse(report).iter("testcase"):
            bad = case.find("failure") is not None or case.find("error") is not None
            outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            outcomes[case.attrib["name"]] = outcome
    return outcomes


def summarise(outcomes: dict[str, str], upstream: Iterable[dict]) -> dict:
    """Counts of passed and of all tests by family and column, and by feature and dtype."""
    families: dict[str, dict[str, list[int]]] = defaultdict(dict)
    features: dict[str, dict[str, list[int]]] = defaultdict(dict)

    def count(table: dict[str, dict[str, list[int]]], row: str, column: str, passed: bool) -> None:
        cell = table[row].setdefault(column, [0, 0])
        cell[0] += passed
        cell[1] += 1

    by_test = {test: column for column, tests in COLUMNS.items() for test in tests}
    for name, outcome in outcomes.items():
        if outcome == "skipped":
            continue
        test, _, parameters = name.rstrip("]").partition("[")
        passed = outcome == "passed"
        if test in by_test:
            alone = re.fullmatch(r"test_(vit|whisper)_equals_eager", test)
            count(families, alone[1] if alone else family_of(parameters), by_test[test], passed)
        elif test == LEAKS and passed:
            families[family_of(parameters)]["packed, `position_ids`"] = []
        elif test == FEATURES:
            levels = dict(zip(FACTORS, parameters.split("-"), strict=True))
            for factor, level in levels.items():
                if factor not in ("dtype", "length"):
                    shown = "/".join(part for part in level.split("_") if part) if factor in _PAIRS else level
                    count(features, f"{factor}: {shown}", levels["dtype"], passed)
    for result in upstream:
        for outcome in result["outcomes"].values():
            if outcome["stock"] == "passed":
                count(families, result["family"], UPSTREAM, outcome["dp_flash"] == "passed")
    return {
        "families": {name: families[name] for name in sorted(families)},
        "features": {name: features[name] for name in sorted(features)},
    }


def cell(counts: list[int] | None) -> str:
    if counts is None:
        return ""
    if not counts:
        return "leaks in Transformers"
    passed, total = counts
    return f"{passed}" if passed == total else f"**{total - passed} of {total} fail**"


def table(rows: dict[str, dict[str, list[int]]], first: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    lines = [f"| {first} | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [
        f"| {name} | {' | '.join(cell(counts.get(column)) for column in columns)} |" for name, counts in rows.items()
    ]
    return "\n".join(lines)


def render(results: dict) -> dict[str, str]:
    """The text between README's markers, by the markers' name."""
    return {
        "families": table(results["families"], "", (*COLUMNS, UPSTREAM)),
        "features": table(results["features"], "", DTYPES),
    }


def replaced(text: str, blocks: dict[str, str]) -> str:
    """`text` with what stands between <!-- NAME --> and <!-- /NAME --> replaced."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"README.md has {found} pairs of markers <!-- {name} -->, not one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="use the stored results")
    if not parser.parse_args().render:
        import torch
        import transformers
        import triton

        with tempfile.TemporaryDirectory() as folder:
            outcomes = run(Path(folder))
            upstream = [
                json.loads(path.read_text()) for path in sorted(Path(folder).glob("transformers_common_*.json"))
            ]
        versions = {module.__name__: module.__version__ for module in (torch, transformers, triton)}
        results = {"versions": versions, **summarise(outcomes, upstream)}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(replaced(README.read_text(), render(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
