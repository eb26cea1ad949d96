"""The fingerprint of the code, and the commit that it comes from."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from dpfa_hf import report, source

PACKAGE = Path(source.__file__).parent


def recomputed() -> str:
    """As docs/evidence.md says it, and as `sha256sum` would print it."""
    kernel = importlib.util.find_spec("dpfa_hf._kernel")
    assert kernel is not None and kernel.origin is not None
    lines = []
    for name, folder in (("dpfa_hf", PACKAGE), ("dpfa_hf/_kernel", Path(kernel.origin).parent)):
        for file in folder.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.parent.name != "_kernel":
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                lines.append(f"{digest}  {name}/{file.relative_to(folder).as_posix()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_the_fingerprint_is_that_of_the_packages_files_and_stands_in_every_report() -> None:
    source.package_sha256.cache_clear()
    assert source.package_sha256() == recomputed() == report._software()["dpfa-hf sha256"]


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_any_changed_added_or_renamed_file_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(PACKAGE, tmp_path / "dpfa_hf", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "__file__", str(tmp_path / "dpfa_hf" / "source.py"))

    def current() -> str:
        source.package_sha256.cache_clear()
        return source.package_sha256()

    seen = [current()]
    noise = tmp_path / "dpfa_hf" / "noise.py"
    noise.write_text(noise.read_text().replace("ChaCha20", "ChaCha8", 1))
    seen.append(current())
    (tmp_path / "dpfa_hf" / "evidence" / "evidence.schema.json").write_text("{}")
    seen.append(current())
    noise.rename(noise.with_name("quiet.py"))
    seen.append(current())
    (tmp_path / "dpfa_hf" / "more.py").touch()
    seen.append(current())
    (tmp_path / "dpfa_hf" / "__pycache__").mkdir()
    (tmp_path / "dpfa_hf" / "__pycache__" / "more.pyc").touch()
    assert len(set(seen)) == len(seen) and current() == seen[-1]
    source.package_sha256.cache_clear()


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "dpfa_hf"
    package.mkdir()
    (package / "source.py").write_text("first")
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    assert source.commit() is None
    git(tmp_path, "init", "--quiet")
    # Merely installed below somebody's checkout: not of it.
    assert source.commit() is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    assert source.commit() == {"sha": git(tmp_path, "rev-parse", "HEAD"), "changed_since": False}
    (package / "source.py").write_text("second")
    assert source.commit() == {"sha": git(tmp_path, "rev-parse", "HEAD"), "changed_since": True}
