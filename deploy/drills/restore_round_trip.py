"""Drill: the disk with the ledger is lost, its backup is restored, and training goes on from its checkpoint.

    python deploy/drills/restore_round_trip.py --database sqlite
    python deploy/drills/restore_round_trip.py --database postgresql

docs/runbooks/backup-and-restore.md is the page. A real job trains and is killed; `dpfa ledger backup` and restic carry
its ledger away; the ledger is deleted; restic and `dpfa ledger restore`, with the witness, bring it back; the job ends
its run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

from drill import Drill, copy_file, main, postgresql

from dpfa_hf.ledger import Ledger, RunRecord

STEPS = 8


def charged() -> RunRecord:
    """The only run of the ledger."""
    with Ledger(create=False) as ledger:
        (record,) = ledger.runs()
    return record


def head(output: str) -> list[object]:
    return json.loads(output)["head"]


def restore_round_trip(drill: Drill, options: argparse.Namespace) -> None:
    disk, other_disk, offsite = (drill.folder / name for name in ("disk", "other-disk", "offsite"))
    for folder in (disk, other_disk, offsite):
        folder.mkdir()
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{disk}/ledger.db"
        if options.database == "postgresql":
            server = stack.enter_context(postgresql())
            database = server.new_database()
            url = server.url(database)
        os.environ["DPFA_LEDGER"] = url
        os.environ["DPFA_LEDGER_WITNESS"] = f"sqlite:///{other_disk}/witness.db"
        job = [f"--output_dir={drill.folder / 'model'}", "--ledger_dataset=notes", f"--max_steps={STEPS}"]

        drill.say("1. A job trains, and its node dies.")
        training = drill.job(*job, "--seconds_a_step=0.5")
        drill.until_step(training, 3)
        drill.stop(training, signal.SIGKILL)
        before = charged()
        drill.check(3 <= before.steps < STEPS, f"{before.steps} of {STEPS} steps are charged to run {before.run}")

        drill.say("2. The ledger is backed up, and the backup leaves the machine.")
        backup = disk / "ledger.jsonl"
        saved = head(drill.dpfa("ledger", "backup", str(backup), "--json"))
        secret = drill.folder / "restic-password"
        secret.write_text("correct horse\n")
        os.environ |= {"RESTIC_REPOSITORY": str(offsite), "RESTIC_PASSWORD_FILE": str(secret)}
        drill.run("restic", "init", "--no-cache")
        drill.run("restic", "backup", "--no-cache", "--tag", "dpfa-ledger", str(backup))
        drill.run("restic", "check", "--no-cache", "--read-data")

        drill.say("3. Whether the backup can be restored is tried beside the ledger, with a copy of the witness.")
        copy_of_witness = f"sqlite:///{drill.folder}/copy-of-witness.db"
        copy_file(other_disk / "witness.db", drill.folder / "copy-of-witness.db")
        rehearsal = ["--ledger", f"sqlite:///{drill.folder}/rehearsal.db", "--witness", copy_of_witness]
        drill.dpfa("ledger", "restore", str(backup), *rehearsal)
        drill.dpfa("ledger", "verify", *rehearsal)
        drill.dpfa("ledger", "verify")
        (drill.folder / "rehearsal.db").unlink()

        drill.say("4. The disk is lost.")
        shutil.rmtree(disk)
        disk.mkdir()
        if options.database == "postgresql":
            server.execute(f"DROP DATABASE {database} WITH (FORCE)")
            server.execute(f"CREATE DATABASE {database}")
        drill.dpfa("ledger", "verify", refused="there is no ledger at")

        drill.say("5. The backup comes back, and the witness is asked.")
        drill.run("restic", "restore", "latest", "--no-cache", "--tag", "dpfa-ledger", "--target", str(disk / "back"))
        (restored,) = Path(disk / "back").rglob("ledger.jsonl")
        again = head(drill.dpfa("ledger", "restore", str(restored), "--json"))
        drill.check(again[0] == saved[0] + 1, f"the ledger has all {saved[0]} entries, and one that says restored")
        verified = json.loads(drill.dpfa("ledger", "verify", "--json"))
        drill.check(verified["ok"] and verified["head"] == again, "the ledger is whole, and as the witness has seen it")
        drill.check(charged() == before, "the run, its reservation and its steps are as they were")

        drill.say("6. The job goes on from its checkpoint.")
        drill.ended(drill.job(*job, "--resume"))
        after = charged()
        drill.check(
            (after.run, after.steps, after.status) == (before.run, STEPS, "completed"),
            f"the same run went on counting at {before.steps} and ended at {STEPS}",
            after,
        )
        drill.check(after.epsilon == before.epsilon, "its epsilon is the one that was reserved before its first step")
        report = json.loads((drill.folder / "model" / "privacy.json").read_text())
        drill.check(
            report["run"] == before.run and report["steps"] == {"charged": STEPS, "planned": STEPS, "resumed": 1},
            "the model's report names the run, all of its steps, and that it was resumed",
            report["steps"],
        )
        drill.dpfa("ledger", "verify")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    main(restore_round_trip, parser)
