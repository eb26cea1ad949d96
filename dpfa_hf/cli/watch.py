"""`dpfa watch`: how far the runs of a ledger have come, in a terminal."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpfa_hf.cli.ledger import existing_ledger, public_names
from dpfa_hf.cli.options import AsJson, LedgerUrl
from dpfa_hf.cli.printing import console, print_json
from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from dpfa_hf.ledger import DatasetRecord, Ledger, RunRecord

# Epsilon so far takes the accountant a second or two a run, and a terminal has few lines.
_LATEST_RUNS = 20
_BAR_WIDTH = 16


def watch(
    ledger: LedgerUrl = None,
    run: Annotated[
        str | None, typer.Option(help=f"One run's id, or how it begins. Default: the latest {_LATEST_RUNS} runs.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the ledger.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once; so it does where stdout is no terminal.")] = False,
    as_json: AsJson = False,
) -> None:
    """How far have the runs come, and what is left of the budgets? Goes on until Ctrl-C.

    Epsilon so far is the accountant's for the steps charged, a progress figure: what a run may have cost is its
    guarantee, from before its first step on. The ledger is read and nothing else. Steps seen over time tell how long
    steps take, which follows the size of private batches: the screen is for those who run the training.

    Example: dpfa watch --ledger sqlite:////home/me/ledger.db
    """
    with existing_ledger(ledger) as opened:
        view = _View(opened, None if run is None else _whole_id(opened, run))
        if as_json:
            print_json(_values(view.look()))
            return
        # Live shows a pipe its last frame alone, which never comes.
        if once or not sys.stdout.isatty():
            console().print(_screen(view.look()))
            return
        with contextlib.suppress(KeyboardInterrupt), Live(_screen(view.look()), console=console()) as live:
            while True:
                time.sleep(interval)
                live.update(_screen(view.look()))


def _whole_id(ledger: Ledger, run: str) -> str:
    found = [each.run for each in ledger.runs() if each.run.startswith(run)] if run else []
    if len(found) > 1:
        raise PrivacyError(f"--run {run} is how {len(found)} runs begin: give more of the id")
    return found[0] if found else ledger.run(run).run


@dataclass(frozen=True)
class _Look:
    """What the ledger held at one moment; `so_far` and `names` by run and by data set."""

    ledger: str
    head: tuple[int, str]
    moved_to: str | None
    runs: list[RunRecord]
    left_out: int
    so_far: dict[str, float | None]
    datasets: list[DatasetRecord]
    names: dict[str, str]


class _View:
    """Looks at a ledger again and again, and keeps what the accountant has computed."""

    def __init__(self, ledger: Ledger, run: str | None) -> None:
        self._ledger, self._run = ledger, run
        self._curves: dict[str, Any] = {}

    def look(self) -> _Look:
        records = self._ledger.runs()
        chosen = [each for each in records if each.run == self._run] if self._run else records[-_LATEST_RUNS:]
        names = {each.dataset for each in chosen}
        return _Look(
            ledger=self._ledger.display_url,
            head=self._ledger.head(),
            moved_to=self._ledger.moved_to(),
            runs=chosen,
            left_out=0 if self._run else len(records) - len(chosen),
            so_far={each.run: self._epsilon_so_far(each) for each in chosen},
            datasets=[each for each in self._ledger.datasets() if each.dataset in names],
            names=public_names(each.dataset for each in records),
        )

    def _epsilon_so_far(self, record: RunRecord) -> float | None:
        """None where this version cannot read the plan."""
        from dpfa_hf.accounting import EpsilonCurve
        from dpfa_hf.plan import PrivacyPlan

        try:
            if record.plan_hash not in self._curves:
                self._curves[record.plan_hash] = EpsilonCurve(PrivacyPlan.from_dict(record.plan))
            return float(self._curves[record.plan_hash].at(record.steps))
        except PrivacyError:
            return None


def _screen(look: _Look) -> Group:
    moved = f"; closed: it moved to {look.moved_to}" if look.moved_to else ""
    head = f"ledger {look.ledger}; head {look.head[0]} {look.head[1][:16]}…{moved}"
    older = [Text(f"{look.left_out} older runs are not shown (`dpfa ledger show`)")] if look.left_out else []
    runs = Table("run", "data set", "steps charged", "", "ε so far", "of guarantee", "status")
    for each in look.runs:
        runs.add_row(
            each.run[:12],
            look.names[each.dataset],
            f"{each.steps} of {each.max_steps}",
            _bar(each.steps, each.max_steps),
            _epsilon(look.so_far[each.run]),
            _epsilon(each.epsilon),
            each.status,
        )
    budgets = Table("data set", "runs", "ε reserved", "", "of budget", "δ reserved", "", "of budget")
    for dataset in look.datasets:
        sums, budget = (dataset.epsilon, dataset.delta), dataset.budget
        cells: list[Any] = [look.names[dataset.dataset], str(dataset.runs)]
        for shown, spent, limit in zip((_epsilon, _short), sums, budget or (None, None), strict=True):
            cells += [shown(spent), _bar(spent, limit), "no budget" if limit is None else _short(limit)]
        budgets.add_row(*cells)
    return Group(Text(head), runs, *older, budgets)


def _bar(done: float, of: float | None) -> ProgressBar | str:
    if of is None or not math.isfinite(done):
        return ""
    return ProgressBar(total=of, completed=min(done, of), width=_BAR_WIDTH)


def _epsilon(value: float | None) -> str:
    return "?" if value is None else _short(value) if math.isfinite(value) else "NOT PRIVATE"


def _short(value: float) -> str:
    return f"{value:.4g}"


def _values(look: _Look) -> dict[str, Any]:
    return {
        "ledger": look.ledger,
        "head": list(look.head),
        "moved_to": look.moved_to,
        "runs": [
            {
                "run": each.run,
                "dataset": look.names[each.dataset],
                "status": each.status,
                "steps": each.steps,
                "max_steps": each.max_steps,
                "epsilon_so_far": look.so_far[each.run],
                "epsilon": each.epsilon,
                "delta": each.delta,
            }
            for each in look.runs
        ],
        "runs_left_out": look.left_out,
        "datasets": [
            {
                "dataset": look.names[each.dataset],
                "runs": each.runs,
                "epsilon": each.epsilon,
                "delta": each.delta,
                "budget": None if each.budget is None else dict(zip(("epsilon", "delta"), each.budget, strict=True)),
            }
            for each in look.datasets
        ],
    }
