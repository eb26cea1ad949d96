"""May this model be served? Checks a model's folder against what it says of itself, its signature and the ledger.

The gate reads; it writes nothing anywhere. It never trusts a number that it can compute or look up again: epsilon is
recomputed from the plan, bytes are compared with what was signed, and the run with what the ledger reserved for it.
Whatever it was not told to look at, it says so. It fails closed: a check that raises, whatever it raises, has failed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpfa_hf.budget import UNNAMED
from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan, sensitivity_slack
from dpfa_hf.report import REPORT_NAME, read_report, with_audit
from dpfa_hf.signing import refuse_irregular, verified_files

if TYPE_CHECKING:
    from dpfa_hf.ledger import Ledger, RunRecord

# Larger than any report, evidence or audit, and small enough for the memory of a small job.
_MOST_BYTES = 64 * 2**20
# Two accountants that add up the same mechanism in another order may differ by this much, relative to epsilon.
_ROUNDING = 1e-6
_FINGERPRINT = re.compile(UNNAMED + "[0-9a-f]{64}")


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed (None: not checked), and one line that says what was seen or why not."""

    check: str
    passed: bool | None
    detail: str


class _NotAskedFor(Exception):
    """Raised by a check that has nothing to look at: an option was not given, or an optional file is absent."""


def judge(
    model_dir: str | os.PathLike[str],
    *,
    max_epsilon: float,
    max_delta: float,
    ledger: str | None = None,
    witness: str | None = None,
    public_key: str | os.PathLike[str] | None = None,
    require_ledger: bool = False,
    require_evidence: bool = False,
    require_audit: bool = False,
) -> dict[str, Any]:
    """Whether the model in `model_dir` may be served, and why, as JSON values; see docs/gate.md for each check.

    Guarantee: "passed" is True only if no check failed, every check that needs no option passed, and so did all checks
    of each option that was given. Without `public_key` and `ledger` this shows only that the folder does not contradict
    itself: whoever may write to it can write another story that does not, either.

    Args:
        model_dir: what `save_model` of a private run wrote.
        max_epsilon: the largest epsilon at the last planned step; finite.
        max_delta: the largest delta.
        ledger: the URL of the ledger in which the run must be recorded, which is only read; None to look at none.
        witness: as for `Ledger`; asked only with `ledger`.
        public_key: a PEM file; every file must then be as the owner of the private key signed it. None to verify none.
        require_ledger: whether no `ledger` is a reason to refuse.
        require_evidence: whether `evidence.json` must be there; one that is there is always checked.
        require_audit: as `require_evidence`, for `audit.json`.

    Raises:
        PrivacyError: a limit is no number that a limit can be. Everything else becomes a check that failed.
    """
    if not (_is_number(max_epsilon) and max_epsilon >= 0):
        raise PrivacyError(f"max_epsilon={max_epsilon!r} must be a finite number of at least 0: correct max_epsilon")
    if not (_is_number(max_delta) and 0 <= max_delta < 1):
        raise PrivacyError(f"max_delta={max_delta!r} must be a number of at least 0 and below 1: correct max_delta")
    bundle = _Bundle(
        folder=Path(model_dir),
        max_epsilon=max_epsilon,
        max_delta=max_delta,
        ledger_url=ledger,
        witness=witness,
        public_key=public_key,
        require_ledger=require_ledger,
        require_evidence=require_evidence,
        require_audit=require_audit,
    )
    checks: dict[str, Check] = {}
    try:
        for name, (needs, run) in _CHECKS.items():
            missing = [need for need in needs if checks[need].passed is not True]
            if missing:
                why = f"not checked, because {missing[0]} {_OUTCOMES[checks[missing[0]].passed]}"
                checks[name] = Check(name, None, why)
            else:
                checks[name] = _tried(name, run, bundle)
    finally:
        bundle.close()
    required = set(_ALWAYS)
    required |= {"signature"} if public_key is not None else set()
    required |= (
        {"ledger", "ledger_run", "ledger_steps", "ledger_budget"} if ledger is not None or require_ledger else set()
    )
    required |= {"evidence"} if require_evidence else set()
    required |= {"audit"} if require_audit else set()
    passed = all(check.passed is not False for check in checks.values())
    passed = passed and all(checks[name].passed is True for name in required)
    return {
        "passed": passed,
        "model": str(model_dir),
        "run": bundle.stated("run", str),
        "epsilon": bundle.stated_guarantee("epsilon"),
        "delta": bundle.stated_guarantee("delta"),
        "max_epsilon": max_epsilon,
        "max_delta": max_delta,
        "privacy_sha256": bundle.sha256(REPORT_NAME),
        "checks": [{"check": each.check, "passed": each.passed, "detail": each.detail} for each in checks.values()],
    }


def _tried(name: str, run: Callable[[_Bundle], str], bundle: _Bundle) -> Check:
    try:
        return Check(name, True, _shown(run(bundle)))
    except _NotAskedFor as reason:
        return Check(name, None, f"not checked: {reason}")
    except PrivacyError as error:
        return Check(name, False, _shown(str(error)))
    except Exception as error:
        # Fails closed whatever a file that somebody prepared, a database or a library raises.
        return Check(name, False, _shown(f"{type(error).__name__}: {error}"))


@dataclass
class _Bundle:
    """What is judged, each part of it read once."""

    folder: Path
    max_epsilon: float
    max_delta: float
    ledger_url: str | None
    witness: str | None
    public_key: str | os.PathLike[str] | None
    require_ledger: bool
    require_evidence: bool
    require_audit: bool
    # Set by the checks named beside them, on which all others that read them depend.
    signed: dict[str, str] | None = None  # signature
    weights: set[str] = field(default_factory=set)  # weights
    report: dict[str, Any] = field(default_factory=dict)  # report
    plan: PrivacyPlan | None = None  # plan
    evidence: dict[str, Any] = field(default_factory=dict)  # evidence
    ledger: Ledger | None = None  # ledger
    record: RunRecord | None = None  # ledger_run
    _bytes: dict[str, bytes] = field(default_factory=dict)

    def close(self) -> None:
        if self.ledger is not None:
            self.ledger.close()

    def read(self, name: str) -> bytes:
        """The bytes of the file `name`, which are the signed ones if a signature was verified."""
        if name not in self._bytes:
            content = _read(self.folder / name)
            if self.signed is not None and self.signed.get(name) != hashlib.sha256(content).hexdigest():
                raise PrivacyError(f"{name} changed since its signature was verified: do not use the model")
            self._bytes[name] = content
        return self._bytes[name]

    def read_json(self, name: str, validated: Callable[[Path], Any]) -> dict[str, Any]:
        """The JSON object in `name`, if the function of the package whose file it is reads the very same one."""
        try:
            value = json.loads(
                self.read(name).decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
            )
        except RecursionError:
            raise PrivacyError(f"{name} is nested too deeply to be read: restore the file") from None
        except ValueError as error:
            raise PrivacyError(f"{name} is not JSON as this package writes it ({error}): restore the file") from None
        if validated(self.folder) != value:
            raise PrivacyError(f"{name} changed while it was read: let nobody write to the model's folder")
        return value

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def file_sha256(self, name: str) -> str | None:
        """Of the file `name`, as it was signed if a signature was verified; None where there is no such file."""
        if self.signed is not None:
            return self.signed.get(name)
        try:
            if not (self.folder / name).resolve(strict=True).is_relative_to(self.folder.resolve()):
                return None
            with open(self.folder / name, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None

    def sha256(self, name: str) -> str | None:
        return hashlib.sha256(self._bytes[name]).hexdigest() if name in self._bytes else None

    def stated(self, name: str, kind: type) -> Any:
        value = self.report.get(name)
        return value if isinstance(value, kind) else None

    def stated_guarantee(self, name: str) -> Any:
        """As it is written, if it is a number; whether it is true is what the checks say."""
        guarantee = self.report.get("guarantee")
        value = guarantee.get(name) if isinstance(guarantee, Mapping) else None
        return value if _is_number(value) or value == "inf" else None


# ---- what the folder says of itself ---------------------------------------------------------------------------------


def _folder(bundle: _Bundle) -> str:
    refuse_irregular(bundle.folder)
    return "a folder of regular files, without links"


def _signature(bundle: _Bundle) -> str:
    if bundle.public_key is None:
        raise _NotAskedFor("--public-key was not given, so anybody may have changed any file")
    bundle.signed = verified_files(bundle.folder, bundle.public_key)
    return f"all {len(bundle.signed)} files are as they were signed, and there is no other"


def _weights(bundle: _Bundle) -> str:
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    shards: set[str] = set()
    for index in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if bundle.exists(index):
            shards |= set(json.loads(bundle.read(index))["weight_map"].values())
    names = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, "adapter_model.safetensors", "adapter_model.bin")
    found = shards | {name for name in names if bundle.exists(name)}
    if not found:
        raise PrivacyError(f"model_dir {bundle.folder} has no weights: name the folder that save_model wrote")
    for name in sorted(found):
        if Path(name).name != name or not bundle.exists(name):
            raise PrivacyError(f"the index of the weights names {name!r}, which is not in the folder: copy it whole")
        _refuse_cut_off(bundle.folder / name)
    bundle.weights = found
    return f"whole: {', '.join(sorted(found)) if len(found) <= 3 else f'{len(found)} files'}"


def _report(bundle: _Bundle) -> str:
    bundle.report = bundle.read_json(REPORT_NAME, read_report)
    return f"{REPORT_NAME} is there and of this version's format"


def _private(bundle: _Bundle) -> str:
    report = bundle.report
    if report["private"] is not True or report["not_private_because"] is not None:
        raise PrivacyError(f"the model is NOT PRIVATE ({report['not_private_because']}): train it with noise")
    if report["noise"].get("private") is not True:
        raise PrivacyError("the noise was seeded, or there was none, so the model is NOT PRIVATE: train it again")
    return "the report claims a guarantee, and noise that nobody seeded"


def _plan(bundle: _Bundle) -> str:
    report = bundle.report
    plan = PrivacyPlan.from_dict(report["plan"])
    if report["plan_sha256"] != plan.sha256():
        raise PrivacyError("the plan was edited: it does not have the hash that is stated; restore privacy.json")
    fields = plan.to_dict()
    mechanism, guarantee, noise = report["mechanism"], report["guarantee"], report["noise"]
    reached = mechanism["clipping_norm_reached"]
    stated = [
        ("guarantee.epsilon", guarantee["epsilon"], fields["epsilon"]),
        ("guarantee.delta", guarantee["delta"], plan.delta),
        ("guarantee.at_step", guarantee["at_step"], plan.max_steps),
        ("steps.planned", report["steps"]["planned"], plan.max_steps),
        ("unit.privacy_unit", report["unit"]["privacy_unit"], plan.privacy_unit),
        ("unit.adjacency", report["unit"]["adjacency"], plan.adjacency),
        ("accountant.name", report["accountant"]["name"], plan.accountant),
        ("accountant.version", report["accountant"]["version"], plan.accountant_version),
        ("noise.generator", noise["generator"], plan.noise_generator),
        ("noise.floating_point_mode", noise["floating_point_mode"], plan.floating_point),
        ("noise.standard_deviation", noise["standard_deviation"], plan.noise_standard_deviation_at(reached)),
        ("mechanism.joint_sensitivity", mechanism["joint_sensitivity"], plan.joint_sensitivity),
        *((f"mechanism.{name}", mechanism[name], fields[name]) for name in mechanism if name in fields),
    ]
    for name, value, planned in stated:
        if isinstance(value, bool) or value != planned:
            raise PrivacyError(f"{name} is {value!r} and the plan has {planned!r}: restore privacy.json")
    if plan.clipping != "adaptive" and reached != plan.clipping_norm:
        raise PrivacyError(f"clipping_norm_reached is {reached!r}, not the plan's: restore privacy.json")
    bundle.plan = plan
    return f"the plan has the hash that is stated, and the numbers of {REPORT_NAME} are the plan's"


def _epsilon(bundle: _Bundle) -> str:
    epsilon = bundle.report["guarantee"]["epsilon"]
    if not (_is_number(epsilon) and epsilon >= 0):
        raise PrivacyError(f"epsilon is {epsilon!r}, no finite number of at least 0: the model has no guarantee")
    if epsilon > bundle.max_epsilon:
        raise PrivacyError(f"epsilon {epsilon!r} is above --max-epsilon {bundle.max_epsilon!r}: train for less")
    return f"epsilon {epsilon!r} at the last planned step is at most {bundle.max_epsilon!r}"


def _delta(bundle: _Bundle) -> str:
    delta, units = bundle.report["guarantee"]["delta"], bundle.report["mechanism"]["num_units"]
    if not (_is_number(delta) and 0 < delta < 1):
        raise PrivacyError(f"delta is {delta!r}, no probability above 0 and below 1: the model has no guarantee")
    if delta > bundle.max_delta:
        raise PrivacyError(f"delta {delta!r} is above --max-delta {bundle.max_delta!r}: train for less")
    if not (_is_number(units) and delta < 1 / units):
        raise PrivacyError(f"delta {delta!r} is not below 1/n for n = {units!r} units (P24): train for a smaller delta")
    return f"delta {delta!r} is at most {bundle.max_delta!r} and below 1/n for n = {units} units"


def _accounting(bundle: _Bundle) -> str:
    plan = _given(bundle.plan)
    if not plan.is_private:
        raise PrivacyError("the plan puts no bound on epsilon (target_epsilon=inf): train with a finite one")
    slack = sensitivity_slack(plan.max_batch_size, plan.floating_point)
    if plan.sensitivity_slack < slack:
        raise PrivacyError(f"the plan allows {plan.sensitivity_slack!r} C for rounding, less than {slack!r} C (P15)")
    epsilon = recomputed_epsilon(plan)
    if not epsilon <= plan.epsilon + _ROUNDING * max(1.0, plan.epsilon):
        raise PrivacyError(
            f"epsilon of the plan, recomputed, is {epsilon!r} and not the {plan.epsilon!r} that is stated (by "
            f"{plan.accountant_version}): do not use the model"
        )
    return f"epsilon {epsilon!r} was recomputed from the plan; {plan.epsilon!r} is stated"


def _steps(bundle: _Bundle) -> str:
    charged, planned = bundle.report["steps"]["charged"], _given(bundle.plan).max_steps
    if not isinstance(charged, int) or isinstance(charged, bool) or not 0 <= charged <= planned:
        raise PrivacyError(f"{charged!r} steps are charged, and the plan has {planned}: epsilon does not cover that")
    return f"{charged} of {planned} planned steps are charged"


def _noise(bundle: _Bundle) -> str:
    generator = _given(bundle.plan).noise_generator
    strength = {"chacha20": "cryptographic", "torch": "not cryptographic"}.get(generator)
    if strength is None:
        raise PrivacyError(f"the noise generator is {generator!r}, which this version does not know: update dpfa_hf")
    return f"{generator}, keyed by the operating system, {strength}"


def _audit(bundle: _Bundle) -> str:
    from dpfa_hf.audit import AUDIT_NAME, read_audit

    if not bundle.exists(AUDIT_NAME):
        if bundle.require_audit:
            raise PrivacyError(f"{AUDIT_NAME} is missing and --require-audit was given: run `dpfa audit`")
        raise _NotAskedFor(f"there is no {AUDIT_NAME}")
    audit = bundle.read_json(AUDIT_NAME, read_audit)
    if audit["passed"] is not True:
        failed = [check["name"] for check in audit["checks"] if check["passed"] is not True]
        raise PrivacyError(f"the audit failed ({', '.join(map(str, failed)) or 'its own self-test'}): find out why")
    for name, mine in (("run", bundle.report["run"]), ("plan_sha256", bundle.report["plan_sha256"])):
        if audit["subject"][name] != mine:
            raise PrivacyError(f"the audit is of another {name} than the model's: audit this one")
    bound, epsilon = audit["epsilon_lower_bound"], bundle.report["guarantee"]["epsilon"]
    of = "passed, of this run" + (f", scaled down in {len(audit['scaled_down'])} ways" if audit["scaled_down"] else "")
    if bound is None:
        return f"{of}; it measured no lower bound on epsilon"
    if not (_is_number(bound) and _is_number(epsilon) and bound <= epsilon):
        raise PrivacyError(f"the audit measured epsilon to be at least {bound!r}, above the {epsilon!r} that is stated")
    return f"{of}; epsilon is at least {bound!r} with confidence {audit['confidence']!r}"


def _evidence(bundle: _Bundle) -> str:
    from dpfa_hf.audit import AUDIT_NAME
    from dpfa_hf.evidence import EVIDENCE_NAME, read_evidence

    if not bundle.exists(EVIDENCE_NAME):
        if bundle.require_evidence:
            raise PrivacyError(f"{EVIDENCE_NAME} is missing and --require-evidence was given: run `dpfa report`")
        raise _NotAskedFor(f"there is no {EVIDENCE_NAME}")
    evidence = bundle.read_json(EVIDENCE_NAME, read_evidence)
    audit = hashlib.sha256(bundle.read(AUDIT_NAME)).hexdigest() if bundle.exists(AUDIT_NAME) else None
    for name, mine in (("privacy_sha256", bundle.sha256(REPORT_NAME)), ("audit_sha256", audit)):
        if evidence[name] != mine:
            raise PrivacyError(f"{EVIDENCE_NAME} is of other files than these ({name} differs): run `dpfa report`")
    report = with_audit(bundle.report, evidence["audit"]) if audit else bundle.report
    if evidence["report"] != report:
        raise PrivacyError(f"{EVIDENCE_NAME} does not say what {REPORT_NAME} says: run `dpfa report` again")
    hashed = {each["path"]: each["sha256"] for each in evidence["weights"]}
    for name in sorted(bundle.weights | set(hashed)):
        if hashed.get(name) != bundle.file_sha256(name):
            raise PrivacyError(f"{EVIDENCE_NAME} is of other weights than {name!r}: run `dpfa report` again")
    bundle.evidence = evidence
    of = f"{REPORT_NAME}, {AUDIT_NAME}" if audit else REPORT_NAME
    return f"{EVIDENCE_NAME} is valid, and of this very {of} and of these weights"


# ---- what the ledger says -------------------------------------------------------------------------------------------


def _ledger(bundle: _Bundle) -> str:
    from dpfa_hf.ledger import Ledger

    if bundle.ledger_url is None:
        if bundle.require_ledger:
            raise PrivacyError("no ledger was named and --require-ledger was given: set --ledger or DPFA_LEDGER")
        raise _NotAskedFor("--ledger was not given, so the run and its epsilon may be invented")
    # Opened to look: a ledger that is missing is not created.
    bundle.ledger = Ledger(bundle.ledger_url, witness=bundle.witness, create=False)
    problems = bundle.ledger.verify()
    if problems:
        raise PrivacyError(f"the ledger is broken ({problems[0]}): restore a backup that `dpfa ledger verify` passes")
    moved = bundle.ledger.moved_to()
    if moved is not None:
        raise PrivacyError(f"the ledger has moved to {moved} and is closed: name that one with --ledger")
    seq, last = bundle.ledger.head()
    return f"the chain of {seq} entries is whole; its head is {last}"


def _ledger_run(bundle: _Bundle) -> str:
    plan, report = _given(bundle.plan), bundle.report
    if not isinstance(report["run"], str):
        raise PrivacyError("the report names no run of a ledger: train with one")
    record = _given(bundle.ledger).run(report["run"])
    named = None if record.dataset.startswith(UNNAMED) else record.dataset
    pairs = {
        "plan": (report["plan"], record.plan),
        "plan_sha256": (plan.sha256(), record.plan_hash),
        "epsilon": (plan.epsilon, record.epsilon),
        "delta": (plan.delta, record.delta),
        "max_steps": (plan.max_steps, record.max_steps),
        "privacy_unit": (plan.declared_unit, record.privacy_unit),
        "adjacency": (plan.adjacency, record.adjacency),
        "dataset": (report["dataset"]["name"], named),
    }
    for name, (mine, recorded) in pairs.items():
        if mine != recorded:
            # The name that another data set has in the ledger is nobody's business here.
            shown = "" if name in ("plan", "dataset") else f" (model {mine!r}, ledger {recorded!r})"
            raise PrivacyError(f"{name} of run {record.run} is not what the ledger has{shown}: do not use the model")
    bundle.record = record
    return f"run {record.run} reserved this epsilon and delta for this plan, unit, adjacency and data-set name"


def _ledger_steps(bundle: _Bundle) -> str:
    record, stated = _given(bundle.record), bundle.report["steps"]["charged"]
    if not stated <= record.steps <= record.max_steps:
        raise PrivacyError(
            f"the ledger has charged {record.steps} of {record.max_steps} steps to the run, the model has {stated}: "
            "the ledger is an older copy, or not this model's"
        )
    return f"{record.steps} steps are charged in the ledger, {stated} when the model was saved"


def _ledger_budget(bundle: _Bundle) -> str:
    ledger, record = _given(bundle.ledger), _given(bundle.record)
    sums = next(each for each in ledger.datasets() if each.dataset == record.dataset)
    if sums.budget is None:
        return f"epsilon reserved on the data set: {sums.epsilon!r}, runs: {sums.runs}; no budget was ever declared"
    for name, spent, limit in zip(("epsilon", "delta"), (sums.epsilon, sums.delta), sums.budget, strict=True):
        # Sums are rounded up, by one unit in the last place at most.
        if not math.nextafter(spent, 0) <= limit:
            raise PrivacyError(f"runs on the data set reserved {name} {spent!r}, and its budget is {limit!r}")
    return f"epsilon reserved on the data set: {sums.epsilon!r} of {sums.budget[0]!r}, runs: {sums.runs}"


def _ledger_head(bundle: _Bundle) -> str:
    if bundle.evidence["ledger"] is None:
        raise _NotAskedFor("the evidence was written without a ledger")
    head = bundle.evidence["ledger"]["head"]
    if _given(bundle.ledger).hash_at(head["sequence"]) != head["hash"]:
        raise PrivacyError(
            f"the ledger lacks entry {head['sequence']} as the evidence has seen it: it is an older copy, or rewritten"
        )
    return f"the ledger still has entry {head['sequence']}, its head when the evidence was written"


_OUTCOMES = {False: "was refused", None: "was not checked"}
# In this order, by name: the checks that must have passed before, and the check itself.
_CHECKS: dict[str, tuple[tuple[str, ...], Callable[[_Bundle], str]]] = {
    "folder": ((), _folder),
    "signature": (("folder",), _signature),
    "weights": (("folder",), _weights),
    "report": (("folder",), _report),
    "private": (("report",), _private),
    "epsilon": (("report",), _epsilon),
    "delta": (("report",), _delta),
    "plan": (("report",), _plan),
    "accounting": (("plan",), _accounting),
    "steps": (("plan",), _steps),
    "noise": (("plan",), _noise),
    "audit": (("report",), _audit),
    "evidence": (("weights", "report"), _evidence),
    "ledger": ((), _ledger),
    "ledger_run": (("plan", "ledger"), _ledger_run),
    "ledger_steps": (("steps", "ledger_run"), _ledger_steps),
    "ledger_budget": (("ledger_run",), _ledger_budget),
    "ledger_head": (("evidence", "ledger"), _ledger_head),
}
_ALWAYS = ("folder", "weights", "report", "private", "epsilon", "delta", "plan", "accounting", "steps", "noise")


# ---- how it is computed and read ------------------------------------------------------------------------------------


def recomputed_epsilon(plan: PrivacyPlan) -> float:
    """Epsilon at the plan's last step and delta, from its mechanism alone, by dp_accounting's own accountants.

    Reads neither `plan.epsilon` nor what the ledger or the report say, and takes another way through dp_accounting than
    `make_plan` does: the event of P6 (arXiv 2508.15089), or RDP with the ceiling charged to delta.

    Raises:
        PrivacyError: the plan names an accountant that is not known, or one that does not cover it.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    relations = {"zero_out": NeighboringRelation.REPLACE_SPECIAL, "replace_one": NeighboringRelation.REPLACE_ONE}
    if plan.adjacency not in relations:
        raise PrivacyError(f"the plan's adjacency {plan.adjacency!r} is unknown: use the version that wrote it")
    noise = plan.accounted_noise_multiplier
    if noise == 0:
        return math.inf
    if plan.accountant == "pld":
        # As wide as make_plan's, since narrower bins would take hours where losses are huge.
        interval = 1e-4 * max(1.0, 0.25 / plan.noise_multiplier**2, plan.target_epsilon / 100)
        accountant = PLDAccountant(relations[plan.adjacency], value_discretization_interval=interval)
        event = TruncatedSubsampledGaussianDpEvent(
            dataset_size=plan.num_units,
            sampling_probability=plan.sampling_probability,
            truncated_batch_size=plan.max_batch_size,
            noise_multiplier=noise,
        )
        return float(accountant.compose(event, plan.max_steps).get_epsilon(plan.delta))
    if plan.accountant == "rdp" and plan.adjacency == "zero_out":
        delta = plan.delta - _truncation_delta(plan)
        rdp = RdpAccountant(neighboring_relation=relations[plan.adjacency])
        step = PoissonSampledDpEvent(plan.sampling_probability, GaussianDpEvent(noise))
        return float(rdp.compose(step, plan.max_steps).get_epsilon(delta)) if delta > 0 else math.inf
    raise PrivacyError(f"accountant {plan.accountant!r} does not cover adjacency {plan.adjacency!r} (P6)")


def _truncation_delta(plan: PrivacyPlan) -> float:
    """What RDP gives up of delta for the ceiling (P6)."""
    from scipy.stats import binom

    exceeding = float(binom.sf(plan.max_batch_size, plan.num_units, plan.sampling_probability))
    return plan.max_steps * (1 + math.exp(min(plan.target_epsilon, 700))) * exceeding


def _refuse_cut_off(path: Path) -> None:
    """Reads the header of safetensors, which tells the file's length; of other files only that they are not empty."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="np") as tensors:
                empty = not list(tensors.keys())
        except SafetensorError as error:
            raise PrivacyError(f"{path.name} is damaged or cut off ({error}): copy the folder again") from None
    else:
        empty = path.stat().st_size == 0
    if empty:
        raise PrivacyError(f"{path.name} holds no weights: copy the folder again")


def _read(path: Path) -> bytes:
    """Neither follows a link, nor waits for a pipe, nor fills the memory."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                raise PrivacyError(f"{path.name} is no regular file of at most {_MOST_BYTES} bytes: restore the file")
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise PrivacyError(
            f"{path} cannot be read ({error.strerror}): name a folder that save_model of a private run wrote"
        ) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name is there twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _given(value: Any) -> Any:
    """A part that an earlier check has set; `_CHECKS` says which one."""
    assert value is not None
    return value


def _shown(text: str) -> str:
    """One line of at most 500 characters, without the fingerprint of any data set (P22)."""
    line = " ".join(_FINGERPRINT.sub("unnamed", text).split())
    return line if len(line) <= 500 else f"{line[:500]}..."
