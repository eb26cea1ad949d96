"""`dpfa plan`: what a guarantee costs, and how many rows of a model fit into memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.cli.options import AsJson, one_of
from dpfa_hf.cli.printing import print_json, print_table
from dpfa_hf.errors import PrivacyError
from dpfa_hf.models import AUTO_CLASSES

if TYPE_CHECKING:
    from dpfa_hf.memory_plan import Request
    from dpfa_hf.plan import PrivacyPlan


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
            callback=one_of("example", "document", "user"), help="What --num-units and batch sizes count; no price."
        ),
    ] = "example",
    adjacency: Annotated[
        str, typer.Option(callback=one_of("zero_out", "replace_one"), help="zero_out, or replace_one (dearer).")
    ] = "zero_out",
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Ceiling on a step's units. Default: so high that it costs nothing.")
    ] = None,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping norm C.")] = 1.0,
    clipping: Annotated[
        str,
        typer.Option(
            callback=one_of("flat", "automatic", "per_layer", "adaptive"),
            help="adaptive has a price; flat, automatic and per_layer have none.",
        ),
    ] = "flat",
    private_loss_weight: Annotated[
        float, typer.Option(help="Weight of the private loss curve, which has a price; 0 for none.")
    ] = 0.08,
    accountant: Annotated[str, typer.Option(callback=one_of("pld", "rdp"), help="pld (tight), or rdp.")] = "pld",
    floating_point: Annotated[
        str,
        typer.Option(callback=one_of("snapped", "hardened"), help="hardened: epsilon for finite precision, on CPUs."),
    ] = "snapped",
    compare: Annotated[
        bool, typer.Option("--compare", help="Chart what each single change to one plan would buy; up to a minute.")
    ] = False,
    tuning_runs: Annotated[
        int | None, typer.Option(min=2, help="With --compare: what this many tuning runs cost.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(dir_okay=False, help="With --compare: draw the charts there.")] = None,
    measure: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Instead, find how many rows of this model fit into memory."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="With --measure: tokens in every row.")] = 128,
    task: Annotated[
        str, typer.Option(callback=one_of("auto", *AUTO_CLASSES), help="With --measure: as for dpfa check.")
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
    """What does epsilon 3 cost on a data set of this size? What would a change buy? How many rows fit into memory?

    Every row is one plan, made by the code that training uses: the noise multiplier sigma that the target needs, and
    the noise that an average gradient then carries. Nothing is read but the numbers you give.

    --compare takes one target and one batch, and says which single change would buy the most.

    --measure runs private steps on invented rows in processes of their own, with more and more rows, until memory or
    the gain in speed ends; one that runs out of memory harms nothing. MODEL needs no weights.

    Example: dpfa plan --num-units 8530 --target-epsilon 3 --expected-batch-size 512 --epochs 10

    Example: dpfa plan -n 8530 --target-epsilon 3 --expected-batch-size 512 --epochs 10 --compare --tuning-runs 10

    Example: dpfa plan --measure ./my-model --tokens 256 --lora 16
    """
    if (measure is None) == (num_units is None):
        raise typer.BadParameter("give --num-units, or a model to --measure")
    if not compare and (tuning_runs is not None or svg is not None):
        raise typer.BadParameter("--tuning-runs and --svg need --compare")
    if measure is not None:
        if compare:
            raise typer.BadParameter("give --compare or --measure, not both")
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

    def arguments_for(epsilon: float) -> PrivacyArguments:
        return PrivacyArguments(
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

    batches = expected_batch_size or [size for size in (256, 1024) if size <= num_units] or [num_units]
    asked_steps = {
        batch: max_steps or math.ceil((3 if epochs is None else epochs) * math.ceil(num_units / batch))
        for batch in batches
    }
    if compare:
        from dpfa_hf.cli import compare as comparing
        from dpfa_hf.comparison import Case

        if len(target_epsilon or []) > 1 or len(expected_batch_size or []) > 1:
            raise typer.BadParameter("--compare takes one --target-epsilon and one --expected-batch-size")
        base = Case(arguments_for((target_epsilon or [3.0])[0]), num_units, batches[0], asked_steps[batches[0]])
        comparing.show(base, tuning_runs, svg, as_json)
        return
    cases = [(epsilon, batch) for epsilon in target_epsilon or [1.0, 3.0, 8.0] for batch in batches]
    rows = []
    for epsilon, batch in track(cases, "Planning", console=Console(stderr=True), transient=True):
        steps = asked_steps[batch]
        row: dict[str, Any] = {"target_epsilon": epsilon, "expected_batch_size": batch, "asked_steps": steps}
        try:
            row |= _planned(arguments_for(epsilon), num_units, batch, steps)
        except PrivacyError as error:
            row["refused"] = str(error)
        rows.append(row)
    if as_json:
        print_json(rows)
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
        print_json(found.to_dict())
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
        print_table(
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
    print_table(
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
