"""The four plots, as SVG that stands in a page of its own: no script, no font or picture from elsewhere.

The same numbers give the same bytes. What a plot shows is also said in words, for whoever cannot see it.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpfa_hf.errors import PrivacyError
from dpfa_hf.markdown import up

_INK, _LINE, _MARK, _GRID = "#1b1f24", "#0b5fa5", "#b3261e", "#d9dee3"
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#6b7480",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.figsize": (6.6, 3.7),
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": _GRID,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "dpfa_hf",
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Plot:
    """A plot in words: what it is called, what it means, and what one sees."""

    name: str
    title: str
    meaning: str
    description: str


def described(evidence: Mapping[str, Any]) -> list[Plot]:
    """The plots of a model that is private, in words; [] for one that is not."""
    curve, report = evidence["curves"], evidence["report"]
    if curve is None:
        return []
    guarantee = report["guarantee"]
    epsilon, delta, last = up(guarantee["epsilon"]), up(guarantee["delta"]), guarantee["at_step"]
    first, pairs = curve["epsilon_by_step"][1], curve["privacy_curve"]
    half = _misses_at(curve["trade_off"], 0.05)
    noise = curve["noise_by_batch"]
    batches = "; ".join(
        f"{up(each['noise_of_mean'])} at {each['expected_batch_size']} (σ = {up(each['noise_multiplier'])})"
        for each in noise
    )
    return [
        Plot(
            "epsilon_by_step",
            "ε over the steps",
            "Progress only: the guarantee is the value at the last planned step, whether or not the run got there. "
            f"{report['steps']['charged']} of {last} steps were taken.",
            f"A staircase that rises from {up(first['epsilon'])} at step {first['step']} to {epsilon} at step {last}, "
            "where the guarantee is marked.",
        ),
        Plot(
            "privacy_curve",
            "The privacy curve δ(ε)",
            "All pairs (ε, δ) that hold for the planned mechanism after all steps; the guarantee is one of them. Each "
            "value is an upper bound.",
            f"δ on a logarithmic scale falls as ε rises, from {up(pairs[0]['delta'])} at ε = 0 through {delta} at "
            f"ε = {epsilon}, where the guarantee is marked, to {up(pairs[-1]['delta'])} at "
            f"ε = {up(pairs[-1]['epsilon'])}.",
        ),
        Plot(
            "trade_off",
            "What the best test for one unit must get wrong",
            "Whoever tests whether (or which) one unit was used, knowing everything else, and raises false alarms this "
            "often, misses at least this often. The bound holds for every test; the dashed line is mere guessing.",
            "A curve that falls from about 1 miss at no false alarms to 0 misses at 1; at 5 % false alarms at least "
            f"{_down(100 * half)} % are missed, where guessing misses 95 %.",
        ),
        Plot(
            "noise_by_batch",
            "Noise against batch size, at the same guarantee",
            "Standard deviation of the noise on each coordinate of the averaged gradient, σ C / batch, with σ found "
            f"anew for each batch so that ε = {epsilon}, δ = {delta} and the {last} steps stay. Public numbers only.",
            f"By expected batch: {batches}. The run's own, {report['mechanism']['expected_batch_size']}, is marked.",
        ),
    ]


def svg(name: str, evidence: Mapping[str, Any]) -> str:
    """One plot as an `<svg>` element with a title and a description, ids its own."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise PrivacyError('plots need matplotlib, which is not installed: pip install "dpfa-hf[evidence]"') from None
    plot = next(each for each in described(evidence) if each.name == name)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Whatever the user's own settings are, but for the windows that they open.
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE, "backend": matplotlib.get_backend()}
    with matplotlib.rc_context(settings):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        _DRAWN[name](figure.subplots(), evidence)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    text = text[text.index("<svg") :].strip()
    # Ids of several plots in one page must not meet.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    label = f"{name}-words-title {name}-words"
    words = (
        f'<title id="{name}-words-title">{html.escape(plot.title)}</title>'
        f'<desc id="{name}-words">{html.escape(plot.description)}</desc>'
    )
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-labelledby="{label}">{words}{rest}'


def _steps(axes: Any, evidence: Mapping[str, Any]) -> None:
    points, guarantee = evidence["curves"]["epsilon_by_step"], evidence["report"]["guarantee"]
    steps, values = [each["step"] for each in points], [each["epsilon"] for each in points]
    # The later value holds for the steps before it: the curve is concave, and a chord would claim too little.
    axes.step(steps, values, where="pre", color=_LINE, label="progress, rounded up")
    _mark(axes, steps[-1], values[-1], f"guarantee, ε = {up(guarantee['epsilon'])}")
    axes.axhline(values[-1], color=_MARK, linewidth=0.9, linestyle=":")
    axes.set(xlabel="step", ylabel="ε", ylim=(0, 1.12 * values[-1]), xlim=(0, 1.03 * steps[-1]))
    axes.legend(loc="lower right")


def _privacy(axes: Any, evidence: Mapping[str, Any]) -> None:
    points, guarantee = evidence["curves"]["privacy_curve"], evidence["report"]["guarantee"]
    epsilons, deltas = [each["epsilon"] for each in points], [each["delta"] for each in points]
    axes.step(epsilons, deltas, where="post", color=_LINE, label="upper bound on δ")
    label = f"guarantee, ε = {up(guarantee['epsilon'])}, δ = {up(guarantee['delta'])}"
    _mark(axes, guarantee["epsilon"], guarantee["delta"], label)
    axes.set_yscale("log")
    axes.set(xlabel="ε", ylabel="δ", xlim=(0, epsilons[-1]))
    axes.legend(loc="upper right")


def _trade_off(axes: Any, evidence: Mapping[str, Any]) -> None:
    points = evidence["curves"]["trade_off"]
    alarms, misses = [each["false_alarms"] for each in points], [each["misses"] for each in points]
    axes.plot([0, 1], [1, 0], color="#6b7480", linestyle="--", linewidth=1.2, label="guessing")
    axes.fill_between(alarms, misses, color=_LINE, alpha=0.12, linewidth=0, label="out of reach for every test")
    axes.plot(alarms, misses, color=_LINE, label="lower bound")
    axes.set(xlabel="false alarms (type I error)", ylabel="misses (type II error)", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="upper right")


def _noise(axes: Any, evidence: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    points = evidence["curves"]["noise_by_batch"]
    own = evidence["report"]["mechanism"]["expected_batch_size"]
    batches, noises = [each["expected_batch_size"] for each in points], [each["noise_of_mean"] for each in points]
    axes.plot(batches, noises, color=_LINE, marker="o", markersize=5, label="at the same ε, δ and steps")
    for each in points:
        if each["expected_batch_size"] == own:
            _mark(axes, own, each["noise_of_mean"], f"this run, σ = {up(each['noise_multiplier'])}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set(xlabel="expected batch", ylabel="noise per coordinate of the mean", ylim=(0, 1.15 * max(noises)))
    axes.legend(loc="upper right")


_DRAWN: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "epsilon_by_step": _steps,
    "privacy_curve": _privacy,
    "trade_off": _trade_off,
    "noise_by_batch": _noise,
}


def _mark(axes: Any, x: float, y: float, label: str) -> None:
    axes.plot([x], [y], color=_MARK, marker="D", markersize=7, linestyle="none", label=label, zorder=3)


def _misses_at(corners: list[dict[str, float]], false_alarms: float) -> float:
    """The bound at one rate of false alarms, on the line between two corners."""
    left = max((c for c in corners if c["false_alarms"] <= false_alarms), key=lambda c: c["false_alarms"])
    right = min((c for c in corners if c["false_alarms"] > false_alarms), key=lambda c: c["false_alarms"])
    share = (false_alarms - left["false_alarms"]) / (right["false_alarms"] - left["false_alarms"])
    return left["misses"] + share * (right["misses"] - left["misses"])


def _down(per_cent: float) -> str:
    """Whole per cents, rounded down: the bound must not promise more errors than there are."""
    return str(int(per_cent))
