"""`dpfa watch`: what it shows, in a terminal and in a pipe, and that looking changes nothing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from typer.testing import CliRunner, Result

from dpfa_hf import cli
from dpfa_hf.accounting import EpsilonCurve, make_plan
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.cli import watch
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan

ASKED: dict[str, Any] = {"target_epsilon": 9.0, "noise_multiplier": 2.0, "accountant": "rdp"}


def dpfa(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    arguments = PrivacyArguments(**ASKED, sampling_probability=1.0)
    return make_plan(arguments, num_units=100, expected_batch_size=10, max_steps=5)


def open_run(ledger: Ledger, plan: PrivacyPlan, /, **changed: Any) -> str:
    usual: dict[str, Any] = {
        "dataset": "notes [bold]", "plan": plan.to_dict(), "plan_hash": plan.sha256(), "epsilon": plan.epsilon,
        "delta": plan.delta, "max_steps": plan.max_steps, "privacy_unit": "example", "adjacency": "zero_out",
        "budget": None,
    }  # fmt: skip
    return ledger.open_run(**{**usual, **changed})


@pytest.fixture
def place(tmp_path: Path, plan: PrivacyPlan) -> tuple[str, list[str]]:
    """A ledger's URL and its runs: three steps of five under a budget, an unnamed data set, one NOT PRIVATE."""
    url = f"sqlite:///{tmp_path}/ledger.db"
    with Ledger(url) as ledger:
        runs = [open_run(ledger, plan, budget=(20.0, 1e-2))]
        for step in (1, 2, 3):
            ledger.charge_step(runs[0], step)
        secret = "unnamed-" + ledger.fingerprint(b"people")
        runs.append(open_run(ledger, plan, dataset=secret, plan={"of": "another version"}, plan_hash="0" * 64))
        unsafe = make_plan(
            PrivacyArguments(target_epsilon=math.inf, noise_multiplier=1.0),
            num_units=100, expected_batch_size=10, max_steps=5,
        )  # fmt: skip
        runs.append(open_run(ledger, unsafe, dataset=secret, epsilon=math.inf))
        ledger.charge_step(runs[2], 1)
        ledger.end_run(runs[2], "stopped early")
    return url, runs


def test_json_has_steps_progress_guarantee_and_budgets(place: tuple[str, list[str]], plan: PrivacyPlan) -> None:
    url, runs = place
    result = dpfa("watch", "--ledger", url, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    with Ledger(url, create=False) as ledger:
        head = list(ledger.head())
    assert (found["ledger"], found["head"], found["moved_to"], found["runs_left_out"]) == (url, head, None, 0)
    first, unreadable, unsafe = found["runs"]
    assert first == {
        "run": runs[0], "dataset": "notes [bold]", "status": "running", "steps": 3, "max_steps": 5,
        "epsilon_so_far": EpsilonCurve(plan).at(3), "epsilon": plan.epsilon, "delta": plan.delta,
    }  # fmt: skip
    assert 0 < first["epsilon_so_far"] < first["epsilon"]
    assert (unreadable["dataset"], unreadable["epsilon_so_far"]) == ("unnamed 1", None)
    assert (unsafe["epsilon_so_far"], unsafe["epsilon"], unsafe["status"]) == ("inf", "inf", "stopped early")
    assert found["datasets"][0]["budget"] == {"epsilon": 20.0, "delta": 1e-2}
    assert (found["datasets"][0]["epsilon"], found["datasets"][1]["epsilon"]) == (plan.epsilon, "inf")
    assert found["datasets"][1]["budget"] is None
    assert not re.search(r"unnamed-[0-9a-f]", result.stdout)


def test_a_pipe_gets_one_table_whole_and_without_fingerprints(place: tuple[str, list[str]], plan: PrivacyPlan) -> None:
    url, runs = place
    for arguments in (("--once",), (), ("--run", runs[0]), ("--run", runs[0][:12])):
        result = dpfa("watch", "--ledger", url, *arguments)
        assert result.exit_code == 0
        for text in (runs[0][:12], "3 of 5", "notes [bold]", f"{EpsilonCurve(plan).at(3):.4g}", "running", "━"):
            assert text in result.stdout
        assert "\x1b" not in result.stdout and "unnamed-" not in result.stdout
        assert (runs[2][:12] in result.stdout) == ("--run" not in arguments)
        assert ("NOT PRIVATE" in result.stdout) == ("--run" not in arguments)


def test_only_the_latest_runs_are_shown_and_it_says_so(
    place: tuple[str, list[str]], plan: PrivacyPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_LATEST_RUNS", 1)
    url, runs = place
    result = dpfa("watch", "--ledger", url)
    assert "2 older runs are not shown" in result.stdout
    assert runs[2][:12] in result.stdout and runs[0][:12] not in result.stdout
    found = json.loads(dpfa("watch", "--ledger", url, "--json").stdout)
    assert ([each["run"] for each in found["runs"]], found["runs_left_out"]) == ([runs[2]], 2)


def test_looking_neither_creates_nor_changes_a_ledger(place: tuple[str, list[str]], tmp_path: Path) -> None:
    missing = dpfa("watch", "--ledger", f"sqlite:///{tmp_path}/none.db")
    assert missing.exit_code == 1 and "there is no ledger" in missing.stderr and missing.stderr.count("\n") == 1
    assert not (tmp_path / "none.db").exists()
    url, _ = place
    file = tmp_path / "ledger.db"
    before = file.read_bytes()
    # Whoever holds a connection keeps the file from being tidied up at the end of another's.
    with sqlite3.connect(file) as holder:
        tables = ("dpfa_meta", "dpfa_entries", "dpfa_datasets", "dpfa_runs")
        questions = ["PRAGMA data_version", *(f"SELECT * FROM {table}" for table in tables)]
        content = [holder.execute(question).fetchall() for question in questions]
        assert dpfa("watch", "--ledger", url).exit_code == 0
        # SQLite's number changes with every commit of another connection.
        assert [holder.execute(question).fetchall() for question in questions] == content
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--interval", "0"), 2, "Usage"),
        (("--interval", "soon"), 2, "Usage"),
        (("--run", "nonsense"), 1, "run nonsense is not in ledger"),
        (("--nonsense",), 2, "Usage"),
    ],
)
def test_wrong_usage_and_unknown_runs_are_refused(
    arguments: tuple[str, ...], code: int, said: str, place: tuple[str, list[str]]
) -> None:
    result = dpfa("watch", "--ledger", place[0], *arguments)
    assert result.exit_code == code and said in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_a_beginning_that_several_runs_share_is_refused(tmp_path: Path, plan: PrivacyPlan) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    with Ledger(url) as ledger:
        # More runs than there are digits.
        runs = [open_run(ledger, plan) for _ in range(17)]
    shared = Counter(run[0] for run in runs).most_common(1)[0][0]
    result = dpfa("watch", "--ledger", url, "--run", shared)
    assert result.exit_code == 1 and "runs begin" in result.stderr and result.stderr.count("\n") == 1


def test_help_explains_and_gives_an_example() -> None:
    result = dpfa("watch", "--help")
    assert result.exit_code == 0 and "Example: dpfa watch" in " ".join(result.stdout.split())


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, list[bytes]]]:
    """A terminal to write to, and what it has shown, once the fixture's thread has read it."""
    ours, theirs = pty.openpty()
    written: list[bytes] = []

    def read() -> None:
        # Reading what a closed terminal had to say ends with an error.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                written.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w") as stdout:
        yield stdout, written
    reader.join()
    os.close(ours)


def test_in_a_terminal_it_follows_the_run_until_ctrl_c(
    place: tuple[str, list[str]], terminal: tuple[TextIO, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, runs), (stdout, written), waits = place, terminal, []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) > 1:
            raise KeyboardInterrupt
        with Ledger(url) as ledger:
            ledger.resume_run(runs[0], ledger.run(runs[0]).plan_hash)
            ledger.charge_step(runs[0], 4)

    with monkeypatch.context() as patch:
        for name, value in {"TERM": "xterm", "COLUMNS": "140", "LINES": "40"}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(watch.time, "sleep", wait)
        watch.watch(ledger=url, interval=0.7)
        stdout.flush()
    assert waits == [0.7, 0.7]
    deadline = time.monotonic() + 60
    while b"\x1b[?25h" not in b"".join(written) and time.monotonic() < deadline:
        time.sleep(0.01)
    shown = b"".join(written).decode()
    assert 0 < shown.index("3 of 5") < shown.index("4 of 5")
    # The cursor is back, and the last table stays.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
