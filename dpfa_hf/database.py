"""A SQLite or PostgreSQL database in which every commit is durable, or which is refused (P21)."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import sqlalchemy as sa

from dpfa_hf.errors import PrivacyError

T = TypeVar("T")

_PATIENCE_S = 60.0
_DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "sqlite+pysqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
# Serialisation failure, deadlock, and the two ways to lose the race for creating the tables: nothing was committed.
_RETRY_SQLSTATES = {"40001", "40P01", "23505", "42P07"}
_SQLITE_WAY_OUT = {
    sqlite3.SQLITE_BUSY: "another process has held it too long; let it finish or stop it",
    sqlite3.SQLITE_CANTOPEN: "create its folder, make it accessible, or correct {setting}",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable, or name another place in {setting}",
    sqlite3.SQLITE_FULL: "free disk space, then resume the run",
    sqlite3.SQLITE_IOERR: "check the disk and its free space, then resume the run",
    sqlite3.SQLITE_NOTADB: "name the right file in {setting}, or restore a backup",
    sqlite3.SQLITE_CORRUPT: "restore a backup; a fresh ledger would forget what was spent",
}


class Database:
    """One SQLite or PostgreSQL database.

    Guarantee: a transaction that has returned is durable (P21) under the database's own promise: SQLite in WAL with
    synchronous=FULL, else EXTRA; PostgreSQL with synchronous_commit=on and fsync=on; asserted on connecting.

    Args:
        parsed: a URL from `parse_url`.
        create: whether to create a missing SQLite file, readable by its owner alone; otherwise it is refused.

    Raises:
        PrivacyError: the driver is not installed, or the file is missing or cannot be created. Connecting is left to
            the first transaction.
    """

    display_url: str
    """The URL without password and options."""

    # For messages: what this database is, and where the user has named it.
    _noun = "ledger"
    _setting = "ledger or DPFA_LEDGER"
    # Taken by every "write", so that writers queue: SQLite locks the whole file, PostgreSQL this table.
    _written_table: str | None = None

    def __init__(self, parsed: sa.URL, *, create: bool) -> None:
        self._backend = parsed.get_backend_name()
        self.display_url = parsed.set(drivername=self._backend, query={}).render_as_string(hide_password=True)
        self._withheld = [text for text in (parsed.password, *_query_values(parsed)) if text]
        self._owner: int | None = os.getpid()
        self._path = Path(parsed.database or "") if self._backend == "sqlite" else None
        self._identity = self._file_identity(self._path, create=create) if self._path else None
        arguments: dict[str, Any] = {"connect_args": {"timeout": _PATIENCE_S}}
        if self._backend == "postgresql":
            # A server that has vanished without a word is noticed after the same patience as a lock.
            patience = {"connect_timeout": 10, "tcp_user_timeout": int(1000 * _PATIENCE_S)}
            arguments = {"connect_args": patience, "isolation_level": "SERIALIZABLE"}
        try:
            self._engine = sa.create_engine(parsed, pool_pre_ping=True, **arguments)
        except ImportError:
            raise PrivacyError(
                f"{self._noun} {self.display_url} needs the driver psycopg, which is not installed: "
                "pip install 'psycopg[binary]', or use a sqlite:/// URL"
            ) from None
        sa.event.listen(self._engine, "connect", self._prepare)
        sa.event.listen(self._engine, "begin", self._begin)

    def close(self) -> None:
        """Closes the connections."""
        if self._owner == os.getpid():
            self._engine.dispose()
        self._owner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, dbapi_connection: Any, _: object) -> None:
        cursor = dbapi_connection.cursor()
        try:
            if self._backend == "sqlite":
                # The driver would otherwise open transactions of its own, and not IMMEDIATE ones.
                dbapi_connection.isolation_level = None
                _configure_sqlite(cursor)
                _assert_sqlite_durable(cursor)
            else:
                _configure_postgresql(cursor)
                _assert_postgresql_durable(cursor)
                dbapi_connection.commit()
        finally:
            cursor.close()

    def _begin(self, connection: sa.Connection) -> None:
        mode = connection.get_execution_options()["dpfa_mode"]
        if self._backend == "sqlite":
            connection.exec_driver_sql("BEGIN" if mode == "read" else "BEGIN IMMEDIATE")
        elif mode != "read":
            # In every transaction, because a pooler between us and the server may drop what a session was told.
            statements = f"SET LOCAL synchronous_commit TO on; SET LOCAL lock_timeout TO {int(1000 * _PATIENCE_S)}"
            if mode == "write" and self._written_table:
                # PostgreSQL's BEGIN IMMEDIATE: taken before the snapshot, so writers queue and see each other.
                statements += f"; LOCK TABLE {self._written_table} IN EXCLUSIVE MODE"
            connection.exec_driver_sql(statements)

    def transaction(self, work: Callable[[sa.Connection], T], mode: str) -> T:
        """Runs `work` in one transaction, again where it was rolled back for another's sake, and commits.

        Args:
            work: what to do; its result is returned.
            mode: "read", "write", or "create", a write before which the tables may be missing.

        Raises:
            PrivacyError: the database cannot be reached, read, written or made durable, or is busy for a minute. If the
                connection was lost in mid-commit, the transaction may have been committed all the same.
        """
        if self._owner is None:
            raise PrivacyError(f"{self._noun} {self.display_url} is closed: open a new Ledger and resume the run")
        if self._owner != os.getpid():
            raise PrivacyError(
                f"{self._noun} {self.display_url} was opened before a fork, and a copy of it must not write: "
                "open a Ledger in this process"
            )
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            if self._path and _identity(self._path) != self._identity:
                raise PrivacyError(
                    f"the file of {self._noun} {self.display_url} was moved, deleted or replaced while it was open: "
                    "put it back and resume the run"
                )
            try:
                with self._engine.connect() as connection:
                    connection.execution_options(dpfa_mode=mode)
                    with connection.begin():
                        return work(connection)
            except sa.exc.SQLAlchemyError as error:
                if not _retryable(error) or time.monotonic() > deadline:
                    raise PrivacyError(self._refusal(error)) from None
            time.sleep(random.uniform(0.001, 0.05))

    def _refusal(self, error: sa.exc.SQLAlchemyError) -> str:
        cause = getattr(error, "orig", None) or error
        text = " ".join(str(cause).split())
        for withheld in self._withheld:
            text = text.replace(withheld, "***")
        code = getattr(cause, "sqlite_errorcode", None)
        way_out = f"check that the server is reachable and that this user may write, or correct {self._setting}"
        if self._backend == "sqlite":
            way_out = _SQLITE_WAY_OUT.get(-1 if code is None else code & 0xFF, "run `dpfa ledger verify` on it")
            way_out = way_out.format(setting=self._setting)
        return f"{self._noun} {self.display_url} failed ({text}): {way_out}"

    def _file_identity(self, path: Path, *, create: bool) -> tuple[int, int]:
        """Of the database file; a missing one is created readable by its owner alone, since a ledger holds a secret."""
        way_out = _SQLITE_WAY_OUT[sqlite3.SQLITE_CANTOPEN].format(setting=self._setting)
        try:
            if create and not path.exists():
                path.touch(mode=0o600)
        except OSError as error:
            raise PrivacyError(f"{self._noun} file {path} cannot be created ({error.strerror}): {way_out}") from None
        identity = _identity(path)
        if identity is None:
            raise PrivacyError(f"{self._noun} file {path} cannot be reached: {way_out}")
        return identity


def parse_url(url: str, source: str) -> sa.URL:
    """The URL of a durable database, with its driver; a SQLite file's path is made absolute.

    Args:
        url: what the user gave.
        source: where, for messages.

    Raises:
        PrivacyError: it is malformed, or names a database in memory or of another kind.
    """
    if not isinstance(url, str):
        raise PrivacyError(
            f"{source} must be a database URL as str, not {type(url).__name__}: e.g. sqlite:///ledger.db"
        )
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or not url.isprintable():
        # The parser's own message may quote the password.
        raise PrivacyError(f"{source} is not a database URL: write e.g. sqlite:////folder/ledger.sqlite3")
    if parsed.drivername not in _DRIVERS:
        raise PrivacyError(
            f"{source} has the scheme {parsed.drivername!r}, and durable commits can be asserted on SQLite and "
            "PostgreSQL only (P21): use sqlite:/// or postgresql+psycopg://"
        )
    parsed = parsed.set(drivername=_DRIVERS[parsed.drivername])
    if parsed.get_backend_name() == "postgresql":
        return parsed
    if parsed.query:
        raise PrivacyError(
            f"{source} has options after '?', and SQLite's can put the ledger in memory or switch off its locks: "
            "leave them out"
        )
    if not parsed.database or parsed.database == ":memory:":
        raise PrivacyError(
            f"{source} is a SQLite database in memory, which forgets what was spent: "
            "name a file, e.g. sqlite:////folder/ledger.sqlite3"
        )
    # Absolute, or a later change of the working directory would start a second ledger.
    return parsed.set(database=os.path.abspath(parsed.database))


def place_of(url: sa.URL) -> str:
    """The database without whoever connects to it, and how: scheme, host, port, name or file."""
    bare = sa.URL.create(url.get_backend_name(), host=url.host, port=url.port, database=url.database)
    return bare.render_as_string()


def _query_values(url: sa.URL) -> list[str]:
    return [part for value in url.query.values() for part in ([value] if isinstance(value, str) else value)]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _configure_sqlite(cursor: Any) -> None:
    journal = cursor.execute("PRAGMA journal_mode").fetchone()[0]
    if journal != "wal":
        journal = cursor.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    cursor.execute(f"PRAGMA synchronous={'FULL' if journal == 'wal' else 'EXTRA'}")
    # On macOS fsync alone leaves the data in the drive's cache.
    cursor.execute("PRAGMA fullfsync=ON")


def _assert_sqlite_durable(cursor: Any) -> None:
    journal = cursor.execute("PRAGMA journal_mode").fetchone()[0]
    synchronous = cursor.execute("PRAGMA synchronous").fetchone()[0]
    # 2 is FULL, 3 is EXTRA.
    if not (journal == "wal" and synchronous >= 2 or journal in ("delete", "truncate", "persist") and synchronous == 3):
        raise PrivacyError(
            f"ledger: SQLite runs with journal_mode={journal}, synchronous={synchronous}, so a step could be lost "
            "after its noise was drawn (P21): put the ledger on a local file system, or use PostgreSQL"
        )


def _configure_postgresql(cursor: Any) -> None:
    cursor.execute("SET synchronous_commit TO on")


def _assert_postgresql_durable(cursor: Any) -> None:
    for setting in ("synchronous_commit", "fsync"):
        value = cursor.execute(f"SHOW {setting}").fetchone()[0]
        if value != "on":
            raise PrivacyError(
                f"ledger: PostgreSQL runs with {setting}={value}, so a step could be lost after its noise was drawn "
                f"(P21): set {setting}=on on the server"
            )


def _retryable(error: sa.exc.SQLAlchemyError) -> bool:
    cause = getattr(error, "orig", None)
    code = getattr(cause, "sqlite_errorcode", None)
    busy = code is not None and code & 0xFF == sqlite3.SQLITE_BUSY
    return busy or getattr(cause, "sqlstate", None) in _RETRY_SQLSTATES
