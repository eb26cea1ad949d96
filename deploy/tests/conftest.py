"""The programs that deploy/ is tested with. `make test-ops` installs them; one that is missing fails the test."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Name of a program -> its path: HELM, KUBECTL and CHECKOV as the Makefile sets them, the others on the PATH."""

    def find(name: str) -> str:
        path = shutil.which(os.environ.get(name.upper(), name))
        if path is None:
            pytest.fail(f"{name} is not installed: run `make test-ops`, which installs it")
        return path

    return find


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A port of 127.0.0.1 that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
