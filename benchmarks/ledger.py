"""What a step's ledger entry costs, with and without a witness, into benchmarks/results/ledger.json.

    python benchmarks/ledger.py                               # two minutes
    python benchmarks/ledger.py --postgresql postgresql://user:password@host/an_empty_database

Medians, in milliseconds, of `--charges` calls of `Ledger.charge_step`, each of which returns when its entry is on the
disk, of all combinations in turn; one fsync of 4 KiB beside them, since the disk decides. Then what grows with the
number of entries: verifying, which every run does before its first step, and backing up. Without `--postgresql` the
server is the one that the tests start, on the same disk and reached by a socket; the network of a cluster comes on top.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from noise import rounded
from sentiment import RESULTS, ROOT, machine

from dpfa_hf.ledger import Ledger

ENTRIES = 10_000
RUN: dict[str, Any] = {
    "plan": {},
    "plan_hash": "0",
    "epsilon": 1.0,
    "delta": 1e-6,
    "max_steps": 10**6,
    "privacy_unit": "example",
    "adjacency": "zero_out",
    "budget": None,
}


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def measure_fsync(folder: str, repeats: int) -> float:
    with open(f"{folder}/fsync", "wb") as file:

        def write() -> None:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())

        return statistics.median(milliseconds(write) for _ in range(repeats))


def measure_charges(ledgers: dict[str, Ledger], charges: int) -> dict[str, dict[str, float]]:
    runs = {name: ledger.open_run(dataset="d", **RUN) for name, ledger in ledgers.items()}
    times: dict[str, list[float]] = {name: [] for name in ledgers}
    for step in range(1, charges + 6):
        for name, ledger in ledgers.items():
            times[name].append(milliseconds(partial(ledger.charge_step, runs[name], step)))
    found = {}
    for name, all_times in times.items():
        counted = sorted(all_times[5:])
        found[name] = {"median": statistics.median(counted), "95th_percentile": counted[int(0.95 * len(counted))]}
    return found


def measure_length(ledger: Ledger, folder: str, name: str) -> dict[str, float]:
    run = ledger.open_run(dataset="long", **RUN)
    for step in range(1, ENTRIES - ledger.head()[0] + 1):
        ledger.charge_step(run, step)
    return {
        "entries": ledger.head()[0],
        "verify_milliseconds": statistics.median(milliseconds(ledger.verify) for _ in range(3)),
        "backup_milliseconds": milliseconds(lambda: ledger.backup(f"{folder}/{name}.jsonl")),
        "backup_mib": Path(f"{folder}/{name}.jsonl").stat().st_size / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--charges", type=int, default=200, help="charges of which the median is taken (default 200)")
    parser.add_argument("--postgresql", help="the URL of an empty database, instead of a server of its own")
    parser.add_argument("--output", type=Path, default=RESULTS / "ledger.json", help="where the figures are written")
    arguments = parser.parse_args()
    os.environ.pop("DPFA_LEDGER_WITNESS", None)

    server = None
    with tempfile.TemporaryDirectory(prefix="dpfa-") as folder:
        if arguments.postgresql is None:
            sys.path.append(str(ROOT / "tests"))
            from conftest import PostgreSQL

            (Path(folder) / "server").mkdir()
            Path(folder).chmod(0o755)
            server = PostgreSQL(Path(folder) / "server")
        postgresql = arguments.postgresql or server.url(server.new_database())
        ledgers = {
            "sqlite": Ledger(f"sqlite:///{folder}/plain.db"),
            "sqlite, witness on sqlite": Ledger(
                f"sqlite:///{folder}/seen.db", witness=f"sqlite:///{folder}/witness.db"
            ),
            "postgresql": Ledger(postgresql),
        }
        if server is not None:
            ledgers["postgresql, witness on sqlite"] = Ledger(
                server.url(server.new_database()), witness=f"sqlite:///{folder}/witness.db"
            )
        with ledgers["postgresql"]._engine.connect() as connection:
            version = connection.dialect.server_version_info
        databases = {"sqlite": sqlite3.sqlite_version, "postgresql": ".".join(map(str, version))}
        document = {
            "benchmark": "ledger",
            "machine": machine() | {"databases": databases},
            "fsync_milliseconds": measure_fsync(folder, arguments.charges),
            "charge_milliseconds": measure_charges(ledgers, arguments.charges),
            "length": {name: measure_length(ledgers[name], folder, name) for name in ("sqlite", "postgresql")},
        }
        for ledger in ledgers.values():
            ledger.close()
        if server is not None:
            server.kill()
    document = rounded(document)
    print(json.dumps(document, indent=2))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
