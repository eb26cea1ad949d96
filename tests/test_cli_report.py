"""`dpfa report` from the shell: what it writes, signs, says and refuses."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from dpfa_hf import cli, report
from dpfa_hf.accounting import make_plan
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.budget import open_run
from dpfa_hf.errors import PrivacyError
from dpfa_hf.evidence import building, read_evidence
from dpfa_hf.evidence.curves import curves
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.signing import verify_model

FILES = ["evidence.json", "evidence.md", "evidence.html", "README.md"]


def dpfa(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def refused(result: Result) -> str:
    """The one line of a refusal; nothing on stdout, no traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.stdout == "" and result.stderr.count("\n") == 1 and result.stderr.startswith("dpfa: ")
    return result.stderr


_CURVES = functools.cache(curves)


@pytest.fixture(autouse=True)
def no_ledger_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPFA_LEDGER", raising=False)
    # The curves of a plan are always the same, and take a second.
    monkeypatch.setattr(building, "curves", lambda plan: copy.deepcopy(_CURVES(plan)))


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    arguments = PrivacyArguments(target_epsilon=9.0, target_delta=1e-5, noise_multiplier=3.0, accountant="rdp")
    # No other batch is possible, so that none need be calibrated.
    arguments = replace(arguments, sampling_probability=1.0)
    return make_plan(arguments, num_units=50, expected_batch_size=1, max_steps=4)


@pytest.fixture
def model(tmp_path: Path, plan: PrivacyPlan) -> Iterator[Path]:
    yield saved(tmp_path, plan)


def saved(root: Path, plan: PrivacyPlan, **changes: Any) -> Path:
    """A model's folder with weights and report, and its run in a ledger beside it."""
    folder = root / "model"
    folder.mkdir()
    arguments = PrivacyArguments(target_epsilon=9.0, ledger_dataset="notes")
    with Ledger(url(folder)) as ledger:
        run = open_run(ledger, plan, arguments, [])
        ledger.charge_step(run, 1)
        spent, place = ledger.datasets()[0], ledger.display_url
    stated: dict[str, Any] = {
        "plan": plan,
        "run": run,
        "steps": 1,
        "dataset": "notes",
        "dataset_spent": (spent.epsilon, spent.delta),
        "ledger_url": place,
        "model": {
            "class": "M",
            "base_model": None,
            "adapter": None,
            "trainable_parameters": 3,
            "total_parameters": 3,
        },
        "loss": "task: causal_lm",
        "sampler": "truncated Poisson",
        "noise": {"generator": plan.noise_generator, "standard_deviation": plan.noise_standard_deviation},
        "log_private_metrics": False,
        "eval_data": None,
    }
    report.write_report(folder, report.build_report(**(stated | changes)))
    save_file({"weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


def url(folder: Path) -> str:
    return f"sqlite:///{folder.parent / 'ledger.sqlite3'}"


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "key.pem", folder / "key.pub"
    generate = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(generate, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], check=True, capture_output=True
    )
    return private


def test_it_writes_the_bundle_says_the_guarantee_rounded_up_and_that_no_ledger_was_asked(
    model: Path, plan: PrivacyPlan
) -> None:
    result = dpfa(model)
    assert result.exit_code == 0, result.output
    assert [line.removeprefix(f"wrote {model}/") for line in result.stdout.splitlines()[:4]] == FILES
    stated = re.search(r"^ε = ([\d.]+) at δ = 1e-05, unit: one example", result.stdout, re.MULTILINE)
    assert stated is not None and plan.epsilon <= float(stated[1]) < plan.epsilon + 0.01
    assert "audit: none" in result.stdout and "ledger: not asked" in result.stdout
    assert read_evidence(model)["ledger"] is None


def test_as_json_it_says_the_same_for_machines_and_signs(model: Path, plan: PrivacyPlan, key: Path) -> None:
    result = dpfa(model, "--ledger", url(model), "--sign-key", key, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["files"] == [str(model / name) for name in FILES]
    assert said["signature"] == str(model / "model.sig") and said["signature_void"] is False
    assert (said["private"], said["epsilon"], said["delta"]) == (True, plan.epsilon, plan.delta)
    assert said["run"] == report.read_report(model)["run"] and said["audit_passed"] is None
    with Ledger(url(model), create=False) as ledger:
        assert said["ledger_head"] == list(ledger.head())
    verify_model(model, key.with_suffix(".pub"))
    # One byte of the evidence is enough.
    page = model / "evidence.html"
    page.write_bytes(page.read_bytes().replace(b"not assessed", b"not assesseD", 1))
    with pytest.raises(PrivacyError):
        verify_model(model, key.with_suffix(".pub"))
    # Written anew without the key, the old signature is void, and it says so.
    again = dpfa(model)
    assert again.exit_code == 0 and "model.sig is of older files now" in again.stdout
    assert json.loads(dpfa(model, "--json").stdout)["signature_void"] is True


def test_the_environments_ledger_is_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFA_LEDGER", url(model))
    assert f"ledger: {url(model)} agrees; head 4 " in dpfa(model).stdout
    assert read_evidence(model)["ledger"]["steps_charged"] == 1


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_model_that_is_not_private_is_said_to_be_so(
    tmp_path: Path, plan: PrivacyPlan, arguments: tuple[str, ...]
) -> None:
    endless = replace(plan, epsilon=math.inf, target_epsilon=math.inf)
    folder = saved(tmp_path, endless)
    result = dpfa(folder, "--ledger", url(folder), *arguments)
    assert result.exit_code == 0, result.output
    if arguments:
        said = json.loads(result.stdout)
        assert (said["private"], said["epsilon"]) == (False, "inf")
    else:
        assert "NOT PRIVATE: there is no bound on epsilon" in result.stdout and "ε =" not in result.stdout


def test_what_is_not_there_or_no_key_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, key: Path
) -> None:
    before = sorted(model.iterdir())
    (tmp_path / "no.pem").write_text("no key")
    (tmp_path / "empty").mkdir()
    assert "privacy.json" in refused(dpfa(tmp_path / "nowhere"))
    assert "privacy.json" in refused(dpfa(tmp_path / "empty"))
    assert "privacy.json" in refused(dpfa(model / "privacy.json"))
    assert "private_key" in refused(dpfa(model, "--sign-key", tmp_path / "no.pem"))
    assert "private_key" in refused(dpfa(model, "--sign-key", tmp_path / "nothing.pem"))
    assert "private_key" in refused(dpfa(model, "--sign-key", key.with_suffix(".pub")))
    assert "no ledger" in refused(dpfa(model, "--ledger", f"sqlite:///{tmp_path}/none.db"))
    assert "ledger" in refused(dpfa(model, "--ledger", "nonsense"))
    assert not (tmp_path / "none.db").exists()
    with Ledger(f"sqlite:///{tmp_path}/other.db"):
        pass
    assert "is not in ledger" in refused(dpfa(model, "--ledger", f"sqlite:///{tmp_path}/other.db"))
    report_file = model / "privacy.json"
    report_file.write_text(report_file.read_text().replace('"delta": 1e-05', '"delta": 1e-06'))
    assert "contradicts the plan" in refused(dpfa(model))
    assert sorted(model.iterdir()) == before
    shutil.rmtree(tmp_path / "empty")


@pytest.mark.parametrize("arguments", [(), ("a", "b"), ("a", "--score")])
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    assert dpfa(*arguments).exit_code == 2


def test_help_explains_and_gives_an_example() -> None:
    result = dpfa("--help")
    assert result.exit_code == 0 and "Example: dpfa report" in " ".join(result.stdout.split())
