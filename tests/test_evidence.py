"""What evidence may and may not say: no better than its sources, no fingerprint, no markup of others, no verdict."""

from __future__ import annotations

import copy
import functools
import html.parser
import importlib.util
import itertools
import json
import math
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import TruncatedSubsampledGaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from jsonschema import Draft202012Validator
from safetensors.numpy import save_file
from scipy.stats import norm

from dpfa_hf import markdown, report
from dpfa_hf.accounting import make_plan, privacy_curve
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.audit import AUDIT_NAME, read_audit
from dpfa_hf.budget import open_run
from dpfa_hf.errors import PrivacyError
from dpfa_hf.evidence import EVIDENCE_NAME, build_evidence, building, headings, read_evidence, rendering, write_bundle
from dpfa_hf.evidence import bundle as bundle_module
from dpfa_hf.evidence.bundle import schema
from dpfa_hf.evidence.curves import curves, trade_off
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan

HOSTILE = "</script><script>alert(1)</script>|`x`<img src=x onerror=alert(1)>![a](http://b.example/c)&amp;**b**"
PAGES = ("evidence.md", "evidence.html", "README.md")


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    """Every unit in every step, so that the truth is the Gaussian mechanism's."""
    arguments = PrivacyArguments(target_epsilon=3.0, target_delta=1e-5, private_loss_weight=0.0)
    return make_plan(arguments, num_units=40, expected_batch_size=40, max_steps=6)


def trained(
    folder: Path, plan: PrivacyPlan, *, dataset: str | None = "clinic notes", steps: int = 4, **changes: Any
) -> Ledger:
    """What a run leaves behind, without the training: its entries in a ledger, weights, report and card."""
    folder.mkdir(parents=True)
    ledger = Ledger(f"sqlite:///{folder.parent / 'ledger.sqlite3'}")
    run = open_run(ledger, plan, PrivacyArguments(target_epsilon=3.0, ledger_dataset=dataset), [1, 2, 3])
    for step in range(steps):
        ledger.charge_step(run, step + 1)
    name = ledger.run(run).dataset
    spent = next((each.epsilon, each.delta) for each in ledger.datasets() if each.dataset == name)
    arguments: dict[str, Any] = {
        "plan": plan,
        "run": run,
        "steps": steps,
        "dataset": dataset,
        "dataset_spent": spent,
        "ledger_url": ledger.display_url,
        "model": {
            "class": "BertForSequenceClassification",
            "base_model": "google/bert-mini",
            "adapter": None,
            "trainable_parameters": 1000,
            "total_parameters": 200000,
        },
        "loss": "task: sequence_classification",
        "sampler": "truncated Poisson",
        "noise": {"generator": plan.noise_generator, "standard_deviation": plan.noise_standard_deviation},
        "log_private_metrics": False,
        "eval_data": None,
    }
    save_file({"weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    report.write_report(folder, report.build_report(**(arguments | changes)))
    return ledger


_CURVES = functools.cache(curves)


@pytest.fixture(scope="module", autouse=True)
def curves_once() -> Iterator[None]:
    """The curves of a plan are always the same, and take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "curves", lambda plan: copy.deepcopy(_CURVES(plan)))
        yield


@pytest.fixture(scope="module")
def original(plan: PrivacyPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence") / "model"
    with trained(folder, plan) as ledger:
        write_bundle(folder, build_evidence(folder, ledger=ledger))
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy of a whole bundle, with its ledger beside it."""
    shutil.copytree(original.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "model"


def ledger_of(folder: Path) -> Ledger:
    return Ledger(f"sqlite:///{folder.parent / 'ledger.sqlite3'}", create=False)


def audit_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """The record of an audit of the run in `folder`, as docs/audit.md has it."""
    stated = report.read_report(folder)
    record = {
        "format": 1,
        "tool": "dpfa audit",
        "version": "0.1.0",
        "created": "2026-11-29T12:00:00+00:00",
        "subject": {"kind": "model", "name": "M", "run": stated["run"], "plan_sha256": stated["plan_sha256"]},
        "scaled_down": ["3 of 6 steps"],
        "checks": [{"name": "replay", "passed": True, "what": "one unit moves the sum by no more than C"}],
        "epsilon_lower_bound": 0.4,
        "confidence": 0.95,
        "epsilon_claimed": 2.0,
        "epsilon_of_plan": stated["plan"]["epsilon"],
        "canaries": 100,
        "mutants": [{"name": "no noise", "caught": True, "by": "noise law"}],
        "not_looked_at": ["the private rows"],
        "passed": True,
    } | changes
    (folder / AUDIT_NAME).write_text(json.dumps(record), encoding="utf-8")
    return record


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(PrivacyError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- schema ---------------------------------------------------------------------------------------------------------


def test_the_bundle_fits_the_schema_that_is_shipped_and_reads_as_it_was_written(bundle: Path) -> None:
    published = schema()
    Draft202012Validator.check_schema(published)
    assert published["$id"] == "urn:dpfa-hf:schema:evidence:1" and "2020-12" in published["$schema"]
    evidence = read_evidence(bundle)
    assert evidence["$schema"] == published["$id"]
    assert evidence == json.loads((bundle / EVIDENCE_NAME).read_text(encoding="utf-8"))


def set_at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(evidence: dict[str, Any]) -> None:
        inner: Any = evidence
        for key in path[:-1]:
            inner = inner[key]
        assert inner[path[-1]] != value
        inner[path[-1]] = value

    return change


CHANGES = {
    "a better epsilon": set_at("report", "guarantee", "epsilon", value=0.1),
    "a better epsilon of the plan": set_at("report", "plan", "epsilon", value=0.1),
    "a better delta": set_at("report", "guarantee", "delta", value=1e-9),
    "infinity as a guarantee": set_at("report", "guarantee", "epsilon", value="inf"),
    "NOT PRIVATE with a guarantee": set_at("report", "private", value=False),
    "more noise": set_at("report", "mechanism", "noise_multiplier", value=99.0),
    "more units": set_at("report", "mechanism", "num_units", value=10**6),
    "more units of data": set_at("data", "units", value=10**6),
    "another unit": set_at("report", "unit", "privacy_unit", value="user"),
    "another name": set_at("data", "name", value="other"),
    "another end of the curve": set_at("curves", "epsilon_by_step", -1, "epsilon", value=0.1),
    "another guarantee on the curve": set_at("curves", "privacy_curve", 25, "delta", value=1e-9),
    "a better trade-off": set_at("curves", "trade_off", 30, "misses", value=1.0),
    "no curves": set_at("curves", value=None),
    "a better registry entry": set_at(
        "deployments_registry", "record", "deployment", "privacy_loss", "privacy_parameters", "epsilon", value=0.1
    ),
    "a better status": set_at("assumptions", -1, "status", value="enforced"),
    "a status of one's own": set_at("assumptions", 0, "status", value="certified"),
    "a heading of one's own": set_at("assumptions", 0, "headings", value=["iso-27001"]),
    "a score": lambda evidence: evidence.update(score=97),
    "a verdict in the report": lambda evidence: evidence["report"].update(compliant=True),
    "less reserved": set_at("ledger", "reserved", "epsilon", value=0.1),
    "fewer steps": set_at("ledger", "steps_charged", value=1),
    "another entry": set_at("data", "run_opened_by", "hash", value="0" * 64),
    "no ledger entry": set_at("data", "declared_by", value=None),
    "no hash": lambda evidence: evidence.pop("privacy_sha256"),
    "a hash that is none": set_at("privacy_sha256", value="none"),
    "an audit out of nowhere": set_at("audit_sha256", value="0" * 64),
    "another format": set_at("format", value=2),
    "a list": lambda evidence: evidence.clear(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_refused(bundle: Path, name: str) -> None:
    evidence = read_evidence(bundle)
    CHANGES[name](evidence)
    (bundle / EVIDENCE_NAME).write_text(json.dumps(evidence), encoding="utf-8")
    assert EVIDENCE_NAME in refused(lambda: read_evidence(bundle))
    refused(lambda: write_bundle(bundle, evidence))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"format": NaN}'])
def test_evidence_that_is_missing_or_no_json_is_refused_in_one_line(bundle: Path, content: bytes | None) -> None:
    (bundle / EVIDENCE_NAME).unlink()
    if content is not None:
        (bundle / EVIDENCE_NAME).write_bytes(content)
    assert EVIDENCE_NAME in refused(lambda: read_evidence(bundle))


# ---- its sources ----------------------------------------------------------------------------------------------------


def test_the_guarantee_is_the_reports_whatever_was_taken_and_every_page_rounds_it_up(
    bundle: Path, plan: PrivacyPlan
) -> None:
    evidence = read_evidence(bundle)
    assert evidence["report"] == report.read_report(bundle)
    assert evidence["report"]["steps"]["charged"] == 4 < plan.max_steps
    for page in PAGES:
        text = (bundle / page).read_text(encoding="utf-8")
        stated = [float(each) for each in re.findall(r"ε = (\d+(?:\.\d+)?)", text)]
        assert stated and min(each for each in stated if each > 0) >= plan.epsilon, page


@pytest.mark.parametrize(
    "path",
    [("guarantee", "epsilon"), ("guarantee", "delta"), ("plan", "epsilon"), ("mechanism", "noise_multiplier")],
)
def test_a_report_that_was_edited_is_refused(bundle: Path, path: tuple[str, str]) -> None:
    stated = report.read_report(bundle)
    stated[path[0]][path[1]] *= 0.5
    (bundle / report.REPORT_NAME).write_text(json.dumps(stated), encoding="utf-8")
    assert "contradicts the plan" in refused(lambda: build_evidence(bundle))


@pytest.mark.parametrize("path", ["guarantee", "mechanism", "unit", "plan", "assumptions", "model"])
def test_a_report_with_a_part_missing_is_refused(bundle: Path, path: str) -> None:
    stated = report.read_report(bundle)
    stated[path] = {} if isinstance(stated[path], dict) else []
    (bundle / report.REPORT_NAME).write_text(json.dumps(stated), encoding="utf-8")
    assert report.REPORT_NAME in refused(lambda: build_evidence(bundle))


def test_the_weights_are_named_by_their_hashes(bundle: Path) -> None:
    (weights,) = read_evidence(bundle)["weights"]
    assert weights["path"] == "model.safetensors"
    (bundle / "checkpoint-1").mkdir()
    shutil.copy(bundle / "model.safetensors", bundle / "checkpoint-1")
    again = building._weights(bundle)
    assert [each["path"] for each in again] == ["checkpoint-1/model.safetensors", "model.safetensors"]
    assert again[1] == weights and again[0]["sha256"] == weights["sha256"]


def test_the_same_evidence_gives_the_same_bytes(bundle: Path) -> None:
    before = {name: (bundle / name).read_bytes() for name in (EVIDENCE_NAME, *PAGES)}
    written = write_bundle(bundle, read_evidence(bundle))
    assert [path.name for path in written] == list(before)
    assert {name: (bundle / name).read_bytes() for name in before} == before


def test_a_folder_that_cannot_be_written_is_refused(bundle: Path) -> None:
    evidence = read_evidence(bundle)
    (bundle / EVIDENCE_NAME).unlink()
    (bundle / EVIDENCE_NAME).mkdir()
    assert "cannot be written" in refused(lambda: write_bundle(bundle, evidence))


# ---- the ledger -----------------------------------------------------------------------------------------------------


def test_the_ledgers_entries_are_those_of_the_chain(bundle: Path, tmp_path: Path) -> None:
    evidence = read_evidence(bundle)
    with ledger_of(bundle) as ledger:
        assert evidence["ledger"]["head"] == dict(zip(("sequence", "hash"), ledger.head(), strict=True))
        ledger.export(tmp_path / "entries.jsonl")
    lines = (tmp_path / "entries.jsonl").read_text().splitlines()
    entries = {entry["seq"]: entry for entry in map(json.loads, lines[1:])}
    opened, declared = (evidence["ledger"][name] for name in ("run_opened_by", "dataset_declared_by"))
    assert entries[opened["sequence"]]["hash"] == opened["hash"]
    assert (entries[opened["sequence"]]["kind"], entries[declared["sequence"]]["kind"]) == ("run", "dataset")
    assert (evidence["data"]["run_opened_by"], evidence["data"]["declared_by"]) == (opened, declared)
    assert evidence["ledger"]["steps_charged"] == 4


def test_the_ledgers_place_is_named_without_whoever_logs_in(bundle: Path) -> None:
    with ledger_of(bundle) as ledger:
        ledger.display_url = "postgresql://alice:***@host/ledger"
        assert build_evidence(bundle, ledger=ledger)["ledger"]["place"] == "postgresql://***@host/ledger"


def test_without_a_ledger_it_says_that_none_was_asked(bundle: Path) -> None:
    evidence = build_evidence(bundle)
    assert evidence["ledger"] is None and evidence["data"]["declared_by"] is None
    assert "no ledger was asked" in rendering.markdown_page(evidence)


def test_a_run_that_went_on_after_the_save_is_no_contradiction(bundle: Path) -> None:
    with ledger_of(bundle) as ledger:
        run = report.read_report(bundle)["run"]
        ledger.resume_run(run, ledger.run(run).plan_hash)
        ledger.charge_step(run, 5)
        assert build_evidence(bundle, ledger=ledger)["ledger"]["steps_charged"] == 5


def changed_report(folder: Path, *path: str, value: Any) -> None:
    stated = report.read_report(folder)
    set_at(*path, value=value)(stated)
    (folder / report.REPORT_NAME).write_text(json.dumps(stated), encoding="utf-8")


def edited_ledger(folder: Path, statement: str) -> None:
    with sqlite3.connect(folder.parent / "ledger.sqlite3") as connection:
        connection.execute(statement)


CONTRADICTIONS = {
    "another run": lambda folder: changed_report(folder, "run", value="ab" * 16),
    "no run": lambda folder: changed_report(folder, "run", value=None),
    "another data set": lambda folder: changed_report(folder, "dataset", "name", value="other"),
    "a data set without name": lambda folder: changed_report(folder, "dataset", "name", value=None),
    "more steps": lambda folder: changed_report(folder, "steps", "charged", value=6),
    "an entry was edited": lambda folder: edited_ledger(
        folder, "UPDATE dpfa_entries SET payload = replace(payload, '\"delta\":1e-05', '\"delta\":1e-06')"
    ),
    "steps were dropped": lambda folder: edited_ledger(folder, "DELETE FROM dpfa_entries WHERE seq = 6"),
    "steps were taken back": lambda folder: edited_ledger(folder, "UPDATE dpfa_runs SET steps = 1"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_the_ledger_contradicts_is_refused(bundle: Path, name: str) -> None:
    CONTRADICTIONS[name](bundle)
    with ledger_of(bundle) as ledger:
        refused(lambda: build_evidence(bundle, ledger=ledger))


def test_another_plan_under_the_runs_name_is_refused(bundle: Path, plan: PrivacyPlan) -> None:
    other = replace(plan, noise_multiplier=plan.noise_multiplier * 2)
    stated = report.read_report(bundle)
    stated["mechanism"]["noise_multiplier"] = other.noise_multiplier
    stated |= {"plan": other.to_dict(), "plan_sha256": other.sha256()}
    (bundle / report.REPORT_NAME).write_text(json.dumps(stated), encoding="utf-8")
    with ledger_of(bundle) as ledger:
        assert "the plan's hash" in refused(lambda: build_evidence(bundle, ledger=ledger))


# ---- fingerprints (P22) ---------------------------------------------------------------------------------------------


def fingerprints_in(folder: Path) -> list[str]:
    """Files that show the keyed fingerprint by which the ledger knows the unnamed data set."""
    with ledger_of(folder) as ledger:
        (name,) = {each.dataset for each in ledger.datasets()}
    fingerprint = name.removeprefix("unnamed-")
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    return sorted(path.name for path in folder.iterdir() if fingerprint.encode() in path.read_bytes())


def test_an_unnamed_data_set_is_called_so_and_no_file_shows_its_fingerprint(
    plan: PrivacyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    with trained(folder, plan, dataset=None) as ledger:
        evidence = build_evidence(folder, ledger=ledger)
        write_bundle(folder, evidence)
        assert evidence["data"]["name"] == "unnamed" and evidence["data"]["declared_by"] is not None
        assert fingerprints_in(folder) == []
        # Mutant: the ledger's own name is passed on. It is refused, and found where nothing refuses it.
        real, name = building._data, next(each.dataset for each in ledger.datasets())
        monkeypatch.setattr(building, "_data", lambda *a: real(*a) | {"why_no_fingerprint": name})
        message = refused(lambda: build_evidence(folder, ledger=ledger))
        assert "P22" in message and name not in message
        monkeypatch.setattr(building, "refuse_fingerprints", lambda evidence: None)
        write_bundle(folder, build_evidence(folder, ledger=ledger))
        assert fingerprints_in(folder) == ["evidence.html", "evidence.json", "evidence.md"]


# ---- NOT PRIVATE ----------------------------------------------------------------------------------------------------


def first_words(folder: Path) -> dict[str, bool]:
    """By page, whether it begins with NOT PRIVATE."""
    found = {}
    for name in PAGES:
        text = (folder / name).read_text(encoding="utf-8")
        text = text[text.index(report.BEGIN) :] if name == "README.md" else text
        text = text.partition("<title>")[2] if name == "evidence.html" else text
        found[name] = "NOT PRIVATE" in text[:60]
    return found


@pytest.mark.parametrize("reason", ["endless", "seeded", "audit"])
def test_a_model_without_guarantee_says_so_first_on_every_page_and_has_no_curves(
    plan: PrivacyPlan, tmp_path: Path, reason: str
) -> None:
    folder = tmp_path / "model"
    made = replace(plan, epsilon=math.inf, target_epsilon=math.inf) if reason == "endless" else plan
    with trained(folder, made, seeded=reason == "seeded") as ledger:
        if reason == "audit":
            checks = [{"name": "noise <b>law</b>", "passed": False, "what": "the noise is the planned one"}]
            audit_of(folder, checks=checks, passed=False)
        evidence = build_evidence(folder, ledger=ledger)
        write_bundle(folder, evidence)
    assert read_evidence(folder) == evidence
    assert evidence["report"]["private"] is False and evidence["report"]["guarantee"]["epsilon"] == "inf"
    assert evidence["curves"] is None and evidence["deployments_registry"] is None
    assert first_words(folder) == dict.fromkeys(PAGES, True)
    for name in PAGES:
        assert f"ε = {plan.epsilon:.3f}" not in (folder / name).read_text().partition("## Ledger")[0]
    # The check can fail: this page is of a model that is private.
    (folder / AUDIT_NAME).unlink(missing_ok=True)
    with trained(tmp_path / "other" / "model", plan):
        write_bundle(tmp_path / "other" / "model", build_evidence(tmp_path / "other" / "model"))
    assert not any(first_words(tmp_path / "other" / "model").values())


# ---- audits ---------------------------------------------------------------------------------------------------------


def test_an_audit_of_this_run_goes_into_evidence_and_card(bundle: Path) -> None:
    record = audit_of(bundle)
    assert read_audit(bundle) == record
    evidence = build_evidence(bundle)
    write_bundle(bundle, evidence)
    assert read_evidence(bundle)["audit"] == record
    statuses = {each["assumption"]: each["status"] for each in evidence["assumptions"]}
    assert [status for text, status in statuses.items() if "audit" in text] == ["tested"]
    assert "100 canaries: ε is at least 0.4 with 95 % confidence" in (bundle / "README.md").read_text()
    assert "3 of 6 steps" in (bundle / "evidence.md").read_text()
    # privacy.json stays as the training wrote it.
    assert report.read_report(bundle)["audit"] is None
    assert report.with_audit(evidence["report"], record) == evidence["report"]


def test_a_failed_audit_refutes_the_assumption_and_takes_the_tags_away(bundle: Path) -> None:
    record = audit_of(bundle, mutants=[{"name": "no noise", "caught": False, "by": ""}], passed=False)
    evidence = build_evidence(bundle)
    write_bundle(bundle, evidence)
    assert "its self-test" in evidence["report"]["not_private_because"]
    assert [e["status"] for e in evidence["assumptions"] if "audit" in e["assumption"]] == ["refuted"]
    assert report.TAGS[0] not in (bundle / "README.md").read_text()
    assert report.with_audit(evidence["report"], record) == evidence["report"]


@pytest.mark.parametrize(
    "subject",
    [
        {"kind": "model", "name": "M", "run": "cd" * 16, "plan_sha256": "0" * 64},
        {"kind": "model", "name": "M", "run": None, "plan_sha256": None},
        {"kind": "script", "name": "train.py", "run": None, "plan_sha256": None},
    ],
)
def test_an_audit_of_something_else_is_refused(bundle: Path, subject: dict[str, Any]) -> None:
    audit_of(bundle, subject=subject)
    assert "another run" in refused(lambda: build_evidence(bundle))


def test_an_audit_of_another_epsilon_or_a_damaged_one_is_refused(bundle: Path) -> None:
    audit_of(bundle, epsilon_of_plan=0.1)
    assert AUDIT_NAME in refused(lambda: build_evidence(bundle))
    (bundle / AUDIT_NAME).write_text("{}")
    assert AUDIT_NAME in refused(lambda: build_evidence(bundle))


# ---- curves ---------------------------------------------------------------------------------------------------------


@functools.cache
def direct(plan: PrivacyPlan, steps: int) -> PLDAccountant:
    """dp_accounting's own way from the mechanism to its privacy loss."""
    event = TruncatedSubsampledGaussianDpEvent(
        plan.num_units, plan.sampling_probability, plan.max_batch_size, plan.accounted_noise_multiplier
    )
    return PLDAccountant(NeighboringRelation.REPLACE_SPECIAL).compose(event, steps)


@pytest.fixture(scope="module")
def drawn(plan: PrivacyPlan) -> dict[str, list[dict[str, float]]]:
    return _CURVES(plan)


def flattered(points: list[dict[str, float]], plan: PrivacyPlan) -> list[float]:
    """Epsilons of a privacy curve at which dp_accounting says a larger delta than the curve, up to rounding."""
    accountant = direct(plan, plan.max_steps)
    return [p["epsilon"] for p in points if p["delta"] < accountant.get_delta(p["epsilon"]) * (1 - 1e-6)]


def test_the_privacy_curve_is_dp_accountings_and_never_below_it(plan: PrivacyPlan, drawn: dict[str, Any]) -> None:
    points = drawn["privacy_curve"]
    assert {"epsilon": plan.epsilon, "delta": plan.delta} in points
    assert flattered(points[::6], plan) == []
    accountant = direct(plan, plan.max_steps)
    assert all(p["delta"] <= accountant.get_delta(p["epsilon"]) * 1.02 + 1e-10 for p in points[:40:6])
    assert all(a["delta"] >= b["delta"] for a, b in itertools.pairwise(points))
    # Mutants: the curve of a little more noise, and one that forgets a direction.
    mild = replace(plan, sensitivity_slack=0.0, noise_multiplier=1.01 * plan.noise_multiplier)
    epsilons = [point["epsilon"] for point in points[::6]]
    deltas = privacy_curve(mild, epsilons)
    assert flattered([{"epsilon": e, "delta": d} for e, d in zip(epsilons, deltas, strict=True)], plan)
    halved = [{"epsilon": p["epsilon"], "delta": 0.5 * p["delta"]} for p in points]
    assert flattered(halved[::6], plan)
    refused(lambda: privacy_curve(replace(plan, epsilon=math.inf, target_epsilon=math.inf), [1.0]))


def test_the_staircase_over_the_steps_is_nowhere_below_the_accountant(plan: PrivacyPlan, drawn: dict[str, Any]) -> None:
    points = drawn["epsilon_by_step"]
    assert points[0] == {"step": 0, "epsilon": 0.0}
    assert points[-1] == {"step": plan.max_steps, "epsilon": plan.epsilon}

    def below(stairs: Callable[[int], float]) -> list[int]:
        truth = {step: direct(plan, step).get_epsilon(plan.delta) for step in (1, 3, 5)}
        return [step for step, epsilon in truth.items() if stairs(step) < epsilon * (1 - 1e-6)]

    assert below(lambda step: next(p["epsilon"] for p in points if p["step"] >= step)) == []
    few = [points[0], points[-1]]
    assert below(lambda step: next(p["epsilon"] for p in few if p["step"] >= step)) == []
    # Mutant: the points are joined by a straight line.
    assert below(lambda step: float(np.interp(step, [0, plan.max_steps], [0, plan.epsilon]))) == [1, 3, 5]


def optimism(corners: list[dict[str, float]], plan: PrivacyPlan) -> float:
    """The most by which a trade-off curve promises more misses than the truth: Phi(Phi^-1(1 - alpha) - mu)."""
    mu = math.sqrt(plan.max_steps) / plan.accounted_noise_multiplier
    alphas = np.linspace(1e-6, 1 - 1e-6, 4001)
    promised = np.interp(alphas, [c["false_alarms"] for c in corners], [c["misses"] for c in corners])
    return float(np.max(promised - norm.cdf(norm.isf(alphas) - mu)))


def test_the_trade_off_curve_is_never_better_than_the_truth_and_close_to_it(
    plan: PrivacyPlan, drawn: dict[str, Any]
) -> None:
    corners, points = drawn["trade_off"], drawn["privacy_curve"]
    assert corners[0]["false_alarms"] == 0 and corners[-1] == {"false_alarms": 1.0, "misses": 0.0}
    assert optimism(corners, plan) <= 1e-9
    mu = math.sqrt(plan.max_steps) / plan.accounted_noise_multiplier
    lost = [norm.cdf(norm.isf(c["false_alarms"]) - mu) - c["misses"] for c in corners[1:-1]]
    assert max(lost) < 0.01
    # The bound in full, line by line.
    for alpha in np.linspace(0, 1, 101):
        lines = [1 - p["delta"] - math.exp(p["epsilon"]) * alpha for p in points]
        lines += [math.exp(-p["epsilon"]) * (1 - p["delta"] - alpha) for p in points]
        shown = np.interp(alpha, [c["false_alarms"] for c in corners], [c["misses"] for c in corners])
        assert shown == pytest.approx(max(0.0, *lines), abs=1e-12)


def test_mutant_trade_off_curves_that_flatter_are_caught(plan: PrivacyPlan, drawn: dict[str, Any]) -> None:
    corners, points = drawn["trade_off"], drawn["privacy_curve"]
    joined = [corners[0], *corners[10:-1:20], corners[-1]]
    assert optimism(joined, plan) > 1e-3
    forgotten = [{"epsilon": p["epsilon"], "delta": 0.5 * p["delta"]} for p in points]
    assert optimism(trade_off(forgotten), plan) > 1e-3
    without_epsilon = [{"epsilon": 0.9 * p["epsilon"], "delta": p["delta"]} for p in points]
    assert optimism(trade_off(without_epsilon), plan) > 1e-3


def test_noise_at_other_batches_keeps_the_guarantee(plan: PrivacyPlan, drawn: dict[str, Any]) -> None:
    found = {each["expected_batch_size"]: each for each in drawn["noise_by_batch"]}
    assert set(found) == {20, 40}  # there are no more than 40 units
    assert found[40]["noise_multiplier"] == plan.noise_multiplier
    half = found[20]
    assert half["noise_of_mean"] == half["noise_multiplier"] * plan.clipping_norm / 20 > found[40]["noise_of_mean"]
    other = replace(plan, sampling_probability=0.5, noise_multiplier=half["noise_multiplier"])
    assert direct(other, plan.max_steps).get_epsilon(plan.delta) <= plan.epsilon * (1 + 1e-4)


def test_rdp_has_a_curve_through_its_own_guarantee() -> None:
    arguments = PrivacyArguments(
        target_epsilon=8.0, target_delta=1e-5, noise_multiplier=2.0, accountant="rdp", sampling_probability=1.0
    )
    plan = make_plan(arguments, num_units=40, expected_batch_size=1, max_steps=5)
    points = curves(plan)["privacy_curve"]
    assert {"epsilon": plan.epsilon, "delta": plan.delta} in points
    assert all(a["delta"] >= b["delta"] for a, b in itertools.pairwise(points))
    assert flattered(points[::8], plan) == []


# ---- pages ----------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """What a browser would find in a page that it might act on."""

    SAFE = {"html", "head", "meta", "title", "style", "body", "main", "figure", "figcaption", "h1", "h2", "h3", "h4"}
    SAFE |= {"p", "strong", "em", "code", "pre", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
    SAFE |= {"svg", "g", "path", "text", "defs", "clippath", "use", "rect", "desc", "tspan"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.problems: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.SAFE:
            self.problems.add(f"<{tag}>")
        for name, value in attrs:
            reference = name in ("src", "href", "xlink:href", "action", "data", "srcset")
            if name.startswith("on") or (reference and not (value or "").startswith("#")):
                self.problems.add(f"{name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_hostile_name_brings_no_markup_into_any_page(
    plan: PrivacyPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    with trained(folder, plan, dataset=HOSTILE) as ledger:
        evidence = build_evidence(folder, ledger=ledger)
    assert evidence["data"]["name"] == HOSTILE
    page = Page(rendering.html_page(evidence))
    assert page.problems == set() and HOSTILE in page.text
    assert "<script" not in rendering.markdown_page(evidence)
    rows = [line for line in rendering.markdown_page(evidence).splitlines() if "alert(1)" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    # Two walls: either one alone holds, and without both the check finds what comes in.
    monkeypatch.setattr(rendering, "_OPTIONS", {"html": True})
    assert Page(rendering.html_page(evidence)).problems == set()
    monkeypatch.setattr(markdown, "shown", str)
    assert "<script>" in Page(rendering.html_page(evidence)).problems
    monkeypatch.setattr(rendering, "_OPTIONS", {"html": False})
    assert not {"<script>", "<img>"} & Page(rendering.html_page(evidence)).problems


def test_the_page_needs_nothing_else_and_its_plots_are_told_in_words(bundle: Path) -> None:
    text = (bundle / "evidence.html").read_text(encoding="utf-8")
    assert Page(text).problems == set()
    assert "default-src &#x27;none&#x27;" in text and "@import" not in text and "url(http" not in text
    outside = set(re.findall(r"https?://[\w./-]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, which nobody fetches
    assert text.count("<svg") == text.count('role="img"') == text.count("<desc") == 4
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for label in re.findall(r'aria-labelledby="([^"]+)"', text):
        assert set(label.split()) <= set(ids)


@pytest.mark.parametrize("missing", ["jsonschema", "matplotlib", "markdown_it"])
def test_a_library_that_is_not_installed_is_named_with_the_way_to_install_it(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    evidence = read_evidence(bundle)
    bundle_module._validator.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    message = refused(lambda: write_bundle(bundle, evidence))
    assert 'pip install "dpfa-hf[evidence]"' in message
    bundle_module._validator.cache_clear()


# ---- headings -------------------------------------------------------------------------------------------------------


def test_every_assumption_that_a_report_can_have_is_under_a_heading(plan: PrivacyPlan) -> None:
    known = {heading.id for heading in headings.HEADINGS}
    listed = set()
    choices = itertools.product(
        ("example", "document", "user"), ("snapped", "hardened"), ("chacha20", "torch"), (None, "public", "private"),
        (True, False), (None, "name"),
    )  # fmt: skip
    for unit, floating_point, generator, eval_data, many, dataset in choices:
        made = replace(
            plan, privacy_unit=unit, privacy_unit_column="c" * (unit == "user"), floating_point=floating_point,
            noise_generator=generator,
        )  # fmt: skip
        assumptions = report._assumptions(made, dataset, many, eval_data, True, 1 + many, many)
        listed |= {each["assumption"] for each in assumptions}
        mapped = headings.mapped({"assumptions": assumptions})
        assert all(each["headings"] and set(each["headings"]) <= known for each in mapped)
    listed.add(report._AUDITED)
    headings.mapped({"assumptions": [{"assumption": report._AUDITED, "status": "tested"}]})
    assert len(listed) > 30
    # No rule is there for nothing, and what no rule knows is refused.
    assert all(any(re.search(pattern, each) for each in listed) for pattern, _ in headings._RULES)
    assert "no heading" in refused(lambda: headings.mapped({"assumptions": [{"assumption": "All is well"}]}))


def test_the_headings_are_those_of_the_sources_and_pass_no_judgement() -> None:
    by_framework = {
        framework: [heading.name for heading in headings.HEADINGS if heading.framework == framework]
        for framework in headings.FRAMEWORKS
    }
    assert {framework: len(names) for framework, names in by_framework.items()} == {"nist": 9, "gdpr": 8, "ccpa": 4}
    for article in ("5(1)(c)", "5(1)(f)", "Article 25", "Article 32", "Article 35", "Recital 26"):
        assert any(article in name for name in by_framework["gdpr"]), article
    assert any("1798.140(m)" in name for name in by_framework["ccpa"])
    words = " ".join(f"{heading.contributes} {heading.cannot}" for heading in headings.HEADINGS).lower()
    assert not re.search(r"complian|complies|satisf|fulfil|certif|guarantees that|\bscore", words)


def test_the_registrys_draft_leaves_to_people_what_only_they_know(bundle: Path, plan: PrivacyPlan) -> None:
    draft = read_evidence(bundle)["deployments_registry"]
    loss = draft["record"]["deployment"]["privacy_loss"]
    assert loss["privacy_parameters"] == {"epsilon": plan.epsilon, "delta": plan.delta}
    assert (loss["privacy_unit"], loss["number_of_privacy_units"]) == ("example", plan.num_units)
    left = draft["left_to_the_operator"]
    for name in ("basic.name", "basic.data_curators", "basic.intended_use", "administrative.registry_authors"):
        assert f"deployment.{name}" in left
    assert draft["record"]["deployment"]["dp_variant"]["variant_name"] == "Approximate DP"
    changed = copy.deepcopy(draft["record"])
    assert "clinic notes" not in json.dumps(changed)


# ---- the cards of the demo models -----------------------------------------------------------------------------------

CARDS = Path(__file__).parents[1] / "model_cards"


def regenerate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """What `make cards` does, in this process."""
    spec = importlib.util.spec_from_file_location("regenerate_cards", CARDS / "regenerate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["regenerate.py", *arguments])
    module.main()


def test_the_cards_of_the_demo_models_are_as_their_reports_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regenerate(monkeypatch, "--check")
    for folder in (path.parent for path in CARDS.glob("*/privacy.json")):
        assert "## How this run was made" in (folder / "README.md").read_text(encoding="utf-8")
    # A number that was changed in a card is noticed, and put right.
    shutil.copytree(CARDS, tmp_path / "cards")
    card = tmp_path / "cards" / "sentiment" / "README.md"
    right = card.read_bytes()
    card.write_bytes(right.replace(b"= 2.999 at", b"= 0.999 at", 1))
    with pytest.raises(SystemExit, match="sentiment"):
        regenerate(monkeypatch, "--check", str(tmp_path / "cards"))
    assert card.read_bytes() != right
    regenerate(monkeypatch, str(tmp_path / "cards"))
    assert card.read_bytes() == right
    with pytest.raises(SystemExit, match="no privacy.json"):
        regenerate(monkeypatch, str(tmp_path / "cards" / "sentiment"))
