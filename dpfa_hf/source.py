"""Which code this is: a fingerprint of the package's files, and the commit that they were checked out from."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def package_sha256() -> str:
    """SHA-256 of the sorted lines that `sha256sum` prints for this package's files: one hash and path for each.

    The same whether the package was installed from a wheel or is used from a checkout, in which the kernel lies
    elsewhere. Bytecode is left out.
    """
    lines = sorted(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {path}\n" for path, file in _files())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def commit() -> dict[str, str | bool] | None:
    """The commit of the checkout that this package is used from, and whether files were changed since; None without.

    A package that is merely installed somewhere below a checkout, in a virtual environment, is not of that checkout.
    """
    folder = Path(__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", ".")
    return None if head is None or changes is None else {"sha": head.strip(), "changed_since": bool(changes.strip())}


def _files() -> Iterator[tuple[str, Path]]:
    package = Path(__file__).parent
    kernel = importlib.util.find_spec("dpfa_hf._kernel")
    folders = {"dpfa_hf": package}
    if kernel is not None and kernel.origin is not None:
        folders["dpfa_hf/_kernel"] = Path(kernel.origin).parent
    for name, folder in folders.items():
        for file in folder.rglob("*"):
            inside = file.relative_to(folder)
            # In a wheel the kernel is inside the package, and is counted by its own folder.
            is_kernel = name == "dpfa_hf" and inside.parts[0] == "_kernel"
            if file.is_file() and "__pycache__" not in inside.parts and not is_kernel:
                yield f"{name}/{inside.as_posix()}", file


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
