"""Drill: a budget is used up. A running job halts before it would pass it, and no other begins.

    python deploy/drills/exhausted_budget.py

docs/runbooks/exhausted-budget.md is the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

from drill import Drill, main

from dpfa_hf.errors import PrivacyError
from dpfa_hf.gate import recomputed_epsilon
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan

TARGET = 2.0
ASKED_STEPS = 1000


def exhausted_budget(drill: Drill, options: argparse.Namespace) -> None:
    os.environ["DPFA_LEDGER"] = f"sqlite:///{drill.folder}/ledger.db"
    first = [f"--output_dir={drill.folder / 'first'}", f"--max_steps={ASKED_STEPS}", f"--target_epsilon={TARGET}"]
    first += ["--ledger_dataset=notes", "--dataset_budget_epsilon=2.5", "--dataset_budget_delta=0.01"]

    drill.say(f"1. A job is asked for {ASKED_STEPS} steps, and epsilon {TARGET} pays for fewer. It halts by itself.")
    drill.ended(drill.job(*first))
    with Ledger(create=False) as ledger:
        (run,) = ledger.runs()
    plan = PrivacyPlan.from_dict(run.plan)
    drill.check(
        run.status == "completed" and run.steps == plan.max_steps < ASKED_STEPS,
        f"it has halted after {run.steps} steps, and the model is saved",
        run,
    )
    drill.check((drill.folder / "first" / "model.safetensors").exists(), "the model is there")
    spent, next_one = (
        recomputed_epsilon(dataclasses.replace(plan, max_steps=steps)) for steps in (run.steps, run.steps + 1)
    )
    drill.check(
        spent <= TARGET < next_one, f"epsilon is {spent:.4f}, and one step more would have made it {next_one:.4f}"
    )

    drill.say("2. The same run cannot go on.")
    drill.ended(drill.job(*first, "--resume"), refused="the budget is used up")

    drill.say("3. Another run on the data set is refused before its first step.")
    second = [f"--output_dir={drill.folder / 'second'}", "--ledger_dataset=notes"]
    drill.ended(drill.job(*second), refused="does not fit this data set's budget of 2.5")
    with Ledger() as ledger:
        before = ledger.runs()
        try:
            ledger.open_run(
                dataset="notes",
                plan={},
                plan_hash="0" * 64,
                epsilon=1.0,
                delta=0.001,
                max_steps=1,
                privacy_unit=run.privacy_unit,
                adjacency=run.adjacency,
                budget=(9.0, 0.01),
            )
        except PrivacyError as error:
            drill.check("fixed for its lifetime" in str(error), f"nor can the budget be raised: {error}")
        else:
            drill.check(False, "nor can the budget be raised")
        drill.check(len(before) == 1 and ledger.runs() == before, "nothing was reserved, and nothing given back")
    drill.dpfa("ledger", "show")
    drill.dpfa("ledger", "verify")


if __name__ == "__main__":
    main(exhausted_budget, argparse.ArgumentParser(description=__doc__.splitlines()[0]))
