"""Writes rules.yaml and dashboard.json from rules.py and dashboard.py, here and into the Helm chart's files.

    python deploy/monitoring/build.py
    python deploy/monitoring/build.py --base-url https://git.example.com/ml/dpfa_hf --to /tmp/monitoring

The base URL is where alerts find their runbook pages: <base URL>/docs/runbooks/<alert>.md.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import dashboard
import rules
import yaml

HERE = Path(__file__).parent
CHART_FILES = HERE.parent / "helm" / "dpfa" / "files"
HEADER = "# Written by deploy/monitoring/build.py from rules.py: change it there.\n"


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay so."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def build(folder: Path, base_url: str) -> None:
    """Writes both files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = yaml.dump(rules.rules(base_url), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
    (folder / "rules.yaml").write_text(HEADER + content, encoding="utf-8")
    (folder / "dashboard.json").write_text(dashboard.build(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default=rules.BASE_URL, help=f"of your repository (default: {rules.BASE_URL})")
    parser.add_argument("--to", type=Path, help="another folder, instead of here and the chart's")
    asked = parser.parse_args()
    if not re.fullmatch(r"https?://[^\s{}]+", asked.base_url):
        parser.error(f"--base-url {asked.base_url!r} is no http or https URL, so alerts would lead nowhere")
    for folder in (HERE, CHART_FILES) if asked.to is None else (asked.to,):
        build(folder, asked.base_url.rstrip("/"))


if __name__ == "__main__":
    main()
