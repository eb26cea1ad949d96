"""What a run says about itself beside the weights: `privacy.json` and a section of the model card (P25, P26).

The report holds evidence, never a verdict: there is no score. It is made from public numbers only, and neither a
fingerprint of the data nor the password of a database can get into it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard

from dpfa_hf.errors import PrivacyError
from dpfa_hf.markdown import bullets, shown, table, up
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.source import package_sha256

REPORT_NAME = "privacy.json"
CARD_NAME = "README.md"
BEGIN, END = "<!-- dpfa_hf:begin -->", "<!-- dpfa_hf:end -->"
TAGS = ("differential_privacy", "dp-sgd")
ENFORCED, TESTED, WORD, UNASSESSED = "enforced", "tested", "operator's word", "not assessed"
# Of an assumption that an audit has found to be untrue.
REFUTED = "refuted"

_FORMAT = 1
_FIELDS = frozenset(
    {
        "format",
        "private",
        "not_private_because",
        "run",
        "guarantee",
        "dataset",
        "trust_model",
        "releases",
        "unit",
        "mechanism",
        "steps",
        "accountant",
        "tuning",
        "halting",
        "noise",
        "model",
        "audit",
        "assumptions",
        "ledger",
        "software",
        "plan",
        "plan_sha256",
    }
)
_MODEL_FIELDS = ("class", "adapter", "trainable_parameters", "total_parameters")
_UNITS = {
    "example": ("one example, that is, one row of the training data set", "each row counts by itself"),
    "document": (
        "one document, that is, one row of the training data set",
        "each row is sampled by itself and only then packed, whole, with the others that were drawn",
    ),
    "user": (
        "one user, that is, all rows of the training data set with one value in the column {plan.privacy_unit_column}",
        "each user is sampled by itself, then at most {plan.max_examples_per_user} of the user's rows at random; their "
        "losses are averaged, and the user's gradient is clipped once",
    ),
}
_ADJACENCIES = {
    "zero_out": "one unit replaced by nothing; the number of units n is public",
    "replace_one": "one unit replaced by any other; the number of units n is public",
}
_USERS_NEIGHBOURS = {
    "zero_out": ", all of whose rows go; another text in one of a user's rows is not covered at this epsilon",
    "replace_one": ", with as many rows and whichever; changing one of a user's rows is covered too",
}
_TRUST_MODEL = (
    "Central: whoever ran the training, the machine and this software saw the raw data. The guarantee holds against "
    "everybody who sees the releases that it covers, whatever else they know, all other units included."
)
_HALTING = (
    "Looks ahead: the last step was fixed before step 1 as the last one within the target, and each step was written "
    "to the ledger before its noise was drawn. Stopping earlier does not lower epsilon."
)
_EXPLAINED = {"Whom you trust": "trust_model", "Halting": "halting", "Tuning": "tuning"}
_UNAUDITED = "An empirical audit (an attack on the trained model) agrees with epsilon"
_AUDITED = "Nothing that dpfa audit tried on this plan contradicts epsilon; these weights were not attacked"
_EMPTY_HEADER = "---\n\n---\n"
# The tempered dot keeps a section whose end was lost from swallowing the text up to the next one.
_SECTION = re.compile(rf"\n*{BEGIN}(?:(?!{BEGIN}).)*?{END}\n*", re.DOTALL)
_TITLE = re.compile(r"\A(?:\s|(?><!--.*?-->))*+# [^\n]*\n?", re.DOTALL)
_HUB, _LOCAL = "Hugging Face Hub id, as the model's configuration states it", "local directory"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FINGERPRINT = re.compile(r"[0-9a-fA-F]{32}")


def build_report(
    *,
    plan: PrivacyPlan,
    clipping_norm: float | None = None,
    run: str | None,
    steps: int,
    dataset: str | None,
    dataset_spent: tuple[float, float] | None,
    ledger_url: str | None,
    model: Mapping[str, Any],
    loss: str,
    sampler: str,
    noise: Mapping[str, Any],
    log_private_metrics: bool,
    eval_data: str | None,
    resumed: int = 0,
    seeded: bool = False,
    curve: Mapping[int, float] | None = None,
    processes: int = 1,
    spread: bool = False,
) -> dict[str, Any]:
    """Everything that rule P25 asks of a report, as JSON values; infinity is the string "inf".

    Guarantee: the epsilon that is stated is `plan.epsilon`, the one at `plan.max_steps`, whatever `steps` is (P20); it
    is "inf", and the report says NOT PRIVATE, where the plan has no guarantee, the noise had none, or somebody seeded
    it. No argument's password and no fingerprint is passed on (P22).

    Args:
        plan: what was decided before step 1.
        clipping_norm: the norm that adaptive clipping has reached, a release; None for the plan's.
        run: the run's id in the ledger, by which it is resumed; None without a ledger.
        steps: charged steps so far.
        dataset: the data set's name in the ledger; None if the user gave none, so that the sums hold for this very
            version of the data only. Never the fingerprint.
        dataset_spent: sums of (epsilon, delta) over all recorded runs on the data set, this run included.
        ledger_url: the ledger's URL; a user's name, password and options are cut off.
        model: "class", "base_model" (hub id, local directory or None), "adapter" (such as "LORA", or None),
            "trainable_parameters" and "total_parameters".
        loss: the loss whose per-unit gradients were clipped.
        sampler: the sampler that actually ran.
        noise: `GaussianNoise.describe()`.
        log_private_metrics: whether the operator let unprotected figures be logged.
        eval_data: None, "public" or "private".
        resumed: how often the run was resumed.
        seeded: whether anybody but the operating system seeded sampling or noise.
        curve: epsilon by step, for the record; the last one alone is a guarantee.

    Raises:
        PrivacyError: the arguments contradict the plan or each other, or `dataset` looks like a fingerprint.
    """
    clipping_norm = plan.clipping_norm if clipping_norm is None else clipping_norm
    _refuse_contradictions(plan, clipping_norm, steps, dataset, dataset_spent, noise, curve)
    reasons = {
        "there is no bound on epsilon (target_epsilon=inf)": not plan.is_private,
        "no noise was added": plan.noise_multiplier == 0,
        "sampling or noise was seeded by somebody, who can take it off again": seeded or not noise.get("private", True),
    }
    because = "; ".join(reason for reason, holds in reasons.items() if holds) or None
    private = because is None
    unit, built = _UNITS[plan.privacy_unit]
    neighbours = _ADJACENCIES[plan.adjacency]
    public = "n, the columns' names and kinds, the model's architecture and every number in this report"
    if plan.privacy_unit == "user":
        unit, built = (text.format(plan=plan) for text in (unit, built))
        neighbours += _USERS_NEIGHBOURS[plan.adjacency]
        public = f"that n is the number of users and that every row names one, {public}"
    base_model, origin = _base_model(model["base_model"])
    spent = (None, None) if dataset_spent is None else dataset_spent if private else (math.inf, dataset_spent[1])
    report = {
        "format": _FORMAT,
        "private": private,
        "not_private_because": because,
        "run": run,
        "guarantee": {
            "epsilon": plan.epsilon if private else math.inf,
            "delta": plan.delta,
            "at_step": plan.max_steps,
            "meaning": "epsilon at the last planned step, a guarantee for every release covered",
        },
        "dataset": {
            "name": dataset,
            "scope": "all recorded runs under this name" if dataset else "this fingerprint only: no name was given",
            "epsilon": spent[0],
            "delta": spent[1],
        },
        "trust_model": _TRUST_MODEL,
        "releases": _releases(plan, log_private_metrics, eval_data),
        "unit": {
            "privacy_unit": plan.privacy_unit,
            "what": unit,
            "how_built": f"{built}; n counts them as the data set was handed over",
            "adjacency": plan.adjacency,
            "neighbours": neighbours,
            "public": public,
        },
        "mechanism": {
            "name": "DP-SGD: clipped per-unit gradients, summed, plus Gaussian noise",
            "num_units": plan.num_units,
            "sampler": sampler,
            "sampling_probability": plan.sampling_probability,
            "expected_batch_size": plan.expected_batch_size,
            "max_batch_size": plan.max_batch_size,
            "noise_multiplier": plan.noise_multiplier,
            "clipping": plan.clipping,
            "clipping_norm": plan.clipping_norm,
            "clipping_norm_reached": clipping_norm,
            "coordinates": _coordinates(plan),
            "joint_sensitivity": plan.joint_sensitivity,
            "sensitivity_slack": plan.sensitivity_slack,
            "max_steps": plan.max_steps,
            "loss": loss,
        },
        "steps": {"charged": steps, "planned": plan.max_steps, "resumed": resumed},
        "accountant": {
            "name": plan.accountant,
            "version": plan.accountant_version,
            "curve": None if curve is None else [[step, curve[step]] for step in sorted(curve)],
            "curve_meaning": "progress: only the value at the last planned step is a guarantee",
        },
        "tuning": "Not included, unless the tuning runs are recorded under the same data-set name, which adds them up.",
        "halting": _HALTING,
        "noise": dict(noise),
        "model": {
            **{name: model[name] for name in _MODEL_FIELDS},
            "base_model": base_model,
            "base_model_origin": origin,
        },
        "audit": None,
        "assumptions": _assumptions(plan, dataset, log_private_metrics, eval_data, private, processes, spread),
        "ledger": without_credentials(ledger_url),
        "software": _software(),
        "plan": plan.to_dict(),
        "plan_sha256": plan.sha256(),
    }
    return _plain(report)


def write_report(directory: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Writes `privacy.json`, and the report's section and tags into the model card `README.md`.

    Each file is replaced whole or not at all. Text and metadata of a card that is there already are kept; writing again
    changes nothing else. A model that is NOT PRIVATE does not keep the tags.

    Raises:
        PrivacyError: `report` is not one of `build_report`'s.
    """
    _refuse_damaged(report, "report")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / REPORT_NAME, json.dumps(_plain(report), indent=2, allow_nan=False) + "\n")
    write_card(directory, report)


def write_card(directory: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Writes the report's section and tags into the model card alone, in the way of `write_report`.

    Raises:
        PrivacyError: `report` is not one of `build_report`'s.
    """
    _refuse_damaged(report, "report")
    card = Path(directory) / CARD_NAME
    # Surrogates and newline="" give every byte back that is not ours, whatever the file's encoding.
    content = card.read_bytes().decode("utf-8-sig", "surrogateescape") if card.exists() else _new_card(report)
    line_break = "\r\n" if "\r\n" in content else "\n"
    replace_file(card, _merged(content.replace("\r\n", "\n"), report).replace("\n", line_break))


def read_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The report in `directory`, as `build_report` made it.

    Raises:
        PrivacyError: there is no `privacy.json`, or it is damaged or of another version.
    """
    path = Path(directory) / REPORT_NAME
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PrivacyError(
            f"{path} cannot be read ({error.strerror}): name a directory that save_model or a checkpoint of a private "
            "run wrote; without it the run cannot be found in the ledger"
        ) from None
    except ValueError:
        report = None
    _refuse_damaged(report, str(path))
    return report


def with_audit(report: Mapping[str, Any], audit: Mapping[str, Any]) -> dict[str, Any]:
    """`report` with the result of `dpfa audit` on the same run, as card and evidence show it; twice is as once.

    Guarantee: fails closed. An audit that failed makes the report NOT PRIVATE, whatever the accountant says.
    """
    _refuse_damaged(report, "report")
    passed = bool(audit["passed"])
    failed = [str(check["name"]) for check in audit["checks"] if not check["passed"]]
    outcome = {
        "version": audit["version"],
        "created": audit["created"],
        "passed": passed,
        "checks": len(audit["checks"]),
        "failed": failed,
        "scaled_down": list(audit["scaled_down"]),
        "epsilon_claimed": audit["epsilon_claimed"],
        "epsilon_lower_bound": audit["epsilon_lower_bound"],
        "confidence": audit["confidence"],
        "canaries": audit["canaries"],
        "mutants": len(audit["mutants"]),
        "mutants_caught": sum(bool(mutant["caught"]) for mutant in audit["mutants"]),
    }
    assumptions = [each for each in report["assumptions"] if each["assumption"] not in (_UNAUDITED, _AUDITED)]
    assumptions.append({"assumption": _AUDITED, "status": TESTED if passed else REFUTED})
    audited = {**report, "audit": outcome, "assumptions": assumptions}
    if passed:
        return audited
    because, failure = report["not_private_because"] or "", f"an audit failed ({', '.join(failed) or 'its self-test'})"
    return audited | {
        "private": False,
        "not_private_because": because if because.endswith(failure) else "; ".join(filter(None, (because, failure))),
        "guarantee": {**report["guarantee"], "epsilon": "inf"},
        "dataset": {**report["dataset"], "epsilon": "inf" if report["dataset"]["epsilon"] is not None else None},
    }


def _refuse_contradictions(
    plan: PrivacyPlan,
    clipping_norm: float,
    steps: int,
    dataset: str | None,
    dataset_spent: tuple[float, float] | None,
    noise: Mapping[str, Any],
    curve: Mapping[int, float] | None,
) -> None:
    if not 0 <= steps <= plan.max_steps:
        raise PrivacyError(f"steps={steps} is outside the plan's 0 to {plan.max_steps}; report the charged steps.")
    if dataset is not None and _FINGERPRINT.search(dataset):
        raise PrivacyError("dataset looks like a fingerprint, which no report may show (P22); give None or a name.")
    if dataset_spent is not None and not (dataset_spent[0] >= plan.epsilon and dataset_spent[1] >= plan.delta):
        raise PrivacyError(
            f"dataset_spent={dataset_spent} is less than this run's own ({plan.epsilon}, {plan.delta}); reserve the "
            "run in the ledger first and pass the data set's sums."
        )
    if plan.clipping != "adaptive" and clipping_norm != plan.clipping_norm:
        raise PrivacyError(f"clipping_norm={clipping_norm} is not the plan's {plan.clipping_norm}; clip to the plan's.")
    deviation = plan.noise_standard_deviation_at(clipping_norm)
    planned = {
        "standard_deviation": deviation,
        "generator": plan.noise_generator,
        "floating_point_mode": plan.floating_point,
    }
    for name, value in planned.items():
        if noise.get(name, value) != value:
            raise PrivacyError(f"noise has {name}={noise[name]!r}, the plan {value!r}; build the noise from the plan.")
    for step, epsilon in (curve or {}).items():
        wrong = not 0 <= step <= plan.max_steps or not 0 <= epsilon <= plan.epsilon
        if wrong or (step == plan.max_steps and epsilon != plan.epsilon):
            raise PrivacyError(f"curve has epsilon {epsilon} at step {step}, unlike the plan; tabulate it anew.")


def _refuse_damaged(report: object, where: str) -> None:
    if not isinstance(report, Mapping) or report.get("format") != _FORMAT or set(report) != _FIELDS:
        raise PrivacyError(
            f"{where} is damaged or was written by another version of dpfa_hf: restore the file, or use the version "
            "that wrote it"
        )


def _coordinates(plan: PrivacyPlan) -> list[dict[str, str | float]]:
    """What is summed and noised as one vector: each part with the longest that one unit's may be, in units of C."""
    found: list[dict[str, str | float]] = [{"what": "the clipped gradient", "longest": 1.0}]
    if plan.private_loss_weight:
        what = f"the loss, clamped to between 0 and {plan.private_loss_max:.6g}"
        found.append({"what": what, "longest": plan.private_loss_weight})
    if plan.clipping_quantile_weight:
        what = "whether the gradient's norm is within the clipping norm, as plus or minus one"
        found.append({"what": what, "longest": plan.clipping_quantile_weight / 2})
    return found


def _releases(plan: PrivacyPlan, log_private_metrics: bool, eval_data: str | None) -> dict[str, list[str]]:
    covered = [
        "the trained weights and everything computed from them",
        "every checkpoint of the run, optimizer state included",
        "epsilon, step, learning rate, expected batch size and the norm of the noised gradient in the logs",
    ]
    if plan.private_loss_weight:
        covered.append("private_loss in the logs, a noised estimate of the mean training loss")
    if plan.clipping_quantile_weight:
        covered.append("the clipping norm of every step, which follows a noised share of the units")
    not_covered = [
        "how long a step took, as whoever watches the terminal or the machine can see",
        "anything computed from private rows before training, such as a tokenizer, a label list or a maximum length",
    ]
    if log_private_metrics:
        not_covered.append("training loss and other private figures in the logs: the operator switched them on")
    if eval_data == "private":
        not_covered.append("evaluation results on private data, which were returned to the caller")
    if eval_data == "public":
        not_covered.append("evaluation data, which the operator declared public")
    return {"covered": covered, "not_covered": not_covered}


def _assumptions(
    plan: PrivacyPlan,
    dataset: str | None,
    log_private_metrics: bool,
    eval_data: str | None,
    private: bool,
    processes: int,
    spread: bool,
) -> list[dict[str, str]]:
    """One {"assumption", "status"} for each thing that must be true for the epsilon to be true."""
    keys = "Noise keys and sampling come from the operating system and are never reused"
    if plan.noise_generator == "torch":
        keys += " (the generator, torch's, is not cryptographic)"
    drawn = ENFORCED if private else UNASSESSED
    found = {
        "Each unit is sampled by itself with probability q, never more than the ceiling in a step": drawn,
        "Every unit's whole gradient is clipped to C, tied weights included": ENFORCED,
        "Noise of the planned size is added once to every step, empty ones included": drawn,
        keys: drawn,
        "Training stops at the last planned step, and every step is in the ledger before its noise is drawn": ENFORCED,
        "The loss of one unit depends on that unit alone (tried on synthetic rows before step 1)": TESTED,
        "Per-unit gradients equal autograd's (tried on synthetic rows before step 1)": TESTED,
        **_rounding_assumptions(plan, drawn),
        "A person's data are in one unit; somebody in several units has less protection": WORD,
        "Nothing was computed from private rows before step 1 (filters, class weights, adapter initialisation)": WORD,
        "The base model was not trained on these data": WORD,
        "The ledger was not edited, deleted or put back to an older copy": WORD,
        "The machine kept the raw data, the noise keys and the unreleased files to itself": WORD,
    }
    if plan.privacy_unit == "user":
        found |= {
            "A user is whole in one micro-batch; at most k rows, drawn afresh, give one clipped gradient": ENFORCED,
            "Each row is that of the user whom its column names, under the same name in all of a person's rows": WORD,
        }
    if plan.privacy_unit == "document":
        found["One row of the data set is one whole document, neither packed nor cut before sampling"] = WORD
    if processes > 1:
        found["All processes have the same rows in the same order (some rows compared before step 1)"] = TESTED
    if spread:
        found["No row ends the run: the processes that share a model cannot leave out one that fails"] = UNASSESSED
    found["All runs on the same people's data, tuning included, are recorded under one name"] = (
        WORD if dataset else UNASSESSED
    )
    if log_private_metrics:
        found["Private figures in the logs tell nothing about a unit (the operator switched them on)"] = UNASSESSED
    else:
        found["Training loss, gradient norms, true batch sizes and step times stay out of the logs"] = ENFORCED
    if eval_data == "public":
        found["The evaluation data are public"] = WORD
    if eval_data == "private":
        found["Evaluation on private data steers nothing"] = ENFORCED
        found["Evaluation results on private data were not published"] = WORD
    found |= {
        "Nobody learns from how long a step takes or how much memory it needs": UNASSESSED,
        _UNAUDITED: UNASSESSED,
    }
    return [{"assumption": assumption, "status": status} for assumption, status in found.items()]


def _rounding_assumptions(plan: PrivacyPlan, drawn: str) -> dict[str, str]:
    """P18: what epsilon is for, and what that takes for granted."""
    if plan.floating_point == "hardened":
        return {
            "Epsilon is for the numbers in the machine: the noise is the ideal Gaussian's, rounded to a grid": drawn,
            "Rounding of norms and sums, in float64, stays within the sensitivity slack in the worst case": ENFORCED,
            "A row, computed alone, gives the same bits whatever came before it (tried on synthetic rows)": TESTED,
            "Arithmetic is IEEE 754's, and matrix products multiply and add, in whatever order": UNASSESSED,
            "PyTorch's float64 log, sine and cosine are right to 2^-42, and mpmath's intervals enclose": UNASSESSED,
            "Nobody breaks ChaCha20": UNASSESSED,
            "Units are drawn with probability q but for the rounding of float64 logarithms": UNASSESSED,
            "Dropout's masks, if there are any, are as good as independent (PyTorch's generator)": UNASSESSED,
        }
    return {
        "Rounding in float32 stays within the sensitivity slack": TESTED,
        "Epsilon is for real arithmetic; the noised sum is snapped to a grid; finite precision is unproved": UNASSESSED,
        "A row's forward pass rounds alike whatever its neighbours (bfloat16: moved a sum by 0.008 C)": UNASSESSED,
    }


def _base_model(name: str | None) -> tuple[str | None, str]:
    """(name, origin); of a local directory only the last part is passed on."""
    if not name:
        return None, "not stated"
    if os.path.exists(name) or re.search(r"^[/\\~.]|[/\\].*[/\\]|^[A-Za-z]:", name):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1], _LOCAL
    return name, _HUB if _HUB_ID.fullmatch(name) else "as the operator states it"


def without_credentials(url: str | None) -> str | None:
    """A database's URL without user, password and options."""
    if url is None:
        return None
    scheme, separator, place = url.partition("://")
    if not separator or not scheme.replace("+", "").isalnum():
        return "withheld: not a database URL"
    # At the last "@" because a password may hold any sign unquoted; a SQLite path has neither user nor password.
    if not scheme.startswith("sqlite"):
        _, at, place = place.rpartition("@")
        place = f"***{at}{place}" if at else place
    return f"{scheme}://{place.partition('?')[0]}"


def _software() -> dict[str, str]:
    from dpfa_hf import __version__

    ours = {"dpfa-hf": __version__, "dpfa-hf sha256": package_sha256()}
    return ours | {name: version(name) for name in ("transformers", "torch", "dp-accounting")}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return "inf" if isinstance(value, float) and value == math.inf else value


def replace_file(path: Path, text: str) -> None:
    """Writes `text` durably, as a whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


# ---- the model card -------------------------------------------------------------------------------------------------


def _new_card(report: Mapping[str, Any]) -> str:
    return f"# {shown(report['model']['class'])}\n"


def _merged(content: str, report: Mapping[str, Any]) -> str:
    """`content` with the report's section and metadata; everything else as it was."""
    try:
        card = RepoCard(content if content.lstrip().startswith("---") else _EMPTY_HEADER + content)
    except (ValueError, TypeError, yaml.YAMLError):
        card = RepoCard(_EMPTY_HEADER + content)
    found = card.data.get("tags")
    tags = found if isinstance(found, list) else [] if found is None else [found]
    tags = [tag for tag in tags if tag not in TAGS or report["private"]]
    card.data["tags"] = tags + [tag for tag in TAGS if tag not in tags and report["private"]] or None
    model = report["model"]
    if card.data.get("library_name") is None:
        card.data["library_name"] = "peft" if model["adapter"] else "transformers"
    if card.data.get("base_model") is None and model["base_model_origin"] == _HUB:
        card.data["base_model"] = model["base_model"]
    text = _SECTION.sub("\n\n", card.text).replace(BEGIN, "").replace(END, "").lstrip("\n")
    title = _TITLE.match(text)
    head, tail = (text[: title.end()], text[title.end() :]) if title else ("", text)
    parts = (head.rstrip("\n"), f"{BEGIN}\n{card_section(report)}\n{END}", tail.strip("\n"))
    card.text = "\n" + "\n\n".join(part for part in parts if part) + "\n"
    return str(card)


def card_section(report: Mapping[str, Any]) -> str:
    """The report as Markdown: what the card shows, and what the evidence begins with."""
    guarantee, dataset, unit, mechanism = (report[name] for name in ("guarantee", "dataset", "unit", "mechanism"))
    steps, accountant, noise, model = (report[name] for name in ("steps", "accountant", "noise", "model"))
    epsilon, delta = up(guarantee["epsilon"]), up(guarantee["delta"])
    question = "whether one unit was used" if unit["adjacency"] == "zero_out" else "which of two one unit was"
    if report["private"]:
        title = "## Differential privacy"
        statement = (
            f"This model was trained with differential privacy. What is protected is **{shown(unit['what'])}**: there "
            "is a limit to what these weights give away about it, whatever else somebody knows. The limit is "
            f"**ε = {epsilon} at δ = {delta}** (smaller is stronger): an attacker who knows all the other data, and "
            f"would otherwise have to toss a coin over {question}, is right at most "
            f"{_attack_accuracy(guarantee)} % of the time."
        )
    else:
        title, because = "## NOT PRIVATE", shown(report["not_private_because"])
        statement = (
            f"**NOT PRIVATE: this model carries no privacy guarantee**, because {because}. Do "
            "not release it if the training data are confidential. The numbers below describe a run for debugging or "
            "comparison."
        )
    total = "not recorded"
    if dataset["epsilon"] is not None:
        total = f"ε = {up(dataset['epsilon'])}, δ = {up(dataset['delta'])}"
    name = "this fingerprint only (the data set was given no name)" if dataset["name"] is None else dataset["name"]
    strength = "" if noise.get("cryptographic", True) else " (not cryptographic)"
    precision = "ε is for real arithmetic, the noised sum is snapped to a grid"
    if report["plan"]["floating_point"] == "hardened":
        precision = "ε is for finite precision, on the assumptions below; the noised sum is rounded to a grid"
    base = f"{model['base_model']} ({model['base_model_origin']})" if model["base_model"] else "not stated"
    numbers = {
        "ε (privacy loss of this run, all planned steps)": epsilon,
        "δ (what ε leaves open; below 1/n)": delta,
        "What is protected": f"{unit['what']}; {unit['how_built']}",
        "Neighbouring data sets": f"{unit['adjacency']}: {unit['neighbours']}",
        "All recorded runs on the data set, this one included": f"{total}; data set: {name}",
        "Units in the data set, n": mechanism["num_units"],
        "Sampling": f"{mechanism['sampler']}; each unit with probability q = {mechanism['sampling_probability']:.6g}",
        "Batch": f"{mechanism['expected_batch_size']} expected, at most {mechanism['max_batch_size']}",
        "Noise multiplier σ": f"{mechanism['noise_multiplier']:.6g}",
        "Clipping": f"{mechanism['clipping']}, norm C = {mechanism['clipping_norm']:g}"
        + (" at first" if mechanism["clipping"] == "adaptive" else "")
        + f", allowance for rounding {mechanism['sensitivity_slack']:.2g} C",
        "Released by every step": "; ".join(
            f"{each['what']} (at most {each['longest']:.4g} C)" for each in mechanism["coordinates"]
        )
        + f"; as one vector, at most {up(mechanism['joint_sensitivity'])} C of one unit",
        "Steps": f"{steps['charged']} taken of {steps['planned']} planned; ε is that of all planned steps",
        "Loss": mechanism["loss"],
        "Accountant": f"{accountant['name']} ({accountant['version']})",
        "Noise generator": f"{noise.get('generator', 'not stated')}{strength}; {precision}",
        "Trained": f"{model['trainable_parameters']:,} of {model['total_parameters']:,} parameters"
        + (f" (adapter: {model['adapter']})" if model["adapter"] else ""),
        "Base model": base,
        "Audit": _audit(report["audit"]),
    }
    run = f" --run {report['run']}" if report["run"] else ""
    not_protected = (
        "what is true of the training data as a whole (that is what the model learned)",
        "somebody whose data are in several units: they have less protection than the number says",
        "the base model and whatever it was trained on",
        "what people type into the model later",
        *report["releases"]["not_covered"],
    )
    covered = ["### Covered by the guarantee", bullets(report["releases"]["covered"])]
    explained = [f"**{name}.** {report[key]}" for name, key in _EXPLAINED.items()]
    paragraphs = [
        title,
        statement,
        table(("", ""), numbers.items()),
        *(covered if report["private"] else []),
        "### Not protected",
        bullets(not_protected),
        *(explained if report["private"] else []),
        "### What this rests on",
        table(("Assumption", "Status"), ((each["assumption"], each["status"]) for each in report["assumptions"])),
        "### How to check",
        f"`{REPORT_NAME}` beside this card holds every number. Where the ledger of the training is at hand, "
        f"`dpfa ledger show{run}` shows what was charged, and `dpfa ledger verify` whether its chain is whole. No law "
        "names an ε: this is evidence, not a verdict.",
    ]
    return "\n\n".join(paragraphs)


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "none"
    bound = "no lower bound on ε was measured"
    if audit["epsilon_lower_bound"] is not None:
        bound = (
            f"{audit['canaries']} canaries: ε is at least {audit['epsilon_lower_bound']:.4g} with "
            f"{100 * audit['confidence']:g} % confidence, and {up(audit['epsilon_claimed'])} was claimed for what was "
            "audited"
        )
    outcome = "passed" if audit["passed"] else f"FAILED: {', '.join(audit['failed'])}"
    return (
        f"{outcome}; {audit['checks']} checks; {bound}; {audit['mutants_caught']} of {audit['mutants']} planted bugs "
        f"caught; dpfa audit {audit['version']}, {audit['created'][:10]}"
    )


def _attack_accuracy(guarantee: Mapping[str, Any]) -> str:
    """Per cent, rounded up: (e^epsilon + delta) / (e^epsilon + 1), the best test at even odds (arXiv 1311.0776)."""
    odds = math.exp(-guarantee["epsilon"])
    return up(min(100.0, 100 * (1 + guarantee["delta"] * odds) / (1 + odds)))
