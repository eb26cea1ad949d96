"""What the ledger says of a run: which entries declared its data set and opened it, and that nothing contradicts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpfa_hf.budget import UNNAMED
from dpfa_hf.errors import PrivacyError
from dpfa_hf.report import without_credentials

if TYPE_CHECKING:
    from dpfa_hf.ledger import Ledger, RunRecord


def ledger_record(ledger: Ledger, report: Mapping[str, Any]) -> dict[str, Any]:
    """Where the run of `report` stands in `ledger`, as JSON values.

    Entries are named by sequence number and hash, and nothing of what they hold is passed on that the report does not
    have already: an unnamed data set's keyed fingerprint stays in the ledger (P22).

    Raises:
        PrivacyError: the ledger's chain is broken, does not have the run, or contradicts the report.
    """
    if report["run"] is None:
        raise PrivacyError("the report names no run, so no ledger can confirm it: leave --ledger out")
    problems = ledger.verify()
    if problems:
        # The problem itself may name an unnamed data set by its fingerprint.
        raise PrivacyError(
            f"ledger {ledger.display_url} fails verification, so it confirms nothing: see `dpfa ledger verify`"
        )
    record = ledger.run(report["run"])
    sums = next(each for each in ledger.datasets() if each.dataset == record.dataset)
    found = {
        "the plan's hash": (report["plan_sha256"], record.plan_hash),
        "the plan": (report["plan"], record.plan),
        "the reserved epsilon": (report["plan"]["epsilon"], _json(record.epsilon)),
        "the reserved delta": (report["plan"]["delta"], record.delta),
        "the planned steps": (report["steps"]["planned"], record.max_steps),
        "the data set's name": (report["dataset"]["name"], _public_name(record)),
        "the adjacency": (report["unit"]["adjacency"], record.adjacency),
    }
    for what, (reported, recorded) in found.items():
        if reported != recorded:
            # No values: the recorded name of another data set is nobody's business here.
            raise PrivacyError(
                f"{what} in privacy.json is not what ledger {ledger.display_url} has for run {record.run}: one of the "
                "two was changed, or the model is of another run"
            )
    if report["steps"]["charged"] > record.steps:
        raise PrivacyError(
            f"privacy.json counts {report['steps']['charged']} steps of run {record.run}, and ledger "
            f"{ledger.display_url} {record.steps}: the ledger is an older copy; restore the newest one"
        )
    entries, head = _entries(ledger, record.run)
    return {
        "place": without_credentials(ledger.display_url),
        "head": head,
        "run_opened_by": entries["run"],
        "dataset_declared_by": entries["dataset"],
        "created": record.created,
        "status": record.status,
        "steps_charged": record.steps,
        "reserved": {"epsilon": _json(record.epsilon), "delta": record.delta},
        "dataset_reserved": {"epsilon": _json(sums.epsilon), "delta": sums.delta, "runs": sums.runs},
        "dataset_budget": None if sums.budget is None else {"epsilon": sums.budget[0], "delta": sums.budget[1]},
        "checked": sorted([*found, "the charged steps", "the chain of entries"]),
    }


def _entries(ledger: Ledger, run: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({"run", "dataset"} -> the entry's number and hash, the head), all of one moment, out of an export.

    The data set's entry is the one in force when the run was opened: the last declaration before it.
    """
    declared: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "entries.jsonl"
        sequence, digest = ledger.export(path)
        with path.open(encoding="ascii") as lines:
            next(lines)
            for entry in map(json.loads, lines):
                place = {"sequence": entry["seq"], "hash": entry["hash"]}
                if entry["kind"] == "dataset":
                    declared[json.loads(entry["payload"])["dataset"]] = place
                elif entry["kind"] == "run" and entry["run"] == run:
                    found = {"run": place, "dataset": declared[json.loads(entry["payload"])["dataset"]]}
    return found, {"sequence": sequence, "hash": digest}


def _public_name(record: RunRecord) -> str | None:
    return None if record.dataset.startswith(UNNAMED) else record.dataset


def _json(number: float) -> float | str:
    return "inf" if number == float("inf") else number
