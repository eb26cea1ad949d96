"""Every drill, and whether it could fail; and that runbooks name commands, options, drills and pages that exist."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import typer

from dpfa_hf.cli import app

DRILLS = Path(__file__).parents[1] / "drills"
RUNBOOKS = DRILLS.parents[1] / "docs" / "runbooks"
RUNS = {
    "zero_downtime": ["--requests", "150"],
    "stale_restore": [],
    "restore_round_trip": ["--database", "postgresql"],
    "restore_round_trip-sqlite": ["--database", "sqlite"],
    "key_rotation": [],
    "two_regions": ["--rounds", "10"],
    "exhausted_budget": [],
}
PAGES = sorted(page.name for page in RUNBOOKS.glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# To the end of the command: a backtick, a pipe, a comment, or the line.
COMMAND = re.compile(r"(?:^ {4,}|`)(?:\w+=\S+ )*(dpfa [a-z][^`\n|;#]*)", re.MULTILINE)


def run_drill(name: str, *options: str) -> tuple[int, str]:
    command = [sys.executable, str(DRILLS / f"{name.partition('-')[0]}.py"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def drills() -> Iterator[dict[str, Future[tuple[int, str]]]]:
    """All drills, two at a time: they wait more than they compute."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run_drill, name, *options) for name, options in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_drill_ends_well(name: str, drills: dict[str, Future[tuple[int, str]]]) -> None:
    code, output = drills[name].result()
    assert (code, output.splitlines()[-1]) == (0, "ok"), output


def test_every_drill_is_run_here() -> None:
    scripts = {path.stem for path in DRILLS.glob("*.py")} - {"drill", "training_job"}
    assert scripts == {name.partition("-")[0] for name in RUNS}


# ---- a drill can fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """A drill's module by its name; what it does to the environment and to signals ends with the test."""
    monkeypatch.syspath_prepend(str(DRILLS))
    handler = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ):
        yield importlib.import_module
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda drill: drill.check(1 + 1 == 3, "one and one is three"), "one and one is three: not so"),
        (lambda drill: drill.dpfa("plan", "--help", refused="room"), 'it is refused, and says "room": not so'),
        (lambda drill: drill.dpfa("ledger", "show", "--ledger", "sqlite:////nowhere/l.db", refused="room"), '"room"'),
        (lambda drill: drill.run("false"), "exit code 1"),
        (lambda drill: drill.run("true", refused="wrong password"), "wrong password"),
        (lambda drill: drill.run("no-such-program"), "no-such-program is not installed"),
        (lambda drill: drill.until_step(drill.start("echo", "step 1"), 2), "ended before step 2"),
        (
            lambda drill: drill.ended(drill.start("sh", "-c", "echo step 1; echo full; exit 1"), refused="full"),
            "it has taken no step: not so",
        ),
        (lambda drill: {}["anything"], "anything"),
    ],
)
def test_a_drill_that_does_not_hold_says_failed_and_leaves_no_process(
    body: Callable[[Any], object],
    why: str,
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    def broken(drill: Any, options: argparse.Namespace) -> None:
        started.append((drill.start("sleep", "600"), drill.folder))
        body(drill)

    monkeypatch.setattr(sys, "argv", ["broken.py"])
    with pytest.raises(SystemExit) as ended:
        module("drill").main(broken, argparse.ArgumentParser())
    output = capsys.readouterr().out
    assert ended.value.code == 1
    assert output.splitlines()[-1].startswith("FAILED") and why in output
    ((sleeper, folder),) = started
    assert sleeper.poll() == -signal.SIGTERM and not folder.exists()


def test_so_few_requests_or_rounds_that_they_would_show_nothing_are_refused(
    module: Callable[[str], ModuleType],
) -> None:
    number = module("drill").at_least(150)
    assert number("150") == 150
    with pytest.raises(argparse.ArgumentTypeError, match="149 is less than 150, which would show nothing"):
        number("149")


HEY = """
Status code distribution:
  [200]\t{good} responses
{rest}
"""


@pytest.mark.parametrize(
    ("rest", "bad"),
    [
        ("", []),
        ("  [502]\t3 responses\n", ["3 with status 502"]),
        (
            '\nError distribution:\n  [2]\tPost "http://127.0.0.1:44423/": EOF',
            ['[2] Post "http://127.0.0.1:44423/": EOF'],
        ),
    ],
)
def test_requests_that_failed_are_found_in_what_hey_says(
    rest: str, bad: list[str], module: Callable[[str], ModuleType]
) -> None:
    judged = module("zero_downtime").judged
    assert judged(HEY.format(good=1017, rest=rest)) == (1017, bad)
    with pytest.raises(Exception, match="hey has counted nothing"):
        judged("Error distribution: none was answered")


# ---- runbooks ------------------------------------------------------------------------------------------------------


def command_problems(text: str) -> list[str]:
    """What the commands in a page name that `dpfa` does not have, as its --help says."""
    problems = []
    for command in COMMAND.findall(text):
        words, entry, path = command.split()[1:], typer.main.get_command(app), "dpfa"
        while words and hasattr(entry, "commands") and not words[0].startswith("-"):
            path, name = f"{path} {words[0]}", words.pop(0)
            if name not in entry.commands:
                problems.append(f"no command {path}")
                break
            entry = entry.commands[name]
        else:
            known = {option for parameter in entry.params for option in parameter.opts} | {"--help"}
            options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
            problems += [f"{path} has no {option}" for option in options if option not in known]
    return problems


def link_problems(page: Path) -> list[str]:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    return [link for link in links if not (page.parent / link).exists()]


def drill_problems(text: str) -> list[str]:
    """Drills that a page names, by their path or by their name alone, and that do not exist."""
    named = re.findall(r"(?:deploy/drills/|`)(\w+\.py)\b", text)
    return [name for name in named if not (DRILLS / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_a_runbook_names_what_exists(page: str) -> None:
    text = (RUNBOOKS / page).read_text(encoding="utf-8")
    assert command_problems(text) == []
    assert link_problems(RUNBOOKS / page) == []


def test_wrong_commands_and_links_in_a_runbook_are_found(tmp_path: Path) -> None:
    text = "    dpfa ledger restor x\n\nor `dpfa ledger restore x --unwitnesed`\n\n    A=b dpfa gate --epsilon 3\n"
    expected = ["no command dpfa ledger restor", "dpfa ledger restore has no --unwitnesed"]
    expected.append("dpfa gate has no --epsilon")
    assert command_problems(text) == expected
    assert command_problems("`dpfa ledger restore x --unwitnessed`, and `dpfa ledger show`") == []
    page = tmp_path / "page.md"
    page.write_text("[there](page.md) [not there](nowhere.md) [elsewhere](https://example.org/x)")
    assert link_problems(page) == ["nowhere.md"]
    assert drill_problems("`no_such.py` or python deploy/drills/none.py") == ["no_such.py", "none.py"]
    assert drill_problems("`drill.py` and `tests/test_resume.py`") == []


def test_the_index_names_every_page_and_every_drill() -> None:
    index = (RUNBOOKS / "README.md").read_text(encoding="utf-8")
    assert {page for page in PAGES if f"({page})" not in index} == {"README.md"}
    assert drill_problems(index) == []
    assert {path.name for path in DRILLS.glob("*.py")} - set(re.findall(r"(\w+\.py)", index)) == {
        "drill.py",
        "training_job.py",
    }


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("dpfa-") and page != "README.md"])
def test_a_page_says_when_who_what_it_means_and_what_never_to_do(page: str) -> None:
    text = (RUNBOOKS / page).read_text(encoding="utf-8")
    assert "**When:**" in text and "**Who:**" in text and "## Never" in text and "python deploy/drills/" in text
    assert "## What it means for epsilon" in text or page == "suspected-leak.md"
    assert drill_problems(text) == []
