"""What every drill shares: a folder and an environment of its own, programs that end with it, and a last line.

A drill prints what it does and what it finds. Its last line is "ok", with exit code 0, or begins with "FAILED", with
exit code 1. It leaves no process and, unless --keep names a folder, no file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
from typer.testing import CliRunner

from dpfa_hf.cli import app

REPOSITORY = Path(__file__).resolve().parents[2]
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
JOB = Path(__file__).with_name("training_job.py")
PATIENCE_S = 600.0  # until a program must have started or ended, on a busy machine

# dp_accounting names every order that RDP passes over.
absl.logging.set_verbosity(absl.logging.ERROR)


class DrillFailed(Exception):
    """What did not hold."""


@dataclass(frozen=True)
class Result:
    """What a command ended with."""

    code: int
    output: str


class Drill:
    """One run of a drill in `folder`.

    `DPFA_LEDGER` and the rest are set in the environment of this very process, as a shell would, and programs inherit
    them. Whatever the caller's environment says of ledgers and keys is taken out first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs: list[subprocess.Popen[str]] = []
        for name in [name for name in os.environ if name.startswith(("DPFA_", "RESTIC_"))]:
            del os.environ[name]
        path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"]
        os.environ |= {"PATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.environ.setdefault("OMP_NUM_THREADS", "1")

    def say(self, text: str) -> None:
        for place, name in ((self.folder, "$DRILL"), (sys.executable, "python"), (REPOSITORY, ".")):
            text = text.replace(str(place), name)
        print(text, flush=True)

    def check(self, holds: bool, what: str, seen: object = "") -> None:
        """Prints `what`, or ends the drill with it and with what was seen instead."""
        if not holds:
            raise DrillFailed(f"{what}: not so. {seen}")
        self.say(f"    holds: {what}")

    def dpfa(self, *arguments: str, refused: str | None = None) -> str:
        """What `dpfa` prints, by its own entry point in this process, which saves its start.

        Without `refused` the command must end well; with it, in exit code 1 and with these words.
        """
        self.say("$ " + shlex.join(["dpfa", *arguments]))
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return self._judged(Result(result.exit_code, result.output), refused)

    def run(self, *command: str, refused: str | None = None, **environment: str) -> str:
        """What a program prints, on stdout and stderr; `refused` as in `dpfa`, with any exit code but 0."""
        self.say("$ " + shlex.join(command))
        done = subprocess.run(
            [found(command[0]), *command[1:]],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        return self._judged(Result(done.returncode, done.stdout), refused)

    def _judged(self, result: Result, refused: str | None) -> str:
        self.say(f"    {_in_one_line(result.output)}")
        if refused is None and result.code != 0:
            raise DrillFailed(f"it ended with exit code {result.code}:\n{result.output[-2000:]}")
        if refused is not None:
            self.check(
                result.code != 0 and refused in " ".join(result.output.split()),
                f'it is refused, and says "{refused}"',
                f"exit code {result.code}:\n{result.output[-2000:]}",
            )
        return result.output

    def start(self, *command: str, log: Path | None = None) -> subprocess.Popen[str]:
        """Starts a program that is ended with the drill. Its output goes to `log`, or else can be read line by line."""
        self.say("$ " + shlex.join(command) + " &")
        with contextlib.ExitStack() as stack:
            stdout = subprocess.PIPE if log is None else stack.enter_context(log.open("a"))
            program = subprocess.Popen(
                [found(command[0]), *command[1:]],
                stdout=stdout,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._programs.append(program)
        return program

    def stop(self, program: subprocess.Popen[str], how: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal to a program and waits for its end; after a minute all of its processes are killed."""
        with contextlib.suppress(ProcessLookupError):
            program.send_signal(how)
        try:
            program.wait(60)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()

    def stop_all(self) -> None:
        for program in reversed(self._programs):
            if program.poll() is None:
                self.stop(program)
            if program.stdout is not None:
                program.stdout.close()

    def wait(self, condition: Callable[[], bool], what: str, program: subprocess.Popen[str] | None = None) -> None:
        """Waits for `what`; fails where `program` ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if program is not None and program.poll() is not None:
                raise DrillFailed(f"waited for {what}, and the program ended with exit code {program.returncode}")
            if time.monotonic() > deadline:
                raise DrillFailed(f"waited {PATIENCE_S:.0f} s in vain for {what}")
            time.sleep(0.05)

    # ---- training ---------------------------------------------------------------------------------------------------

    def job(self, *options: str) -> subprocess.Popen[str]:
        """Starts the training job, a process of its own."""
        return self.start(sys.executable, str(JOB), *options)

    def until_step(self, job: subprocess.Popen[str], step: int) -> None:
        """Reads a job's output until it has taken `step`."""
        assert job.stdout is not None
        seen = []
        for line in job.stdout:
            seen.append(line)
            if line.strip() == f"step {step}":
                return self.say(f"    the job has taken step {step}")
        raise DrillFailed(f"the job ended before step {step}:\n{''.join(seen)[-2000:]}")

    def ended(self, job: subprocess.Popen[str], refused: str | None = None) -> str:
        """What a job has printed till its end; `refused` as in `run`, and then it must not have taken a step."""
        output = job.communicate(timeout=PATIENCE_S)[0]
        self._judged(Result(job.returncode, output), refused)
        if refused is not None:
            steps = [line for line in output.splitlines() if line.startswith("step ")]
            self.check(not steps, "it has taken no step", output)
        return output


def _in_one_line(output: str) -> str:
    """The whole of JSON, the last line of anything else."""
    with contextlib.suppress(ValueError):
        return json.dumps(json.loads(output))
    return (output.strip().splitlines() or [""])[-1]


def found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise DrillFailed(f"{program} is not installed: `make test-ops` installs what the drills need")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def copy_file(source: Path, target: Path) -> None:
    """Copies one moment of a SQLite file that may be being written, as a snapshot of the volume does."""
    with contextlib.closing(sqlite3.connect(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
        old.backup(new)


@contextlib.contextmanager
def postgresql() -> Iterator[Any]:
    """A PostgreSQL server of its own: that of the project's tests."""
    spec = importlib.util.spec_from_file_location("dpfa_tests_conftest", REPOSITORY / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # A folder of its own, since the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="dpfa-") as folder:
        server = module.PostgreSQL(Path(folder))
        try:
            yield server
        finally:
            server.kill()


def runbook_code(page: str) -> str:
    """The first block of Python in a runbook: what the page tells people to run is what the drill runs."""
    text = (RUNBOOKS / page).read_text(encoding="utf-8")
    return text.partition("```python\n")[2].partition("```")[0]


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: whole numbers, of which fewer would show nothing."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}, which would show nothing")
        return value

    return number


def _terminated(*_: object) -> NoReturn:
    raise DrillFailed("it was terminated")


def main(drill: Callable[[Drill, argparse.Namespace], None], parser: argparse.ArgumentParser) -> NoReturn:
    """Runs `drill` in a fresh folder and ends the process with its result."""
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="run in this new folder, and keep it")
    options = parser.parse_args()
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep: {options.keep} exists; name a new folder")
    signal.signal(signal.SIGTERM, _terminated)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if options.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpfa-drill-")))
        else:
            folder = options.keep.resolve()
            folder.mkdir(parents=True)
        run = Drill(folder)
        stack.callback(run.stop_all)
        try:
            drill(run, options)
        except Exception as failure:
            if not isinstance(failure, DrillFailed):
                traceback.print_exc()
            run.say(f"{failure}\nFAILED: see above" if "\n" in str(failure) else f"FAILED: {failure}")
            sys.exit(1)
    print(f"{time.monotonic() - started:.0f} s\nok", flush=True)
    sys.exit(0)
