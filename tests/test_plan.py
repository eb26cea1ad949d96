from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan, sensitivity_slack
from dpfa_hf.rounding import contribution_error, summation_error

FIELDS: dict[str, Any] = {
    "privacy_unit": "user",
    "privacy_unit_column": "author",
    "max_examples_per_user": 8,
    "adjacency": "zero_out",
    "accountant": "pld",
    "clipping": "adaptive",
    "num_units": 1000,
    "sampling_probability": 0.1,
    "expected_batch_size": 100,
    "max_batch_size": 160,
    "noise_multiplier": 1.5,
    "clipping_norm": 0.5,
    "clipping_quantile": 0.5,
    "clipping_learning_rate": 0.2,
    "clipping_quantile_weight": 0.16,
    "private_loss_weight": 0.08,
    "private_loss_max": 1.5,
    "sensitivity_slack": 2.0**-10,
    "max_steps": 50,
    "delta": 1e-4,
    "truncation_delta": 0.0,
    "target_epsilon": 3.0,
    "epsilon": 2.9,
    "noise_generator": "chacha20",
    "floating_point": "snapped",
    "accountant_version": "dp_accounting 0.6.0",
}
PLAN = PrivacyPlan(**FIELDS)

# Another possible value for each field.
CHANGED: dict[str, Any] = {
    "privacy_unit": "example",
    "privacy_unit_column": "sender",
    "max_examples_per_user": 7,
    "adjacency": "replace_one",
    "accountant": "rdp",
    "clipping": "per_layer",
    "num_units": 1001,
    "sampling_probability": math.nextafter(0.1, 1),
    "expected_batch_size": 101,
    "max_batch_size": 161,
    "noise_multiplier": math.nextafter(1.5, 2),
    "clipping_norm": 0.25,
    "clipping_quantile": 0.6,
    "clipping_learning_rate": 0.3,
    "clipping_quantile_weight": 0.17,
    "private_loss_weight": 0.0,
    "private_loss_max": 1.6,
    "sensitivity_slack": 2.0**-11,
    "max_steps": 51,
    "delta": 1e-5,
    "truncation_delta": 1e-9,
    "target_epsilon": math.inf,
    "epsilon": math.nextafter(2.9, 3),
    "noise_generator": "torch",
    "floating_point": "hardened",
    "accountant_version": "dp_accounting 0.7.0",
}


def test_plan_survives_json_with_its_hash() -> None:
    not_private = dataclasses.replace(PLAN, noise_multiplier=0.0, target_epsilon=math.inf, epsilon=math.inf)
    for plan in (PLAN, not_private):
        text = json.dumps(plan.to_dict(), allow_nan=False)
        restored = PrivacyPlan.from_dict(json.loads(text))
        assert restored == plan
        assert restored.sha256() == plan.sha256()


def test_hash_is_the_same_in_another_process() -> None:
    code = f"from dpfa_hf.plan import PrivacyPlan; print(PrivacyPlan(**{FIELDS!r}).sha256())"
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert seen == PLAN.sha256() and len(seen) == 64


def test_hash_changes_with_any_field() -> None:
    assert CHANGED.keys() == FIELDS.keys() == {spec.name for spec in dataclasses.fields(PrivacyPlan)}
    hashes = {dataclasses.replace(PLAN, **{name: value}).sha256() for name, value in CHANGED.items()}
    assert len(hashes | {PLAN.sha256()}) == len(FIELDS) + 1


def test_hash_check_catches_a_field_left_out_of_the_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PrivacyPlan.to_dict
    monkeypatch.setattr(
        PrivacyPlan, "to_dict", lambda plan: {k: v for k, v in whole(plan).items() if k != "noise_multiplier"}
    )
    assert dataclasses.replace(PLAN, noise_multiplier=0.1).sha256() == PLAN.sha256()
    with pytest.raises(AssertionError):
        test_hash_changes_with_any_field()


def test_numpy_and_integer_values_hash_like_python_values() -> None:
    same = PrivacyPlan(**{**FIELDS, "num_units": np.int64(1000), "delta": np.float64(1e-4)})
    assert same.sha256() == PLAN.sha256()
    assert dataclasses.replace(PLAN, target_epsilon=3).sha256() == PLAN.sha256()


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_or_unknown_field_is_refused(name: str) -> None:
    values = PLAN.to_dict()
    del values[name]
    with pytest.raises(PrivacyError, match=name):
        PrivacyPlan.from_dict(values)
    with pytest.raises(PrivacyError, match=f"{name}_2"):
        PrivacyPlan.from_dict({**PLAN.to_dict(), f"{name}_2": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(FIELDS, (None, True, [], math.nan)),
        *((name, "3") for name, value in FIELDS.items() if not isinstance(value, str)),
        *((name, 3) for name, value in FIELDS.items() if isinstance(value, str)),
        *((name, 2.5) for name, value in FIELDS.items() if isinstance(value, int)),
        ("num_units", 0),
        ("sampling_probability", 0.0),
        ("sampling_probability", 1.1),
        ("expected_batch_size", 0),
        ("max_batch_size", 0),
        ("max_batch_size", 1001),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.inf),
        ("clipping_norm", 0.0),
        ("clipping_quantile", 0.0),  # under adaptive clipping
        ("clipping_quantile", 1.0),
        ("clipping_learning_rate", -0.1),
        ("clipping_quantile_weight", 0.0),  # under adaptive clipping
        ("clipping_quantile_weight", 1.1),
        ("private_loss_weight", -0.1),
        ("private_loss_weight", 1.1),
        ("private_loss_max", 0.0),  # with a weight
        ("private_loss_max", math.inf),
        ("sensitivity_slack", -0.1),
        ("floating_point", "exact"),
        ("max_steps", 0),
        ("delta", 1e-3),  # 1/n
        ("delta", 0.0),
        ("truncation_delta", 1e-4),
        ("epsilon", 3.1),  # above the target
        ("epsilon", -0.1),
        ("epsilon", math.inf),
    ],
)
def test_impossible_values_are_refused_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(PrivacyError, match=name) as caught:
        PrivacyPlan.from_dict({**PLAN.to_dict(), name: value})
    assert "\n" not in str(caught.value)


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.noise_multiplier = 0.0  # type: ignore[misc]


def test_derived_values() -> None:
    assert PLAN.noise_standard_deviation == 1.5 * 0.5
    assert PLAN.noise_standard_deviation_at(0.7) == 1.5 * 0.7
    assert PLAN.joint_sensitivity == pytest.approx(math.hypot(1, 0.08, 0.08), rel=1e-15)
    assert PLAN.accounted_noise_multiplier == pytest.approx(1.5 / (1 + 2.0**-10) / math.hypot(1, 0.08, 0.08), rel=1e-15)
    alone = dataclasses.replace(PLAN, clipping="flat", clipping_quantile_weight=0.0, private_loss_weight=0.0)
    assert alone.joint_sensitivity == 1 and alone.accounted_noise_multiplier == 1.5 / (1 + 2.0**-10)
    assert PLAN.is_private
    assert not dataclasses.replace(PLAN, target_epsilon=math.inf, epsilon=math.inf).is_private


def test_slack_covers_float32_sums_of_clipped_rows_and_the_check_catches_half_precision() -> None:
    """Rows of norm 1 summed with and without a newcomer: the difference stays within 1 + slack (P15)."""
    rng = np.random.default_rng(0)

    def influence(rows: int, dtype: Any) -> float:
        direction = rng.standard_normal(64)
        aligned = direction / np.linalg.norm(direction) + 0.05 * rng.standard_normal((rows + 1, 64))
        unit = (aligned / np.linalg.norm(aligned, axis=1, keepdims=True)).astype(dtype)
        total = np.zeros(64, dtype)
        for row in unit[:-1]:  # one by one: the order with the largest error
            total += row
        with_newcomer = unit[-1].copy()
        for row in unit[:-1]:
            with_newcomer += row
        return float(np.linalg.norm(with_newcomer.astype(np.float64) - total.astype(np.float64)))

    for rows in (16, 512, 4096):
        assert influence(rows, np.float32) <= 1 + sensitivity_slack(rows + 1)
    assert influence(4096, np.float16) > 1 + sensitivity_slack(4097)


def test_slack_is_the_documented_sum() -> None:
    assert sensitivity_slack(4096) == 2.0**-12 + 2 * 4096 * 2.0**-21
    assert sensitivity_slack(4096, "hardened") == contribution_error() + 2 * summation_error(1.0, examples=4096)
