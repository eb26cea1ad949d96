from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from dpfa_hf import database
from dpfa_hf import ledger as ledger_module
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import DatasetRecord, Ledger, RunRecord

REPOSITORY = str(Path(__file__).resolve().parents[1])
# The package's own import loads transformers, which a child that only needs the ledger should not wait for.
LEDGER_ALONE = f"""
import sys, types
sys.modules["dpfa_hf"] = types.ModuleType("dpfa_hf")
sys.modules["dpfa_hf"].__path__ = [{REPOSITORY + "/dpfa_hf"!r}]
"""
PLAN = {"sampling_probability": 0.01, "noise_multiplier": 1.1, "note": "é", "groups": [1, 2]}


def ask(**changes: Any) -> dict[str, Any]:
    return {
        "dataset": "reviews",
        "plan": PLAN,
        "plan_hash": "a" * 64,
        "epsilon": 1.0,
        "delta": 1e-6,
        "max_steps": 5,
        "privacy_unit": "example",
        "adjacency": "zero_out",
        "budget": None,
    } | changes


both = pytest.mark.parametrize("url", ["sqlite", "postgresql"], indirect=True)
"""What the test says holds on SQLite and on a real PostgreSQL server."""


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite3"
    server = request.getfixturevalue("postgresql")
    return server.url(server.emptied_database())


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with Ledger(url) as opened:
        yield opened


@contextlib.contextmanager
def behind_its_back(url: str) -> Iterator[sa.Connection]:
    """A connection to the ledger's database, which commits at the end."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def sql(url: str, *statements: str) -> None:
    """Edits the database behind the ledger's back."""
    with behind_its_back(url) as connection:
        for statement in statements:
            assert connection.exec_driver_sql(statement).rowcount != 0, statement


def refused(pattern: str) -> Any:
    return pytest.raises(PrivacyError, match=pattern)


def one_line(error: pytest.ExceptionInfo[PrivacyError]) -> str:
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 600
    return text


def child(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LEDGER_ALONE + script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


# --- what is recorded -------------------------------------------------------------------------------------------------


@both
def test_a_run_is_recorded_as_asked_and_survives_reopening(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask(budget=(3.0, 1e-5)))
    assert [ledger.charge_step(run, step) for step in (1, 2, 3)] == [1, 2, 3]
    ledger.close()
    with Ledger(url) as again:
        record = again.run(run)
        assert record == RunRecord(
            run=run,
            dataset="reviews",
            steps=3,
            max_steps=5,
            epsilon=1.0,
            delta=1e-6,
            budget=(3.0, 1e-5),
            privacy_unit="example",
            adjacency="zero_out",
            plan=PLAN,
            plan_hash="a" * 64,
            status="running",
            created=record.created,
        )
        assert record.created.endswith("+00:00") and again.runs() == [record] and again.verify() == []
        assert again.datasets() == [DatasetRecord("reviews", (3.0, 1e-5), "example", "zero_out", 1.0, 1e-6, 1)]


def test_an_infinite_epsilon_is_valid_json_and_reads_back_as_infinity(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask(epsilon=math.inf, plan={"target_epsilon": math.inf}))
    assert ledger.run(run).epsilon == math.inf and ledger.run(run).plan == {"target_epsilon": "inf"}
    assert ledger.datasets()[0].epsilon == math.inf and ledger.verify() == []
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        payloads = [text for (text,) in connection.execute("SELECT payload FROM dpfa_entries")]
        valid = connection.execute("SELECT min(json_valid(payload)) FROM dpfa_entries").fetchone()
    assert valid == (1,) and not any("Infinity" in text or "NaN" in text for text in payloads)


def test_step_entries_hold_no_time(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask())
    ledger.charge_step(run, 1)
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(dpfa_entries)")]
        payload = connection.execute("SELECT payload FROM dpfa_entries WHERE kind = 'step'").fetchone()[0]
    assert columns == ["seq", "run", "kind", "payload", "prev", "hash"] and payload == '{"step":1}'


def test_fingerprints_are_keyed_by_the_ledger(tmp_path: Path, url: str, ledger: Ledger) -> None:
    mark = ledger.fingerprint(b"rows")
    with Ledger(url) as same, Ledger(f"sqlite:///{tmp_path}/other.sqlite3") as other:
        assert same.fingerprint(b"rows") == mark != other.fingerprint(b"rows")
    assert len(mark) == 64 and mark != ledger.fingerprint(b"row") and mark != hashlib.sha256(b"rows").hexdigest()
    with refused("bytes"):
        ledger.fingerprint("rows")  # type: ignore[arg-type]


def test_the_file_is_readable_by_its_owner_alone(url: str, ledger: Ledger) -> None:
    assert os.stat(url.removeprefix("sqlite:///")).st_mode & 0o077 == 0


# --- budgets ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("epsilon", "limit", "fits"), [(1.0, 3.0, 3), (0.1, 1.0, 10), (0.3, 1.0, 3), (0.7, 2.1, 3)])
def test_runs_fill_a_budget_exactly_and_never_pass_it(ledger: Ledger, epsilon: float, limit: float, fits: int) -> None:
    for _ in range(fits):
        ledger.open_run(**ask(epsilon=epsilon, budget=(limit, 0.1)))
    with refused("epsilon .* nothing is refunded") as error:
        ledger.open_run(**ask(epsilon=epsilon))
    one_line(error)
    assert len(ledger.runs()) == fits and ledger.verify() == []
    assert Fraction(str(ledger.datasets()[0].epsilon)) == fits * Fraction(str(epsilon))


def test_mutant_float_sums_would_refuse_or_overspend() -> None:
    assert sum([0.7] * 3) < 2.1 < sum([0.1] * 3) + 1.9
    assert sum([0.1] * 3) > 0.3 and 1e16 + 1.0 <= 1e16
    assert ledger_module._fits([0.1] * 3, 0.3) and not ledger_module._fits([1e16, 1.0], 1e16)


@both
def test_deltas_are_summed_too(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.open_run(**ask(delta=1e-6, budget=(100.0, 3e-6)))
    with refused("delta"):
        ledger.open_run(**ask(delta=1e-30))


def test_reported_sums_are_rounded_up() -> None:
    amounts = [0.1, 1e-20, 0.2]
    total = sum(Fraction(str(amount)) for amount in amounts)
    assert Fraction(str(ledger_module._sum_rounded_up(amounts))) >= total > Fraction(str(float(total)))
    assert ledger_module._sum_rounded_up([1e308] * 3) == math.inf


@both
def test_ending_or_crashing_refunds_nothing(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask(epsilon=2.0, budget=(3.0, 1e-5)))
    ledger.charge_step(run, 1)
    ledger.end_run(run, "halted")
    assert ledger.run(run).status == "halted" and ledger.datasets()[0].epsilon == 2.0
    with Ledger(url) as other:
        other.open_run(**ask(epsilon=1.0))
    with refused("epsilon"):
        ledger.open_run(**ask(epsilon=1e-9))


@both
def test_a_refused_run_leaves_no_trace(ledger: Ledger) -> None:
    before = ledger.head()
    with refused("epsilon"):
        ledger.open_run(**ask(epsilon=4.0, budget=(3.0, 1e-5)))
    assert ledger.head() == before and ledger.runs() == [] and ledger.datasets() == []


@both
@pytest.mark.parametrize("change", [{"privacy_unit": "user"}, {"adjacency": "replace_one"}, {"budget": (3.5, 1e-5)}])
def test_unit_adjacency_and_budget_are_fixed_for_a_data_set(ledger: Ledger, change: dict[str, Any]) -> None:
    ledger.open_run(**ask(budget=(3.0, 1e-5)))
    with refused("for its lifetime") as error:
        ledger.open_run(**ask(**change))
    one_line(error)
    ledger.open_run(**ask(**change, dataset="another"))
    assert len(ledger.runs()) == 2


@both
def test_a_budget_given_late_counts_earlier_runs_and_then_binds(ledger: Ledger) -> None:
    for _ in range(3):
        ledger.open_run(**ask())
    with refused("epsilon"):
        ledger.open_run(**ask(budget=(3.0, 1e-5)))
    assert ledger.datasets()[0].budget is None
    ledger.open_run(**ask(budget=(4.0, 1e-5)))
    assert ledger.datasets()[0].budget == (4.0, 1e-5) and ledger.verify() == []
    with refused("for its lifetime"):
        ledger.open_run(**ask(budget=(5.0, 1e-5)))
    with refused("epsilon"):
        ledger.open_run(**ask(epsilon=0.5))


@both
def test_infinite_epsilon_is_refused_where_there_is_a_budget(ledger: Ledger) -> None:
    ledger.open_run(**ask(epsilon=math.inf))
    with refused("epsilon"):
        ledger.open_run(**ask(budget=(1e6, 1e-5)))
    with refused("NOT PRIVATE"):
        ledger.open_run(**ask(dataset="other", epsilon=math.inf, budget=(1e6, 1e-5)))


RACER = """
import sys
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger
if sys.argv[2] == "mutant":
    import dpfa_hf.ledger as module
    module._fits = lambda amounts, limit: len(amounts) < 2 or all(amount <= limit for amount in amounts)
with Ledger(sys.argv[1]) as ledger:
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            run = ledger.open_run(dataset=line.strip(), plan={}, plan_hash="h", epsilon=0.5, delta=1e-6, max_steps=3,
                                  privacy_unit="example", adjacency="zero_out", budget=(1.0, 1e-5))
            print("won", ledger.charge_step(run, 1), flush=True)
        except PrivacyError as error:
            print("lost" if "does not fit" in str(error) else error, flush=True)
"""


@both
@pytest.mark.parametrize(("kind", "winners", "rounds"), [("sound", 1, 12), ("mutant", 2, 1)])
def test_of_two_processes_racing_for_the_last_of_a_budget_one_wins(
    url: str, kind: str, winners: int, rounds: int
) -> None:
    with child(RACER, url, kind) as first, child(RACER, url, kind) as second:
        racers = (first, second)
        assert [racer.stdout.readline() for racer in racers if racer.stdout] == ["ready\n"] * 2
        with Ledger(url) as ledger:
            for round_ in range(rounds):
                name = f"set {round_}"
                ledger.open_run(**ask(dataset=name, epsilon=0.5, budget=(1.0, 1e-5)))
                for racer in racers:
                    assert racer.stdin
                    racer.stdin.write(name + "\n")
                    racer.stdin.flush()
                answers = sorted(racer.stdout.readline().strip() for racer in racers if racer.stdout)
                assert answers == ["lost"] * (2 - winners) + ["won 1"] * winners
            assert (ledger.verify() == []) == (winners == 1)
        for racer in racers:
            racer.communicate(timeout=20)


# --- steps ------------------------------------------------------------------------------------------------------------


@both
def test_steps_are_charged_once_in_order_and_never_past_the_plan(ledger: Ledger) -> None:
    run = ledger.open_run(**ask(max_steps=2))
    for wrong in (2, 3):
        with refused("not the next one"):
            ledger.charge_step(run, wrong)
    assert ledger.charge_step(run, 1) == 1
    with refused("not the next one"):
        ledger.charge_step(run, 1)
    assert ledger.charge_step(run, 2) == 2
    for beyond in (2, 3):
        with refused("spent all its 2 steps"):
            ledger.charge_step(run, beyond)
    assert ledger.run(run).steps == 2 and ledger.verify() == []


@both
def test_an_ended_run_is_not_charged_until_it_is_resumed(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask())
    ledger.charge_step(run, 1)
    ledger.end_run(run, "interrupted")
    with Ledger(url) as stranger:
        for other in (ledger, stranger):
            with refused("has ended"):
                other.charge_step(run, 2)
            with refused("has ended"):
                other.end_run(run, "again")
    assert ledger.resume_run(run, "a" * 64).steps == 1 and ledger.run(run).status == "running"
    assert ledger.charge_step(run, 2) == 2 and ledger.verify() == []


@both
def test_a_zombie_is_refused_once_its_run_was_resumed_elsewhere(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask())
    ledger.charge_step(run, 1)
    with Ledger(url) as other:
        with refused("another process"):
            other.charge_step(run, 2)
        assert other.resume_run(run, "a" * 64).steps == 1
        for wrong in (1, 2):
            with refused("another process"):
                ledger.charge_step(run, wrong)
        with refused("another process"):
            ledger.end_run(run, "completed")
        assert other.charge_step(run, 2) == 2
        ledger.resume_run(run, "a" * 64)
        with refused("another process"):
            other.charge_step(run, 3)
    assert ledger.run(run).steps == 2 and ledger.verify() == []


@both
def test_resuming_refuses_a_changed_plan_and_an_unknown_run(ledger: Ledger) -> None:
    run = ledger.open_run(**ask())
    before = ledger.head()
    with refused("other privacy arguments") as changed:
        ledger.resume_run(run, "b" * 64)
    with refused(r"privacy\.json.*backup.*new run") as unknown:
        ledger.resume_run("0" * 32, "a" * 64)
    for error in (changed, unknown):
        one_line(error)
    for use in (
        lambda: ledger.run("0" * 32),
        lambda: ledger.charge_step("0" * 32, 1),
        lambda: ledger.end_run("x", "y"),
    ):
        with refused("is not in ledger"):
            use()
    assert ledger.head() == before


def test_a_forked_copy_must_not_charge(ledger: Ledger) -> None:
    run = ledger.open_run(**ask())
    ledger._owner = os.getpid() + 1
    with refused("fork"):
        ledger.charge_step(run, 1)
    ledger._owner = os.getpid()
    assert ledger.charge_step(run, 1) == 1


def test_a_closed_ledger_and_a_replaced_file_are_refused(tmp_path: Path, url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask())
    path = Path(url.removeprefix("sqlite:///"))
    path.rename(tmp_path / "moved")
    with refused("moved, deleted or replaced"):
        ledger.charge_step(run, 1)
    path.touch()
    with refused("moved, deleted or replaced"):
        ledger.charge_step(run, 1)
    (tmp_path / "moved").replace(path)
    assert ledger.charge_step(run, 1) == 1
    ledger.close()
    with refused("closed"):
        ledger.charge_step(run, 2)


CHARGER = """
import os, sys, time
from dpfa_hf.ledger import Ledger
url, run, order = sys.argv[1:]
ledger = Ledger(url)
step = ledger.resume_run(run, "a" * 64).steps
def announce(what):
    # In one write: a kill must not leave half a line, which print does under PYTHONUNBUFFERED.
    sys.stdout.write(f"{what} {step}\\n")
    sys.stdout.flush()
announce("resumed")
while True:
    step += 1
    if order == "noise first":
        announce("noise")
        time.sleep(30)
    ledger.charge_step(run, step)
    announce("noise")
"""


def kill_after(url: str, run: str, order: str, lines: int, pause: float) -> int:
    """The last noise draw that a child announced before it was killed with SIGKILL."""
    with child(CHARGER, url, run, order) as process:
        assert process.stdout
        drawn = [process.stdout.readline() for _ in range(lines + 1)][-1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=pause)
        os.kill(process.pid, signal.SIGKILL)
        return int(([drawn] + process.stdout.read().splitlines())[-1].split()[1])


@both
def test_no_kill_loses_a_step_whose_noise_may_have_been_drawn(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask(max_steps=10**6))
    clock = random.Random(7)
    charged = 0
    for _ in range(6):
        drawn = kill_after(url, run, "charge first", clock.randrange(1, 30), clock.uniform(0.0, 0.02))
        assert drawn > charged
        charged = ledger.run(run).steps
        assert drawn <= charged <= drawn + 1 and ledger.verify() == []


def test_mutant_that_draws_noise_before_charging_is_caught_by_the_same_count(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask(max_steps=10**6))
    assert kill_after(url, run, "noise first", 1, 0.0) == 1 > ledger.run(run).steps


FULL_DISK = """
import resource, sys
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger.resume_run(sys.argv[2], "a" * 64)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
step = 0
try:
    while True:
        step = ledger.charge_step(sys.argv[2], step + 1)
except PrivacyError as error:
    try:
        ledger.charge_step(sys.argv[2], step + 1)
    except PrivacyError:
        print(step, error, flush=True)
"""


def test_a_full_disk_raises_and_the_step_is_not_reported_as_charged(url: str, ledger: Ledger) -> None:
    run = ledger.open_run(**ask(max_steps=10**6))
    with child(FULL_DISK, url, run, str(300 * 1024)) as process:
        step, _, message = process.communicate(timeout=30)[0].strip().partition(" ")
    assert "\n" not in message and "then resume the run" in message
    assert int(step) >= 5 and ledger.verify() == []
    assert ledger.resume_run(run, "a" * 64).steps == int(step)
    assert ledger.charge_step(run, int(step) + 1) == int(step) + 1


def test_a_failing_commit_charges_nothing(ledger: Ledger) -> None:
    run = ledger.open_run(**ask())

    def fail(_: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", None, sqlite3.OperationalError("disk I/O error"))

    sa.event.listen(ledger._engine, "commit", fail)
    with refused("disk I/O error") as error:
        ledger.charge_step(run, 1)
    one_line(error)
    sa.event.remove(ledger._engine, "commit", fail)
    assert ledger.run(run).steps == 0 and ledger.charge_step(run, 1) == 1 and ledger.verify() == []


def test_a_locked_ledger_is_refused_after_patience(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PATIENCE_S", 0.05)
    with Ledger(url) as ledger, contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as holder:
        run = ledger.open_run(**ask())
        holder.execute("BEGIN IMMEDIATE")
        with refused("locked.*another process") as error:
            ledger.charge_step(run, 1)
        one_line(error)
        assert ledger.run(run).steps == 0
        holder.execute("ROLLBACK")
        assert ledger.charge_step(run, 1) == 1


def test_a_step_costs_the_same_work_however_many_came_before(ledger: Ledger) -> None:
    run = ledger.open_run(**ask(max_steps=10**6))

    def work(step: int) -> int:
        ticks = [0]

        def tick() -> int:
            ticks[0] += 1
            return 0

        raw = ledger._engine.raw_connection()
        raw.driver_connection.set_progress_handler(tick, 1)  # type: ignore[union-attr]
        raw.close()
        ledger.charge_step(run, step)
        return ticks[0]

    early = work(1)
    for step in range(2, 200):
        ledger.charge_step(run, step)
    assert early > 20 and work(200) <= early + 5


@both
def test_runs_of_one_ledger_are_charged_side_by_side(url: str) -> None:
    with Ledger(url) as ledger:
        runs = [ledger.open_run(**ask(max_steps=15, dataset=f"set {index}")) for index in range(4)]
        failures: list[Exception] = []

        def train(run: str) -> None:
            try:
                with Ledger(url) as own:
                    own.resume_run(run, "a" * 64)
                    for step in range(1, 16):
                        own.charge_step(run, step)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=train, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [] and [ledger.run(run).steps for run in runs] == [15] * 4 and ledger.verify() == []


CREATOR = """
import sys
from dpfa_hf.ledger import Ledger
sys.stdin.readline()
with Ledger(sys.argv[1]) as ledger:
    print(ledger.fingerprint(b"x"), flush=True)
"""


@both
def test_processes_that_create_a_ledger_at_once_share_one_secret(url: str) -> None:
    with contextlib.ExitStack() as stack:
        creators = [stack.enter_context(child(CREATOR, url)) for _ in range(3)]
        for creator in creators:
            assert creator.stdin
            creator.stdin.write("go\n")
            creator.stdin.flush()
        marks = {creator.communicate(timeout=30)[0] for creator in creators}
    with Ledger(url) as ledger:
        assert marks == {ledger.fingerprint(b"x") + "\n"} and ledger.verify() == []


# --- durability -------------------------------------------------------------------------------------------------------


def pragmas(ledger: Ledger) -> tuple[str, int]:
    raw = ledger._engine.raw_connection()
    cursor = raw.cursor()
    found = [cursor.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]  # type: ignore[attr-defined]
    raw.close()
    return found[0], found[1]


def test_sqlite_runs_in_wal_with_full_synchronous(ledger: Ledger) -> None:
    assert pragmas(ledger) == ("wal", 2)


@pytest.mark.parametrize(
    "mutant",
    [
        "journal_mode=WAL; synchronous=OFF",
        "journal_mode=WAL; synchronous=NORMAL",
        "journal_mode=DELETE; synchronous=FULL",
        "journal_mode=MEMORY; synchronous=EXTRA",
        "journal_mode=OFF; synchronous=EXTRA",
    ],
)
def test_mutant_pragmas_are_refused_on_connecting(url: str, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    def configure(cursor: sqlite3.Cursor) -> None:
        for pragma in mutant.split("; "):
            cursor.execute(f"PRAGMA {pragma}").fetchall()

    monkeypatch.setattr(database, "_configure_sqlite", configure)
    with refused("synchronous=.*P21") as error:
        Ledger(url)
    one_line(error)


def test_without_wal_the_rollback_journal_is_used_with_extra_synchronous(tmp_path: Path) -> None:
    class NoSharedMemory(sqlite3.Cursor):
        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            return super().execute(statement.replace("=WAL", "=DELETE"), *parameters)

    with contextlib.closing(sqlite3.connect(tmp_path / "x")) as connection:
        cursor = connection.cursor(NoSharedMemory)
        database._configure_sqlite(cursor)
        database._assert_sqlite_durable(cursor)
        assert cursor.execute("PRAGMA synchronous").fetchone() == (3,)


@pytest.mark.parametrize("setting", ["synchronous_commit", "fsync"])
def test_postgresql_without_durable_commits_is_refused(setting: str) -> None:
    class Server:
        def execute(self, statement: str) -> Server:
            self.value = "off" if statement == f"SHOW {setting}" else "on"
            return self

        def fetchone(self) -> tuple[str]:
            return (self.value,)

    with refused(f"{setting}=off.*P21"):
        database._assert_postgresql_durable(Server())


# --- verification -----------------------------------------------------------------------------------------------------

TAMPERINGS = {
    "flip a payload": ["UPDATE dpfa_entries SET payload = replace(payload, '1.0', '0.5') WHERE kind = 'run'"],
    "flip a hash": ["UPDATE dpfa_entries SET hash = replace(hash, substr(hash, 1, 1), 'z') WHERE seq = 4"],
    "flip a link": ["UPDATE dpfa_entries SET prev = hash WHERE seq = 4"],
    "flip a kind": ["UPDATE dpfa_entries SET kind = 'note' WHERE seq = 5"],
    "drop a step": ["DELETE FROM dpfa_entries WHERE seq = 5"],
    "drop and renumber": [
        "DELETE FROM dpfa_entries WHERE seq = 5",
        "UPDATE dpfa_entries SET seq = seq - 1 WHERE seq = 6",
        "UPDATE dpfa_entries SET seq = seq - 1 WHERE seq = 7",
    ],
    "truncate": ["DELETE FROM dpfa_entries WHERE seq >= 7"],
    "truncate more": ["DELETE FROM dpfa_entries WHERE seq >= 5"],
    "truncate all": ["DELETE FROM dpfa_entries"],
    "reorder": [
        "UPDATE dpfa_entries SET seq = 100 WHERE seq = 4",
        "UPDATE dpfa_entries SET seq = 4 WHERE seq = 5",
        "UPDATE dpfa_entries SET seq = 5 WHERE seq = 100",
    ],
    "append": ["INSERT INTO dpfa_entries SELECT 8, run, kind, payload, hash, hash FROM dpfa_entries WHERE seq = 7"],
    "not JSON": ["UPDATE dpfa_entries SET payload = '{' WHERE seq = 3"],
    "other JSON": ["UPDATE dpfa_entries SET payload = '[]' WHERE seq = 3"],
    "edit the count": ["UPDATE dpfa_runs SET steps = steps - 1"],
    "edit the last step": ["UPDATE dpfa_runs SET max_steps = 99"],
    "edit the session": ["UPDATE dpfa_runs SET session = NULL"],
    "edit the status": ["UPDATE dpfa_runs SET status = 'completed'"],
    "rename the data set": ["UPDATE dpfa_runs SET dataset = 'other'"],
    "drop the run's row": ["DELETE FROM dpfa_runs"],
    "drop the data set's row": ["DELETE FROM dpfa_datasets"],
    "replace the secret": ["UPDATE dpfa_meta SET value = '" + "0" * 64 + "' WHERE name = 'secret'"],
}


@pytest.fixture
def chain(url: str) -> str:
    """Entries: 1 ledger, 2 dataset, 3 run, 4 and 5 step, 6 resume, 7 step."""
    with Ledger(url) as ledger:
        run = ledger.open_run(**ask(budget=(1.5, 1e-5)))
        ledger.charge_step(run, 1)
        ledger.charge_step(run, 2)
        ledger.resume_run(run, "a" * 64)
        ledger.charge_step(run, 3)
        assert ledger.head()[0] == 7 and ledger.verify() == []
    return url


@both
@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_verify_finds_every_tampering_and_no_run_starts_on_it(chain: str, tampering: str) -> None:
    sql(chain, *TAMPERINGS[tampering])
    with Ledger(chain) as ledger:
        assert ledger.verify() and all("\n" not in problem for problem in ledger.verify())
        with refused("fails verification.*backup") as error:
            ledger.open_run(**ask(dataset="fresh"))
        one_line(error)
        with refused("fails verification"):
            ledger.resume_run("0" * 32, "a" * 64)


def test_verify_finds_a_step_moved_to_another_run(url: str) -> None:
    with Ledger(url) as ledger:
        for run in [ledger.open_run(**ask()) for _ in range(2)]:
            ledger.charge_step(run, 1)
        sql(
            url,
            "UPDATE dpfa_entries SET run = (SELECT run FROM dpfa_entries WHERE seq = 6) WHERE seq = 5",
        )
        assert ledger.verify()


def rehash(url: str) -> None:
    """An attacker who recomputes the chain of hashes."""
    with behind_its_back(url) as connection:
        prev = "0" * 64
        rows = connection.exec_driver_sql("SELECT seq, run, kind, payload FROM dpfa_entries ORDER BY seq").fetchall()
        for seq, run, kind, payload in rows:
            entry = {"seq": seq, "run": run, "kind": kind, "payload": payload, "prev": prev}
            digest = ledger_module._sha256(ledger_module._canonical(entry))
            update = sa.text("UPDATE dpfa_entries SET prev = :prev, hash = :hash WHERE seq = :seq")
            connection.execute(update, {"prev": prev, "hash": digest, "seq": seq})
            prev = digest


@both
@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE dpfa_entries SET payload = replace(payload, '1.0', '9.0') WHERE kind = 'run'",
        "UPDATE dpfa_entries SET payload = '{\"step\":4}' WHERE seq = 7",
        "UPDATE dpfa_entries SET kind = 'end' WHERE seq = 7",
        "DELETE FROM dpfa_entries WHERE seq = 7",
        "UPDATE dpfa_entries SET payload = replace(payload, 'reviews', 'other') WHERE kind = 'dataset'",
        "UPDATE dpfa_entries SET payload = replace(payload, '\"max_steps\":5', '\"max_steps\":2') WHERE kind = 'run'",
    ],
)
def test_a_rehashed_chain_must_still_add_up(chain: str, tampering: str) -> None:
    sql(chain, tampering)
    rehash(chain)
    with Ledger(chain) as ledger:
        assert ledger.verify() and not any("hash" in problem for problem in ledger.verify())


def test_only_the_head_kept_elsewhere_shows_an_old_copy(tmp_path: Path, chain: str) -> None:
    copy = f"sqlite:///{tmp_path}/copy.sqlite3"
    with contextlib.closing(sqlite3.connect(chain.removeprefix("sqlite:///"))) as connection:
        connection.execute(f"VACUUM INTO '{tmp_path}/copy.sqlite3'")
    with Ledger(chain) as ledger, Ledger(copy) as old:
        assert old.head() == ledger.head()
        ledger.charge_step(ledger.resume_run(ledger.runs()[0].run, "a" * 64).run, 4)
        assert old.verify() == [] and ledger.head()[0] == 9 > old.head()[0] and ledger.head()[1] != old.head()[1]


@both
def test_mutant_ledgers_that_forget_to_write_are_found_by_verify(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ledger.open_run(**ask(max_steps=9))
    append = ledger_module._append

    def forgetful(connection: sa.Connection, of: str, kind: str, payload: dict[str, Any]) -> int:
        return 0 if kind == "step" else append(connection, of, kind, payload)

    monkeypatch.setattr(ledger_module, "_append", forgetful)
    assert ledger.charge_step(run, 1) == 1
    assert ledger.verify()


def test_mutant_ledger_without_links_is_found_by_verify(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ledger.open_run(**ask())
    last = ledger_module._last
    monkeypatch.setattr(ledger_module, "_last", lambda connection: (last(connection)[0], "0" * 64, "", ""))
    ledger.charge_step(run, 1)
    assert ledger.verify()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"epsilon": "1"},
        {"epsilon": True},
        {"epsilon": None},
        {"epsilon": 10**400},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": -1e-5},
        {"delta": math.nan},
        {"delta": "1e-5"},
        {"max_steps": 0},
        {"max_steps": -1},
        {"max_steps": 1.5},
        {"max_steps": True},
        {"max_steps": 2**63},
        {"dataset": ""},
        {"dataset": " reviews"},
        {"dataset": "a\nb"},
        {"dataset": None},
        {"dataset": "x" * 256},
        {"privacy_unit": ""},
        {"adjacency": 1},
        {"plan_hash": ""},
        {"plan": "plan"},
        {"plan": {"sigma": math.nan}},
        {"plan": {"sigma": -math.inf}},
        {"plan": {1: 2}},
        {"plan": {"sigma": object()}},
        {"budget": 3.0},
        {"budget": (3.0,)},
        {"budget": "3"},
        {"budget": (math.inf, 1e-5)},
        {"budget": (0.0, 1e-5)},
        {"budget": (3.0, 0.0)},
        {"budget": (3.0, math.nan)},
    ],
    ids=lambda wrong: "-".join(f"{name}={str(value)[:20]}" for name, value in wrong.items()),
)
def test_bad_arguments_are_refused_in_one_line_and_leave_no_trace(ledger: Ledger, wrong: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError) as error:
        ledger.open_run(**ask(**wrong))
    (name,) = wrong
    assert name in one_line(error) and ledger.head()[0] == 1


@pytest.mark.parametrize("step", [0, -1, 1.0, True, "1", None])
def test_bad_steps_are_refused(ledger: Ledger, step: Any) -> None:
    run = ledger.open_run(**ask())
    with refused("step must be"):
        ledger.charge_step(run, step)


@pytest.mark.parametrize("reason", ["", "running", "a\nb", None])
def test_bad_reasons_are_refused(ledger: Ledger, reason: Any) -> None:
    run = ledger.open_run(**ask())
    with refused("reason must"):
        ledger.end_run(run, reason)
    assert ledger.run(run).status == "running"


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "options"),
        ("sqlite:////x?nolock=1", "options"),
        ("mysql://user:hunter2@host/db", "scheme 'mysql'.*P21"),
        ("postgres://user:hunter2@host/db", "postgresql"),
        ("postgresql+asyncpg://user:hunter2@host/db", "postgresql"),
        ("sqlite+aiosqlite:////x", "sqlite:///"),
        ("ledger.sqlite3", "not a database URL"),
        ("", "not a database URL"),
        ("postgresql://user:hunter2@host:port/db", "not a database URL"),
        ("sqlite:////a\nb", "not a database URL"),
        (5, "as str"),
        ("sqlite:////nowhere/at/all/ledger.sqlite3", "cannot be created"),
        ("sqlite:////dev/null/ledger.sqlite3", "cannot be created"),
        ("sqlite:////usr", "failed"),
    ],
)
def test_bad_urls_are_refused_without_showing_a_password(wrong: Any, pattern: str) -> None:
    with refused(pattern) as error:
        Ledger(wrong)
    assert "hunter2" not in one_line(error)
    cause: BaseException | None = error.value
    while cause is not None:
        assert "hunter2" not in str(cause)
        cause = None if cause.__suppress_context__ else cause.__cause__ or cause.__context__


def test_a_missing_driver_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with refused(r"pip install 'psycopg\[binary\]'") as error:
        Ledger("postgresql://user:hunter2@host/db?sslpassword=hunter3")
    assert "hunter" not in one_line(error) and "user:***@host/db" in str(error.value)


def test_driver_messages_are_scrubbed_of_passwords(ledger: Ledger) -> None:
    ledger._withheld = ["hunter2"]
    text = ledger._refusal(sa.exc.OperationalError("x", None, Exception("bad hunter2\nsecond line")))
    assert "hunter2" not in text and "\n" not in text and "bad *** second line" in text


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_corrupt_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with refused("backup") as error:
        Ledger(f"sqlite:///{tmp_path}/x")
    one_line(error)
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize(
    ("tampering", "pattern"),
    [
        ("DELETE FROM dpfa_meta", "secret"),
        ("UPDATE dpfa_meta SET value = 'x' WHERE name = 'secret'", "secret"),
        ("UPDATE dpfa_meta SET value = '2' WHERE name = 'format'", "format"),
    ],
)
def test_a_ledger_without_its_secret_or_of_another_format_is_refused(chain: str, tampering: str, pattern: str) -> None:
    sql(chain, tampering)
    with refused(pattern) as error:
        Ledger(chain)
    one_line(error)


# Root may write anywhere, so the child becomes nobody, who may not be able to read the environment either: whatever is
# loaded late is loaded first.
READER = """
import os, sys, tempfile
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger
with tempfile.TemporaryDirectory() as folder:
    Ledger(f"sqlite:///{folder}/first.sqlite3").close()
if os.geteuid() == 0:
    os.setuid(65534)
try:
    Ledger(sys.argv[1])
except PrivacyError as error:
    print(error)
"""


def test_an_unwritable_file_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite3"
        with Ledger(f"sqlite:///{path}"):
            pass
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        with child(READER, f"sqlite:///{path}") as process:
            answer = process.communicate(timeout=20)[0]
        Path(folder).chmod(0o755)
    assert "make the file and its folder writable" in answer and answer.count("\n") == 1


def test_the_environment_changes_the_per_user_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFA_LEDGER", f"sqlite:///{tmp_path}/env.sqlite3")
    with Ledger() as ledger:
        assert ledger.display_url == f"sqlite:///{tmp_path}/env.sqlite3"
    monkeypatch.setenv("DPFA_LEDGER", "sqlite://")
    with refused("DPFA_LEDGER.*in memory"):
        Ledger()
    monkeypatch.delenv("DPFA_LEDGER")
    monkeypatch.setattr(ledger_module, "user_data_dir", lambda name: str(tmp_path / "home" / name))
    with Ledger() as ledger:
        assert ledger.display_url == f"sqlite:///{tmp_path}/home/dpfa_hf/ledger.sqlite3"
        assert (tmp_path / "home/dpfa_hf/ledger.sqlite3").exists()


def test_a_relative_path_is_fixed_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Ledger("sqlite:///ledger.sqlite3") as ledger:
        run = ledger.open_run(**ask())
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        ledger._engine.dispose()
        assert ledger.charge_step(run, 1) == 1 and os.listdir() == []


def test_the_ledger_loads_neither_torch_nor_transformers() -> None:
    with child("import sys, dpfa_hf.ledger; print(*sys.modules)") as process:
        loaded = process.communicate(timeout=60)[0].split()
    assert "dpfa_hf.ledger" in loaded and not {"torch", "transformers", "dp_accounting", "numpy"} & set(loaded)


# --- a server that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def server_url(postgresql: Any) -> str:
    return postgresql.url(postgresql.emptied_database())


def database_of(url: str) -> str:
    return str(sa.make_url(url).database)


def test_a_killed_server_refuses_the_next_step_and_refunds_none(postgresql: Any, server_url: str) -> None:
    with Ledger(server_url) as ledger:
        run = ledger.open_run(**ask(budget=(1.0, 1e-5)))
        assert [ledger.charge_step(run, step) for step in (1, 2)] == [1, 2]
        postgresql.kill()
        try:
            with refused("check that the server is reachable") as error:
                ledger.charge_step(run, 3)
            assert "hunter2" not in one_line(error)
        finally:
            postgresql.start()
        assert ledger.run(run).steps == 2 and ledger.verify() == []
        assert ledger.charge_step(run, 3) == 3
        with refused("does not fit"):
            ledger.open_run(**ask(epsilon=1e-9))


def test_a_server_killed_in_mid_step_loses_no_step_whose_noise_may_have_been_drawn(
    postgresql: Any, server_url: str
) -> None:
    with Ledger(server_url) as ledger:
        run = ledger.open_run(**ask(max_steps=10**6))
    with child(CHARGER, server_url, run, "charge first", stderr=subprocess.PIPE) as process:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(20)]
        postgresql.kill()
        try:
            rest, errors = process.communicate(timeout=30)
        finally:
            postgresql.start()
    drawn = int((lines + rest.splitlines())[-1].split()[1])
    assert process.returncode == 1 and errors.rstrip().splitlines()[-1].startswith("dpfa_hf.errors.PrivacyError: ")
    with Ledger(server_url) as ledger:
        assert drawn <= ledger.run(run).steps <= drawn + 1 and ledger.verify() == []


@pytest.mark.parametrize(
    ("change", "pattern"),
    [({"folder": "nowhere"}, "No such file"), ({"password": "hunter3"}, "password authentication failed")],
)
def test_a_server_out_of_reach_is_refused_in_one_line_without_the_password(
    postgresql: Any, change: dict[str, str], pattern: str
) -> None:
    with refused(pattern) as error:
        Ledger(postgresql.url("postgres", **change))
    assert "hunter" not in one_line(error) and error.value.__suppress_context__


def test_no_message_about_a_broken_ledger_shows_a_fingerprint(url: str, ledger: Ledger) -> None:
    name = "unnamed-" + ledger.fingerprint(b"rows")
    ledger.open_run(**ask(dataset=name))
    sql(url, "UPDATE dpfa_datasets SET entry = 1")
    problems = ledger.verify()
    assert problems == ["the row of dataset unnamed in dpfa_datasets differs from the entries"]
    with refused("fails verification") as info:
        ledger.open_run(**ask())
    assert name not in one_line(info)


def test_a_role_that_may_only_select_can_look_and_not_write(postgresql: Any) -> None:
    """What a gate, an auditor or a dashboard gets: `create=False` opens a ledger without a right to write."""
    database = postgresql.new_database()
    url = postgresql.url(database)
    with Ledger(url) as ledger:
        run = ledger.open_run(**ask())
        postgresql.execute("CREATE ROLE looker LOGIN PASSWORD 'hunter2'")
        postgresql.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker", database)
        with Ledger(url.replace("trainer:", "looker:"), create=False) as looking:
            assert looking.verify() == [] and looking.head() == ledger.head() and looking.id == ledger.id
            assert looking.run(run) == ledger.run(run) and looking.hash_at(3) == ledger.head()[1]
            with refused("permission denied"):
                looking.open_run(**ask())
        assert ledger.charge_step(run, 1) == 1


def test_a_dropped_connection_is_replaced_and_the_step_counts_once(postgresql: Any, server_url: str) -> None:
    with Ledger(server_url) as ledger:
        run = ledger.open_run(**ask())
        for step in (1, 2, 3):
            assert postgresql.drop_connections(database_of(server_url)) == 1
            assert ledger.charge_step(run, step) == step
        assert ledger.run(run).steps == 3 and ledger.verify() == []


@pytest.mark.parametrize(("committed", "charged"), [(False, 0), (True, 1)])
def test_a_connection_dropped_in_mid_commit_refuses_the_step_and_counts_it_at_most_once(
    postgresql: Any, server_url: str, committed: bool, charged: int
) -> None:
    def drop(connection: sa.Connection) -> None:
        if committed:
            connection.connection.dbapi_connection.commit()  # type: ignore[union-attr]
            lost = OSError("server closed the connection unexpectedly")
            raise sa.exc.OperationalError("COMMIT", None, lost)  # the answer is lost on its way
        postgresql.drop_connections(database_of(server_url))

    with Ledger(server_url) as ledger:
        run = ledger.open_run(**ask())
        sa.event.listen(ledger._engine, "commit", drop)
        with refused("check that the server is reachable") as error:
            ledger.charge_step(run, 1)
        one_line(error)
        sa.event.remove(ledger._engine, "commit", drop)
        if committed:
            with refused("not the next one, 2: .*resume_run"):
                ledger.charge_step(run, 1)
        assert ledger.resume_run(run, "a" * 64).steps == charged
        assert ledger.charge_step(run, charged + 1) == charged + 1 and ledger.verify() == []


@both
def test_a_ledger_that_can_no_longer_be_written_refuses_the_next_step(request: pytest.FixtureRequest, url: str) -> None:
    with Ledger(url) as ledger:
        run = ledger.open_run(**ask(max_steps=10**6))
        ledger.charge_step(run, 1)
        if url.startswith("sqlite"):
            raw = ledger._engine.raw_connection()
            raw.cursor().execute("PRAGMA max_page_count = 1")  # as a full disk: no page may be added
            raw.close()
        else:
            server = request.getfixturevalue("postgresql")
            server.execute(f"ALTER DATABASE {database_of(url)} SET default_transaction_read_only = on")
            server.drop_connections(database_of(url))
        step = 1
        with refused("database or disk is full|read-only transaction") as error:
            for step in range(2, 1000):
                ledger.charge_step(run, step)
        one_line(error)
        if not url.startswith("sqlite"):
            server.execute(f"ALTER DATABASE {database_of(url)} RESET default_transaction_read_only")
            server.drop_connections(database_of(url))
    with Ledger(url) as ledger:
        assert ledger.resume_run(run, "a" * 64).steps == step - 1 and ledger.verify() == []
        assert ledger.charge_step(run, step) == step


def test_commits_are_synchronous_whatever_the_server_was_told(postgresql: Any, server_url: str) -> None:
    name = database_of(server_url)
    postgresql.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    found = []
    try:
        assert postgresql.execute("SHOW synchronous_commit", name) == [("off",)]
        with Ledger(server_url) as ledger:
            run = ledger.open_run(**ask())
            raw = ledger._engine.raw_connection()
            raw.cursor().execute("SET synchronous_commit TO off")  # a pooler that mixes up sessions
            raw.driver_connection.commit()  # type: ignore[union-attr]
            raw.close()

            def look(connection: sa.Connection) -> None:
                found.append(connection.exec_driver_sql("SHOW synchronous_commit").scalar())

            sa.event.listen(ledger._engine, "commit", look)
            ledger.charge_step(run, 1)
    finally:
        postgresql.execute(f"ALTER DATABASE {name} RESET synchronous_commit")
    assert found == ["on"]


@pytest.mark.parametrize("setting", ["synchronous_commit", "fsync"])
def test_mutant_server_without_durable_commits_is_refused(
    postgresql: Any, server_url: str, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(database, "_configure_postgresql", lambda cursor: None)
    for statement in (f"ALTER SYSTEM SET {setting} = off", "SELECT pg_reload_conf()"):
        postgresql.execute(statement)
    try:
        with refused(f"{setting}=off.*P21") as error:
            for _ in range(100):  # the reload takes a moment
                Ledger(server_url).close()
                time.sleep(0.02)
        one_line(error)
    finally:
        for statement in (f"ALTER SYSTEM RESET {setting}", "SELECT pg_reload_conf()"):
            postgresql.execute(statement)


def test_a_locked_table_is_refused_after_patience(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_PATIENCE_S", 0.05)
    with Ledger(server_url) as ledger:
        run = ledger.open_run(**ask())
        with behind_its_back(server_url) as holder:
            holder.exec_driver_sql("LOCK TABLE dpfa_entries IN EXCLUSIVE MODE")
            with refused("lock timeout") as error:
                ledger.charge_step(run, 1)
            one_line(error)
        assert ledger.charge_step(run, 1) == 1


# --- witness ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgresql"])
def witness(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/elsewhere.sqlite3"
    server = request.getfixturevalue("postgresql")
    return server.url(server.emptied_database())


@pytest.fixture
def near(tmp_path: Path) -> str:
    """A witness for tests in which it does not matter where it is."""
    return f"sqlite:///{tmp_path}/elsewhere.sqlite3"


def put_back(url: str, copy: Path) -> None:
    """What a restored disk does: an older state of the file, under the same name."""
    path = Path(url.removeprefix("sqlite:///"))
    for leftover in path.parent.glob(path.name + "*"):
        leftover.unlink()
    copy.rename(path)


def copied(url: str, copy: Path) -> Path:
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute(f"VACUUM INTO '{copy}'")
    return copy


def stale(url: str, witness: str, copy: Path) -> str:
    """A ledger put back to before its budget was used up, and a run that it still knows."""
    with Ledger(url, witness=witness) as ledger:
        run = ledger.open_run(**ask(budget=(2.0, 1e-5)))
        ledger.charge_step(run, 1)
        copied(url, copy)
        ledger.open_run(**ask())
    put_back(url, copy)
    return run


def served(url: str, witness: str, run: str) -> list[str]:
    """What a ledger lets itself be used for."""
    uses = {
        "open": lambda ledger: ledger.open_run(**ask()),
        "resume": lambda ledger: ledger.resume_run(run, "a" * 64),
        "back up": lambda ledger: ledger.backup(Path(url.removeprefix("sqlite:///") + ".backup")),
        "witness": lambda ledger: ledger.start_witness(),
        "move": lambda ledger: ledger.export(Path(url.removeprefix("sqlite:///") + ".move"), to="sqlite:////x"),
    }
    done = []
    for name, use in uses.items():
        with Ledger(url, witness=witness) as ledger:
            try:
                use(ledger)
                done.append(name)
            except PrivacyError as error:
                assert "its witness has seen" in str(error) and "newer backup" in str(error)
    return done


def test_a_ledger_older_than_its_witness_refuses_to_serve(url: str, witness: str, tmp_path: Path) -> None:
    run = stale(url, witness, tmp_path / "copy")
    assert served(url, witness, run) == []
    with Ledger(url, witness=witness) as ledger:
        assert ledger.run(run).steps == 1  # looking is allowed
        (problem,) = ledger.verify()
        assert "older copy" in problem and ledger.head()[0] == 5


def test_mutant_that_ignores_its_witness_spends_a_budget_twice(
    url: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stale(url, near, tmp_path / "copy")
    monkeypatch.setattr(Ledger, "_losses", lambda self, connection, seen: [])
    assert "open" in served(url, near, run)


def test_a_running_process_whose_ledger_was_put_back_may_charge_no_more(url: str, near: str, tmp_path: Path) -> None:
    with Ledger(url, witness=near) as ledger:
        run = ledger.open_run(**ask())
        with Ledger(url, witness=near) as other:
            other.open_run(**ask(dataset="another"))
        sql(url, "DELETE FROM dpfa_entries WHERE seq >= 5", "DELETE FROM dpfa_datasets WHERE entry >= 5")
        with refused("its witness has seen an entry 6 that it lacks"):
            ledger.charge_step(run, 1)
        assert ledger.run(run).steps == 0


def test_of_two_live_copies_the_witness_lets_one_go_on(url: str, near: str, tmp_path: Path) -> None:
    with Ledger(url, witness=near) as ledger:
        run = ledger.open_run(**ask())
        copied(url, tmp_path / "copy")
        ledger.charge_step(run, 1)
        with Ledger(f"sqlite:///{tmp_path}/copy", witness=near) as copy:
            for longer in range(2):
                with refused("another branch"):
                    copy.resume_run(run, "a" * 64)
                monkey = pytest.MonkeyPatch()
                monkey.setattr(Ledger, "_losses", lambda self, connection, seen: [])
                copy.resume_run(run, "a" * 64)  # a copy that was written without its witness, and is longer now
                monkey.undo()
                assert copy.head()[0] == 5 + longer
        with refused("another branch"):  # the copy has told the witness, and the first one finds out
            ledger.charge_step(run, 2)


def test_the_step_that_the_witness_cannot_be_told_draws_no_noise_and_counts(
    url: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(url, witness=near) as ledger:
        run = ledger.open_run(**ask())
        full = sqlite3.OperationalError("database or disk is full")

        def fail(_: sa.Connection) -> None:
            raise sa.exc.OperationalError("COMMIT", None, full)

        assert ledger._witness is not None
        sa.event.listen(ledger._witness._engine, "commit", fail)
        with refused("^witness sqlite:.* is full"):
            ledger.charge_step(run, 1)
        sa.event.remove(ledger._witness._engine, "commit", fail)
    with Ledger(url, witness=near) as ledger:
        assert ledger.resume_run(run, "a" * 64).steps in (0, 1) and ledger.verify() == []


def test_a_ledger_ahead_of_its_witness_is_sound(url: str, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(url, witness=near) as ledger:
        run = ledger.open_run(**ask())
        with monkeypatch.context() as crash:
            crash.setattr(ledger_module._Witness, "advance", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ledger.charge_step(run, 1)
    with Ledger(url, witness=near) as ledger:
        assert ledger.verify() == [] and ledger.resume_run(run, "a" * 64).steps == 1
        assert ledger.charge_step(run, 2) == 2
        assert ledger._opened_witness().head(ledger.id) == ledger.head()


def test_a_witnessed_ledger_is_refused_without_its_witness(url: str, near: str, tmp_path: Path) -> None:
    with Ledger(url, witness=near) as ledger:
        run = ledger.open_run(**ask())
    with Ledger(url) as ledger:
        for use in (lambda: ledger.open_run(**ask()), lambda: ledger.resume_run(run, "a" * 64)):
            with refused("has a witness, which was not asked.*DPFA_LEDGER_WITNESS") as error:
                use()
            one_line(error)
    with Ledger(url, witness=f"sqlite:///{tmp_path}/absent.sqlite3") as ledger, refused("cannot be reached"):
        ledger.open_run(**ask())
    Path(near.removeprefix("sqlite:///")).rename(tmp_path / "lost")
    with Ledger(url, witness=near) as ledger:
        with refused("cannot be reached"):
            ledger.resume_run(run, "a" * 64)
        assert not Path(near.removeprefix("sqlite:///")).exists()
        ledger.start_witness()
        assert ledger.resume_run(run, "a" * 64).steps == 0 and ledger.verify() == []


def test_a_witness_lost_in_mid_run_stops_it_before_the_step_counts(url: str, near: str, tmp_path: Path) -> None:
    with Ledger(url, witness=near) as ledger:
        run = ledger.open_run(**ask())
        Path(near.removeprefix("sqlite:///")).rename(tmp_path / "lost")
        with refused("file of witness .* was moved"):
            ledger.charge_step(run, 1)
        assert ledger.run(run).steps == 0


def test_a_ledger_that_exists_gets_a_witness_on_demand_only(
    url: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(url) as ledger:
        run = ledger.open_run(**ask())
        with refused("witness is not set"):
            ledger.start_witness()
    monkeypatch.setenv("DPFA_LEDGER_WITNESS", near)
    with Ledger(f"{url}.other") as other, Ledger(url) as ledger:
        other.open_run(**ask())
        with refused("does not know ledger.*`dpfa ledger witness`") as error:
            ledger.resume_run(run, "a" * 64)
        one_line(error)
        ledger.start_witness()
        ledger.start_witness()
        assert ledger.resume_run(run, "a" * 64).steps == 0 and ledger.verify() == [] == other.verify()


def lose(url: str) -> None:
    path = Path(url.removeprefix("sqlite:///"))
    for file in path.parent.glob(path.name + "*"):
        file.unlink()


def test_no_fresh_ledger_is_created_in_the_place_of_a_lost_one(url: str, witness: str, tmp_path: Path) -> None:
    with Ledger(url, witness=witness) as ledger:
        run = ledger.open_run(**ask(epsilon=1.0, budget=(1.0, 1e-5)))
        ledger.backup(tmp_path / "backup")
        with Ledger(f"{url}.other", witness=witness) as other:  # data of other people
            assert other.open_run(**ask())
    lose(url)
    for _ in range(2):
        with refused("has seen another ledger at .* not mounted: restore it") as error:
            Ledger(url, witness=witness)
        assert "hunter2" not in one_line(error)
    with ledger_module.restore_ledger(tmp_path / "backup", url, witness=witness) as ledger:
        assert ledger.resume_run(run, "a" * 64).steps == 0
        with refused("does not fit"):
            ledger.open_run(**ask())
    with Ledger(url, witness=witness) as ledger:
        assert ledger.verify() == []


def test_mutant_witness_that_forgets_places_lets_a_budget_be_spent_twice(
    url: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(url, witness=near) as ledger:
        ledger.open_run(**ask(budget=(1.0, 1e-5)))
    lose(url)
    begin = ledger_module._Witness.begin
    monkeypatch.setattr(ledger_module._Witness, "begin", lambda self, ledger, place: begin(self, ledger, ledger))
    with Ledger(url, witness=near) as ledger:
        assert ledger.open_run(**ask(budget=(1.0, 1e-5)))


def test_a_creation_that_failed_can_be_repeated(url: str, near: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append = ledger_module._append
    with monkeypatch.context() as crash:
        crash.setattr(ledger_module, "_append", lambda *entry: 1 / 0 if entry[2] == "witness" else append(*entry))
        with pytest.raises(ZeroDivisionError):
            Ledger(url, witness=near)
    with Ledger(url, witness=near) as ledger:
        assert ledger.open_run(**ask()) and ledger.verify() == []
        assert ledger._opened_witness().head(ledger.id) == ledger.head()


@pytest.mark.parametrize(
    ("wrong", "pattern"),
    [("mysql://u:hunter2@h/d", "witness has the scheme"), ("sqlite://", "in memory"), (None, "own database")],
)
def test_bad_witnesses_are_refused(url: str, wrong: str | None, pattern: str, tmp_path: Path) -> None:
    with refused(pattern) as error:
        Ledger(url, witness=wrong or url)
    assert "hunter2" not in one_line(error)


def test_writers_that_race_leave_the_witness_at_the_latest_entry(url: str, near: str) -> None:
    with Ledger(url, witness=near) as ledger:
        runs = [ledger.open_run(**ask(max_steps=10)) for _ in range(3)]
        failures: list[Exception] = []

        def train(run: str) -> None:
            try:
                with Ledger(url, witness=near) as own:
                    own.resume_run(run, "a" * 64)
                    for step in range(1, 11):
                        own.charge_step(run, step)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=train, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [] and ledger.verify() == []
        assert ledger._opened_witness().head(ledger.id) == ledger.head()


# --- moves and backups ------------------------------------------------------------------------------------------------


def place_for(kind: str, request: pytest.FixtureRequest, tmp_path: Path, name: str) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/{name}.sqlite3"
    server = request.getfixturevalue("postgresql")
    return server.url(server.new_database() if name == "new" else server.emptied_database())


def spent(url: str, witness: str | None = None) -> str:
    """A ledger with a budget that is used up, and an unfinished run; returns the run."""
    with Ledger(url, witness=witness) as ledger:
        ledger.open_run(**ask(dataset="exhausted", epsilon=1.0, budget=(1.0, 1e-5)))
        run = ledger.open_run(**ask(epsilon=math.inf))
        for step in (1, 2, 3):
            ledger.charge_step(run, step)
    return run


@pytest.mark.parametrize(
    ("before", "after"), [("sqlite", "postgresql"), ("postgresql", "sqlite"), ("postgresql", "postgresql")]
)
def test_a_moved_ledger_goes_on_in_the_new_place_alone(
    request: pytest.FixtureRequest, tmp_path: Path, before: str, after: str
) -> None:
    old, new = place_for(before, request, tmp_path, "old"), place_for(after, request, tmp_path, "new")
    file = tmp_path / "moving.jsonl"
    run = spent(old)
    with Ledger(old) as source:
        source.resume_run(run, "a" * 64)
        head = source.export(file, to=new)
        assert head == source.head() and file.stat().st_mode & 0o777 == 0o600
        with ledger_module.import_ledger(file, new) as ledger:
            assert ledger.fingerprint(b"rows") == source.fingerprint(b"rows")
            assert (ledger.runs(), ledger.datasets()) == (source.runs(), source.datasets())
            assert ledger.verify() == [] == source.verify() and ledger.head()[0] == head[0] + 1
            with refused("does not fit"):
                ledger.open_run(**ask(dataset="exhausted", epsilon=1e-9))
            assert ledger.resume_run(run, "a" * 64).steps == 3 and ledger.charge_step(run, 4) == 4
        for use in (
            lambda: source.charge_step(run, 4),
            lambda: source.open_run(**ask()),
            lambda: source.resume_run(run, "a" * 64),
            lambda: source.end_run(run, "over"),
            lambda: source.export(tmp_path / "again", to="sqlite:////elsewhere"),
        ):
            with refused("has moved to .* and is closed") as error:
                use()
            assert "hunter2" not in one_line(error)
        assert source.head() == head and source.run(run).steps == 3
        assert source.moved_to() is not None and not (tmp_path / "again").exists()
    with refused("is in use"):
        ledger_module.import_ledger(file, new)


def test_mutant_moved_ledger_that_stays_open_spends_the_budget_twice(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(url) as source:
        source.open_run(**ask(budget=(2.0, 1e-5)))
        source.export(tmp_path / "file", to=f"sqlite:///{tmp_path}/new")
        monkeypatch.setattr(ledger_module, "_moved_to", lambda kind, payload: None)
        with ledger_module.import_ledger(tmp_path / "file", f"sqlite:///{tmp_path}/new") as ledger:
            assert len({source.open_run(**ask()), ledger.open_run(**ask())}) == 2
        assert source.verify()


def test_a_file_is_imported_where_it_was_moved_to_and_nowhere_else(url: str, tmp_path: Path) -> None:
    run = spent(url)
    new = f"sqlite:///{tmp_path}/new.sqlite3"
    with Ledger(url) as ledger:
        ledger.export(tmp_path / "audit")
        ledger.backup(tmp_path / "backup")
        ledger.export(tmp_path / "move", to=new)
        with refused("File exists"):
            ledger.export(tmp_path / "move", to=new)
        ledger.export(tmp_path / "move again", to=new)
        assert ledger._secret not in (tmp_path / "audit").read_text()
    assert (tmp_path / "move").read_bytes() == (tmp_path / "move again").read_bytes()
    for file, place, pattern in (
        ("audit", new, "has no secret"),
        ("backup", new, "still in use"),
        ("move", f"{new}.other", "moved to"),
        ("absent", new, "cannot be read"),
        ("", new, "cannot be read"),
    ):
        with refused(pattern) as error:
            ledger_module.import_ledger(tmp_path / file, place)
        one_line(error)
    with refused("moved to"):
        ledger_module.restore_ledger(tmp_path / "move", new, unwitnessed=True)
    assert not (tmp_path / "new.sqlite3").exists()
    with Ledger(f"{new}.used") as used:
        before = used.head()
        with refused("is in use"):
            ledger_module.restore_ledger(tmp_path / "backup", f"{new}.used", unwitnessed=True)
        assert used.head() == before
    with ledger_module.import_ledger(tmp_path / "move", new) as ledger:
        assert ledger.run(run).steps == 3


def test_a_file_that_cannot_be_written_leaves_neither_file_nor_closed_ledger(url: str, tmp_path: Path) -> None:
    run = spent(url)
    with Ledger(url) as ledger:
        for path in (tmp_path / "no" / "folder", tmp_path):
            with refused("cannot be created"):
                ledger.export(path, to="sqlite:////x")
        assert ledger.moved_to() is None and ledger.resume_run(run, "a" * 64).steps == 3
        (tmp_path / "full").symlink_to("/dev/full")
        with refused("File exists"):
            ledger.backup(tmp_path / "full")


def test_a_move_keeps_its_witness(url: str, near: str, tmp_path: Path) -> None:
    run = spent(url, near)
    new, file = f"sqlite:///{tmp_path}/new.sqlite3", tmp_path / "file"
    with Ledger(url, witness=near) as ledger:
        ledger.export(file, to=new)
    with refused("with a witness: name it"):
        ledger_module.import_ledger(file, new)
    assert not (tmp_path / "new.sqlite3").exists()
    with ledger_module.import_ledger(file, new, witness=near) as ledger:
        ledger.resume_run(run, "a" * 64)
        assert ledger.verify() == [] and ledger._opened_witness().head(ledger.id) == ledger.head()
    (tmp_path / "new.sqlite3").rename(tmp_path / "taken away")
    with refused("its witness has seen an entry"):
        ledger_module.import_ledger(file, new, witness=near)


def test_a_backup_older_than_the_witness_is_not_restored(url: str, witness: str, tmp_path: Path) -> None:
    run = spent(url, witness)
    place = f"sqlite:///{tmp_path}/restored.sqlite3"
    with Ledger(url, witness=witness) as ledger:
        ledger.backup(tmp_path / "old")
        ledger.resume_run(run, "a" * 64)
        ledger.charge_step(run, 4)
        ledger.backup(tmp_path / "new")
    with refused("its witness has seen an entry .* newer backup") as error:
        ledger_module.restore_ledger(tmp_path / "old", place, witness=witness)
    one_line(error)
    with refused("there is no ledger"):
        Ledger(place, create=False)
    with ledger_module.restore_ledger(tmp_path / "new", place, witness=witness) as ledger:
        assert ledger.resume_run(run, "a" * 64).steps == 4 and ledger.verify() == []
        with refused("does not fit"):
            ledger.open_run(**ask(dataset="exhausted", epsilon=1e-9))


def test_mutant_restore_that_ignores_the_witness_is_caught(
    url: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = spent(url, near)
    with Ledger(url, witness=near) as ledger:
        ledger.backup(tmp_path / "old")
        ledger.resume_run(run, "a" * 64)
    with monkeypatch.context() as mutant:
        mutant.setattr(Ledger, "_losses", lambda self, connection, seen: [])
        ledger_module.restore_ledger(tmp_path / "old", f"sqlite:///{tmp_path}/restored", witness=near).close()
    with Ledger(f"sqlite:///{tmp_path}/restored", witness=near) as ledger:
        assert "another branch" in ledger.verify()[0]


def test_without_a_witness_restoring_takes_the_operators_word_and_records_it(
    url: str, near: str, tmp_path: Path
) -> None:
    spent(url)
    file, place = tmp_path / "backup", f"sqlite:///{tmp_path}/restored.sqlite3"
    with Ledger(url) as ledger:
        ledger.backup(file)
    with refused("no witness is named that knows.*unwitnessed") as error:
        ledger_module.restore_ledger(file, place)
    one_line(error)
    with refused("does not know"):
        Path(near.removeprefix("sqlite:///")).touch()
        ledger_module.restore_ledger(file, place, witness=near)
    with ledger_module.restore_ledger(file, place, unwitnessed=True) as ledger:
        assert ledger.verify() == [] and ledger.open_run(**ask())
    with contextlib.closing(sqlite3.connect(tmp_path / "restored.sqlite3")) as connection:
        kept = connection.execute("SELECT payload FROM dpfa_entries WHERE kind = 'restored'").fetchall()
    assert kept == [('{"witnessed":false}',)]


def test_the_operators_word_does_not_outrank_a_witness(url: str, near: str, tmp_path: Path) -> None:
    run = spent(url, near)
    with Ledger(url, witness=near) as ledger:
        ledger.backup(tmp_path / "old")
        ledger.resume_run(run, "a" * 64)
    place = f"sqlite:///{tmp_path}/restored.sqlite3"
    restored = ledger_module.restore_ledger(tmp_path / "old", place, witness=near, unwitnessed=True)
    with restored, refused("its witness has seen"):
        restored.resume_run(run, "a" * 64)
    with Ledger(place) as ledger, refused("witness, which was not asked"):
        ledger.resume_run(run, "a" * 64)


def accepted(original: bytes, changed: Iterator[bytes], file: Path) -> list[int]:
    """Which of the damaged copies are taken for whole ones."""
    found = []
    for number, content in enumerate(changed):
        assert content != original
        file.write_bytes(content)
        try:
            ledger_module._Copy(file)
            found.append(number)
        except PrivacyError as error:
            assert "no whole copy" in str(error) and "\n" not in str(error)
    return found


def damages(original: bytes) -> Iterator[bytes]:
    for place in range(len(original)):
        yield original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :]
    for place in range(0, len(original), 3):
        yield original[:place] + original[place + 1 :]
        yield original[:place] + b" " + original[place:]
        yield original[:place]
    lines = original.splitlines(keepends=True)
    yield original + b"\n"
    yield original + lines[-1]
    for number in range(len(lines)):
        yield b"".join(lines[:number] + lines[number + 1 :])
        yield b"".join(lines[:number] + [lines[number]] + lines[number:])
        if number:
            yield b"".join([*lines[: number - 1], lines[number], lines[number - 1], *lines[number + 1 :]])
    yield b"[" * 100_000
    yield b"\xff" * 100


def test_no_damaged_copy_passes_for_a_whole_one(url: str, tmp_path: Path) -> None:
    with Ledger(url) as ledger:
        ledger.charge_step(ledger.open_run(**ask(plan={}, plan_hash="b")), 1)
        ledger.backup(tmp_path / "backup")
    original = (tmp_path / "backup").read_bytes()
    ledger_module._Copy(tmp_path / "backup")
    assert accepted(original, damages(original), tmp_path / "damaged") == []


@pytest.mark.parametrize("mutant", ["_line", "follow"])
def test_mutant_readers_take_some_damaged_copy(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    Ledger(url).close()
    with Ledger(url) as ledger:
        ledger.backup(tmp_path / "backup")
    original = (tmp_path / "backup").read_bytes()
    if mutant == "_line":  # any spelling of the same JSON
        monkeypatch.setattr(ledger_module._Copy, "_line", staticmethod(json.loads))
    else:  # hashes that nobody computes

        def follow(self: Any, entry: dict[str, Any]) -> list[str]:
            self.seq, self.last = entry["seq"], entry["hash"]
            return []

        monkeypatch.setattr(ledger_module._Replay, "follow", follow)
    spellings = itertools.islice(damages(original), 2 * len(original))
    assert accepted(original, spellings, tmp_path / "damaged")


@both
def test_a_backup_under_way_is_of_one_moment(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> None:
    with Ledger(url) as ledger:
        run = ledger.open_run(**ask(max_steps=10**6))
        with child(CHARGER, url, run, "charge first") as process:
            assert process.stdout
            process.stdout.readline()
            for number in range(3):
                before = ledger.run(run).steps
                ledger.backup(tmp_path / f"{number}")
                place = f"sqlite:///{tmp_path}/restored{number}"
                with ledger_module.restore_ledger(tmp_path / f"{number}", place, unwitnessed=True) as restored:
                    assert before <= restored.run(run).steps <= ledger.run(run).steps and restored.verify() == []
            process.kill()
            process.stdout.read()
