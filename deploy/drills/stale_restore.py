"""Drill: an old copy of the ledger comes back, which would give spent budget back, and is refused.

    python deploy/drills/stale_restore.py

docs/runbooks/backup-and-restore.md and docs/runbooks/lost-ledger.md are the pages. While a real job trains, its ledger
is backed up and its file copied, as a snapshot of the volume does. The job trains on, and the disk is lost. Neither of
the copies can take the ledger's place; the newest backup can. Where there is none, what is left of the budget is
charged.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

from drill import Drill, copy_file, main, runbook_code

from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger

STEPS = 8


def lose(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def charged() -> int:
    with Ledger(create=False) as ledger:
        (record,) = ledger.runs()
    return record.steps


def stale_restore(drill: Drill, options: argparse.Namespace) -> None:
    disk, other_disk, backups = (drill.folder / name for name in ("disk", "other-disk", "backups"))
    for folder in (disk, other_disk, backups):
        folder.mkdir()
    file, snapshot = disk / "ledger.db", backups / "snapshot.db"
    os.environ["DPFA_LEDGER"] = f"sqlite:///{file}"
    os.environ["DPFA_LEDGER_WITNESS"] = f"sqlite:///{other_disk}/witness.db"
    job = [f"--output_dir={drill.folder / 'model'}", "--ledger_dataset=notes", f"--max_steps={STEPS}"]
    budget = ["--dataset_budget_epsilon=6", "--dataset_budget_delta=0.01"]

    drill.say("1. While a job trains, a backup and a snapshot are taken. It trains on, and its node dies.")
    training = drill.job(*job, *budget, "--seconds_a_step=0.7")
    drill.until_step(training, 2)
    drill.dpfa("ledger", "backup", str(backups / "old.jsonl"))
    copy_file(file, snapshot)
    drill.until_step(training, 5)
    drill.stop(training, signal.SIGKILL)
    last = charged()
    drill.dpfa("ledger", "backup", str(backups / "newest.jsonl"))

    drill.say("2. The disk is lost. The old backup would give steps back.")
    lose(disk)
    drill.dpfa("ledger", "restore", str(backups / "old.jsonl"), refused="its witness has seen an entry")
    drill.dpfa("ledger", "show", refused="there is no ledger at")

    drill.say("3. So would the snapshot, put where the ledger was.")
    copy_file(snapshot, file)
    drill.check(charged() < last, f"the snapshot has {charged()} steps, where {last} were taken")
    drill.dpfa("ledger", "verify", refused="its witness has seen an entry")
    drill.ended(drill.job(*job, *budget, "--resume"), refused="it is an older copy")
    other = [f"--output_dir={drill.folder / 'other'}", *job[1:]]
    drill.ended(drill.job(*other, *budget), refused="its witness has seen an entry")
    drill.check(charged() < last, "nothing was written to it")

    drill.say("4. Nor does an empty disk begin anew: the witness knows that a ledger was there.")
    lose(disk)
    try:
        Ledger().close()
    except PrivacyError as error:
        drill.check("has seen another ledger" in str(error), f"a new ledger is refused: {error}")
    else:
        drill.check(False, "a new ledger is refused")
    lose(disk)

    drill.say("5. The newest backup is taken, and the job goes on.")
    drill.dpfa("ledger", "restore", str(backups / "newest.jsonl"))
    drill.check(charged() == last, f"all {last} steps are there")
    drill.ended(drill.job(*job, *budget, "--resume"))
    drill.check(charged() == STEPS, f"the run has ended at {STEPS} steps")
    drill.dpfa("ledger", "verify")

    drill.say("6. Another time nothing but the old backup is left, and no witness. What was spent since is unknown.")
    os.environ["DPFA_LEDGER"] = f"sqlite:///{disk}/unwitnessed.db"
    del os.environ["DPFA_LEDGER_WITNESS"]
    old = str(backups / "old.jsonl")
    drill.dpfa("ledger", "restore", old, refused="no witness is named that knows")
    drill.dpfa("ledger", "restore", old, "--unwitnessed")
    os.environ["DPFA_LEDGER_WITNESS"] = f"sqlite:///{other_disk}/second-witness.db"
    drill.dpfa("ledger", "witness")
    drill.dpfa("ledger", "export", str(backups / "record.jsonl"))
    record = [json.loads(line) for line in (backups / "record.jsonl").read_text().splitlines()]
    kinds = [(entry["kind"], entry["payload"]) for entry in record[1:]]
    drill.check(("restored", '{"witnessed":false}') in kinds, "that nobody vouched for the backup stays on record")

    drill.say("7. So all that may have been spent is charged, by the lines of lost-ledger.md.")
    exec(compile(runbook_code("lost-ledger.md"), "lost-ledger.md", "exec"), {})
    drill.dpfa("ledger", "show")
    drill.dpfa("ledger", "verify")
    with Ledger(create=False) as ledger:
        runs, (data,) = ledger.runs(), ledger.datasets()
    drill.check(all(run.steps == run.max_steps for run in runs), "no run has a step left to be resumed with", runs)
    drill.check(data.epsilon > 5.999, f"of epsilon 6, {data.epsilon} is reserved")
    drill.ended(drill.job(f"--output_dir={drill.folder / 'next'}", "--ledger_dataset=notes"), refused="does not fit")


if __name__ == "__main__":
    main(stale_restore, argparse.ArgumentParser(description=__doc__.splitlines()[0]))
