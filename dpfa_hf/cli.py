"""The command line `dpfa`: what a guarantee costs, whether a model can have one, and what has been spent.

Exit codes: 0 done; 1 refused, in one line on stderr; 2 wrong usage. With `--json` stdout holds one JSON value only.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer.core import TyperGroup

import dpfa_hf
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from torch import nn

    from dpfa_hf.ledger import Ledger, RunRecord
    from dpfa_hf.memory_plan import Request
    from dpfa_hf.plan import PrivacyPlan

_PIPE_WIDTH = 160
_UNNAMED = re.compile(r"unnamed-[0-9a-f]{64}")
_AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}


class _OneLineErrors(TyperGroup):
    """Turns a PrivacyError of any command into its one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PrivacyError as error:
            typer.echo(f"dpfa: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="dpfa",
    cls=_OneLineErrors,
    help="Differentially private fine-tuning: plan it, check a model for it, and see what has been spent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ledger_app = typer.Typer(help="The record of what every run on every data set may spend.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
LedgerUrl = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        help="The ledger's database URL, such as sqlite:////home/me/ledger.db. Default: DPFA_LEDGER in the "
        "environment, else the file in your user data folder.",
        show_default=False,
    ),
]
WitnessUrl = Annotated[
    str | None,
    typer.Option(
        help="The database URL of the ledger's witness. Default: DPFA_LEDGER_WITNESS in the environment, else none.",
        show_default=False,
    ),
]


def _one_of(*choices: str) -> Callable[[str], str]:
    def checked(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return checked


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dpfa_hf {dpfa_hf.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# ---- plan -----------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    num_units: Annotated[
        int | None,
        typer.Option(
            "--num-units", "-n", min=1, help="Privacy units in the data set: its rows, or users, before any filter."
        ),
    ] = None,
    target_epsilon: Annotated[
        list[float] | None,
        typer.Option(
            help="Epsilon that the run may spend; repeat it to compare. Smaller is more private. Default: 1 3 8."
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Delta, below 1/n. Default: 1/(10 n).", show_default=False)
    ] = None,
    expected_batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Expected units in a step; repeat it to compare. Default: 256 and 1024, as n allows."),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data; Trainer's num_train_epochs. Default: 3.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of --epochs.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Fix sigma; the steps are then cut to what epsilon affords.")
    ] = None,
    privacy_unit: Annotated[
        str,
        typer.Option(
            callback=_one_of("example", "document", "user"), help="What --num-units and batch sizes count; no price."
        ),
    ] = "example",
    adjacency: Annotated[
        str, typer.Option(callback=_one_of("zero_out", "replace_one"), help="zero_out, or replace_one (dearer).")
    ] = "zero_out",
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Ceiling on a step's units. Default: so high that it costs nothing.")
    ] = None,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm C.")] = 1.0,
    clipping: Annotated[
        str,
        typer.Option(
            callback=_one_of("flat", "automatic", "per_layer", "adaptive"),
            help="adaptive has a price; flat, automatic and per_layer have none.",
        ),
    ] = "flat",
    private_loss_weight: Annotated[
        float, typer.Option(help="Weight of the private loss curve, which has a price; 0 for none.")
    ] = 0.08,
    accountant: Annotated[str, typer.Option(callback=_one_of("pld", "rdp"), help="pld (tight), or rdp.")] = "pld",
    floating_point: Annotated[
        str,
        typer.Option(callback=_one_of("snapped", "hardened"), help="hardened: epsilon for finite precision, on CPUs."),
    ] = "snapped",
    measure: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Instead, find how many rows of this model fit into memory."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="With --measure: tokens in every row.")] = 128,
    task: Annotated[
        str, typer.Option(callback=_one_of("auto", *_AUTO_CLASSES), help="With --measure: as for dpfa check.")
    ] = "auto",
    lora: Annotated[int | None, typer.Option(min=1, help="With --measure: as for dpfa check.")] = None,
    attn_implementation: Annotated[str, typer.Option(help="With --measure: as for dpfa check.")] = "dp_flash",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="With --measure: compute activations twice, store fewer.")
    ] = False,
    memory_limit: Annotated[
        float | None, typer.Option(help="With --measure: GiB at most. Default: nine tenths of what is free.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What does epsilon 3 cost on a data set of this size? Or, with --measure, how many rows fit into memory?

    Every row is one plan, made by the code that training uses: the noise multiplier sigma that the target needs, and
    the noise that an average gradient then carries. Nothing is read but the numbers you give.

    --measure runs private steps on invented rows in processes of their own, with more and more rows, until memory or
    the gain in speed ends; one that runs out of memory harms nothing. MODEL needs no weights.

    Example: dpfa plan --num-units 8530 --target-epsilon 3 --expected-batch-size 512 --epochs 10

    Example: dpfa plan --measure ./my-model --tokens 256 --lora 16
    """
    if (measure is None) == (num_units is None):
        raise typer.BadParameter("give --num-units, or a model to --measure")
    if measure is not None:
        from dpfa_hf.memory_plan import Request

        request = Request(
            measure,
            tokens,
            task=task,
            lora=lora,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
        )
        _print_memory_plan(request, memory_limit, as_json)
        return
    assert num_units is not None
    if epochs is not None and max_steps is not None:
        raise typer.BadParameter("give --epochs or --max-steps, not both")
    if epochs is not None and not 0 < epochs < math.inf:
        raise typer.BadParameter("--epochs must be above 0")
    batches = expected_batch_size or [size for size in (256, 1024) if size <= num_units] or [num_units]
    cases = [(epsilon, batch) for epsilon in target_epsilon or [1.0, 3.0, 8.0] for batch in batches]
    rows = []
    for epsilon, batch in track(cases, "Planning", console=Console(stderr=True), transient=True):
        steps = max_steps or math.ceil((3 if epochs is None else epochs) * math.ceil(num_units / batch))
        row: dict[str, Any] = {"target_epsilon": epsilon, "expected_batch_size": batch, "asked_steps": steps}
        try:
            arguments = PrivacyArguments(
                target_epsilon=epsilon,
                target_delta=delta,
                noise_multiplier=noise_multiplier,
                per_example_max_grad_norm=max_grad_norm,
                clipping=clipping,  # type: ignore[arg-type]
                private_loss_weight=private_loss_weight,
                max_batch_size=max_batch_size,
                privacy_unit=privacy_unit,  # type: ignore[arg-type]
                # Any name will do: nothing that is printed depends on it.
                privacy_unit_column="user" if privacy_unit == "user" else None,
                adjacency=adjacency,  # type: ignore[arg-type]
                accountant=accountant,  # type: ignore[arg-type]
                floating_point=floating_point,  # type: ignore[arg-type]
            )
            row |= _planned(arguments, num_units, batch, steps)
        except PrivacyError as error:
            row["refused"] = str(error)
        rows.append(row)
    if as_json:
        _print_json(rows)
    else:
        _print_plans(rows)
    if all(row["refused"] for row in rows):
        raise typer.Exit(1)


def _print_memory_plan(request: Request, limit_gib: float | None, as_json: bool) -> None:
    from dpfa_hf import memory_plan

    limit = None if limit_gib is None else int(limit_gib * 2**30)
    with Console(stderr=True).status("Measuring"):
        found = memory_plan.measure(request, limit_bytes=limit)
    gib = f"{found.limit_bytes / 2**30:.1f} GiB"
    if as_json:
        _print_json(found.to_dict())
    else:
        rows = [
            (
                each.micro_batch_size,
                "" if each.peak_bytes is None else f"{each.peak_bytes / 2**30:.2f} GiB",
                "" if each.rows_per_second is None else f"{each.rows_per_second:.3g}",
                each.outcome,
            )
            for each in found.measurements
        ]
        _print_table(
            (f"rows of {request.tokens} tokens", f"peak on {request.device}", "rows per second", f"of {gib}"), rows
        )
    if found.recommended is None:
        raise PrivacyError(
            f"not even one row of {request.tokens} tokens fits into {gib}: use fewer tokens, --lora or "
            "--gradient-checkpointing, or a larger machine"
        )
    if not as_json:
        typer.echo(
            f"Use per_device_train_batch_size={found.recommended}: more rows are not faster, or do not fit. It changes "
            "memory and speed\nand nothing else, as long as expected_batch_size is set."
        )


def _planned(arguments: PrivacyArguments, num_units: int, batch: int, steps: int) -> dict[str, Any]:
    from dpfa_hf.accounting import make_plan, statistics_prices

    # Any scale will do: the price does not depend on it.
    found: PrivacyPlan = make_plan(
        arguments, num_units=num_units, expected_batch_size=batch, max_steps=steps, loss_scale=1.0
    )
    prices = statistics_prices(found)
    names = ("epsilon", "delta", "noise_multiplier", "clipping_norm", "sampling_probability", "max_steps")
    return {
        **{
            name: getattr(found, name) for name in (*names, "max_batch_size", "privacy_unit", "adjacency", "accountant")
        },
        "noise_per_example": found.noise_standard_deviation / found.expected_batch_size,
        "price_private_loss": prices.get("private_loss"),
        "price_adaptive_clipping": prices.get("adaptive_clipping"),
        "private": found.is_private,
        "refused": None,
    }


def _print_plans(rows: Sequence[Mapping[str, Any]]) -> None:
    cells = []
    for row in rows:
        shown = [f"{row['target_epsilon']:g}", row["expected_batch_size"]]
        if row["refused"] is None:
            epsilon = f"{row['epsilon']:.4f}" if row["private"] else "NOT PRIVATE"
            prices = [row["price_private_loss"], row["price_adaptive_clipping"]]
            shown += [row["max_steps"], row["max_batch_size"], epsilon]
            shown += ["-" if price is None else f"{price:.4f}" for price in prices] + [f"{row['delta']:.3g}"]
            shown += [f"{row['noise_multiplier']:.4g}", f"{row['noise_per_example']:.3g}"]
        cells.append(shown)
    prices_heads = ("ε for the loss curve", "ε for adaptive C")
    _print_table(
        (
            "target ε",
            "expected batch",
            "steps",
            "batch ceiling",
            "ε",
            *prices_heads,
            "δ",
            "σ",
            "noise/example σC/batch",
        ),
        cells,
    )
    for row in rows:
        if row["refused"]:
            typer.echo(f"target ε {row['target_epsilon']:g}, batch {row['expected_batch_size']}: {row['refused']}")
    typer.echo(
        "\nThe last column decides how well the model learns: it is the noise on the average gradient, whose norm is "
        "at most C.\nLower is better. It falls with a larger batch (which costs computing time), a larger epsilon "
        "(which costs privacy),\nmore data, or fewer steps. Loss curve and adaptive clipping are part of ε: "
        "without them the same noise would\ncost so much less (--private-loss-weight 0, --clipping flat)."
    )


# ---- check ----------------------------------------------------------------------------------------------------------


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A model's directory, or the Hub id of one already downloaded.")],
    task: Annotated[
        str,
        typer.Option(
            callback=_one_of("auto", *_AUTO_CLASSES),
            help=f"auto (the head that the configuration names), or one of {', '.join(_AUTO_CLASSES)}.",
        ),
    ] = "auto",
    attn_implementation: Annotated[
        str, typer.Option(help="Attention to build the model with; eager where dp_flash is refused.")
    ] = "dp_flash",
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train a LoRA adapter of this rank on all linear layers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Can this model be trained privately, and how is each trainable layer covered?

    Builds the model, lists its trainable layers with the rule that gives their per-example gradients, and tries on
    invented rows that examples do not touch each other and that the gradients are autograd's. These are the checks that
    DPTrainer makes before its first step. No training data are read.

    Example: dpfa check ./my-model --task sequence_classification --lora 16
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result: dict[str, Any] = {
        "model": model,
        "class": None,
        "task": None,
        "weights": None,
        "layers": [],
        "attention": [],
    }
    refusal = None
    configuration = _configuration(model)
    try:
        built, result["task"], result["weights"] = _build(model, configuration, task, attn_implementation)
        result["class"] = type(built).__name__
        if lora is not None:
            built = _with_lora(built, lora, result["task"])
        result["layers"] = _trainable_layers(built)
        _preflight(built, result["task"])
        result["attention"] = _attention_backends(built, result["task"])
    except PrivacyError as error:
        refusal = str(error)
    result |= {"covered": refusal is None, "refusal": refusal}
    if as_json:
        _print_json(result)
    elif result["class"]:
        typer.echo(f"{result['class']}, task {result['task']}, weights {result['weights']}")
        _print_table(
            ("trainable layer", "rule", "layers", "type", "parameters"),
            [
                (each["name"], each["rule"] or "NONE", f"×{each['count']}", each["type"], f"{each['parameters']:,}")
                for each in result["layers"]
            ],
        )
        if result["attention"]:
            _print_table(
                ("dp_flash attention", "layers", "computed here by", "on CUDA in bfloat16 by"),
                [(each["call"], f"×{each['count']}", each["here"], each["cuda"]) for each in result["attention"]],
            )
    if refusal is not None:
        raise PrivacyError(refusal)
    if not as_json:
        typer.echo("Covered: every trainable parameter has a rule, and the rules were right on synthetic rows.")


def _configuration(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise PrivacyError(
            f"MODEL {name} has no configuration that can be read offline ({_first_line(error)}): name a directory with "
            "a config.json, or download the model first"
        ) from None


def _build(name: str, configuration: Any, task: str, attention: str) -> tuple[nn.Module, str, str]:
    """(model, task, where its weights come from); the weights do not matter for coverage, so random ones will do."""
    import transformers

    from dpfa_hf.per_example.losses import task_of

    if task == "auto":
        heads = configuration.architectures or []
        model_class = next((getattr(transformers, head) for head in heads if hasattr(transformers, head)), None)
        if model_class is None:
            raise PrivacyError(f"MODEL {name} does not say which head it has; give one with --task")
        load, create = model_class.from_pretrained, model_class._from_config
    else:
        model_class = getattr(transformers, _AUTO_CLASSES[task])
        load, create = model_class.from_pretrained, model_class.from_config
    try:
        try:
            model = load(name, config=configuration, local_files_only=True, attn_implementation=attention)
            weights = "loaded"
        except OSError:
            model, weights = create(configuration, attn_implementation=attention), "random (none found)"
    except PrivacyError:
        raise
    except Exception as error:  # any model's code may raise anything; it is reported, and nothing is passed over
        raise PrivacyError(
            f"MODEL {name} cannot be built ({type(error).__name__}: {_first_line(error)}): check its files, --task and "
            "--attn-implementation"
        ) from error
    if task != "auto":
        return model, task, weights
    try:
        return model, task_of(model), weights
    except PrivacyError:
        raise PrivacyError(f"MODEL {name} is a {type(model).__name__}, whose task is not known; give --task") from None


def _with_lora(model: nn.Module, rank: int, task: str) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise PrivacyError("--lora needs PEFT, which is not installed: pip install 'dpfa-hf[peft]'") from None
    kinds = {
        "causal_lm": "CAUSAL_LM",
        "sequence_classification": "SEQ_CLS",
        "token_classification": "TOKEN_CLS",
        "question_answering": "QUESTION_ANS",
        "seq2seq_lm": "SEQ_2_SEQ_LM",
    }
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type=kinds.get(task)))


def _trainable_layers(model: nn.Module) -> list[dict[str, Any]]:
    """One entry for all layers of one place, type and rule: the numbers of repeated blocks become "*".

    The rule is None where there is none, and "tied" where the layers that share the parameters have one.
    """
    from dpfa_hf.per_example.layers import find_rule, rule_name

    groups: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    seen: set[int] = set()
    owners = [(name, module, find_rule(module)) for name, module in model.named_modules()]
    ruled = {id(each) for _, module, rule in owners if rule for each in module.parameters(recurse=False)}
    for name, module, rule in owners:
        own = [each for each in module.parameters(recurse=False) if each.requires_grad]
        if not own:
            continue
        tied = "tied" if all(id(each) in ruled for each in own) else None
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), type(module).__name__, rule_name(rule) if rule else tied)
        group = groups.setdefault(key, dict(zip(("name", "type", "rule"), key, strict=True), count=0, parameters=0))
        group["count"] += 1
        # A tied parameter is counted where it comes first.
        group["parameters"] += sum(each.numel() for each in own if id(each) not in seen)
        seen.update(map(id, own))
    return list(groups.values())


def _preflight(model: nn.Module, task: str) -> None:
    from dpfa_hf.per_example import preflight
    from dpfa_hf.per_example.gradients import PerExampleGradients
    from dpfa_hf.per_example.losses import per_example_loss

    engine = PerExampleGradients(model, per_example_loss(model, task), clipping_norm=1.0)
    preflight.check(engine, preflight.synthetic_batch(model, task, {}), compare_with_model_loss=True)


def _attention_backends(model: nn.Module, task: str) -> list[dict[str, Any]]:
    """Who computes the attention of the layers for plain, padded and, where the task allows it, packed rows; none
    without dp_flash.

    Decided by the form of the calls alone, so that a machine without a GPU can tell what one would take.
    """
    from collections import Counter

    import torch
    from transformers import DataCollatorWithFlattening

    from dpfa_hf._kernel import Call, choose, observed
    from dpfa_hf.per_example import losses, packing, preflight

    padded = preflight.synthetic_batch(model, task, {})
    forms = {"no padding": {k: v for k, v in padded.items() if k != "attention_mask"}, "padded": padded}
    if task in losses.PACKABLE_TASKS and getattr(model.config, "model_type", None) not in packing.LEAKING_MODEL_TYPES:
        inside = padded["attention_mask"].bool()
        rows = [
            {name: padded[name][i][each].tolist() for name in ("input_ids", "labels")} for i, each in enumerate(inside)
        ]
        forms["packed"] = packing.normalise(DataCollatorWithFlattening()(rows), len(rows))
    loss = losses.per_example_loss(model, task)
    found: Counter[tuple[str, Call, str]] = Counter()
    for form, batch in forms.items():

        def note(call: Call, backend: str, form: str = form) -> None:
            found[form, call, backend] += 1

        with torch.no_grad(), observed(note):
            loss(model.eval(), batch)
    return [
        {
            "call": ", ".join([form, *_described(call)]),
            "count": count,
            "here": backend,
            "cuda": choose(call._replace(device="cuda", dtype=torch.bfloat16)),
        }
        for (form, call, backend), count in found.items()
    ]


def _described(call: Any) -> list[str]:
    words = ["causal" if call.is_causal else "bidirectional"]
    if call.window is not None:
        words.append(f"window {call.window}")
    words += [name for name in ("softcap", "sinks", "dropout") if getattr(call, name)]
    return words + ["a written-out mask or bias"] * call.dense


# ---- ledger ---------------------------------------------------------------------------------------------------------


@ledger_app.command()
def show(
    ledger: LedgerUrl = None,
    run: Annotated[str | None, typer.Option(help="One run's id, as privacy.json has it; adds its plan.")] = None,
    as_json: AsJson = False,
) -> None:
    """What did every run reserve, and what is left of the budgets?

    Epsilon and delta are what a run reserved before its first step, the guarantee for its last one. Nothing is given
    back, however early a run stopped.

    Example: dpfa ledger show --ledger sqlite:////home/me/ledger.db
    """
    with _existing_ledger(ledger) as opened:
        if run is not None:
            opened.run(run)
        records, sums, place = opened.runs(), opened.datasets(), opened.display_url
    names = _public_names(record.dataset for record in records)
    shown = [record for record in records if run in (None, record.run)]
    if as_json:
        _print_json([_run_values(record, names, with_plan=run is not None) for record in shown])
        return
    typer.echo(f"ledger {place}")
    _print_table(
        ("run", "data set", "steps charged", "ε", "δ", "status", "opened (UTC)"),
        [
            (
                each.run,
                names[each.dataset],
                f"{each.steps} of {each.max_steps}",
                f"{each.epsilon:.6g}" if math.isfinite(each.epsilon) else "NOT PRIVATE",
                f"{each.delta:.3g}",
                each.status,
                each.created[:16].replace("T", " "),
            )
            for each in shown
        ],
    )
    if run is not None:
        _print_table(("plan", ""), shown[0].plan.items())
    _print_table(
        ("data set", "runs", "ε reserved", "of budget", "δ reserved", "of budget", "unit", "adjacency"),
        [
            (
                names[each.dataset],
                each.runs,
                f"{each.epsilon:.6g}",
                f"{each.budget[0]:g}" if each.budget else "no budget",
                f"{each.delta:.3g}",
                f"{each.budget[1]:g}" if each.budget else "no budget",
                each.privacy_unit,
                each.adjacency,
            )
            for each in sums
            if any(each.dataset == record.dataset for record in shown)
        ],
    )


@ledger_app.command()
def verify(ledger: LedgerUrl = None, witness: WitnessUrl = None, as_json: AsJson = False) -> None:
    """Is the ledger's chain of entries whole, and has it every entry that its witness has seen?

    Replays every entry and compares it with its hash and with the totals; exit code 1 if anything differs. Whoever may
    write to the database can rewrite all of it, or put back an older copy: only a witness notices (`dpfa ledger
    witness`), or a head (number and hash) that you noted elsewhere.

    Example: dpfa ledger verify --ledger sqlite:////home/me/ledger.db
    """
    with _existing_ledger(ledger, witness) as opened:
        problems, head, place, moved = opened.verify(), opened.head(), opened.display_url, opened.moved_to()
    problems = [_UNNAMED.sub("unnamed", problem) for problem in problems]
    if as_json:
        _print_json({"ledger": place, "ok": not problems, "problems": problems, "head": list(head), "moved_to": moved})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"ledger {place}: {'BROKEN' if problems else 'whole'}; head {head[0]} {head[1]}")
        if moved:
            typer.echo(f"It is closed: it moved to {moved}.")
    if problems:
        raise typer.Exit(1)


@ledger_app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A new file. It is readable by you alone.")],
    ledger: LedgerUrl = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Move: close this ledger for good, to go on at this database URL after `dpfa ledger import`."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write every entry, as JSON lines: for an auditor, or to move to another database.

    The file names data sets. Without --to it does not hold the ledger's secret and cannot be imported. With --to it
    does: delete it once it is imported. This ledger then refuses to be used, since two that are alive would spend the
    budget twice; if the file gets lost, the same command writes it again.

    Example: dpfa ledger export moving.jsonl --to postgresql://ledger@db.example.org/ledger
    """
    with _existing_ledger(ledger) as opened:
        head, place = opened.export(file, to=to), opened.display_url
    done = f"the entries of {place}" if to is None else f"ledger {place}, which is closed now: import it, and delete it"
    _print_copy(file, head, done, as_json)


@ledger_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `dpfa ledger export --to` wrote.")],
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a ledger that was moved here: from SQLite to PostgreSQL, for example.

    Every byte of the file is checked. The place must be empty, and the one that the export named. Runs go on from their
    checkpoints; set DPFA_LEDGER to the new place first.

    Example: dpfa ledger import moving.jsonl --ledger postgresql://ledger@db.example.org/ledger
    """
    from dpfa_hf.ledger import import_ledger

    with import_ledger(file, ledger, witness=witness) as opened:
        _print_copy(file, opened.head(), f"ledger {opened.display_url}, which is in use now", as_json)


@ledger_app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A new file. It is readable by you alone.")],
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write a copy for `dpfa ledger restore`, of one moment, while runs go on.

    The file holds the ledger's secret and names data sets: keep it as safe as the ledger.

    Example: dpfa ledger backup /backup/ledger-2026-11-23.jsonl
    """
    with _existing_ledger(ledger, witness) as opened:
        head, place = opened.backup(file), opened.display_url
    _print_copy(file, head, f"ledger {place}", as_json)


@ledger_app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `dpfa ledger backup` wrote.")],
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    unwitnessed: Annotated[
        bool, typer.Option("--unwitnessed", help="Your word that nothing was written after the backup; recorded.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup in the place of a lost ledger, unless it is older than what the witness has seen.

    An older backup would refund what was spent after it. Every byte is checked, and the place must be empty.

    Example: dpfa ledger restore ledger-2026-11-23.jsonl --ledger sqlite:////home/me/ledger.db --witness sqlite:////nas/w.db
    """
    from dpfa_hf.ledger import restore_ledger

    with restore_ledger(file, ledger, witness=witness, unwitnessed=unwitnessed) as opened:
        _print_copy(file, opened.head(), f"ledger {opened.display_url}, which is in use now", as_json)


@ledger_app.command("witness")
def start_witness(ledger: LedgerUrl = None, witness: WitnessUrl = None, as_json: AsJson = False) -> None:
    """Give the ledger a witness: a second database, kept elsewhere, that remembers how far the ledger has come.

    From now on the ledger is refused without it, and if an older copy of it is put in its place. Set
    DPFA_LEDGER_WITNESS for everybody who trains. A new ledger gets the witness that is set there by itself.

    Example: dpfa ledger witness --witness sqlite:////nas/witness.db
    """
    with _existing_ledger(ledger, witness) as opened:
        opened.start_witness()
        head, place = opened.head(), opened.display_url
    if as_json:
        _print_json({"ledger": place, "head": list(head)})
    else:
        typer.echo(f"ledger {place} is witnessed from entry {head[0]} on; set DPFA_LEDGER_WITNESS wherever it is used")


def _print_copy(file: Path, head: tuple[int, str], what: str, as_json: bool) -> None:
    if as_json:
        _print_json({"file": str(file), "head": list(head)})
    else:
        typer.echo(f"{file}: {what}; head {head[0]} {head[1]}")


def _existing_ledger(url: str | None, witness: str | None = None) -> Ledger:
    """The ledger, opened only if it is there: looking for one creates none."""
    from dpfa_hf.ledger import Ledger

    return Ledger(url, witness=witness, create=False)


def _public_names(datasets: Iterable[str]) -> dict[str, str]:
    """By data set: its name, or a number where the name is a fingerprint, which nothing may show (P22)."""
    names: dict[str, str] = {}
    for dataset in dict.fromkeys(datasets):
        unnamed = sum(name.startswith("unnamed ") for name in names.values())
        names[dataset] = f"unnamed {unnamed + 1}" if _UNNAMED.fullmatch(dataset) else dataset
    return names


def _run_values(record: RunRecord, names: Mapping[str, str], *, with_plan: bool) -> dict[str, Any]:
    budget = None if record.budget is None else dict(zip(("epsilon", "delta"), record.budget, strict=True))
    same = ("run", "steps", "max_steps", "epsilon", "delta", "privacy_unit", "adjacency", "status", "created")
    values = {name: getattr(record, name) for name in same}
    plan = {"plan": record.plan} if with_plan else {}
    return {**values, "dataset": names[record.dataset], "budget": budget, **plan}


# ---- printing -------------------------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n", 1)[0].split()) or "no message"


def _print_json(value: Any) -> None:
    """Infinity as the string "inf", as in privacy.json."""
    value = [_finite(each) for each in value] if isinstance(value, list) else _finite(value)
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "inf" if value == math.inf else value for name, value in values.items()}


def _print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    # A narrow pipe would cut ids in two; names of data sets may look like markup.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(*head)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def main() -> None:
    """The entry point of the console script `dpfa`."""
    app(prog_name="dpfa")


if __name__ == "__main__":
    main()
