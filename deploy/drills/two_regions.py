"""Drill: two regions race for the last of one budget, on one PostgreSQL ledger, and exactly one has it.

    python deploy/drills/two_regions.py --rounds 20

Two processes, one for each region, reserve at the same moment, round after round; then two real training jobs do. With
a ledger in each region, which docs/ledger.md forbids, both win: the drill shows that it would notice.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
from typing import Any

from drill import Drill, DrillFailed, at_least, main, postgresql

from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger

BUDGET = (3.0, 0.01)
REGIONS = ("region-a", "region-b")
WON, FULL = "has it", "is refused"


def reserve(url: str, dataset: str) -> str:
    """Reserves 2 of a budget of 3, as a run does before its first step."""
    with Ledger(url) as ledger:
        try:
            ledger.open_run(
                dataset=dataset,
                plan={},
                plan_hash="0" * 64,
                epsilon=2.0,
                delta=0.001,
                max_steps=10,
                privacy_unit="example",
                adjacency="zero_out",
                budget=BUDGET,
            )
        except PrivacyError as error:
            if "does not fit this data set's budget" not in str(error):
                raise
            return FULL
    return WON


def region(url: str, rounds: int, start: Any, results: Any) -> None:
    for round_ in range(rounds):
        start.wait(60)
        results.put((round_, reserve(url, f"notes-{round_}")))


def winners(urls: list[str], rounds: int) -> list[int]:
    """How many regions had the last of the budget, round by round."""
    context = mp.get_context("spawn")
    start, results = context.Barrier(len(urls)), context.Queue()
    regions = [context.Process(target=region, args=(url, rounds, start, results), daemon=True) for url in urls]
    for each in regions:
        each.start()
    won = [0] * rounds
    try:
        for _ in range(rounds * len(urls)):
            round_, result = results.get(timeout=300)
            won[round_] += result == WON
    finally:
        for each in regions:
            each.join(10)
            if each.is_alive():
                each.kill()
    return won


def two_regions(drill: Drill, options: argparse.Namespace) -> None:
    with postgresql() as server:
        url = server.url(server.new_database())
        Ledger(url).close()

        drill.say(f"1. Two regions reserve at once, {options.rounds} times; only one reservation fits.")
        won = winners([url, url], options.rounds)
        drill.check(won == [1] * options.rounds, f"exactly one had it in each of {options.rounds} rounds", won)
        drill.dpfa("ledger", "verify", "--ledger", url)

        drill.say("2. With a ledger in each region, both spend the budget.")
        apart = winners([f"sqlite:///{drill.folder / name}.db" for name in REGIONS], 2)
        drill.check(apart == [2, 2], "both had it, which the drill would have found in its first part", apart)

        drill.say("3. Two training jobs start at once, on one budget with room for one.")
        os.environ["DPFA_LEDGER"] = url
        budget = ["--ledger_dataset=notes", "--dataset_budget_epsilon=4", "--dataset_budget_delta=0.01"]
        jobs = [drill.job(f"--output_dir={drill.folder / name}", *budget) for name in REGIONS]
        outputs = [job.communicate(timeout=600)[0] for job in jobs]
        codes = [job.returncode for job in jobs]
        if sorted(code == 0 for code in codes) != [False, True]:
            raise DrillFailed(f"exit codes {codes}:\n" + "\n".join(output[-1500:] for output in outputs))
        refused = outputs[codes.index(max(codes, key=abs))]
        drill.check("does not fit this data set's budget" in refused, "one trained, and the other was refused", refused)
        drill.check("step 1\n" not in refused, "before its first step", refused)
        drill.dpfa("ledger", "show")
        drill.dpfa("ledger", "verify")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=20)
    main(two_regions, parser)
