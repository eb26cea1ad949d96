"""Evidence about a trained model, to hand over: numbers, plots, assumptions, and where they may be relevant (P25, P26).

`building` collects it (`curves`, `headings`, `registry` and `ledger_record` make its parts), `bundle` reads and writes
the files and holds them against the published schema, `rendering` and `plots` make the pages. Nothing computes twice
what the report says: pages are made from `evidence.json`, and it from `privacy.json`, `audit.json` and the ledger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpfa_hf.evidence.building import build_evidence
    from dpfa_hf.evidence.bundle import read_evidence, write_bundle

EVIDENCE_NAME = "evidence.json"
_LAZY = {"build_evidence": "building", "read_evidence": "bundle", "write_bundle": "bundle"}
__all__ = ["EVIDENCE_NAME", "build_evidence", "read_evidence", "write_bundle"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
