"""Drill: the ledger's password, restic's and the signing key are changed, and what the old ones made stays good.

    python deploy/drills/key_rotation.py

docs/runbooks/key-rotation.md is the page. PostgreSQL's password changes under a running job; restic's backups are read
with a new password; a model and a head of the ledger that were signed with the old key verify under it, and under no
other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal

from drill import Drill, main, postgresql

from dpfa_hf.ledger import Ledger

STEPS = 8


def key_rotation(drill: Drill, options: argparse.Namespace) -> None:
    with postgresql() as server:
        database = server.new_database()
        os.environ["DPFA_LEDGER"] = server.url(database)
        os.environ["DPFA_LEDGER_WITNESS"] = f"sqlite:///{drill.folder}/witness.db"
        model = drill.folder / "model"
        job = [f"--output_dir={model}", "--ledger_dataset=notes", f"--max_steps={STEPS}"]

        drill.say("1. PostgreSQL's password changes while a job trains.")
        training = drill.job(*job, "--seconds_a_step=1")
        drill.until_step(training, 1)
        server.execute("ALTER ROLE trainer PASSWORD 'correct horse'")
        drill.until_step(training, 3)
        drill.stop(training, signal.SIGKILL)
        drill.dpfa("ledger", "verify", refused="cannot be read")
        os.environ["DPFA_LEDGER"] = server.url(database, password="correct horse")
        drill.dpfa("ledger", "verify")
        drill.ended(drill.job(*job, "--resume"))
        with Ledger(create=False) as ledger:
            (run,) = ledger.runs()
        drill.check((run.steps, run.status) == (STEPS, "completed"), "with the new one the job ends its run", run)

        drill.say("2. restic's password changes, and the old backups are read with the new one.")
        backup = drill.folder / "ledger.jsonl"
        drill.dpfa("ledger", "backup", str(backup))
        old, new = drill.folder / "restic-old", drill.folder / "restic-new"
        old.write_text("battery\n")
        new.write_text("staple\n")
        os.environ |= {"RESTIC_REPOSITORY": str(drill.folder / "offsite"), "RESTIC_PASSWORD_FILE": str(old)}
        drill.run("restic", "init", "--no-cache")
        drill.run("restic", "backup", "--no-cache", str(backup))
        drill.run("restic", "key", "add", "--no-cache", "--new-password-file", str(new))
        os.environ["RESTIC_PASSWORD_FILE"] = str(new)
        keys = json.loads(drill.run("restic", "key", "list", "--no-cache", "--json"))
        (retired,) = [key["id"] for key in keys if not key["current"]]
        drill.run("restic", "key", "remove", "--no-cache", retired)
        target = drill.folder / "back"
        drill.run("restic", "restore", "latest", "--no-cache", "--target", str(target))
        (restored,) = target.rglob("ledger.jsonl")
        drill.check(restored.read_bytes() == backup.read_bytes(), "the backup comes back, byte for byte")
        drill.run("restic", "snapshots", "--no-cache", refused="wrong password", RESTIC_PASSWORD_FILE=str(old))

        drill.say("3. The signing key changes. What the old one signed stays good under it, and under no other.")
        for name in ("old", "new"):
            private, public = str(drill.folder / f"{name}.pem"), str(drill.folder / f"{name}.pub")
            drill.run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private)
            drill.run("openssl", "ec", "-in", private, "-pubout", "-out", public)
        for checkpoint in model.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        next_model = drill.folder / "next-model"
        shutil.copytree(model, next_model)
        head = str(drill.folder / "head.json")
        drill.dpfa("ledger", "head", "--sign-key", str(drill.folder / "old.pem"), "--out", head)
        verify = ["ledger", "verify", "--signed-head", head, "--public-key"]
        drill.dpfa(*verify, str(drill.folder / "old.pub"))
        drill.dpfa(*verify, str(drill.folder / "new.pub"), refused="key")
        ledger_options = ["--ledger", os.environ["DPFA_LEDGER"]]
        for folder, key in ((model, "old"), (next_model, "new")):
            drill.dpfa("report", str(folder), *ledger_options, "--sign-key", str(drill.folder / f"{key}.pem"))
        for folder, key, refused in (
            (model, "old", None),
            (model, "new", "does not verify"),
            (next_model, "new", None),
            (next_model, "old", "does not verify"),
        ):
            limits = ["--max-epsilon", "3", "--max-delta", "0.001", "--public-key", str(drill.folder / f"{key}.pub")]
            drill.dpfa("gate", "--model", str(folder), *limits, *ledger_options, refused=refused)


if __name__ == "__main__":
    main(key_rotation, argparse.ArgumentParser(description=__doc__.splitlines()[0]))
