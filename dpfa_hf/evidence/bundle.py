"""The files of the evidence: written whole, and read only if they hold what the published schema says."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from dpfa_hf.errors import PrivacyError
from dpfa_hf.evidence import EVIDENCE_NAME
from dpfa_hf.report import replace_file, write_card

SCHEMA_NAME = "evidence.schema.json"
MARKDOWN_NAME, HTML_NAME = "evidence.md", "evidence.html"


def write_bundle(model_dir: str | os.PathLike[str], evidence: Mapping[str, Any]) -> list[Path]:
    """Writes `evidence.json`, `evidence.md`, `evidence.html` and the model card's section, and returns their paths.

    All of them show the same evidence; the same evidence gives the same bytes. Each file is replaced whole or not at
    all. A signature that was there before does not hold any more.

    Raises:
        PrivacyError: `evidence` is not one of `build_evidence`'s, or a file cannot be written.
    """
    from dpfa_hf.evidence.rendering import html_page, markdown_page

    refuse_damaged(evidence, "evidence")
    folder = Path(model_dir)
    pages = {
        EVIDENCE_NAME: json.dumps(evidence, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN_NAME: markdown_page(evidence),
        HTML_NAME: html_page(evidence),
    }
    try:
        for name, text in pages.items():
            replace_file(folder / name, text)
        write_card(folder, evidence["report"])
    except OSError as error:
        raise PrivacyError(f"{folder} cannot be written ({error.strerror}): make it writable, or copy it") from None
    return [folder / name for name in (*pages, "README.md")]


def read_evidence(model_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The evidence in `model_dir`.

    It is held against the published schema, and its parts against each other; whether it belongs to the files beside
    it, their hashes say (`privacy_sha256`, `audit_sha256` and `weights`), and a signature who wrote it.

    Raises:
        PrivacyError: there is no `evidence.json`, or it is damaged, contradicts itself or is of another version.
    """
    path = Path(model_dir) / EVIDENCE_NAME
    try:
        evidence = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PrivacyError(f"{path} cannot be read ({error.strerror}): write it with `dpfa report`") from None
    except (ValueError, RecursionError):
        raise PrivacyError(f"{path} is no JSON: write it anew with `dpfa report`") from None
    refuse_damaged(evidence, str(path))
    return evidence


def schema() -> dict[str, Any]:
    """The published JSON schema, draft 2020-12."""
    return json.loads(resources.files("dpfa_hf.evidence").joinpath(SCHEMA_NAME).read_text(encoding="utf-8"))


def refuse_unlike_schema(value: object, where: str, part: str | None = None) -> None:
    """Raises PrivacyError with the first place at which `value` is not what the schema, or its `part`, says."""
    errors = sorted(_validator(part).iter_errors(value), key=lambda error: (error.json_path, error.message))
    if errors:
        message = " ".join(errors[0].message.split())
        message = message if len(message) <= 160 else f"{message[:160]} ..."
        raise PrivacyError(
            f"{where} is damaged or was written by another version of dpfa_hf ({errors[0].json_path}: {message}): "
            "restore the file, or write it anew"
        )


def refuse_damaged(evidence: object, where: str) -> None:
    """Raises PrivacyError unless `evidence` fits the schema and its parts fit each other."""
    from dpfa_hf.evidence.building import inconsistencies, refuse_fingerprints

    refuse_unlike_schema(evidence, where)
    assert isinstance(evidence, Mapping)
    refuse_fingerprints(evidence)
    found = inconsistencies(evidence)
    if found:
        raise PrivacyError(
            f"{where} contradicts itself ({found[0]}): it was edited; write it anew with `dpfa report`, from the files "
            "that the training wrote"
        )


@functools.cache
def _validator(part: str | None) -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        raise PrivacyError(
            'evidence needs jsonschema, which is not installed: pip install "dpfa-hf[evidence]"'
        ) from None
    whole = schema()
    if part is None:
        return Draft202012Validator(whole)
    return Draft202012Validator({"$schema": whole["$schema"], "$ref": f"#/$defs/{part}", "$defs": whole["$defs"]})
