"""A draft of the model's entry in OpenDP's Differential Privacy Deployments Registry.

The fields are those of `schemas/deployments-schema.yaml` in github.com/opendp/deployments-registry-data at the commit
below. What only the operator knows is null and listed by name: an entry is submitted by people, never by this software.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpfa_hf.evidence import headings

SCHEMA = "opendp/deployments-registry-data: schemas/deployments-schema.yaml at 057e5d81cf60150dd3307e0cf4504b957802fb3b"


def registry_draft(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"schema", "record", "left_to_the_operator"}; None for a model that is NOT PRIVATE, which has no place there."""
    if not report["private"]:
        return None
    record = _record(report)
    return {"schema": SCHEMA, "record": record, "left_to_the_operator": sorted(_empty(record))}


def _record(report: Mapping[str, Any]) -> dict[str, Any]:
    unit, mechanism, guarantee = (report[name] for name in ("unit", "mechanism", "guarantee"))
    accountant, noise = report["accountant"], report["noise"]
    rounding = "rounded to a grid, hardened" if report["plan"]["floating_point"] == "hardened" else "snapped to a grid"
    return {
        "url_slug": None,
        "deployment": {
            "basic": {
                "name": None,
                "data_curators": None,
                "description": None,
                "intended_use": None,
                "data_product_type": "Machine learning model",
                "data_product_region": None,
                "data_product_sector": None,
                "publication_date": None,
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": f"Data sets of {mechanism['num_units']} units; a unit is {unit['what']}.",
                "unprotected_quantities": f"Public: {unit['public']}. "
                f"Not covered: {'; '.join(report['releases']['not_covered'])}.",
            },
            "privacy_loss": {
                "privacy_unit": unit["privacy_unit"],
                "privacy_unit_details": f"{unit['what']}. Neighbours: {unit['adjacency']}, {unit['neighbours']}. "
                f"{unit['how_built']}.",
                "number_of_privacy_units": mechanism["num_units"],
                "privacy_parameters": {"epsilon": guarantee["epsilon"], "delta": guarantee["delta"]},
                "privacy_parameters_details": f"{guarantee['meaning']} ({guarantee['at_step']}), by "
                f"{accountant['name']} ({accountant['version']}).",
            },
            "deployment_model": {
                "model_name": "Central",
                "model_name_details": None,
                "trust_assumptions": report["trust_model"],
                "actors": None,
                "release_type": None,
                "release_type_details": None,
                "data_source_type": "Static",
                "data_source_type_details": None,
                "access_type": "Non-interactive",
                "access_type_details": None,
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": f"Tuning: {report['tuning']} Preprocessing: nothing was "
                "computed from private rows before step 1, by the operator's word.",
                "mechanisms": f"{mechanism['name']}; sampling: {mechanism['sampler']}; noise multiplier "
                f"{mechanism['noise_multiplier']:.6g}, clipping {mechanism['clipping']} to "
                f"{mechanism['clipping_norm']:g}; noise from {noise.get('generator', 'an unnamed generator')}, "
                f"{rounding}. Library: dpfa_hf.",
                "composition": "Steps: composed by the accountant named above. Runs on the same data set: sums of "
                "epsilon and of delta, reserved before the first step.",
                "post_processing": "The noised sums are divided by a public constant and used by the optimizer.",
                "justification": None,
                "utility": None,
                "additional_information": headings.NO_VERDICT,
            },
            "administrative": {
                "evidence_sources": None,
                "status": "Draft",
                "registry_authors": None,
                "tier": None,
            },
        },
    }


def _empty(value: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, item in value.items():
        if item is None:
            yield f"{path}{name}"
        elif isinstance(item, Mapping):
            yield from _empty(item, f"{path}{name}.")
