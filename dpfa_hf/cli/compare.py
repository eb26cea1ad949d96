"""How `dpfa plan --compare` asks and prints: small charts in the terminal, numbers as JSON, a drawing as SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import track

from dpfa_hf.cli.printing import print_json, print_table
from dpfa_hf.comparison import (
    PROXY_IGNORES,
    SELECTION_CONDITIONS,
    Case,
    Change,
    Comparison,
    Kind,
    Point,
    Tuning,
    compare,
    tuning_costs,
)
from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = 24
_HEADS = {"expected_batch_size": "expected batch", "max_steps": "steps", "target_epsilon": "target ε"}
_KINDS: dict[Kind, str] = {
    "free": "same promise, same data",
    "needs data": "same promise, more data",
    "costs privacy": "a weaker promise",
}


def show(base: Case, tuning_runs: int | None, svg: Path | None, as_json: bool) -> None:
    """Compares, prints, and draws where asked to.

    Raises:
        PrivacyError: see `comparison.compare`, and where nothing can be drawn; found out before any computing.
    """
    if svg is not None:
        _refuse_drawing(svg)
    errors = Console(stderr=True)
    progress = partial(track, description="Planning", console=errors, transient=True)
    comparison = compare(base, progress)
    tuning = None
    if tuning_runs is not None:
        tuning = tuning_costs(comparison.base, tuning_runs, partial(progress, description="Tuning"))
    if svg is not None:
        _draw(comparison, svg)
    if as_json:
        print_json({**comparison.to_dict(), "tuning": None if tuning is None else tuning.to_dict()})
        return
    _print_curves(comparison)
    _print_changes(comparison)
    if tuning is not None:
        _print_tuning(comparison.base, tuning)


def _bars(values: Sequence[float]) -> list[str]:
    longest = max(values, default=0.0)
    return ["█" * max(round(_BAR * value / longest), 1) for value in values]


def _print_curves(comparison: Comparison) -> None:
    for name, points in comparison.curves.items():
        planned = [point for point in points if point.plan is not None]
        rows = []
        for point, bar in zip(planned, _bars([point.noise_over_the_run for point in planned]), strict=True):
            assert point.plan is not None
            value = {
                "expected_batch_size": point.plan.expected_batch_size,
                "max_steps": point.plan.max_steps,
                "target_epsilon": point.plan.target_epsilon,
            }[name]
            row = point.to_dict()
            rows.append(
                (
                    f"{value:g}" + (" (base)" if point == comparison.base else ""),
                    f"{point.plan.noise_multiplier:.4g}",
                    f"{row['noise_per_example']:.3g}",
                    f"{point.noise_over_the_run:.3g}",
                    bar,
                )
            )
        print_table((_HEADS[name], "σ", "noise/example σC/batch", "noise over the run", ""), rows)
        for point in points:
            if point.refused is not None:
                typer.echo(point.refused)


def _print_changes(comparison: Comparison) -> None:
    rows: list[tuple[str, ...]] = []
    for change in comparison.changes:
        noise = "refused" if change.point.plan is None else f"{1 / change.gain:.2f} x"
        rows.append((change.name, noise, _KINDS[change.kind], f"{change.computing:g} x", change.costs))
    print_table(("one change", "noise over the run", "what stays", "computing", "what it costs"), rows)
    for change in comparison.changes:
        if change.point.refused is not None:
            typer.echo(f"{change.name}: {change.point.refused}")
    typer.echo()
    most = comparison.most()
    typer.echo(f"The single change that buys the most: {_said(most)}" + (f"; {_KINDS[most.kind]}." if most else "."))
    typer.echo(f"With the same promise and the same data: {_said(comparison.best('free'))}.")
    typer.echo(f"With more data: {_said(comparison.best('needs data'))}.")
    typer.echo(f"Not a knob but a weaker promise to everybody in the data: {_said(comparison.best('costs privacy'))}.")
    _paragraph(
        "\nNoise over the run is sigma / (expected batch x sqrt(steps)), the noise in the mean of all average "
        "gradients, in units of C: what one coordinate of a steady gradient has to stand out from. It is a proxy from "
        f"public numbers, not accuracy. It ignores {'; '.join(PROXY_IGNORES)}. Gains below 1 % are within the "
        "precision of σ."
    )


def _said(change: Change | None) -> str:
    return "nothing, by this measure" if change is None else f"{change.name} ({1 / change.gain:.2f} x the noise)"


def _print_tuning(base: Point, tuning: Tuning) -> None:
    assert base.plan is not None
    composition, target = tuning.composition, base.plan.target_epsilon

    def within(noise_multiplier: float | None, noise: float | None) -> tuple[str, str]:
        if noise_multiplier is None or noise is None:
            return "-", "-"
        return f"{noise_multiplier:.4g}", f"{noise / base.noise_over_the_run:.2f} x"

    each, added = composition.within.case.arguments, composition.within
    rows: list[tuple[str, ...]] = [
        ("one run", f"{base.plan.epsilon:.4g}", f"{base.plan.delta:.3g}", f"{base.plan.noise_multiplier:.4g}", "1 x"),
        (
            f"{composition.runs} runs, added up (the ledger)",
            f"{composition.epsilon:.4g}",
            f"{composition.delta:.3g}",
            *within(None if added.plan is None else added.plan.noise_multiplier, added.noise_over_the_run),
        ),
    ]
    for selection in tuning.selections:
        epsilon = "-" if selection.epsilon is None else f"{selection.epsilon:.4g}"
        rows.append(
            (
                f"best of {selection.mean_runs} on average, {selection.distribution}",
                epsilon,
                f"{base.plan.delta:.3g}",
                *within(selection.noise_multiplier, selection.noise_over_the_run),
            )
        )
    typer.echo()
    print_table(("tuning", "ε at this σ", "δ", f"σ to stay within ε {target:g}", "noise over the run"), rows)
    refused = {selection.refused for selection in tuning.selections if selection.refused is not None}
    for reason in sorted(refused | ({added.refused} if added.refused is not None else set())):
        typer.echo(reason)
    # A hair's breadth for rounding: ten times 1/(10 n) is 1/n.
    if composition.delta * (1 + 1e-9) >= 1 / base.case.num_units:
        typer.echo(f"A δ of {composition.delta:.3g} is 1/n or more, which no run by itself may have (P24).")
    shares = f"target_epsilon={each.target_epsilon:g} and target_delta={each.target_delta:g}"
    _paragraph(
        "\nAdded up: every run reserves its whole ε and δ, whatever comes of it. To keep "
        f"{composition.runs} runs within ε {target:g} and δ {base.plan.delta:.3g}, give each {shares}."
    )
    _paragraph(
        "Best of a random, hidden number of runs (Papernot and Steinke 2022, arXiv:2110.03620): the ledger grants no "
        "such discount, because it cannot see whether these conditions hold, and all must:"
    )
    for condition in SELECTION_CONDITIONS:
        _paragraph(condition, "- ")
    ceilings = [selection.max_batch_size for selection in tuning.selections if selection.max_batch_size is not None]
    if ceilings:
        _paragraph(f"It needs max_batch_size={max(ceilings)} or more.")
    chances = ", ".join(f"{each.distribution} {each.few_runs:.2g}" for each in tuning.selections)
    _paragraph(f"Chance that there is one run or none, and so no choice: {chances}.")


def _paragraph(text: str, bullet: str = "") -> None:
    start = "\n" * text.startswith("\n")
    typer.echo(start + textwrap.fill(text.strip(), 118, initial_indent=bullet, subsequent_indent=" " * len(bullet)))


def _refuse_drawing(svg: Path) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PrivacyError('--svg needs matplotlib: pip install "dpfa-hf[evidence]".') from None
    if not svg.parent.is_dir():
        raise PrivacyError(f"--svg {svg}: there is no folder {svg.parent}; make it first.")


def _draw(comparison: Comparison, svg: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 2).flat)
    for axis, (name, points) in zip(axes, comparison.curves.items(), strict=False):
        _draw_curve(axis, name, [point for point in points if point.plan is not None], comparison.base)
    planned = [change for change in reversed(comparison.changes) if change.point.plan is not None]
    colors: dict[Kind, str] = {"free": "#1b7837", "needs data": "#2166ac", "costs privacy": "#b2182b"}
    for kind, color in colors.items():
        chosen = [change for change in planned if change.kind == kind]
        heights = [planned.index(change) for change in chosen]
        axes[3].barh(heights, [change.gain for change in chosen], color=color, label=_KINDS[kind])
    axes[3].set_yticks(range(len(planned)), [change.name for change in planned])
    axes[3].axvline(1.0, color="black", linewidth=0.8)
    axes[3].set_xlabel("times less noise over the run")
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=8)
    # Text stays text, and the same comparison is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dpfa"}):
        try:
            figure.savefig(svg, format="svg", metadata={"Date": None})
        except OSError as error:
            raise PrivacyError(f"--svg {svg} cannot be written: {error.strerror}.") from None


def _draw_curve(axis: Axes, name: str, points: Iterable[Point], base: Point) -> None:
    def value(point: Point) -> Any:
        row = point.to_dict()
        return row[name]

    points = list(points)
    axis.plot([value(point) for point in points], [point.noise_over_the_run for point in points], marker="o")
    axis.plot([value(base)], [base.noise_over_the_run], marker="s", markersize=9, color="black", label="base")
    axis.set_xlabel(_HEADS[name])
    axis.set_ylabel("noise over the run")
    axis.set_ylim(bottom=0)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axis.legend(fontsize=8)
