"""The write-ahead budget ledger (P19 to P22): what every run was allowed to spend, and every step it set out to take.

An append-only chain of entries is the truth; two small tables beside it make lookups O(1) and are written in the same
transaction. A step is durable here before its noise is drawn, so a run that is killed has counted every step that it
ever intended; a run reserves its whole (epsilon(T_max), delta) before step 1, and nothing is refunded.

A ledger cannot see by itself that an older copy of it was put in its place, which would refund what was spent. A
witness, a second database kept elsewhere, remembers how far the ledger had come. It belongs to the installation, not to
a run: the environment's DPFA_LEDGER_WITNESS names it, and no privacy argument, which a job could leave out. The order
of a step is ledger, witness, noise. A crash in between leaves the ledger ahead of its witness, which is sound; a
witness ahead of its ledger means that entries were lost, and nothing is written any more.

The module knows no Trainer and no torch. No entry holds the time of a step: step times are withheld (P23).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import itertools
import json
import math
import os
import re
import secrets
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa
from platformdirs import user_data_dir

from dpfa_hf.database import Database, parse_url, place_of
from dpfa_hf.errors import PrivacyError

T = TypeVar("T")

_FORMAT = "1"
_GENESIS = "0" * 64
_EXPORT_FORMAT = "dpfa-ledger-1"
_FINGERPRINT = re.compile(r"unnamed-[0-9a-f]{64}")
_ENTRY_TYPES = {"seq": int, "run": str, "kind": str, "payload": str, "prev": str, "hash": str}
_metadata = sa.MetaData()
_meta = sa.Table(
    "dpfa_meta",
    _metadata,
    sa.Column("name", sa.String(16), primary_key=True),
    sa.Column("value", sa.String(64), nullable=False),
)
_entries = sa.Table(
    "dpfa_entries",
    _metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("run", sa.String(32), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("prev", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)
_datasets = sa.Table(
    "dpfa_datasets",
    _metadata,
    sa.Column("dataset", sa.String(255), primary_key=True),
    sa.Column("entry", sa.BigInteger, nullable=False),
)
_runs = sa.Table(
    "dpfa_runs",
    _metadata,
    sa.Column("run", sa.String(32), primary_key=True),
    sa.Column("dataset", sa.String(255), nullable=False, index=True),
    sa.Column("entry", sa.BigInteger, nullable=False),
    sa.Column("steps", sa.BigInteger, nullable=False),
    sa.Column("max_steps", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(255), nullable=False),
    sa.Column("session", sa.String(32)),
)
_witness_metadata = sa.MetaData()
_witnessed = sa.Table(
    "dpfa_witness",
    _witness_metadata,
    sa.Column("ledger", sa.String(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)
_places = sa.Table(
    "dpfa_places",
    _witness_metadata,
    sa.Column("place", sa.String(1024), primary_key=True),
    sa.Column("ledger", sa.ForeignKey(_witnessed.c.ledger), nullable=False),
)


@dataclass(frozen=True)
class RunRecord:
    """What the ledger knows of one run.

    `epsilon` and `delta` are what the run reserved, the guarantee at `max_steps` (P20); `epsilon` is `inf` for a run
    that is NOT PRIVATE. `steps` counts charged steps. `budget` is the data set's (epsilon, delta), or None where none
    was declared. `plan` is the plan as stored: tuples are lists, and an infinite number is the string "inf". `status`
    is "running" until `end_run` and the reason given there afterwards. `created` is UTC, ISO 8601.
    """

    run: str
    dataset: str
    steps: int
    max_steps: int
    epsilon: float
    delta: float
    budget: tuple[float, float] | None
    privacy_unit: str
    adjacency: str
    plan: dict[str, Any]
    plan_hash: str
    status: str
    created: str


@dataclass(frozen=True)
class DatasetRecord:
    """A data set, its budget (epsilon, delta) or None, and what its `runs` have reserved, as sums rounded up (P22)."""

    dataset: str
    budget: tuple[float, float] | None
    privacy_unit: str
    adjacency: str
    epsilon: float
    delta: float
    runs: int


class _Witness(Database):
    """How far ledgers have come, for each the sequence number and the hash of its last entry, and where they are."""

    _noun = "witness"
    _setting = "witness or DPFA_LEDGER_WITNESS"
    _has_table = False

    def head(self, ledger: str) -> tuple[int, str] | None:
        """What was last recorded of the ledger with this id, or None where it is not known."""

        def find(connection: sa.Connection) -> tuple[int, str] | None:
            self._has_table = self._has_table or sa.inspect(connection).has_table(_witnessed.name)
            if not self._has_table:
                return None
            row = connection.execute(sa.select(_witnessed).where(_witnessed.c.ledger == ledger)).first()
            return (row.seq, row.hash) if row else None

        return self.transaction(find, "read")

    def begin(self, ledger: str, place: str) -> None:
        """Begins with a ledger before its first entry; of one that is known, notes that it is at `place` too.

        Raises:
            PrivacyError: another ledger was written at this place: a fresh one would forget what that one spent.
        """

        def note(connection: sa.Connection) -> None:
            _witness_metadata.create_all(connection)
            here = _places.c.place == place
            known = connection.execute(sa.select(_witnessed).join(_places).where(here)).first()
            # Nothing was spent by a ledger without entries: its creation did not end.
            if known is not None and known.ledger != ledger and known.seq > 0:
                raise PrivacyError(
                    f"witness {self.display_url} has seen another ledger at {place}, of {known.seq} entries, which is "
                    "lost or on a disk that is not mounted: restore it, or name another place for other data"
                )
            if connection.execute(sa.select(_witnessed).where(_witnessed.c.ledger == ledger)).first() is None:
                connection.execute(_witnessed.insert().values(ledger=ledger, seq=0, hash=_GENESIS))
            if known is None:
                connection.execute(_places.insert().values(place=place, ledger=ledger))
            else:
                connection.execute(_places.update().where(here).values(ledger=ledger))

        self.transaction(note, "create")

    def advance(self, ledger: str, head: tuple[int, str]) -> bool:
        """Records `head`, durably; False where another process has recorded as late or a later one."""
        behind = (_witnessed.c.ledger == ledger) & (_witnessed.c.seq < head[0])
        forward = _witnessed.update().where(behind).values(seq=head[0], hash=head[1])
        return self.transaction(lambda connection: connection.execute(forward).rowcount == 1, "create")


class Ledger(Database):
    """A ledger in one database, SQLite or PostgreSQL.

    Guarantee: when `charge_step` returns, the step is durable (P21), as `Database` promises, and its witness knows of
    it. The exact decimal sums of the epsilons and of the deltas that the runs of a data set reserved never pass its
    budget, whatever processes race (P22). Nothing is written to a ledger that lacks an entry which its witness has
    seen, one that has a witness serves nobody who does not name it, and none is created where the witness has seen
    another. Whoever may write to the database can rewrite
    all of it consistently, and whoever may replace it can put back an older copy: without a witness elsewhere, nothing
    in the ledger shows that.

    Args:
        url: `sqlite:////absolute/file` or `postgresql://user:password@host/database`. None means the environment's
            DPFA_LEDGER, else `ledger.sqlite3` in the user's data folder.
        witness: the URL of the witness, of the same kinds. None means the environment's DPFA_LEDGER_WITNESS, else
            none. A ledger that is created here gets it from its first entry on; one that exists, by `start_witness`.
        create: whether to create what is missing; otherwise a missing ledger is refused and nothing is written.

    Raises:
        PrivacyError: a URL is malformed, names another kind of database or one in memory, its driver is not installed,
            or the database cannot be reached, written, understood or made durable.
    """

    _written_table = _entries.name

    def __init__(
        self, url: str | None = None, *, witness: str | None = None, create: bool = True, _copy: _Copy | None = None
    ) -> None:
        parsed = _ledger_url(url)
        if not create:
            _refuse_missing(parsed)
        super().__init__(parsed, create=create)
        self._sessions: dict[str, str] = {}
        self._place = place_of(parsed)
        self._witness_url = _witness_url(witness, parsed)
        self._witness: _Witness | None = None
        try:
            if _copy is not None:
                self._fill_from(_copy)
            elif create:
                self._secret = self.transaction(self._create, "create")
            else:
                self._secret = self.transaction(_recorded_secret, "read")
        except PrivacyError:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections; runs stay open in the database and can be resumed."""
        if self._witness is not None:
            self._witness.close()
        super().close()

    def fingerprint(self, data: bytes) -> str:
        """HMAC-SHA256 of `data` under this ledger's secret, as 64 hex digits.

        Equal data give equal fingerprints in this ledger only. A plain hash of private data would be a release (P22); a
        keyed one still belongs in no card, log or report.
        """
        if not isinstance(data, bytes):
            raise PrivacyError(f"data must be bytes, not {type(data).__name__}: encode it first")
        return hmac.new(bytes.fromhex(self._secret), data, hashlib.sha256).hexdigest()

    def open_run(
        self,
        *,
        dataset: str,
        plan: dict[str, Any],
        plan_hash: str,
        epsilon: float,
        delta: float,
        max_steps: int,
        privacy_unit: str,
        adjacency: str,
        budget: tuple[float, float] | None,
    ) -> str:
        """Reserves (epsilon, delta) against the data set's budget and returns the new run's id (32 hex digits).

        One serialised transaction creates the data set if it is new, checks unit, adjacency and budget against what is
        recorded, and records the reservation, or changes nothing. A data set without a budget is recorded, not limited;
        once a budget is given, the runs before it count against it. The ledger is verified first.

        Guarantee: the sums of the reserved epsilons and of the deltas stay within the budget (basic composition, which
        holds for runs chosen after seeing earlier ones; P22). Numbers are read as the decimals that Python prints, and
        added exactly.

        Args:
            dataset: the data set's name for its lifetime.
            plan: the plan (P19), of JSON types; infinite floats are stored as "inf", NaN is refused.
            plan_hash: the plan's hash, compared on resuming.
            epsilon: epsilon at `max_steps`; `inf` says NOT PRIVATE and is refused where there is a budget.
            delta: in (0, 1).
            max_steps: the largest number of steps that will ever be charged.
            privacy_unit: e.g. "example".
            adjacency: e.g. "zero_out".
            budget: (epsilon, delta) of the data set, or None to use what is recorded.

        Raises:
            PrivacyError: an argument is out of range, the data set has another budget, unit or adjacency, the budget
                would be passed, or the ledger fails verification or cannot be written.
        """
        run = uuid.uuid4().hex
        session = secrets.token_hex(16)
        declaration = {
            "dataset": _text("dataset", dataset),
            "budget": _budget(budget),
            "privacy_unit": _text("privacy_unit", privacy_unit),
            "adjacency": _text("adjacency", adjacency),
        }
        if not isinstance(plan, dict):
            raise PrivacyError(f"plan must be a dict, not {type(plan).__name__}: pass the plan's fields")
        reservation = {
            "dataset": dataset,
            "plan": plan,
            "plan_hash": _text("plan_hash", plan_hash),
            "epsilon": _epsilon(epsilon),
            "delta": _delta("delta", delta),
            "max_steps": _integer("max_steps", max_steps),
            "session": session,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _canonical(reservation)
        self._refuse_broken()

        def reserve(connection: sa.Connection) -> None:
            limit = _declare(connection, declaration)
            if limit is not None:
                _refuse_overspending(connection, reservation, limit)
            seq = _append(connection, run, "run", reservation)
            connection.execute(
                _runs.insert().values(
                    run=run,
                    dataset=dataset,
                    entry=seq,
                    steps=0,
                    max_steps=reservation["max_steps"],
                    status="running",
                    session=session,
                )
            )

        self._write(reserve)
        self._sessions[run] = session
        return run

    def charge_step(self, run: str, step: int) -> int:
        """Writes step number `step` (from 1) of `run` ahead of its noise and returns the count of charged steps.

        Guarantee: on return the step is durable (P21). On an error it is not reported as charged, though a connection
        lost in mid-commit may have counted it. Work and statements per step are O(1).

        Raises:
            PrivacyError: the run is unknown, has ended, was resumed elsewhere since, or was not opened or resumed by
                this object; `step` is not the next one or is beyond max_steps; or the ledger cannot be written.
        """
        step = _integer("step", step)
        session = self._sessions.get(_text("run", run), "")

        def charge(connection: sa.Connection) -> int:
            mine = (_runs.c.run == run) & (_runs.c.session == session)
            next_one = (_runs.c.steps == step - 1) & (_runs.c.max_steps >= step)
            if connection.execute(_runs.update().where(mine & next_one).values(steps=step)).rowcount != 1:
                self._refuse_stale(connection, run, session)
                charged, last = connection.execute(
                    sa.select(_runs.c.steps, _runs.c.max_steps).where(_runs.c.run == run)
                ).one()
                if charged >= last:
                    raise PrivacyError(
                        f"run {run} has spent all its {last} steps, so step {step} is refused (P20): open a new run"
                    )
                raise PrivacyError(
                    f"step {step} of run {run} is not the next one, {charged + 1}: "
                    "charge each step once and in order, and after a failure resume_run"
                )
            _append(connection, run, "step", {"step": step})
            return step

        return self._write(charge)

    def resume_run(self, run: str, plan_hash: str) -> RunRecord:
        """Takes `run` over for this object, which alone may charge it from now on, and returns its record.

        The record's `steps` is where charging goes on, whatever the checkpoint says; its `plan` is to be read, never
        recomputed (P19). A run that has ended may be resumed: its reservation covers max_steps.

        Raises:
            PrivacyError: the run is not in this ledger, its plan had another hash, or the ledger fails verification.
        """
        _text("run", run)
        _text("plan_hash", plan_hash)
        self._refuse_broken()
        session = secrets.token_hex(16)

        def resume(connection: sa.Connection) -> RunRecord:
            record = self._one(connection, run)
            if record.plan_hash != plan_hash:
                raise PrivacyError(
                    f"run {run} was planned with other privacy arguments (its plan's hash differs, P19): "
                    "resume it with the arguments of its first start, or start a new run"
                )
            _append(connection, run, "resume", {"session": session})
            connection.execute(_runs.update().where(_runs.c.run == run).values(status="running", session=session))
            return self._one(connection, run)

        record = self._write(resume)
        self._sessions[run] = session
        return record

    def end_run(self, run: str, reason: str) -> None:
        """Ends `run` with a one-line `reason`, its status from then on. Nothing is refunded (P22).

        Raises:
            PrivacyError: as `charge_step` does, for a run that is not this object's to end.
        """
        if _text("reason", reason) == "running":
            raise PrivacyError('reason must not be "running", the status of a run that has not ended: name another')
        session = self._sessions.get(_text("run", run), "")

        def end(connection: sa.Connection) -> None:
            self._refuse_stale(connection, run, session)
            _append(connection, run, "end", {"reason": reason})
            connection.execute(_runs.update().where(_runs.c.run == run).values(status=reason, session=None))

        self._write(end)
        del self._sessions[run]

    def run(self, run: str) -> RunRecord:
        """The record of `run`; PrivacyError where this ledger does not have it."""
        _text("run", run)
        return self.transaction(lambda connection: self._one(connection, run), "read")

    def runs(self) -> list[RunRecord]:
        """All runs, in the order in which they were opened."""
        return self.transaction(_records, "read")

    def datasets(self) -> list[DatasetRecord]:
        """All data sets, in the order of their first runs."""
        by_name: dict[str, list[RunRecord]] = {}
        for record in self.runs():
            by_name.setdefault(record.dataset, []).append(record)
        return [
            DatasetRecord(
                dataset=name,
                budget=records[-1].budget,
                privacy_unit=records[-1].privacy_unit,
                adjacency=records[-1].adjacency,
                epsilon=_sum_rounded_up(record.epsilon for record in records),
                delta=_sum_rounded_up(record.delta for record in records),
                runs=len(records),
            )
            for name, records in by_name.items()
        ]

    def verify(self) -> list[str]:
        """Replays the whole chain and returns the problems found, one line each; [] means that it holds.

        Found are entries that were changed, dropped, reordered, added or cut off at the end, summary rows that differ
        from what the entries add up to, a replaced secret, passed budgets, and entries that the witness has seen and
        the ledger has lost. Cost is linear in the entries.

        Raises:
            PrivacyError: the ledger or its witness cannot be read.
        """
        seen = self._seen()

        def replay(connection: sa.Connection) -> list[str]:
            problems, replayed = _problems(connection, self._secret)
            if replayed.witnessed and self._witness_url is None:
                problems.append("it has a witness, which was not asked: name it in witness or DPFA_LEDGER_WITNESS")
            return problems + self._losses(connection, seen)

        return self.transaction(replay, "read")

    def head(self) -> tuple[int, str]:
        """(sequence number, hash) of the last entry: kept elsewhere, it witnesses that no older copy was restored."""
        return self.transaction(_head, "read")

    def hash_at(self, seq: int) -> str | None:
        """The recorded hash of entry `seq`, or None where there is none; whether it is true, `verify` says."""
        return self.transaction(lambda connection: _hash_at(connection, seq), "read")

    @property
    def id(self) -> str:
        """What witnesses and signed heads call this ledger: the secret's hash, which its first entry has too."""
        return _sha256(self._secret)

    def moved_to(self) -> str | None:
        """Where this ledger was moved by `export`, so that it is closed; None for one that is in use."""
        return _moved_to(*self.transaction(_last, "read")[2:])

    def start_witness(self) -> None:
        """Makes the witness that this object was opened with the ledger's own: from now on the ledger is refused
        without one. Where the ledger has lost its witness, this starts a new one.

        A witness that begins today vouches for today's entries: that none was lost before is the caller's word.

        Raises:
            PrivacyError: no witness was named, it knows a later state of this ledger, or either cannot be written.
        """
        if self._witness_url is None:
            raise PrivacyError("witness is not set: name its database in witness or DPFA_LEDGER_WITNESS")
        # Before the entry that demands it, so that a crash in between leaves a ledger which can be served.
        self._opened_witness(create=True).begin(self.id, self._place)
        self._write(lambda connection: _append(connection, "", "witness", {}))

    def export(self, path: str | os.PathLike[str], *, to: str | None = None) -> tuple[int, str]:
        """Writes the chain as JSON lines into a new file that its owner alone can read, and returns its head.

        Without `to` the file is for reading, by an auditor for example: it holds data sets' names and fingerprints, and
        not the secret. With `to` the ledger moves: its last entry, written before the file, says where to, it is
        refused from then on, and the file, which holds the secret too, can be imported at that place alone. If writing
        the file fails, calling again writes it.

        Raises:
            PrivacyError: the file exists or cannot be written, the ledger fails verification or has moved elsewhere.
        """
        place = None if to is None else place_of(_ledger_url(to))

        def move(connection: sa.Connection) -> None:
            if _last(connection)[2:] != ("moved", _canonical({"to": place})):
                _append(connection, "", "moved", {"to": place})

        with _new_file(path) as file:
            if place is None:
                return self._copy(file, secret=False)
            self._refuse_broken()
            self._write(move)
            return self._copy(file, secret=True)

    def backup(self, path: str | os.PathLike[str]) -> tuple[int, str]:
        """Writes a copy for `restore_ledger` into a new file that its owner alone can read, and returns its head.

        The copy is of one moment, whatever is charged meanwhile, and holds the secret.

        Raises:
            PrivacyError: the file exists or cannot be written, or the ledger fails verification.
        """
        with _new_file(path) as file:
            self._refuse_broken()
            return self._copy(file, secret=True)

    def _copy(self, file: IO[str], *, secret: bool) -> tuple[int, str]:
        def write(connection: sa.Connection) -> tuple[int, str]:
            file.seek(0)
            file.truncate()
            seq, last = _head(connection)
            header = {"format": _EXPORT_FORMAT, "entries": seq, "head": last}
            file.write(_canonical(header | ({"secret": self._secret} if secret else {})) + "\n")
            for entry in _in_order(connection):
                file.write(_canonical(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
            return seq, last

        return self.transaction(write, "read")

    def _create(self, connection: sa.Connection) -> str:
        secret, is_new = _create(connection)
        if is_new and self._witness_url is not None:
            # Before the commit: a crash in between leaves the witness of a ledger that never was.
            self._opened_witness(create=True).begin(_sha256(secret), self._place)
            _append(connection, "", "witness", {})
        return secret

    def _fill_from(self, copy: _Copy) -> None:
        self._secret = copy.secret
        seen = None if copy.unwitnessed else self._seen()
        arrival = "imported" if copy.replay.moved_to is not None else "restored"

        def fill(connection: sa.Connection) -> tuple[int, str]:
            _metadata.create_all(connection)
            if _head(connection) != (0, _GENESIS) or connection.execute(sa.select(_meta)).first():
                raise PrivacyError(f"ledger {self.display_url} is in use: name an empty place, or keep what is there")
            entries = copy.entries()
            while some := list(itertools.islice(entries, 1000)):
                connection.execute(_entries.insert(), some)
            if copy.secret != self._secret:
                raise PrivacyError(f"file {copy.path} was exchanged while it was read: try again")
            for table, rows in ((_datasets, copy.replay.datasets), (_runs, copy.replay.runs)):
                if rows:
                    connection.execute(table.insert(), list(rows.values()))
            _insert_meta(connection, copy.secret)
            losses = self._losses(connection, seen)
            if losses:
                raise PrivacyError(f"file {copy.path} is refused, for {losses[0]}: restore a newer backup")
            if seen is not None:
                self._opened_witness().begin(self.id, self._place)
            _append(connection, "", arrival, {"witnessed": seen is not None})
            return _head(connection)

        head = self.transaction(fill, "create")
        if seen is not None:
            self._tell_witness(head)

    def _opened_witness(self, *, create: bool = False) -> _Witness:
        assert self._witness_url is not None
        if self._witness is None:
            self._witness = _Witness(self._witness_url, create=create)
        return self._witness

    def _seen(self) -> tuple[int, str] | None:
        """The last entry that the witness has seen, None without a witness; asked before the transaction that is held
        against it, so that it cannot be ahead of a sound one."""
        if self._witness_url is None:
            return None
        witness = self._opened_witness()
        seen = witness.head(self.id)
        if seen is None:
            raise PrivacyError(
                f"witness {witness.display_url} does not know ledger {self.display_url}: correct witness or "
                "DPFA_LEDGER_WITNESS, or, if this is the ledger's newest copy, run `dpfa ledger witness`"
            )
        return seen

    def _losses(self, connection: sa.Connection, seen: tuple[int, str] | None) -> list[str]:
        if seen is None or _hash_at(connection, seen[0]) == seen[1]:
            return []
        return [f"its witness has seen an entry {seen[0]} that it lacks: it is an older copy, or another branch"]

    def _write(self, work: Callable[[sa.Connection], T]) -> T:
        """Runs `work` in a write transaction on a ledger that has lost nothing, and has the result witnessed."""
        seen = self._seen()
        if seen is None:
            return self.transaction(work, "write")

        def checked(connection: sa.Connection) -> tuple[T, tuple[int, str]]:
            losses = self._losses(connection, seen)
            if losses:
                raise PrivacyError(f"ledger {self.display_url} is refused, for {losses[0]}: restore a newer backup")
            return work(connection), _head(connection)

        result, head = self.transaction(checked, "write")
        self._tell_witness(head)
        return result

    def _tell_witness(self, head: tuple[int, str]) -> None:
        if self._opened_witness().advance(self.id, head):
            return
        # Another writer was faster: of this ledger, and then its entry is here, or of a copy.
        seen = self._seen()
        losses = self.transaction(lambda connection: self._losses(connection, seen), "read")
        if losses:
            raise PrivacyError(f"ledger {self.display_url} is refused, for {losses[0]}: find and stop the other copy")

    def _refuse_broken(self) -> None:
        problems = self.verify()
        if problems:
            raise PrivacyError(
                f"ledger {self.display_url} fails verification ({problems[0]}): restore a newer backup that passes "
                "`dpfa ledger verify`; a fresh ledger would forget what was spent"
            )

    def _refuse_stale(self, connection: sa.Connection, run: str, session: str) -> None:
        record = self._one(connection, run)
        current = connection.execute(sa.select(_runs.c.session).where(_runs.c.run == run)).scalar_one()
        if current is None:
            raise PrivacyError(f"run {run} has ended ({record.status}): resume_run it, or open a new run")
        if current != session:
            raise PrivacyError(
                f"run {run} belongs to another process, which opened or resumed it last: "
                "stop this one, or take the run over with resume_run"
            )

    def _one(self, connection: sa.Connection, run: str) -> RunRecord:
        records = _records(connection, run)
        if not records:
            raise PrivacyError(
                f"run {run} is not in ledger {self.display_url}: name the ledger of its first start (ledger or "
                "DPFA_LEDGER; privacy.json holds the run's id), restore its backup, or start a new run"
            )
        return records[0]


def import_ledger(path: str | os.PathLike[str], url: str | None = None, *, witness: str | None = None) -> Ledger:
    """Goes on at `url` with a ledger that `Ledger.export(path, to=url)` has moved here, and returns it.

    Guarantee: every byte of the file is checked, the place was empty, and it is the one that the file's last entry
    names, so that one file does not become two ledgers which spend the budget twice. (Places that are called the same
    on two machines are told apart by a witness alone.) All is written, or nothing.

    Args:
        path: the file.
        url: an empty place, as for `Ledger`.
        witness: as for `Ledger`.

    Raises:
        PrivacyError: the file is damaged, incomplete or not a move to this place, the place is not empty, or the
            ledger's witness was not named or has seen later entries.
    """
    copy, place = _Copy(path), place_of(_ledger_url(url))
    if copy.replay.moved_to is None:
        raise PrivacyError(
            f"file {path} is of a ledger that is still in use: close that one with `dpfa ledger export --to {place}`, "
            "or use `dpfa ledger restore` if it was lost"
        )
    if copy.replay.moved_to != place:
        raise PrivacyError(f"file {path} is of a ledger that moved to {copy.replay.moved_to}, not {place}: go on there")
    if copy.replay.witnessed and _witness_url(witness, _ledger_url(url)) is None:
        raise PrivacyError(f"file {path} is of a ledger with a witness: name it in witness or DPFA_LEDGER_WITNESS")
    return Ledger(url, witness=witness, _copy=copy)


def restore_ledger(
    path: str | os.PathLike[str], url: str | None = None, *, witness: str | None = None, unwitnessed: bool = False
) -> Ledger:
    """Puts the copy that `Ledger.backup` wrote to `path` in the place of a ledger that was lost, and returns it.

    Guarantee: every byte of the file is checked, the place was empty, and the copy has the last entry that the witness
    has seen, so that nothing which was spent is refunded. All is written, or nothing.

    Args:
        path: the backup.
        url: an empty place, as for `Ledger`.
        witness: as for `Ledger`.
        unwitnessed: asks no witness: that nothing was written after the backup is the caller's word, and recorded as
            such. A ledger that had a witness is refused until it has one again (`Ledger.start_witness`).

    Raises:
        PrivacyError: the file is damaged, incomplete or of a ledger that has moved, the place is not empty, or there is
            no witness or it has seen later entries.
    """
    copy = _Copy(path, unwitnessed=unwitnessed)
    if copy.replay.moved_to is not None:
        raise PrivacyError(f"file {path} is of a ledger that moved to {copy.replay.moved_to}: go on there")
    if not unwitnessed and _witness_url(witness, _ledger_url(url)) is None:
        raise PrivacyError(
            f"file {path} may be older than what was spent, and no witness is named that knows: name it in witness "
            "or DPFA_LEDGER_WITNESS, or give your word with unwitnessed"
        )
    return Ledger(url, witness=witness, _copy=copy)


@contextlib.contextmanager
def _new_file(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """A file that its owner alone can read; it is removed if anything raises."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise PrivacyError(f"file {path} cannot be created ({error.strerror}): name a new file") from None
    try:
        with open(descriptor, "w", encoding="ascii", newline="\n") as file:
            yield file
    except BaseException as error:
        os.unlink(path)
        if isinstance(error, OSError):
            raise PrivacyError(f"file {path} cannot be written ({error.strerror}): free space, and try again") from None
        raise


class _Copy:
    """A file that `Ledger.export(to=...)` or `Ledger.backup` wrote, read through once on opening.

    Guarantee: a file in which any byte was changed, added or cut off is refused. Each line is the canonical JSON of
    what it says; the first one holds the secret, whose hash is in the first entry, and number and hash of the last one.
    """

    def __init__(self, path: str | os.PathLike[str], *, unwitnessed: bool = False) -> None:
        self.path, self.unwitnessed = path, unwitnessed
        for _ in self.entries():
            pass

    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries in order; `secret` and `replay` are those of all entries at the end."""
        try:
            with open(self.path, "rb") as file:
                lines = map(self._line, file)
                header = next(lines, {})
                self.secret = str(header.get("secret", ""))
                self.replay = _Replay(self.secret)
                if not self.secret:
                    raise ValueError("it has no secret: only what `backup` and `export --to` write can be served")
                for entry in lines:
                    if {name: type(value) for name, value in entry.items()} != _ENTRY_TYPES:
                        raise ValueError("a line is not an entry")
                    problems = self.replay.follow(entry)
                    if problems:
                        raise ValueError(problems[0])
                    yield entry
                last = {"entries": self.replay.seq, "head": self.replay.last}
                if header != {"format": _EXPORT_FORMAT, "secret": self.secret} | last:
                    raise ValueError("it does not end as its first line says")
                problems = self.replay.overspent()
                if problems:
                    raise ValueError(problems[0])
        except OSError as error:
            raise PrivacyError(f"file {self.path} cannot be read ({error.strerror}): name the right file") from None
        except ValueError as error:
            raise PrivacyError(
                f"file {self.path} is no whole copy of a ledger ({error}): take another one, or write it again"
            ) from None

    @staticmethod
    def _line(line: bytes) -> dict[str, Any]:
        try:
            content = json.loads(line)
            sound = isinstance(content, dict) and (_canonical(content) + "\n").encode() == line
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise ValueError("a line is not as it was written")
        return content


def _ledger_url(url: str | None) -> sa.URL:
    if url is not None:
        return parse_url(url, "ledger")
    if os.environ.get("DPFA_LEDGER"):
        return parse_url(os.environ["DPFA_LEDGER"], "DPFA_LEDGER")
    path = Path(user_data_dir("dpfa_hf")) / "ledger.sqlite3"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise PrivacyError(
            f"the default ledger's folder {path.parent} cannot be created ({error.strerror}): "
            "give a place in ledger or DPFA_LEDGER"
        ) from None
    return sa.URL.create("sqlite+pysqlite", database=str(path))


def _witness_url(url: str | None, ledger: sa.URL) -> sa.URL | None:
    source = "DPFA_LEDGER_WITNESS" if url is None else "witness"
    if url is None:
        url = os.environ.get("DPFA_LEDGER_WITNESS") or None
    if url is None:
        return None
    parsed = parse_url(url, source)
    if (place_of(parsed), parsed.query) == (place_of(ledger), ledger.query):
        raise PrivacyError(
            f"{source} is the ledger's own database, which would be put back together with it: name one elsewhere"
        )
    return parsed


def _refuse_missing(url: sa.URL) -> None:
    """Looks without the settings of a ledger's connection, which would already write."""
    shown = url.set(drivername=url.get_backend_name(), query={}).render_as_string(hide_password=True)
    exists = url.get_backend_name() != "sqlite" or Path(url.database or "").is_file()
    if exists:
        try:
            engine = sa.create_engine(url)
            exists = sa.inspect(engine).has_table(_meta.name)
            engine.dispose()
        except (ImportError, sa.exc.SQLAlchemyError) as error:
            raise PrivacyError(
                f"ledger {shown} cannot be read ({type(error).__name__}): check the address in --ledger or "
                "DPFA_LEDGER, the server, and that the database's driver is installed"
            ) from None
    if not exists:
        raise PrivacyError(
            f"there is no ledger at {shown}: name it with --ledger or DPFA_LEDGER; a private run creates one"
        )


def _create(connection: sa.Connection) -> tuple[str, bool]:
    """Creates what is missing of an empty ledger and returns (secret of 64 hex digits, whether it is new)."""
    _metadata.create_all(connection)
    meta = {row.name: row.value for row in connection.execute(sa.select(_meta))}
    is_new = not meta and _head(connection) == (0, _GENESIS)
    if is_new:
        meta = _insert_meta(connection, secrets.token_hex(32))
        _append(connection, "", "ledger", {"format": _FORMAT, "secret_sha256": _sha256(meta["secret"])})
    return _recorded_secret(connection), is_new


def _recorded_secret(connection: sa.Connection) -> str:
    meta = {row.name: row.value for row in connection.execute(sa.select(_meta))}
    secret = meta.get("secret", "")
    if len(secret) != 64 or not set(secret) <= set("0123456789abcdef"):
        raise PrivacyError("ledger has lost its secret, so it cannot tell data sets apart: restore a backup")
    if meta.get("format") != _FORMAT:
        raise PrivacyError(
            f"ledger has format {meta.get('format')!r} and this version of dpfa_hf reads {_FORMAT!r}: "
            "update dpfa_hf, or restore a backup"
        )
    return secret


def _insert_meta(connection: sa.Connection, secret: str) -> dict[str, str]:
    meta = {"format": _FORMAT, "secret": secret}
    connection.execute(_meta.insert(), [{"name": name, "value": value} for name, value in meta.items()])
    return meta


def _last(connection: sa.Connection) -> tuple[int, str, str, str]:
    """(sequence number, hash, kind, payload) of the last entry."""
    columns = (_entries.c.seq, _entries.c.hash, _entries.c.kind, _entries.c.payload)
    last = connection.execute(sa.select(*columns).order_by(_entries.c.seq.desc()).limit(1)).first()
    return (last.seq, last.hash, last.kind, last.payload) if last else (0, _GENESIS, "", "")


def _head(connection: sa.Connection) -> tuple[int, str]:
    return _last(connection)[:2]


def _hash_at(connection: sa.Connection, seq: int) -> str | None:
    if seq == 0:
        return _GENESIS
    return connection.execute(sa.select(_entries.c.hash).where(_entries.c.seq == seq)).scalar()


def _in_order(connection: sa.Connection) -> Iterator[dict[str, Any]]:
    """The entries, fetched a few at a time."""
    entries = sa.select(_entries).order_by(_entries.c.seq).execution_options(yield_per=1000)
    return ({name: row[name] for name in _ENTRY_TYPES} for row in connection.execute(entries).mappings())


def _append(connection: sa.Connection, run: str, kind: str, payload: dict[str, Any]) -> int:
    last, prev, *before = _last(connection)
    moved_to = _moved_to(*before)
    if moved_to is not None and kind != "imported":
        raise PrivacyError(f"this ledger has moved to {moved_to} and is closed: name that one in ledger or DPFA_LEDGER")
    entry = {"seq": last + 1, "run": run, "kind": kind, "payload": _canonical(payload), "prev": prev}
    connection.execute(_entries.insert().values(**entry, hash=_sha256(_canonical(entry))))
    return last + 1


def _moved_to(kind: str, payload: str) -> str | None:
    return str(json.loads(payload)["to"]) if kind == "moved" else None


def _declare(connection: sa.Connection, declaration: dict[str, Any]) -> list[float] | None:
    """Records a new data set, or checks `declaration` against the recorded one, and returns the budget in force."""
    name = declaration["dataset"]
    of_name = _datasets.c.dataset == name
    text = connection.execute(
        sa.select(_entries.c.payload).join(_datasets, _datasets.c.entry == _entries.c.seq).where(of_name)
    ).scalar()
    if text is None:
        seq = _append(connection, "", "dataset", declaration)
        connection.execute(_datasets.insert().values(dataset=name, entry=seq))
        return declaration["budget"]
    recorded = json.loads(text)
    for field in ("privacy_unit", "adjacency"):
        if recorded[field] != declaration[field]:
            raise PrivacyError(
                f"{field}={declaration[field]!r}, but this data set's is {recorded[field]!r} for its lifetime (P22): "
                f"use {recorded[field]!r}"
            )
    if recorded["budget"] is None and declaration["budget"] is not None:
        seq = _append(connection, "", "dataset", declaration)
        connection.execute(_datasets.update().where(of_name).values(entry=seq))
        return declaration["budget"]
    if declaration["budget"] not in (None, recorded["budget"]):
        raise PrivacyError(
            f"the budget {tuple(declaration['budget'])} differs from this data set's, {tuple(recorded['budget'])}, "
            "fixed for its lifetime (P22): give the recorded one, or none"
        )
    return recorded["budget"]


def _refuse_overspending(connection: sa.Connection, reservation: dict[str, Any], budget: list[float]) -> None:
    if reservation["epsilon"] == math.inf:
        raise PrivacyError(
            f"epsilon is inf (NOT PRIVATE), and this data set has the budget {tuple(budget)} (P22): "
            "set a finite target_epsilon, or debug on a public data set"
        )
    earlier = connection.execute(
        sa.select(_entries.c.payload)
        .join(_runs, _runs.c.entry == _entries.c.seq)
        .where(_runs.c.dataset == reservation["dataset"])
    )
    reserved = [json.loads(text) for text in earlier.scalars()]
    for field, limit in zip(("epsilon", "delta"), budget, strict=True):
        before = _sum_rounded_up(float(run[field]) for run in reserved)
        if not _fits([*(float(run[field]) for run in reserved), reservation[field]], limit):
            raise PrivacyError(
                f"{field} {reservation[field]} does not fit this data set's budget of {limit}, of which earlier runs "
                f"reserved {before} and nothing is refunded (P22): lower target_{field}, or train on other data"
            )


def _records(connection: sa.Connection, run: str | None = None) -> list[RunRecord]:
    opened, declared = _entries.alias(), _entries.alias()
    query = (
        sa.select(_runs, opened.c.payload.label("opened"), declared.c.payload.label("declared"))
        .outerjoin(_datasets, _datasets.c.dataset == _runs.c.dataset)
        .outerjoin(opened, opened.c.seq == _runs.c.entry)
        .outerjoin(declared, declared.c.seq == _datasets.c.entry)
        .order_by(_runs.c.entry)
    )
    rows = connection.execute(query if run is None else query.where(_runs.c.run == run))
    return [_record(row) for row in rows]


def _record(row: sa.Row[Any]) -> RunRecord:
    try:
        opened, declared = json.loads(row.opened), json.loads(row.declared)
        return RunRecord(
            run=row.run,
            dataset=row.dataset,
            steps=row.steps,
            max_steps=row.max_steps,
            epsilon=float(opened["epsilon"]),
            delta=float(opened["delta"]),
            budget=None if declared["budget"] is None else (declared["budget"][0], declared["budget"][1]),
            privacy_unit=declared["privacy_unit"],
            adjacency=declared["adjacency"],
            plan=opened["plan"],
            plan_hash=opened["plan_hash"],
            status=row.status,
            created=opened["created"],
        )
    except (KeyError, TypeError, ValueError, IndexError):
        raise PrivacyError(
            f"the ledger's entries of run {row.run} are damaged: see `dpfa ledger verify`, and restore a backup"
        ) from None


def _problems(connection: sa.Connection, secret: str) -> tuple[list[str], _Replay]:
    replay = _Replay(secret)
    problems = [problem for entry in _in_order(connection) for problem in replay.follow(entry)]
    if replay.seq == 0:
        problems.append("there are no entries: even the first, written at creation, is missing")
    for table, expected in ((_datasets, replay.datasets), (_runs, replay.runs)):
        key = table.primary_key.columns[0].name
        found = {row[key]: dict(row) for row in connection.execute(sa.select(table)).mappings()}
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        problems += [f"the row of {key} {_public(name)} in {table.name} differs from the entries" for name in wrong]
    return problems + replay.overspent(), replay


class _Replay:
    """What the entries alone tell: the summary tables, the head, whether a witness is demanded, where the ledger is."""

    def __init__(self, secret: str) -> None:
        self.secret = secret
        self.seq, self.last = 0, _GENESIS
        self.witnessed = False
        self.moved_to: str | None = None
        self.runs: dict[str, dict[str, Any]] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.declared: dict[str, dict[str, Any]] = {}
        self.reserved: dict[str, list[dict[str, Any]]] = {}

    def follow(self, entry: Mapping[str, Any]) -> list[str]:
        """Takes the next entry and returns what is wrong with it."""
        problems = []
        seq, kind = entry["seq"], entry["kind"]
        if seq != self.seq + 1:
            problems.append(f"entry {self.seq + 1} is missing: the next one is {seq}")
        if entry["prev"] != self.last:
            problems.append(f"entry {seq} does not follow the entry before it (prev differs)")
        if entry["hash"] != _sha256(_canonical({name: entry[name] for name in _ENTRY_TYPES if name != "hash"})):
            problems.append(f"entry {seq} was changed (its hash differs)")
        try:
            self._apply(seq, entry["run"], kind, json.loads(entry["payload"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problems.append(f"entry {seq} ({kind}) makes no sense where it stands ({error})")
        self.seq, self.last = seq, entry["hash"]
        return problems

    def _apply(self, seq: int, run: str, kind: str, payload: dict[str, Any]) -> None:
        if (kind == "ledger") != (seq == 1):
            raise ValueError("the chain begins with its only entry of kind 'ledger'")
        if (kind == "imported") != (self.moved_to is not None):
            raise ValueError("a ledger that has moved goes on by being imported, and no other does")
        if kind == "ledger":
            if payload != {"format": _FORMAT, "secret_sha256": _sha256(self.secret)}:
                raise ValueError("the secret was replaced")
        elif kind == "dataset":
            name, before = payload["dataset"], self.declared.get(payload["dataset"])
            if before is not None and payload != {**before, "budget": payload["budget"]}:
                raise ValueError("the data set's unit or adjacency changed")
            if before is not None and before["budget"] is not None:
                raise ValueError("the data set's budget changed")
            self.declared[name], self.datasets[name] = payload, {"dataset": name, "entry": seq}
        elif kind == "run":
            name = payload["dataset"]
            if name not in self.declared or run in self.runs:
                raise ValueError("the data set was not declared, or the run was opened before")
            self.reserved.setdefault(name, []).append({field: float(payload[field]) for field in ("epsilon", "delta")})
            self.runs[run] = {
                "run": run,
                "dataset": name,
                "entry": seq,
                "steps": 0,
                "max_steps": payload["max_steps"],
                "status": "running",
                "session": payload["session"],
            }
        elif kind == "step":
            state = self.runs[run]
            if payload != {"step": state["steps"] + 1} or state["steps"] >= state["max_steps"] or not state["session"]:
                raise ValueError("the step is not the next one of a running run")
            state["steps"] += 1
        elif kind == "resume":
            self.runs[run].update(status="running", session=payload["session"])
        elif kind == "end":
            self.runs[run].update(status=payload["reason"], session=None)
        elif kind == "moved":
            self.moved_to = str(payload["to"])
        elif kind == "imported":
            self.moved_to = None
        elif kind == "witness":
            self.witnessed = True
        elif kind != "restored":
            raise ValueError("the kind is unknown")

    def overspent(self) -> list[str]:
        return [
            f"the runs of data set {_public(name)} reserved more {field} than its budget"
            for name, declaration in self.declared.items()
            for field, limit in zip(("epsilon", "delta"), declaration["budget"] or (), strict=False)
            if not _fits([run[field] for run in self.reserved.get(name, [])], limit)
        ]


def _public(name: str) -> str:
    """A data set's name for messages, which may show no fingerprint (P22)."""
    return _FINGERPRINT.sub("unnamed", name)


def _canonical(value: object) -> str:
    """Canonical JSON: ASCII, sorted keys, no spaces, floats as Python prints them, infinity as the string "inf"."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value == math.inf:
        return "inf"
    if isinstance(value, float) and not math.isfinite(value):
        raise PrivacyError(f"plan holds {value}, which no plan means: correct that field")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise PrivacyError(f"plan holds a {type(value).__name__}, which JSON cannot hold: use numbers, text, lists, dicts")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _exact(number: float) -> Fraction:
    # The decimal that Python prints, so that ten times 0.1 is 1.
    return Fraction(repr(number))


def _fits(amounts: list[float], limit: float) -> bool:
    return math.inf not in amounts and sum(map(_exact, amounts)) <= _exact(limit)


def _sum_rounded_up(amounts: Iterable[float]) -> float:
    amounts = list(amounts)
    if math.inf in amounts:
        return math.inf
    total = sum(map(_exact, amounts), Fraction(0))
    if total > sys.float_info.max:
        return math.inf
    nearest = float(total)
    return nearest if _exact(nearest) >= total else math.nextafter(nearest, math.inf)


def _number(name: str, value: object, low: float, high: float, meaning: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise PrivacyError(f"{name} must be {meaning}, not {_shown(value)}: correct {name}")


def _epsilon(value: object) -> float:
    if value == math.inf:
        return math.inf
    return _number("epsilon", value, 0.0, sys.float_info.max, "a number >= 0 (inf says NOT PRIVATE)")


def _delta(name: str, value: object) -> float:
    least, most = math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0)
    return _number(name, value, least, most, "a probability above 0 and below 1")


def _integer(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63:
        return value
    raise PrivacyError(f"{name} must be a whole number >= 1, not {_shown(value)}: correct {name}")


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int | float) else f"a {type(value).__name__}"


def _text(name: str, value: object) -> str:
    if isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable() and value == value.strip():
        return value
    shown = type(value).__name__ if not isinstance(value, str) else f"a str of {len(value)} characters"
    raise PrivacyError(
        f"{name} must be 1 to 255 printable characters without blanks at either end, not {shown}: correct {name}"
    )


def _budget(budget: object) -> list[float] | None:
    if budget is None:
        return None
    if not isinstance(budget, tuple | list) or len(budget) != 2:
        raise PrivacyError(f"budget must be a pair (epsilon, delta), not a {type(budget).__name__}: give both, or None")
    least, most = math.nextafter(0.0, 1.0), sys.float_info.max
    epsilon = _number("dataset_budget_epsilon", budget[0], least, most, "a finite number above 0")
    return [epsilon, _delta("dataset_budget_delta", budget[1])]
