"""From a saved model's folder to the evidence about it: one JSON value, of which every page is made."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dpfa_hf
from dpfa_hf import source
from dpfa_hf.audit import AUDIT_NAME, read_audit
from dpfa_hf.errors import PrivacyError
from dpfa_hf.evidence import headings
from dpfa_hf.evidence.bundle import refuse_unlike_schema
from dpfa_hf.evidence.curves import curves, trade_off
from dpfa_hf.evidence.ledger_record import ledger_record
from dpfa_hf.evidence.registry import registry_draft
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.report import REPORT_NAME, read_report, with_audit

if TYPE_CHECKING:
    from dpfa_hf.ledger import Ledger

FORMAT, TOOL = 1, "dpfa report"
SCHEMA_ID = "urn:dpfa-hf:schema:evidence:1"
# What holds weights in a folder that save_model, a checkpoint or PEFT wrote.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.distcp", "*.gguf")
# A ledger's name for a data set without one: it ends in a keyed fingerprint.
_FINGERPRINT = re.compile(r"unnamed-[0-9a-fA-F]{16}")
_NO_FINGERPRINT = (
    "The data are identified by their public name and by ledger entries. No hash of them is given, keyed or not: a "
    "hash of private data is itself a release that no epsilon covers."
)


def build_evidence(model_dir: str | os.PathLike[str], *, ledger: Ledger | None = None) -> dict[str, Any]:
    """Everything that can be handed over about the model in `model_dir`, as the JSON values of `evidence.json`.

    Made from `privacy.json`, from `audit.json` if there is one, from the plan, which holds public numbers only, from
    the weights' hashes and, if given, from the ledger. Takes some seconds.

    Guarantee: no number is better than its source. The guarantee is the report's (P20), curves are upper bounds, a
    failed audit makes the model NOT PRIVATE, and no fingerprint of data is in it (P22).

    Args:
        model_dir: a folder that `save_model`, a checkpoint or `PrivateLoop.save_report` wrote.
        ledger: where the run is recorded; without one the evidence says that no ledger was asked.

    Raises:
        PrivacyError: `privacy.json` is missing, damaged or contradicts itself, `audit.json` is damaged or of another
            run, or the ledger contradicts the report.
    """
    folder = Path(model_dir)
    report, audit = audited_report(folder)
    recorded = None if ledger is None else ledger_record(ledger, report)
    evidence = {
        "$schema": SCHEMA_ID,
        "format": FORMAT,
        "tool": TOOL,
        "version": dpfa_hf.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "privacy_sha256": _sha256(folder / REPORT_NAME),
        "audit_sha256": None if audit is None else _sha256(folder / AUDIT_NAME),
        "report": report,
        "audit": audit,
        "assumptions": headings.mapped(report),
        "curves": curves(PrivacyPlan.from_dict(report["plan"])) if report["private"] else None,
        "weights": _weights(folder),
        "data": _data(report, recorded),
        "ledger": recorded,
        "code": _code(report),
        "frameworks": headings.FRAMEWORKS,
        "headings": headings.described(),
        "no_verdict": headings.NO_VERDICT,
        "deployments_registry": registry_draft(report),
    }
    refuse_fingerprints(evidence)
    return evidence


def audited_report(model_dir: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What card and evidence say of the model in `model_dir`: its report with the audit's result, and the audit.

    Raises:
        PrivacyError: as `build_evidence`.
    """
    folder = Path(model_dir)
    report = read_report(folder)
    refuse_unlike_schema(report, str(folder / REPORT_NAME), "report")
    if not _fits_plan(report):
        raise PrivacyError(
            f"{folder / REPORT_NAME} contradicts the plan that it holds: it was edited; restore the file that the "
            "training wrote"
        )
    audit = read_audit(folder)
    if audit is None:
        return report, None
    _refuse_foreign(audit, report, folder)
    return with_audit(report, audit), audit


def refuse_fingerprints(evidence: Mapping[str, Any]) -> None:
    """Raises PrivacyError if a ledger's name for an unnamed data set, a keyed fingerprint, is anywhere in it (P22)."""
    if _FINGERPRINT.search(json.dumps(evidence)):
        raise PrivacyError(
            "the evidence would show the fingerprint of an unnamed data set (P22): remove it from privacy.json or "
            "audit.json, or give the data set a name"
        )


def inconsistencies(evidence: Mapping[str, Any]) -> list[str]:
    """What is not as `build_evidence` would have it, of evidence that fits the schema; [] if nothing was found.

    Cheap enough for every reading: nothing is composed again, and no wording is compared, which later versions change.
    """
    report, curve, recorded, data = (evidence[name] for name in ("report", "curves", "ledger", "data"))
    if not _fits_plan(report):
        return ["the report does not fit its plan"]
    guarantee = {"epsilon": report["guarantee"]["epsilon"], "delta": report["guarantee"]["delta"]}
    stated = [{name: each[name] for name in ("assumption", "status")} for each in evidence["assumptions"]]
    known = {each["id"] for each in evidence["headings"]}
    fits = {
        "the report is not what the audit found": evidence["audit"] is None
        or with_audit(report, evidence["audit"]) == report,
        "the assumptions are not those of the report": stated == report["assumptions"],
        "a heading is missing": all(set(each["headings"]) <= known for each in evidence["assumptions"]),
        "the data are not those of the report": (data["name"], data["is_named"], data["units"])
        == (report["dataset"]["name"] or "unnamed", bool(report["dataset"]["name"]), report["mechanism"]["num_units"]),
    }
    if curve is not None:
        last = {"step": report["guarantee"]["at_step"], "epsilon": guarantee["epsilon"]}
        draft = evidence["deployments_registry"]["record"]["deployment"]["privacy_loss"]["privacy_parameters"]
        fits |= {
            "the curve does not end at the guarantee": curve["epsilon_by_step"][-1] == last,
            "the guarantee is not on the privacy curve": guarantee in curve["privacy_curve"],
            "the trade-off is not that of the privacy curve": _close(curve["trade_off"], curve["privacy_curve"]),
            "the registry's draft has another guarantee": draft == guarantee,
        }
    if recorded is not None:
        entries = recorded["dataset_declared_by"], recorded["run_opened_by"]
        reserved = {"epsilon": report["plan"]["epsilon"], "delta": report["plan"]["delta"]}
        fits |= {
            "the ledger's entries are not those of the data": (data["declared_by"], data["run_opened_by"]) == entries,
            "the ledger reserved something else": recorded["reserved"] == reserved,
            "the ledger has fewer steps": recorded["steps_charged"] >= report["steps"]["charged"],
        }
    return [problem for problem, good in fits.items() if not good]


def _fits_plan(report: Mapping[str, Any]) -> bool:
    """Whether what the report says of the guarantee is what its plan says."""
    try:
        plan = PrivacyPlan.from_dict(report["plan"])
    except PrivacyError:
        return False
    # A report may be NOT PRIVATE for reasons that no plan knows; never the other way round.
    private = report["private"] and plan.is_private
    guarantee, steps, mechanism = report["guarantee"], report["steps"], report["mechanism"]
    planned = ("num_units", "sampling_probability", "noise_multiplier", "clipping_norm", "max_batch_size", "max_steps")
    return bool(
        report["plan_sha256"] == plan.sha256()
        and private == report["private"]
        and (guarantee["epsilon"], guarantee["delta"]) == (plan.epsilon if private else "inf", plan.delta)
        and guarantee["at_step"] == steps["planned"] == plan.max_steps
        and steps["charged"] <= plan.max_steps
        and all(mechanism[name] == getattr(plan, name) for name in planned)
        and (report["unit"]["privacy_unit"], report["unit"]["adjacency"]) == (plan.privacy_unit, plan.adjacency)
    )


def _close(corners: list[dict[str, float]], points: list[dict[str, float]]) -> bool:
    expected = trade_off(points)
    return len(corners) == len(expected) and all(
        abs(corner[name] - other[name]) < 1e-9
        for corner, other in zip(corners, expected, strict=True)
        for name in ("false_alarms", "misses")
    )


def _refuse_foreign(audit: Mapping[str, Any], report: Mapping[str, Any], folder: Path) -> None:
    subject = audit["subject"]
    same = (
        subject["plan_sha256"] == report["plan_sha256"]
        and subject["run"] == report["run"]
        and audit["epsilon_of_plan"] == report["plan"]["epsilon"]
    )
    if not same:
        raise PrivacyError(
            f"{folder / AUDIT_NAME} is of another run, or of a {subject['kind']} under a plan of its own: audit this "
            f"folder with `dpfa audit {folder}`, or move the file away"
        )


def _weights(folder: Path) -> list[dict[str, Any]]:
    files = sorted({file for pattern in _WEIGHTS for file in folder.rglob(pattern) if file.is_file()})
    return [
        {"path": file.relative_to(folder).as_posix(), "bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in files
    ]


def _data(report: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    unit = report["unit"]
    return {
        "name": report["dataset"]["name"] or "unnamed",
        "is_named": report["dataset"]["name"] is not None,
        "units": report["mechanism"]["num_units"],
        "privacy_unit": unit["privacy_unit"],
        "adjacency": unit["adjacency"],
        "declared_by": None if recorded is None else recorded["dataset_declared_by"],
        "run_opened_by": None if recorded is None else recorded["run_opened_by"],
        "why_no_fingerprint": _NO_FINGERPRINT,
    }


def _code(report: Mapping[str, Any]) -> dict[str, Any]:
    here = {"version": dpfa_hf.__version__, "sha256": source.package_sha256(), "commit": source.commit()}
    trained = report["software"]
    return {
        "trained_with": dict(trained),
        "reported_with": here,
        "same_code": trained["dpfa-hf sha256"] == here["sha256"] if "dpfa-hf sha256" in trained else None,
    }


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PrivacyError(f"{path} cannot be read ({error.strerror}): make it readable") from None
