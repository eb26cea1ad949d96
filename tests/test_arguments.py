from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from transformers import HfArgumentParser, TrainingArguments

from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError

BUDGET = {"ledger_dataset": "letters", "dataset_budget_epsilon": 8.0, "dataset_budget_delta": 1e-4}

# What DESIGN's front door promises: names in order and what stands when only epsilon is given.
DEFAULTS: dict[str, Any] = {
    "target_epsilon": 3.0,
    "target_delta": None,
    "noise_multiplier": None,
    "per_example_max_grad_norm": 1.0,
    "clipping": "flat",
    "clipping_quantile": None,
    "clipping_learning_rate": None,
    "private_loss_weight": 0.08,
    "private_loss_max": None,
    "expected_batch_size": None,
    "sampling_probability": None,
    "max_batch_size": None,
    "privacy_unit": "example",
    "privacy_unit_column": None,
    "max_examples_per_user": None,
    "adjacency": "zero_out",
    "accountant": "pld",
    "ledger": None,
    "ledger_dataset": None,
    "dataset_budget_epsilon": None,
    "dataset_budget_delta": None,
    "eval_data": None,
    "log_private_metrics": False,
    "noise_generator": "chacha20",
    "floating_point": "snapped",
}

# (the field that the message must name, the wrong use)
WRONG_USES: list[tuple[str, dict[str, Any]]] = [
    *(("target_epsilon", {"target_epsilon": value}) for value in (True, "3", None, math.nan, 0.0, -1.0, -math.inf)),
    ("noise_multiplier", {"target_epsilon": math.inf}),
    *(("target_delta", {"target_delta": value}) for value in (False, "1e-5", math.nan, 0.0, 1.0, -1e-5, math.inf)),
    *(("noise_multiplier", {"noise_multiplier": value}) for value in (True, "1", math.nan, -0.5, math.inf)),
    ("noise_multiplier", {"noise_multiplier": 0.0}),
    *(
        ("per_example_max_grad_norm", {"per_example_max_grad_norm": value})
        for value in (True, "1", None, math.nan, 0.0, -1.0, math.inf)
    ),
    *(("expected_batch_size", {"expected_batch_size": value}) for value in (True, "8", 8.0, 0, -8, math.nan)),
    *(("max_batch_size", {"max_batch_size": value}) for value in (True, "8", 8.5, 0, -8)),
    *(
        ("sampling_probability", {"sampling_probability": value})
        for value in (True, "0.1", math.nan, 0.0, -0.1, 1.01, math.inf)
    ),
    *(("clipping", {"clipping": value}) for value in ("Flat", "none", None, 1, True)),
    *(
        (name, {"clipping": "adaptive", name: value})
        for name in ("clipping_quantile", "clipping_learning_rate")
        for value in (True, "0.5", math.nan, 0.0, -0.1, 11.0, math.inf)
    ),
    *((name, {"clipping": "flat", name: 0.5}) for name in ("clipping_quantile", "clipping_learning_rate")),
    *(("private_loss_weight", {"private_loss_weight": value}) for value in (True, None, "0", math.nan, -0.1, 1.1)),
    *(("private_loss_max", {"private_loss_max": value}) for value in (True, "1", math.nan, 0.0, -1.0, math.inf)),
    *(("privacy_unit", {"privacy_unit": value}) for value in ("row", None, 1)),
    *(("adjacency", {"adjacency": value}) for value in ("add_remove", None, 2)),
    *(("accountant", {"accountant": value}) for value in ("prv", None, 2)),
    *(("noise_generator", {"noise_generator": value}) for value in ("numpy", None, 2)),
    *(("floating_point", {"floating_point": value}) for value in ("exact", None, 2)),
    ("noise_generator", {"floating_point": "hardened", "noise_generator": "torch"}),
    *(("eval_data", {"eval_data": value}) for value in ("secret", "", True, 1)),
    *(("log_private_metrics", {"log_private_metrics": value}) for value in (None, 1, "yes")),
    *(("ledger", {"ledger": value}) for value in ("", "ledger.db", 3, b"sqlite://")),
    *(("ledger_dataset", {"ledger_dataset": value}) for value in ("", "  ", 3)),
    ("privacy_unit_column", {"privacy_unit": "user"}),
    ("privacy_unit_column", {"privacy_unit": "user", "privacy_unit_column": " "}),
    ("privacy_unit_column", {"privacy_unit": "example", "privacy_unit_column": "author"}),
    ("privacy_unit_column", {"privacy_unit": "document", "privacy_unit_column": "author"}),
    *(
        ("max_examples_per_user", {"privacy_unit": "user", "privacy_unit_column": "author", "max_examples_per_user": k})
        for k in (0, -1, 1.5, True, "8", math.nan)
    ),
    *(("max_examples_per_user", {"privacy_unit": u, "max_examples_per_user": 1}) for u in ("example", "document")),
    ("privacy_unit", {"privacy_unit": "user", "privacy_unit_column": "author", "floating_point": "hardened"}),
    ("accountant", {"accountant": "rdp", "adjacency": "replace_one"}),
    ("ledger_dataset", {**BUDGET, "ledger_dataset": None}),
    ("dataset_budget_delta", {**BUDGET, "dataset_budget_delta": None}),
    ("dataset_budget_epsilon", {**BUDGET, "dataset_budget_epsilon": None}),
    *(("dataset_budget_epsilon", {**BUDGET, "dataset_budget_epsilon": value}) for value in (0.0, math.inf, "8", True)),
    *(("dataset_budget_delta", {**BUDGET, "dataset_budget_delta": value}) for value in (0.0, 1.0, math.nan, "1e-5")),
    ("dataset_budget_epsilon", {**BUDGET, "target_epsilon": math.inf, "noise_multiplier": 1.0}),
]


def test_fields_and_defaults_are_those_of_the_front_door() -> None:
    assert dataclasses.asdict(PrivacyArguments(target_epsilon=3)) == DEFAULTS
    with pytest.raises(TypeError):
        PrivacyArguments()  # type: ignore[call-arg]


@pytest.mark.parametrize(("field", "wrong"), WRONG_USES, ids=lambda value: str(value))
def test_each_wrong_use_is_one_line_that_names_the_field(field: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError) as caught:
        PrivacyArguments(**{"target_epsilon": 3.0, **wrong})
    message = str(caught.value)
    assert field in message
    assert "\n" not in message and len(message) < 250


@pytest.mark.parametrize(
    "right",
    [
        {"target_epsilon": math.inf, "noise_multiplier": 0.0},
        {"target_epsilon": math.inf, "noise_multiplier": 1.0},
        {"noise_multiplier": 0.7, "target_delta": 1e-6},
        {"privacy_unit": "user", "privacy_unit_column": "author"},
        {"privacy_unit": "user", "privacy_unit_column": "author", "max_examples_per_user": 1},
        {"privacy_unit": "document"},
        {"adjacency": "replace_one"},
        {"accountant": "rdp"},
        {"floating_point": "hardened"},
        {"expected_batch_size": 64, "sampling_probability": 1.0, "max_batch_size": 3},
        {"ledger": "sqlite:///:memory:", **BUDGET},
        {"eval_data": "public", "log_private_metrics": True, "clipping": "per_layer", "noise_generator": "torch"},
    ],
    ids=str,
)
def test_right_uses_pass_unchanged(right: dict[str, Any]) -> None:
    arguments = PrivacyArguments(**{"target_epsilon": 3.0, **right})
    assert {name: getattr(arguments, name) for name in right} == right


def test_numbers_are_stored_as_plain_python_numbers() -> None:
    arguments = PrivacyArguments(np.float32(3), expected_batch_size=np.int64(8), noise_multiplier=1)  # type: ignore[arg-type]
    assert type(arguments.target_epsilon) is float
    assert type(arguments.noise_multiplier) is float
    assert type(arguments.expected_batch_size) is int


def test_what_was_checked_cannot_be_changed_afterwards_and_a_changed_copy_is_checked() -> None:
    arguments = PrivacyArguments(3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        arguments.target_epsilon = math.inf  # type: ignore[misc]
    with pytest.raises(PrivacyError, match="target_epsilon"):
        dataclasses.replace(arguments, target_epsilon=-1.0)


def test_a_password_in_the_ledger_url_is_neither_printed_nor_quoted_in_errors() -> None:
    secret = "hunter2"
    assert secret not in repr(PrivacyArguments(3.0, ledger=f"postgresql://me:{secret}@host/db"))
    for wrong in (f"me:{secret}@host", secret.encode()):
        with pytest.raises(PrivacyError) as caught:
            PrivacyArguments(3.0, ledger=wrong)  # type: ignore[arg-type]
        assert secret not in str(caught.value)


def test_command_line_gives_the_same_object_as_code() -> None:
    parser = HfArgumentParser(PrivacyArguments)  # type: ignore[arg-type]
    given = {
        "target_epsilon": "inf",
        "noise_multiplier": "0.5",
        "clipping": "automatic",
        "expected_batch_size": "64",
        "sampling_probability": "0.25",
        "max_batch_size": "96",
        "adjacency": "replace_one",
        "ledger": "sqlite:///x.db",
        "ledger_dataset": "letters",
        "eval_data": "private",
        "noise_generator": "torch",
    }
    line = [part for name, value in given.items() for part in (f"--{name}", value)] + ["--log_private_metrics"]
    (parsed,) = parser.parse_args_into_dataclasses(line)
    assert parsed == PrivacyArguments(
        target_epsilon=math.inf,
        noise_multiplier=0.5,
        clipping="automatic",
        expected_batch_size=64,
        sampling_probability=0.25,
        max_batch_size=96,
        adjacency="replace_one",
        ledger="sqlite:///x.db",
        ledger_dataset="letters",
        eval_data="private",
        noise_generator="torch",
        log_private_metrics=True,
    )
    assert parser.parse_args_into_dataclasses(["--target_epsilon", "3"]) == (PrivacyArguments(3.0),)
    assert "privacy_unit_column" in parser.format_help()


def test_command_line_cannot_pass_what_code_cannot() -> None:
    parser = HfArgumentParser(PrivacyArguments)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="target_epsilon"):
        parser.parse_args_into_dataclasses(["--target_epsilon", "nan"])
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--target_epsilon", "3", "--clipping", "none"])


def test_every_field_has_a_help_text_that_argparse_can_format() -> None:
    for spec in dataclasses.fields(PrivacyArguments):
        assert len(spec.metadata["help"]) > 40, spec.name
        assert "%" not in spec.metadata["help"], spec.name


def test_no_field_shares_a_name_with_the_arguments_of_trainer_or_trl() -> None:
    taken = {spec.name for spec in dataclasses.fields(TrainingArguments)}
    # TRL's SFTConfig, DPOConfig and GRPOConfig in the neighbourhood of our names; TRL itself is no test dependency.
    taken |= {"loss_type", "dataset_num_proc", "eval_packing", "epsilon", "delta", "epsilon_high", "beta", "max_length"}
    assert not taken & {spec.name for spec in dataclasses.fields(PrivacyArguments)}
    # One parser takes both, as a training script does.
    parser = HfArgumentParser((TrainingArguments, PrivacyArguments))  # type: ignore[arg-type]
    assert "--target_epsilon" in parser.format_help()


def test_the_arguments_cost_no_import_of_the_accountant() -> None:
    code = (
        "import sys, dpfa_hf.arguments, dpfa_hf.plan, dpfa_hf.accounting\n"
        "assert not {'dp_accounting', 'scipy.stats'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
