"""`dpfa gate`: exit codes, and JSON on stdout whatever happens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dpfa_hf import cli, gate
from dpfa_hf.ledger import Ledger

LIMITS = ("--max-epsilon", "50", "--max-delta", "1e-3")


@pytest.fixture(autouse=True)
def no_ledger_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPFA_LEDGER", raising=False)


def dpfa_gate(model: object, *options: object) -> Result:
    return CliRunner().invoke(cli.app, ["gate", "--model", str(model), *map(str, options)])


def told(result: Result) -> dict[str, Any]:
    """What stdout says, which is one JSON object and agrees with the exit code; stderr names what was refused."""
    values = json.loads(result.stdout)
    assert result.exit_code == (0 if values["passed"] else 1)
    refused = [check for check in values["checks"] if check["passed"] is False]
    lines = result.stderr.splitlines()
    assert [f"dpfa: gate: {each['check']}: {each['detail']}" for each in refused] == lines
    return values


def passed(values: dict[str, Any], name: str) -> bool | None:
    return next(check["passed"] for check in values["checks"] if check["check"] == name)


def test_a_good_model_passes_with_all_options(signed_run: Any) -> None:
    options = ("--ledger", signed_run.url, "--public-key", signed_run.folder / "key.pub", "--require-evidence")
    values = told(dpfa_gate(signed_run.model, *LIMITS, *options))
    assert values["passed"] is True and 0 < values["epsilon"] < 50 and values["delta"] == 1e-3
    assert {check["check"] for check in values["checks"] if check["passed"] is not True} == {"audit"}


def test_what_is_wrong_is_in_the_json_and_on_stderr(signed_run: Any, tmp_path: Path) -> None:
    values = told(dpfa_gate(signed_run.model, "--max-epsilon", "0.01", "--max-delta", "1e-9"))
    assert passed(values, "epsilon") is False and passed(values, "delta") is False and passed(values, "plan") is True
    values = told(dpfa_gate(signed_run.model, *LIMITS, "--public-key", signed_run.folder / "other.pub"))
    assert passed(values, "signature") is False and passed(values, "ledger") is None
    values = told(dpfa_gate(tmp_path / "nowhere", *LIMITS))
    assert values["passed"] is False and values["epsilon"] is None and values["run"] is None
    values = told(dpfa_gate(signed_run.model, *LIMITS, "--require-audit"))
    assert passed(values, "audit") is False


def test_infinity_is_a_text_in_the_json(signed_run: Any, tmp_path: Path) -> None:
    run = signed_run.copy(tmp_path / "run")
    report = json.loads((run.model / "privacy.json").read_text())
    report["guarantee"]["epsilon"] = "inf"
    (run.model / "privacy.json").write_text(json.dumps(report))
    assert told(dpfa_gate(run.model, *LIMITS))["epsilon"] == "inf"


def test_the_environments_ledger_is_looked_at_and_the_users_default_is_not(
    signed_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passed(told(dpfa_gate(signed_run.model, *LIMITS)), "ledger") is None
    # A password is safer there than on the command line.
    monkeypatch.setenv("DPFA_LEDGER", signed_run.url)
    assert passed(told(dpfa_gate(signed_run.model, *LIMITS)), "ledger_run") is True
    fresh = f"sqlite:///{tmp_path}/fresh.db"
    Ledger(fresh).close()
    monkeypatch.setenv("DPFA_LEDGER", fresh)
    assert passed(told(dpfa_gate(signed_run.model, *LIMITS)), "ledger_run") is False
    assert passed(told(dpfa_gate(signed_run.model, *LIMITS, "--ledger", signed_run.url)), "ledger_run") is True
    # An empty --ledger is a variable that somebody forgot to set, and no reason to look at none.
    monkeypatch.setenv("DPFA_LEDGER", "")
    assert passed(told(dpfa_gate(signed_run.model, *LIMITS, "--ledger", "")), "ledger") is False
    assert passed(told(dpfa_gate(signed_run.model, *LIMITS, "--require-ledger")), "ledger") is False
    assert passed(told(dpfa_gate(signed_run.model, *LIMITS)), "ledger") is None


def test_no_password_of_the_ledger_is_shown(signed_run: Any) -> None:
    url = "postgresql://alice:s3cr3t@127.0.0.1:1/ledger"
    result = dpfa_gate(signed_run.model, *LIMITS, "--ledger", url)
    assert passed(told(result), "ledger") is False and "s3cr3t" not in result.stdout + result.stderr


def test_what_a_library_prints_is_not_in_the_json(signed_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recomputed = gate.recomputed_epsilon

    def chatty(plan: Any) -> float:
        print("WARNING: chatter")
        return recomputed(plan)

    monkeypatch.setattr(gate, "recomputed_epsilon", chatty)
    result = dpfa_gate(signed_run.model, *LIMITS)
    assert json.loads(result.stdout)["passed"] is True and "chatter" in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--max-epsilon", "3"),
        ("--max-delta", "1e-5"),
        ("--max-epsilon", "nan", "--max-delta", "1e-5"),
        ("--max-epsilon", "inf", "--max-delta", "1e-5"),
        ("--max-epsilon", "-1", "--max-delta", "1e-5"),
        ("--max-epsilon", "three", "--max-delta", "1e-5"),
        ("--max-epsilon", "3", "--max-delta", "1"),
        ("--max-epsilon", "3", "--max-delta", "nan"),
        ("--max-epsilon", "3", "--max-delta", "-1e-5"),
        (*LIMITS, "--sign-key", "key.pem"),
        (*LIMITS, "another"),
    ],
)
def test_wrong_usage_exits_2_with_nothing_on_stdout(options: tuple[str, ...], signed_run: Any) -> None:
    result = dpfa_gate(signed_run.model, *options)
    assert result.exit_code == 2 and result.stdout == ""


def test_the_model_must_be_named() -> None:
    assert CliRunner().invoke(cli.app, ["gate", *LIMITS]).exit_code == 2
    assert dpfa_gate("", *LIMITS).exit_code == 2


def test_help_explains_and_gives_an_example() -> None:
    result = CliRunner().invoke(cli.app, ["gate", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and "Example: dpfa gate" in result.stdout and "Exit code 0" in result.stdout


def test_a_relative_path_and_a_trailing_slash_are_the_same_folder(
    signed_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(signed_run.model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for model in ("model", "model/", "./model"):
        options = ("--public-key", signed_run.folder / "key.pub")
        assert told(dpfa_gate(model, *LIMITS, *options))["passed"] is True
    monkeypatch.chdir(tmp_path / "model")
    assert told(dpfa_gate(".", *LIMITS))["passed"] is True
