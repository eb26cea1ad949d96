"""deploy/kustomize is what the chart renders, and `kubectl kustomize` builds it."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

KUSTOMIZE = Path(__file__).parents[1] / "kustomize"
CHART = KUSTOMIZE.parent / "helm" / "dpfa"
OVERLAYS = sorted(each.name for each in (KUSTOMIZE / "overlays").iterdir())


def differences(left: Path, right: Path) -> list[str]:
    found = []
    files = {each.relative_to(folder) for folder in (left, right) for each in folder.rglob("*.yaml")}
    for file in sorted(files):
        one, other = left / file, right / file
        if not (one.exists() and other.exists() and filecmp.cmp(one, other, shallow=False)):
            found.append(str(file))
    return found


def test_it_is_fresh_and_a_stale_file_is_found(tool: Callable[[str], str], tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    command = [sys.executable, str(KUSTOMIZE / "build.py"), str(new)]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "HELM": tool("helm")})
    stale = differences(KUSTOMIZE, new)
    assert stale == [], f"run `python deploy/kustomize/build.py`: {stale} differ from the chart"
    (new / "base" / "kustomization.yaml").unlink()
    edited = new / "overlays" / "one-node" / "job-dpfa-run-1.yaml"
    edited.write_text(edited.read_text().replace("/app/train.py", "/app/other.py"))
    assert differences(KUSTOMIZE, new) == ["base/kustomization.yaml", "overlays/one-node/job-dpfa-run-1.yaml"]


def by_name(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(each["kind"], each["metadata"]["name"]): each for each in yaml.load_all(text, yaml.CSafeLoader) if each}
    for each in found.values():
        for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            each["metadata"]["labels"].pop(label, None)
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_builds_what_the_chart_renders(name: str, tool: Callable[[str], str], tmp_path: Path) -> None:
    shutil.copytree(KUSTOMIZE, tmp_path / "kustomize")
    built = subprocess.run(
        [tool("kubectl"), "kustomize", str(tmp_path / "kustomize" / "overlays" / name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert built.returncode == 0, built.stderr
    values = CHART / f"values-{name}.yaml"
    rendered = subprocess.run(
        [tool("helm"), "template", "dpfa", str(CHART), "--namespace", "dpfa", "--values", str(values)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert by_name(built.stdout) == by_name(rendered.stdout)


def test_there_is_an_overlay_for_each_example() -> None:
    assert sorted(each.stem.removeprefix("values-") for each in CHART.glob("values-*.yaml")) == OVERLAYS
