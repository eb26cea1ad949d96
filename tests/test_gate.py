"""`judge` passes a real private run and refuses it however it is spoilt; what it cannot see is shown here too.

The bundle is real: trained with DPTrainer, recorded in a ledger, with evidence, signed. Each test spoils a copy of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from dpfa_hf import gate
from dpfa_hf.accounting import make_plan
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.audit.results import Check, Mutant, audit_record, write_audit
from dpfa_hf.errors import PrivacyError
from dpfa_hf.evidence import build_evidence
from dpfa_hf.gate import judge, recomputed_epsilon
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.signing import sign_model

OPTIONAL = {"signature", "audit", "evidence", "ledger", "ledger_run", "ledger_steps", "ledger_budget", "ledger_head"}


@pytest.fixture
def run(signed_run: Any, tmp_path: Path) -> Any:
    return signed_run.copy(tmp_path / "run")


def verdict(run: Any, *, signed: bool = True, recorded: bool = True, **options: Any) -> dict[str, Any]:
    """The verdict with the signature and the ledger looked at or not; it is one JSON value whatever happened."""
    chosen = {"max_epsilon": 50.0, "max_delta": 1e-3}
    chosen |= {"public_key": run.folder / "key.pub"} if signed else {}
    chosen |= {"ledger": run.url} if recorded else {}
    found = judge(run.model, **{**chosen, **options})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for check in found["checks"]:
        assert (
            set(check) == {"check", "passed", "detail"} and "\n" not in check["detail"] and len(check["detail"]) < 510
        )
    return found


def failed(found: dict[str, Any]) -> set[str]:
    names = {check["check"] for check in found["checks"] if check["passed"] is False}
    assert found["passed"] is (not names)
    return names


def unchecked(found: dict[str, Any]) -> set[str]:
    return {check["check"] for check in found["checks"] if check["passed"] is None}


def detail(found: dict[str, Any], name: str) -> str:
    return next(check["detail"] for check in found["checks"] if check["check"] == name)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=2))


def report_edit(**changes: Any) -> Callable[[Any], None]:
    """An edit of privacy.json: {"guarantee.epsilon": 1.0} sets what is at that place."""

    def spoil(run: Any) -> None:
        def change(report: dict[str, Any]) -> None:
            for place, value in changes.items():
                *parents, name = place.split(".")
                parent = report
                for each in parents:
                    parent = parent[each]
                assert parent[name] != value
                parent[name] = value

        edit(run.model / "privacy.json", change)

    return spoil


def replanned(report: dict[str, Any], **changes: Any) -> None:
    """The report of another plan, without a contradiction: what a careful liar writes."""
    plan = replace(PrivacyPlan.from_dict(report["plan"]), **changes)
    report |= {"plan": plan.to_dict(), "plan_sha256": plan.sha256()}
    report["guarantee"] |= {"epsilon": plan.epsilon, "delta": plan.delta, "at_step": plan.max_steps}
    report["mechanism"] |= {name: value for name, value in plan.to_dict().items() if name in report["mechanism"]}
    report["mechanism"]["joint_sensitivity"] = plan.joint_sensitivity
    report["noise"]["standard_deviation"] = plan.noise_standard_deviation
    report["steps"]["planned"] = plan.max_steps
    report["unit"] |= {"privacy_unit": plan.privacy_unit, "adjacency": plan.adjacency}


def lie(**changes: Any) -> Callable[[Any], None]:
    return lambda run: edit(run.model / "privacy.json", lambda report: replanned(report, **changes))


def without_evidence(run: Any) -> None:
    for path in run.model.glob("evidence.*"):
        path.unlink()


def audited(run: Any, **changes: Any) -> None:
    """Puts an `audit.json` into the folder, in the place of the evidence, which does not know of it."""
    report = json.loads((run.model / "privacy.json").read_text())
    told: dict[str, Any] = {
        "subject": {"kind": "model", "name": "Bert", "run": report["run"], "plan_sha256": report["plan_sha256"]},
        "scaled_down": [],
        "checks": [Check("noise", True, "the noise has the planned law")],
        "mutants": [Mutant("no noise", True, "noise")],
        "epsilon_lower_bound": 0.3,
        "confidence": 0.95,
        "epsilon_claimed": report["guarantee"]["epsilon"],
        "epsilon_of_plan": report["guarantee"]["epsilon"],
        "canaries": 100,
    }
    told |= changes
    if "subject" in changes:
        told["subject"] = {"kind": "model", "name": "Bert", **changes["subject"]}
    without_evidence(run)
    write_audit(run.model, audit_record(**told))


def sql(run: Any, *statements: str) -> None:
    engine = sa.create_engine(run.url)
    with engine.begin() as connection:
        for statement in statements:
            assert connection.exec_driver_sql(statement).rowcount > 0, statement
    engine.dispose()


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- the good one ---------------------------------------------------------------------------------------------------


def test_a_good_bundle_passes_with_all_options_and_nothing_is_written(run: Any) -> None:
    before = tree(run.folder)
    found = verdict(run, require_evidence=True)
    assert failed(found) == set() and unchecked(found) == {"audit"} and tree(run.folder) == before
    report = json.loads((run.model / "privacy.json").read_text())
    assert found["run"] == report["run"] and found["epsilon"] == report["guarantee"]["epsilon"]
    assert found["delta"] == 1e-3 and found["privacy_sha256"] == before[str(run.model / "privacy.json")]


def test_what_was_not_asked_for_is_listed_as_not_checked(run: Any) -> None:
    without_evidence(run)
    found = verdict(run, signed=False, recorded=False)
    assert failed(found) == set() and unchecked(found) == OPTIONAL
    assert all(detail(found, name).startswith("not checked") for name in OPTIONAL)
    assert "--public-key was not given" in detail(found, "signature")
    assert failed(verdict(run, recorded=False)) == {"signature"}
    run.sign()
    assert unchecked(verdict(run, recorded=False)) == OPTIONAL - {"signature"}
    assert unchecked(verdict(run, signed=False)) == {"signature", "audit", "evidence", "ledger_head"}


def test_a_bundle_with_a_passed_audit_passes(run: Any) -> None:
    audited(run)
    with Ledger(run.url, create=False) as ledger:
        (run.model / "evidence.json").write_text(json.dumps(build_evidence(run.model, ledger=ledger)))
    run.sign()
    found = verdict(run, require_evidence=True, require_audit=True)
    assert failed(found) == set() == unchecked(found) and "0.3" in detail(found, "audit")
    # And the evidence of before the audit does not pass for it.
    edit(run.model / "evidence.json", lambda evidence: evidence.update(audit=None, audit_sha256=None))
    assert "evidence" in failed(verdict(run, signed=False))


def test_a_run_that_trained_on_keeps_its_model(run: Any) -> None:
    """The ledger may have gone on: other runs on the data set, after this model."""
    report = json.loads((run.model / "privacy.json").read_text())
    with Ledger(run.url) as ledger:
        ledger.open_run(
            dataset="reviews", plan=report["plan"], plan_hash=report["plan_sha256"], epsilon=2.0, delta=1e-4,
            max_steps=3, privacy_unit="example", adjacency="zero_out", budget=None,
        )  # fmt: skip
    found = verdict(run)
    assert failed(found) == set() and "runs: 2" in detail(found, "ledger_budget")


# ---- the bad ones: what an attacker, an accident or a hurry makes of it ---------------------------------------------


def swap_weights(run: Any) -> None:
    path = run.model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_weights(run: Any) -> None:
    path = run.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def add(name: str, text: str = "payload") -> Callable[[Any], Any]:
    return lambda run: (run.model / name).write_text(text)


def remove(*names: str) -> Callable[[Any], None]:
    return lambda run: [(run.model / name).unlink() for name in names] and None


def through_a_link(name: str) -> Callable[[Any], None]:
    def spoil(run: Any) -> None:
        shutil.move(run.model / name, run.folder / name)
        (run.model / name).symlink_to(run.folder / name)

    return spoil


def privacy_text(text: str) -> Callable[[Any], Any]:
    return lambda run: (run.model / "privacy.json").write_text(text)


def with_text(change: Callable[[str], str]) -> Callable[[Any], Any]:
    def spoil(run: Any) -> None:
        path = run.model / "privacy.json"
        assert change(path.read_text()) != path.read_text()
        path.write_text(change(path.read_text()))

    return spoil


def link_folder(run: Any) -> None:
    shutil.move(run.model, run.folder / "elsewhere")
    run.model.symlink_to(run.folder / "elsewhere")


UNREADABLE = {"report"}
# By name: how the model's folder is spoilt, and the checks that must refuse it, without a key and without a ledger.
SPOILT: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "missing privacy.json": (remove("privacy.json"), {"report"}),
    "empty privacy.json": (privacy_text(""), UNREADABLE),
    "privacy.json is a list": (privacy_text("[]"), UNREADABLE),
    "privacy.json is nested deeply": (privacy_text("[" * 200_000), UNREADABLE),
    "a number of a million digits": (privacy_text('{"format": ' + "1" * 1_000_000 + "}"), UNREADABLE),
    "privacy.json is of another format": (report_edit(format=2), UNREADABLE),
    "privacy.json has a field more": (
        lambda run: edit(run.model / "privacy.json", lambda report: report.update(x=1)),
        UNREADABLE,
    ),
    "privacy.json says a name twice": (with_text(lambda text: '{"private": true,' + text[1:]), UNREADABLE),
    "privacy.json has NaN": (with_text(lambda text: text.replace('"private": true', '"private": NaN')), UNREADABLE),
    "privacy.json is UTF-16": (
        lambda run: (run.model / "privacy.json").write_bytes((run.model / "privacy.json").read_text().encode("utf-16")),
        UNREADABLE,
    ),
    "privacy.json is a link": (through_a_link("privacy.json"), {"folder"}),
    "weights are a link": (through_a_link("model.safetensors"), {"folder"}),
    "the folder is a link": (link_folder, {"folder"}),
    "the folder is gone": (lambda run: shutil.rmtree(run.model), {"folder"}),
    "a pipe in the folder": (lambda run: os.mkfifo(run.model / "pipe"), {"folder"}),
    "NOT PRIVATE": (report_edit(private=False), {"private", "evidence"}),
    "NOT PRIVATE for a reason": (report_edit(not_private_because="no noise"), {"private", "evidence"}),
    "private is a text": (report_edit(private="true"), {"private", "evidence"}),
    "seeded noise": (report_edit(**{"noise.private": False}), {"private", "evidence"}),
    "epsilon edited": (report_edit(**{"guarantee.epsilon": 0.1}), {"plan", "evidence"}),
    "epsilon negative": (report_edit(**{"guarantee.epsilon": -1.0}), {"epsilon", "plan", "evidence"}),
    "epsilon infinite": (report_edit(**{"guarantee.epsilon": "inf"}), {"epsilon", "plan", "evidence"}),
    "epsilon overflows": (
        with_text(lambda text: text.replace('"guarantee": {\n    "epsilon": ', '"guarantee": {\n    "epsilon": 1e999')),
        {"report"},
    ),
    "epsilon a text": (report_edit(**{"guarantee.epsilon": "1.0"}), {"epsilon", "plan", "evidence"}),
    "epsilon true": (report_edit(**{"guarantee.epsilon": True}), {"epsilon", "plan", "evidence"}),
    "epsilon missing": (report_edit(guarantee={}), {"epsilon", "delta", "plan", "evidence"}),
    "guarantee a list": (report_edit(guarantee=[1, 2]), {"epsilon", "delta", "plan", "evidence"}),
    "delta edited": (report_edit(**{"guarantee.delta": 1e-9}), {"plan", "evidence"}),
    "delta zero": (report_edit(**{"guarantee.delta": 0}), {"delta", "plan", "evidence"}),
    "sigma in the plan": (report_edit(**{"plan.noise_multiplier": 9.0}), {"plan", "evidence"}),
    "sigma beside the plan": (report_edit(**{"mechanism.noise_multiplier": 9.0}), {"plan", "evidence"}),
    "clipping norm reached": (report_edit(**{"mechanism.clipping_norm_reached": 9.0}), {"plan", "evidence"}),
    "another unit": (report_edit(**{"unit.privacy_unit": "user"}), {"plan", "evidence"}),
    "the plan's hash": (report_edit(plan_sha256="0" * 64), {"plan", "evidence"}),
    "no plan": (report_edit(plan=None), {"plan", "evidence"}),
    "more steps than planned": (report_edit(**{"steps.charged": 4}), {"steps", "evidence"}),
    "steps a text": (report_edit(**{"steps.charged": "3"}), {"steps", "evidence"}),
    "steps negative": (report_edit(**{"steps.charged": -1}), {"steps", "evidence"}),
    "another generator": (lie(noise_generator="mersenne"), {"plan", "evidence"}),
    # Careful lies: the hash is right, and no two numbers contradict each other.
    "a lie: less noise": (lie(noise_multiplier=0.5), {"accounting", "evidence"}),
    "a lie: more steps": (lie(max_steps=3000), {"accounting", "evidence"}),
    "a lie: smaller epsilon": (lie(epsilon=0.5), {"accounting", "evidence"}),
    "a lie: smaller delta": (lie(delta=1e-6, truncation_delta=0.0), {"accounting", "evidence"}),
    "a lie: no rounding": (lie(sensitivity_slack=0.0), {"accounting", "evidence"}),
    "a lie: a lower ceiling": (lie(max_batch_size=2), {"accounting", "evidence"}),
    "a lie: a relation that RDP does not cover": (lie(adjacency="replace_one"), {"accounting", "evidence"}),
    "a lie: no noise": (lie(noise_multiplier=0.0), {"accounting", "evidence"}),
    "no weights": (remove("model.safetensors"), {"weights"}),
    "weights cut off": (cut_weights, {"weights"}),
    "weights swapped": (swap_weights, {"evidence"}),
    "weights empty": (add("model.safetensors", ""), {"weights"}),
    "a shard is missing": (
        add("model.safetensors.index.json", '{"weight_map": {"x": "model-00001-of-2.safetensors"}}'),
        {"weights"},
    ),
    "a shard outside": (add("model.safetensors.index.json", '{"weight_map": {"x": "../key.pem"}}'), {"weights"}),
    "evidence of another report": (
        lambda run: edit(run.model / "evidence.json", lambda evidence: evidence.update(privacy_sha256="0" * 64)),
        {"evidence"},
    ),
    "evidence with another epsilon": (
        lambda run: edit(run.model / "evidence.json", lambda e: e["report"]["guarantee"].update(epsilon=0.1)),
        {"evidence"},
    ),
    "evidence of other weights": (
        lambda run: edit(run.model / "evidence.json", lambda e: e["weights"][0].update(sha256="0" * 64)),
        {"evidence"},
    ),
    "evidence is damaged": (add("evidence.json", "{"), {"evidence"}),
    "audit is damaged": (add("audit.json", "{}"), {"audit", "evidence"}),
    "a failed audit": (lambda run: audited(run, checks=[Check("noise", False, "no noise")]), {"audit"}),
    "an audit that misses its own mutants": (lambda run: audited(run, mutants=[Mutant("x", False, "")]), {"audit"}),
    "an audit of another run": (
        lambda run: audited(run, subject={"run": "ab" * 16, "plan_sha256": "0" * 64}),
        {"audit"},
    ),
    "an audit of a script": (lambda run: audited(run, subject={"run": None, "plan_sha256": None}), {"audit"}),
    "an audit that refutes epsilon": (lambda run: audited(run, epsilon_lower_bound=40.0), {"audit"}),
    "an audit with a NaN bound": (
        lambda run: (audited(run), (run.model / "audit.json").write_text(
            (run.model / "audit.json").read_text().replace("0.3", "NaN"))),
        {"audit"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_refused_by_the_right_check_and_signed_or_not(name: str, run: Any) -> None:
    spoil, checks = SPOILT[name]
    spoil(run)
    # Whatever was done to the folder after it was signed, the signature tells; the others do without it.
    assert failed(verdict(run, recorded=False)) == checks | ({"signature"} if "folder" not in checks else set())


@pytest.mark.parametrize(
    ("name", "spoil"),
    {
        "card edited": add("README.md", "epsilon 0.01"),
        "hidden file added": add(".hidden"),
        "git's file added": add(".gitattributes"),
        "pickle added": add("pytorch_model.bin"),
        "config removed": remove("config.json"),
        "signature removed": remove("model.sig"),
        "evidence removed": remove("evidence.json"),
        "weights swapped": swap_weights,
    }.items(),
)
def test_a_file_that_changed_after_signing_is_refused_by_the_signature(
    name: str, spoil: Callable[[Any], Any], run: Any
) -> None:
    spoil(run)
    assert "signature" in failed(verdict(run))


def test_another_key_is_refused_and_so_is_one_in_the_folder(run: Any) -> None:
    assert failed(verdict(run, public_key=run.folder / "other.pub")) == {"signature"}
    assert failed(verdict(run, public_key=run.folder / "none.pub")) == {"signature"}
    sign_model(run.model, run.folder / "other.pem")
    assert failed(verdict(run)) == {"signature"}
    shutil.copy(run.folder / "other.pub", run.model / "key.pub")
    assert failed(verdict(run, public_key=run.model / "key.pub")) == {"signature"}


def test_limits_are_limits(run: Any) -> None:
    epsilon = verdict(run, signed=False, recorded=False)["epsilon"]
    assert failed(verdict(run, max_epsilon=epsilon, max_delta=1e-3)) == set()
    assert failed(verdict(run, max_epsilon=math.nextafter(epsilon, 0))) == {"epsilon"}
    assert failed(verdict(run, max_delta=math.nextafter(1e-3, 0))) == {"delta"}
    assert failed(verdict(run, max_epsilon=0.0, max_delta=0.0)) == {"epsilon", "delta"}
    for wrong in (math.nan, math.inf, -1.0, "3", None, True):
        with pytest.raises(PrivacyError, match="max_epsilon"):
            verdict(run, max_epsilon=wrong)
        with pytest.raises(PrivacyError, match="max_delta"):
            verdict(run, max_delta=wrong)


def test_what_is_required_must_be_there(run: Any) -> None:
    assert failed(verdict(run, require_audit=True)) == {"audit"}
    assert failed(verdict(run, recorded=False, require_ledger=True)) == {"ledger"}
    assert failed(verdict(run, require_ledger=True)) == set()
    without_evidence(run)
    assert failed(verdict(run, signed=False, require_evidence=True)) == {"evidence"}


def test_delta_must_be_below_one_over_n_even_if_everybody_agrees(run: Any) -> None:
    report_edit(**{"mechanism.num_units": 2000})(run)
    assert "delta" in failed(verdict(run, signed=False, recorded=False))


# ---- the ledger -----------------------------------------------------------------------------------------------------


def cheaper(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the run reserved, in a chain that is whole: a tenth."""

    def payload(text: str) -> str:
        values = json.loads(text)
        return json.dumps(values | {"epsilon": values["epsilon"] / 10}, sort_keys=True, separators=(",", ":"))

    return [each | {"payload": payload(each["payload"])} if each["kind"] == "run" else each for each in entries]


def renamed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each | {"payload": each["payload"].replace('"reviews"', '"films"')} for each in entries]


def poorer(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each | {"payload": each["payload"].replace("[60.0,0.01]", "[0.5,0.01]")} for each in entries]


@pytest.mark.parametrize(
    ("edit_of_entries", "checks"),
    [
        (lambda entries: entries[:-2], {"ledger_steps", "ledger_head"}),
        (lambda entries: [each for each in entries if not each["run"]], {"ledger_run", "ledger_head"}),
        (cheaper, {"ledger_run", "ledger_head"}),
        (renamed, {"ledger_run", "ledger_head"}),
        (poorer, {"ledger"}),
    ],
)
def test_a_ledger_that_was_rewritten_or_is_an_older_copy_is_refused(
    edit_of_entries: Any, checks: set[str], run: Any, rewrite_ledger: Any
) -> None:
    rewrite_ledger(run.url, edit_of_entries)
    assert failed(verdict(run)) == checks


def test_rewriting_without_a_change_is_no_change(run: Any, rewrite_ledger: Any) -> None:
    rewrite_ledger(run.url, lambda entries: entries)
    assert failed(verdict(run)) == set()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE dpfa_entries SET payload = replace(payload, '0.01', '0.02') WHERE kind = 'dataset'",
        "DELETE FROM dpfa_entries WHERE kind = 'step'",
        "UPDATE dpfa_runs SET steps = 9, max_steps = 9",
        "UPDATE dpfa_meta SET value = replace(value, '1', '2')",
    ],
)
def test_a_tampered_ledger_is_refused(statement: str, run: Any) -> None:
    sql(run, statement)
    assert failed(verdict(run)) == {"ledger"}


def test_a_ledger_without_the_run_a_missing_one_and_one_that_moved_are_refused(run: Any) -> None:
    fresh = f"sqlite:///{run.folder}/fresh.db"
    Ledger(fresh).close()
    assert failed(verdict(run, ledger=fresh)) == {"ledger_run", "ledger_head"}
    found = verdict(run, ledger=f"sqlite:///{run.folder}/none.db")
    assert failed(found) == {"ledger"} and "there is no ledger" in detail(found, "ledger")
    assert not (run.folder / "none.db").exists()
    for wrong in ("", "sqlite://", "mysql://host/db", "not a url", f"sqlite:///{run.model}/privacy.json"):
        assert failed(verdict(run, ledger=wrong)) == {"ledger"}
    with Ledger(run.url) as ledger:
        ledger.export(run.folder / "moving.jsonl", to=fresh)
    found = verdict(run)
    assert failed(found) == {"ledger"} and "moved" in detail(found, "ledger")


def test_a_ledger_needs_its_witness_and_must_not_be_behind_it(run: Any) -> None:
    witness = f"sqlite:///{run.folder}/witness.db"
    with Ledger(run.url, witness=witness) as ledger:
        ledger.start_witness()
    shutil.copy(run.folder / "ledger.db", run.folder / "older.db")
    assert failed(verdict(run)) == {"ledger"} and failed(verdict(run, witness=witness)) == set()
    with Ledger(run.url, witness=witness) as ledger:
        ledger.end_run(ledger.resume_run(verdict(run)["run"], ledger.runs()[0].plan_hash).run, "again")
    assert failed(verdict(run, witness=witness)) == set()
    shutil.copy(run.folder / "older.db", run.folder / "ledger.db")
    found = verdict(run, witness=witness)
    assert failed(found) == {"ledger"} and "older copy" in detail(found, "ledger")


def test_the_ledger_is_read_and_not_written_not_even_one_that_is_empty(run: Any) -> None:
    with Ledger(run.url, create=False) as ledger:
        before = ledger.head()
    verdict(run)
    with Ledger(run.url, create=False) as ledger:
        assert ledger.head() == before
    sql(run, "DELETE FROM dpfa_entries", "DELETE FROM dpfa_meta")
    assert failed(verdict(run)) == {"ledger"}
    engine = sa.create_engine(run.url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM dpfa_entries").scalar() == 0
    engine.dispose()


def test_no_fingerprint_of_an_unnamed_data_set_is_shown(run: Any, rewrite_ledger: Any) -> None:
    name = "unnamed-" + "0123456789abcdef" * 4
    rewrite_ledger(run.url, lambda entries: [
        each | {"payload": each["payload"].replace('"reviews"', f'"{name}"').replace("[60.0,0.01]", "[0.5,0.01]")}
        for each in entries
    ])  # fmt: skip
    found = verdict(run)
    assert failed(found) == {"ledger"} and "data set unnamed" in detail(found, "ledger")
    assert "0123456789abcdef" not in json.dumps(found)


# ---- what it cannot see, and what it does about surprises -----------------------------------------------------------


def test_a_careful_lie_passes_without_key_and_ledger_and_with_neither_of_them(run: Any) -> None:
    """Why the page says to give both: whoever may write to the folder can invent a run without a contradiction."""
    report = json.loads((run.model / "privacy.json").read_text())
    quiet = replace(PrivacyPlan.from_dict(report["plan"]), noise_multiplier=20.0)
    quiet = replace(quiet, epsilon=recomputed_epsilon(quiet) * (1 + 1e-5))
    without_evidence(run)
    lie(noise_multiplier=20.0, epsilon=quiet.epsilon)(run)
    found = verdict(run, signed=False, recorded=False, max_epsilon=0.5)
    assert failed(found) == set() and found["epsilon"] < report["guarantee"]["epsilon"] / 5
    assert failed(verdict(run, recorded=False, max_epsilon=0.5)) == {"signature"}
    assert failed(verdict(run, signed=False, max_epsilon=0.5)) == {"ledger_run"}


def test_a_file_that_changes_between_the_signature_and_its_reading_is_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified_files = gate.verified_files

    def then_change(*arguments: Any) -> dict[str, str]:
        signed = verified_files(*arguments)
        lie(epsilon=0.5)(run)
        return signed

    monkeypatch.setattr(gate, "verified_files", then_change)
    found = verdict(run)
    assert "report" in failed(found) and "changed since its signature was verified" in detail(found, "report")


def test_a_file_that_changes_between_two_readings_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read_report = gate.read_report
    monkeypatch.setattr(gate, "read_report", lambda folder: {**read_report(folder), "run": "other"})
    assert "changed while it was read" in detail(verdict(run), "report")


@pytest.mark.parametrize("surprise", [RuntimeError("two\nlines"), RecursionError(), MemoryError(), KeyError("x")])
def test_whatever_a_check_raises_it_has_failed(surprise: Exception, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*arguments: Any) -> Any:
        raise surprise

    monkeypatch.setattr(gate, "recomputed_epsilon", raises)
    found = verdict(run)
    assert failed(found) == {"accounting"} and type(surprise).__name__ in detail(found, "accounting")


def test_a_check_that_silently_did_not_run_is_no_pass(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def skipped(bundle: Any) -> str:
        raise gate._NotAskedFor("a bug")

    for name in ("private", "accounting", "signature", "ledger"):
        with monkeypatch.context() as patch:
            patch.setitem(gate._CHECKS, name, (gate._CHECKS[name][0], skipped))
            assert verdict(run)["passed"] is False


def test_a_report_of_gigabytes_is_not_read_into_memory(run: Any) -> None:
    with open(run.model / "privacy.json", "r+b") as file:
        file.truncate(3 * 2**30)
    assert "no regular file of at most" in detail(verdict(run, signed=False), "report")


# ---- epsilon, by another way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"adjacency": "replace_one"},
        {"accountant": "rdp"},
        {"max_batch_size": 10, "clipping": "adaptive"},
    ],
)
def test_epsilon_is_recomputed_for_every_kind_of_plan_and_planted_errors_are_seen(arguments: dict[str, Any]) -> None:
    asked = PrivacyArguments(target_epsilon=8.0, noise_multiplier=4.0, **arguments)
    plan = make_plan(asked, num_units=40, expected_batch_size=8, max_steps=4, loss_scale=1.0)
    # Another way than make_plan's, so that an error there shows; what is stated is not looked at.
    assert recomputed_epsilon(replace(plan, epsilon=0.0)) == pytest.approx(plan.epsilon, rel=1e-6)
