"""Bill of materials, licences and secrets of this repository; and what the same checks say when one is planted."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "deploy" / "supply_chain" / "check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("supply_chain_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bom(check: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("sbom") / "new" / "sbom.cdx.json"
    check.write_sbom(path)
    return json.loads(path.read_text())


def faults_of(check: ModuleType, bom: dict[str, Any]) -> list[str]:
    return check.sbom_faults(bom, check.runtime_packages(), check.pins(REPOSITORY / "constraints.txt"))


# ---- bill of materials -----------------------------------------------------------------------------------------------


def test_the_bill_is_valid_complete_and_of_pinned_versions(check: ModuleType, bom: dict[str, Any]) -> None:
    assert faults_of(check, bom) == []
    names = {each["name"].lower() for each in bom["components"]}
    assert {"torch", "transformers", "dp-accounting", "sqlalchemy", "model-signing", "psycopg-binary"} <= names
    assert not {"pytest", "ruff", "opacus", "kubeflow", "detect-secrets"} & names
    assert bom["metadata"]["component"]["name"] == "dpfa-hf" and bom["specVersion"] == "1.6"


def test_the_bill_says_who_needs_whom_and_nothing_of_this_machine(bom: dict[str, Any]) -> None:
    refs = {each["bom-ref"] for each in bom["components"]} | {bom["metadata"]["component"]["bom-ref"]}
    needed = {ref for each in bom["dependencies"] for ref in each["dependsOn"]}
    assert needed <= refs and {each["ref"] for each in bom["dependencies"]} == refs
    text = json.dumps(bom)
    assert "file:" not in text and str(REPOSITORY) not in text and sys.prefix not in text


Plant = Callable[[dict[str, Any]], Any]
FEW = {"click", "numpy", "rich"}


@pytest.fixture
def few(bom: dict[str, Any]) -> dict[str, Any]:
    """A bill of three of the packages: a whole one takes seconds to validate."""
    kept = [each for each in bom["components"] if each["name"] in FEW]
    edges = [{"ref": each["bom-ref"]} for each in kept]
    return copy.deepcopy({**bom, "components": kept, "dependencies": edges})


def faults_of_few(
    check: ModuleType, bom: dict[str, Any], constraints: Path = REPOSITORY / "constraints.txt"
) -> list[str]:
    packages = {name: version for name, version in check.runtime_packages().items() if name in FEW}
    return check.sbom_faults(bom, packages, check.pins(constraints))


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (lambda bom: None, None),
        (lambda bom: bom["components"].pop(), "is installed and not listed"),
        (lambda bom: bom["components"].append({"type": "library", "name": "planted"}), "planted is listed"),
        (lambda bom: bom["components"][0].update(version="0.0.1"), "is listed as 0.0.1"),
        (lambda bom: bom["components"][0].pop("type"), "not CycloneDX 1.6"),
        (lambda bom: bom.update(bomFormat="CycloneDY"), "not CycloneDX 1.6"),
    ],
)
def test_a_planted_fault_in_the_bill_is_found(
    check: ModuleType, few: dict[str, Any], plant: Plant, said: str | None
) -> None:
    plant(few)
    faults = faults_of_few(check, few)
    assert (faults == []) if said is None else any(said in fault for fault in faults)


def test_versions_that_nobody_tested_are_found(check: ModuleType, few: dict[str, Any], tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("numpy==1.0\n# rich==15.0.0\nclick==" + check.runtime_packages()["click"] + "\n")
    pinned_else, unpinned = faults_of_few(check, few, constraints)
    assert pinned_else.startswith("numpy") and "constraints.txt pins 1.0" in pinned_else
    assert unpinned.startswith("rich") and "not pinned" in unpinned


# ---- licences --------------------------------------------------------------------------------------------------------


def licences(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({} if path is None else {"PYTHONPATH": str(path)})}
    command = [sys.executable, str(SCRIPT), "licences", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def plant_package(folder: Path, name: str, *metadata: str) -> None:
    """An installed package of that name, as far as its metadata go."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *metadata]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_every_package_is_under_an_allowed_licence_or_an_exception_with_a_reason() -> None:
    result = licences()
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "passed"


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (["License-Expression: GPL-3.0-only"], "planted-dependency is under GPL-3.0-only"),
        (["License-Expression: MIT AND AGPL-3.0-or-later"], "planted-dependency is under MIT AND AGPL-3.0-or-later"),
        (
            ["Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)"],
            "planted-dependency is under GNU",
        ),
        (["License: Proprietary"], "planted-dependency is under Proprietary"),
        ([], "planted-dependency is under UNKNOWN"),
        (["License-Expression: MIT OR GPL-3.0-only"], None),
    ],
    ids=str,
)
def test_a_planted_dependency_is_found_unless_it_may_be_kept(
    metadata: list[str], found: str | None, tmp_path: Path
) -> None:
    plant_package(tmp_path, "planted-dependency", *metadata)
    plant_package(tmp_path, "planted-between", "License-Expression: MIT", "Requires-Dist: planted-dependency")
    # What the exceptions are for is needed too, or they would be called unused.
    plant_package(
        tmp_path,
        "planted-root",
        "License-Expression: MIT",
        "Requires-Dist: planted-between",
        "Requires-Dist: dpfa-hf[peft,postgresql,metrics,evidence,trl]",
    )
    result = licences("--package", "planted-root", path=tmp_path)
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    if found is None:
        assert (result.returncode, failures) == (0, [])
    else:
        assert result.returncode == 1 and len(failures) == 1
        assert failures[0].startswith(f"FAILED licences: {found}")


def test_exceptions_are_for_one_licence_and_need_a_reason_and_a_package(check: ModuleType) -> None:
    policy = tomllib.loads((SCRIPT.parent / "licences.toml").read_text())
    assert all(set(each) == {"licence", "reason"} and each["reason"] for each in policy["exceptions"].values())
    one = {"allowed": ["MIT"], "written_as": {}, "exceptions": {"tool": {"licence": "MPL-2.0", "reason": "why"}}}
    assert check.licence_faults({"tool": "MPL-2.0", "other": "MIT"}, one) == []
    assert "exception is for MPL-2.0" in check.licence_faults({"tool": "GPL-3.0-only"}, one)[0]
    assert check.licence_faults({}, one) == ["tool has an exception and is not used"]


# ---- secrets ---------------------------------------------------------------------------------------------------------

# Put together here, so that this file holds none.
SECRETS = {
    "AWS Access Key": "key = '" + "AKIA" + "J5Q7" * 4 + "'",
    "GitHub Token": "token: " + "ghp_" + "aB3dE6gH9j" * 3 + "kLmN12",
    "Private Key": "-----BEGIN EC " + "PRIVATE KEY-----",
    "Basic Auth Credentials": "url = 'postgresql://trainer:" + "Tr0ub4dor" + "@db/ledger'",
    "Secret Keyword": "pass" + "word = 'Tr0ub4dor&3'",
    "Hex High Entropy String": "KEY = '" + "9f86d081" + "884c7d65" + "9a2feaa0" + "c55ad015" + "'",
}


def test_the_repository_holds_nothing_like_a_secret_that_nobody_has_looked_at(check: ModuleType) -> None:
    files = check.repository_files(REPOSITORY)
    assert "Makefile" in files and "dpfa_hf/ledger.py" in files and len(files) > 100
    baseline = json.loads(check.BASELINE.read_text())
    assert check.secret_faults(check.scan(REPOSITORY, files), baseline) == []
    assert str(REPOSITORY) not in json.dumps(baseline)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_planted_secret_is_found_until_it_is_looked_at(check: ModuleType, kind: str, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "settings.py").write_text(f"# settings\n{SECRETS[kind]}\n")
    found = check.scan(tmp_path, check.repository_files(tmp_path))
    assert f"settings.py:2: {kind}" in check.secret_faults(found, json.loads(check.BASELINE.read_text()))
    baseline = tmp_path / "baseline"
    check.accept(found, baseline)
    # Lines move; a finding stays the one that was looked at. A second one is new.
    (tmp_path / "settings.py").write_text(f"# settings\n# of people\n{SECRETS[kind]}\n")
    accepted = json.loads(baseline.read_text())
    assert check.secret_faults(check.scan(tmp_path, ["settings.py"]), accepted) == []
    (tmp_path / "others.py").write_text(f"{SECRETS[kind]}\n")
    assert check.secret_faults(check.scan(tmp_path, ["settings.py", "others.py"]), accepted)[0].startswith(
        "others.py:1"
    )


def test_a_baseline_entry_that_nobody_has_labelled_does_not_count(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text(SECRETS["Private Key"] + "\n")
    found = check.scan(tmp_path, ["settings.py"])
    check.accept(found, tmp_path / "baseline")
    accepted = json.loads((tmp_path / "baseline").read_text())
    del accepted["results"]["settings.py"][0]["is_secret"]
    assert check.secret_faults(found, accepted) == ["settings.py:1: Private Key"]


def test_ids_of_runs_and_hashes_under_their_own_names_are_no_secrets_and_others_are(
    check: ModuleType, tmp_path: Path
) -> None:
    value = SECRETS["Hex High Entropy String"].split("'")[1]
    (tmp_path / "a.json").write_text(f'{{\n "run": "{value}",\n "plan_sha256": "{value * 2}"\n}}\n')
    (tmp_path / "b.json").write_text(f'{{\n "key": "{value}"\n}}\n')
    found = check.scan(tmp_path, ["a.json", "b.json"])
    assert check.secret_faults(found, {"results": {}}) == ["b.json:2: Hex High Entropy String"]


@pytest.mark.parametrize("arguments", [["sbom", "--accept"], ["secrets", "--package", "numpy"], ["everything"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "error:" in result.stderr
