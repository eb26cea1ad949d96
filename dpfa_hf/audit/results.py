"""What an audit found, and `audit.json`, the file that says so beside the weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpfa_hf.errors import PrivacyError

AUDIT_NAME = "audit.json"
FORMAT, TOOL = 1, "dpfa audit"
# What no audit of this kind can see, whatever it finds.
NOT_LOOKED_AT = (
    "the private rows, and anything that was computed from them before training",
    "who else may read the machine, the ledger or the unreleased files",
    "several processes, GPUs, and half precision where the subject was computed in float32",
    "resuming, the ledger's own arithmetic, and other runs on the same people's data",
    "how long a step takes and how much memory it needs",
    "privacy losses that its own synthetic units do not provoke: a lower bound is not epsilon",
)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "tool": str,
    "version": str,
    "created": str,
    "subject": dict,
    "scaled_down": list,
    "checks": list,
    "epsilon_lower_bound": (int, float, type(None)),
    "confidence": float,
    "epsilon_claimed": (int, float, str),
    "epsilon_of_plan": (int, float, str),
    "canaries": int,
    "mutants": list,
    "not_looked_at": list,
    "passed": bool,
}
_SUBJECT = {"kind", "name", "run", "plan_sha256"}


@dataclass(frozen=True)
class Check:
    """One check: what it looked at, whether that held, and the figures that it saw."""

    name: str
    passed: bool
    what: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "what": self.what, **self.figures}


@dataclass(frozen=True)
class Mutant:
    """A bug that the audit planted itself, and the check that saw it; "" where none did."""

    name: str
    caught: bool
    by: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "caught": self.caught, "by": self.by}


def audit_record(
    *,
    subject: Mapping[str, Any],
    scaled_down: list[str],
    checks: list[Check],
    mutants: list[Mutant],
    epsilon_lower_bound: float | None,
    confidence: float,
    epsilon_claimed: float,
    epsilon_of_plan: float,
    canaries: int,
) -> dict[str, Any]:
    """The JSON values of `audit.json`. It has passed if every check has and every mutant was caught."""
    import dpfa_hf

    def number(value: float) -> float | str:
        return "inf" if math.isinf(value) else value

    return {
        "format": FORMAT,
        "tool": TOOL,
        "version": dpfa_hf.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject": dict(subject),
        "scaled_down": scaled_down,
        "checks": [check.to_dict() for check in checks],
        "epsilon_lower_bound": epsilon_lower_bound,
        "confidence": confidence,
        "epsilon_claimed": number(epsilon_claimed),
        "epsilon_of_plan": number(epsilon_of_plan),
        "canaries": canaries,
        "mutants": [mutant.to_dict() for mutant in mutants],
        "not_looked_at": list(NOT_LOOKED_AT),
        "passed": bool(checks) and all(c.passed for c in checks) and all(m.caught for m in mutants),
    }


def write_audit(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Writes `record` to `path`, or to `audit.json` in it if it is a folder; whole or not at all.

    Raises:
        PrivacyError: the record is not one of an audit's, or the file cannot be written.
    """
    path = Path(path)
    path = path / AUDIT_NAME if path.is_dir() else path
    _refuse_damaged(record, "record")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PrivacyError(f"{path} cannot be written ({error.strerror}); name another place with --out") from None
    return path


def read_audit(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The audit in `directory`; None if there is none.

    Raises:
        PrivacyError: `audit.json` is there, but cannot be read, is damaged, contradicts itself or is of another
            version.
    """
    path = Path(directory) / AUDIT_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PrivacyError(f"{path} cannot be read ({error.strerror}); make it readable, or audit anew") from None
    except ValueError:
        record = None
    _refuse_damaged(record, str(path))
    assert isinstance(record, dict)
    return record


def _refuse_damaged(record: object, where: str) -> None:
    if not isinstance(record, Mapping) or not _is_whole(record):
        raise PrivacyError(
            f"{where} is damaged or was written by another version of dpfa_hf: restore the file, or audit anew with "
            "`dpfa audit`"
        )


def _is_whole(record: Mapping[str, Any]) -> bool:
    if set(record) != set(_FIELDS) or record["format"] != FORMAT or record["tool"] != TOOL:
        return False
    if any(isinstance(record[name], bool) and kind is not bool for name, kind in _FIELDS.items()):
        return False
    if not all(isinstance(record[name], kind) for name, kind in _FIELDS.items()):
        return False
    checks, mutants = record["checks"], record["mutants"]
    if not all(isinstance(each, Mapping) for each in (*checks, *mutants)) or not set(record["subject"]) >= _SUBJECT:
        return False
    if not all({"name", "passed", "what"} <= set(each) and isinstance(each["passed"], bool) for each in checks):
        return False
    if not all(set(each) == {"name", "caught", "by"} and isinstance(each["caught"], bool) for each in mutants):
        return False
    for name in ("epsilon_claimed", "epsilon_of_plan"):
        if isinstance(record[name], str) and record[name] != "inf":
            return False
    held = bool(checks) and all(each["passed"] for each in checks) and all(each["caught"] for each in mutants)
    return bool(record["passed"] is held)
