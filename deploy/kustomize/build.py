"""Render the Helm chart into a base and overlays for `kubectl kustomize`: python deploy/kustomize/build.py [FOLDER]

Each values file of the chart is an overlay. What all of them render alike is the base. Needs helm (HELM, or on
the PATH).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

KUSTOMIZE = Path(__file__).resolve().parent
CHART = KUSTOMIZE.parent / "helm" / "dpfa"
NAMESPACE = "dpfa"
HEAD = "# Written by deploy/kustomize/build.py from the Helm chart; change the chart's values instead.\n"


def render(values: Path) -> dict[str, dict[str, Any]]:
    """By name of a file: the manifest. Labels that name Helm are left out: nothing here is Helm's."""
    helm = shutil.which(os.environ.get("HELM", "helm"))
    if helm is None:
        sys.exit("helm is missing: run `make test-ops`, which installs it, or set HELM")
    command = [helm, "template", "dpfa", str(CHART), "--namespace", NAMESPACE, "--values", str(values)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    manifests = {}
    for each in yaml.load_all(done.stdout, yaml.CSafeLoader):
        if each:
            labels = each["metadata"]["labels"]
            labels.pop("helm.sh/chart")
            labels["app.kubernetes.io/managed-by"] = "Kustomize"
            manifests[f"{each['kind'].lower()}-{each['metadata']['name']}.yaml"] = each
    return manifests


def build(folder: Path) -> None:
    """Writes base/ and overlays/ anew."""
    overlays = {values.stem.removeprefix("values-"): render(values) for values in sorted(CHART.glob("values-*.yaml"))}
    first, *others = overlays.values()
    base = {name: it for name, it in first.items() if all(other.get(name) == it for other in others)}
    for old in ("base", "overlays"):
        shutil.rmtree(folder / old, ignore_errors=True)
    _write(folder / "base", base, [])
    for name, manifests in overlays.items():
        own = {file: it for file, it in manifests.items() if file not in base}
        _write(folder / "overlays" / name, own, ["../../base"])


def _write(folder: Path, manifests: dict[str, dict[str, Any]], resources: list[str]) -> None:
    folder.mkdir(parents=True)
    for file, it in manifests.items():
        (folder / file).write_text(HEAD + yaml.safe_dump(it, sort_keys=False))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [*resources, *sorted(manifests)],
    }
    (folder / "kustomization.yaml").write_text(HEAD + yaml.safe_dump(kustomization, sort_keys=False))


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else KUSTOMIZE)
