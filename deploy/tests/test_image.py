"""deploy/Containerfile, as far as it can be tried without a container runtime and an image registry."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[1]
REPOSITORY = DEPLOY.parent


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def problems(text: str) -> set[str]:
    found, steps = set(), instructions(text)
    bases = [rest for name, rest in steps if name == "FROM"]
    if not all(re.fullmatch(r"\S+:\d+\.\d+\.\d+-\S+", base) for base in bases):
        found.add("base image without a full version")
    for name, rest in steps:
        if name == "COPY" and any(not (REPOSITORY / source).exists() for source in rest.split()[:-1]):
            found.add("COPY of what is not there")
        if name == "RUN" and "pip install" in rest and "-c constraints.txt" not in rest:
            found.add("pip without constraints")
        if name in ("ENV", "ARG") and re.search(r"PASSWORD|TOKEN|SECRET|://\S*:\S*@", rest):
            found.add("secret in the image")
    users = [rest for name, rest in steps if name == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        found.add("root")
    return found


def test_the_containerfile_is_sound_and_planted_mistakes_are_found() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    assert problems(text) == set()
    assert problems(re.sub(r"FROM \S+", "FROM python:3", text)) == {"base image without a full version"}
    assert problems(text.replace("COPY kernels", "COPY kernel")) == {"COPY of what is not there"}
    assert problems(text.replace("-c constraints.txt", "")) == {"pip without constraints"}
    assert problems(re.sub(r"\nUSER .*", "", text)) == {"root"}
    assert problems(text + "ENV DPFA_LEDGER=postgresql://a:b@c/d\n") == {"secret in the image"}


def test_its_user_is_the_charts(tmp_path: Path) -> None:
    values = yaml.safe_load((DEPLOY / "helm" / "dpfa" / "values.yaml").read_text())
    user = next(rest for name, rest in instructions((DEPLOY / "Containerfile").read_text()) if name == "USER")
    assert user == f"{values['podSecurity']['user']}:{values['podSecurity']['group']}"
    scripts = [rest.split() for name, rest in instructions((DEPLOY / "Containerfile").read_text()) if name == "COPY"]
    assert ["deploy/train.py", values["training"]["script"]] in scripts


def test_pip_builds_the_package_from_what_is_copied_and_finds_the_rest_in_constraints(tmp_path: Path) -> None:
    steps = instructions((DEPLOY / "Containerfile").read_text())
    for name, rest in steps:
        if name == "COPY" and rest.split()[-1] != "/app/train.py":
            for source in rest.split()[:-1]:
                target = tmp_path / source
                if (REPOSITORY / source).is_dir():
                    shutil.copytree(REPOSITORY / source, target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(REPOSITORY / source, target)
    (install,) = (rest for name, rest in steps if name == "RUN" and "pip install" in rest)
    _, *arguments = shlex.split(install)
    # Offline, against this environment: what a constraint or an extra does not meet, pip would have to fetch.
    arguments = [each for each in arguments if each not in ("--no-cache-dir", "--no-compile")]
    done = subprocess.run(
        [sys.executable, *arguments, "--dry-run", "--no-index", "--no-build-isolation", "--disable-pip-version-check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^Would install (.*)$", done.stdout, re.M) == ["dpfa-hf-0.1.0"], done.stdout[-2000:]


def test_checkov_finds_nothing_but_what_is_planted(tool: Callable[[str], str], tmp_path: Path) -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for name, content in {"good": text, "bad": text.replace("USER 10001:10001", "USER root")}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "Dockerfile").write_text(content)
    done = subprocess.run(
        [tool("checkov"), "--framework", "dockerfile", "--directory", str(tmp_path), "--output", "json", "--quiet"]
        + ["--skip-download"],
        capture_output=True,
        text=True,
        timeout=150,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LOG_LEVEL": "ERROR"},
    )
    result = json.loads(done.stdout)
    assert result["summary"]["passed"] > 40
    assert {(each["check_id"], each["file_path"]) for each in result["results"]["failed_checks"]} == {
        ("CKV_DOCKER_8", "/bad/Dockerfile")
    }
