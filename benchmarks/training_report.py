"""README's table of training steps and its figure, from benchmarks/results/training.json and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from families import README, replaced
from sentiment import RESULTS

FIGURE = RESULTS / "training.svg"
LONG_ROWS = 1024
LABELS = {
    "flat": "dpfa_hf, flat",
    "per_layer": "dpfa_hf, per layer",
    "opacus_ghost": "Opacus, ghost clipping",
    "opacus_per_sample": "Opacus, per sample",
}
COLORS = {"flat": "#1b6ca8", "per_layer": "#6fb1e0", "opacus_ghost": "#e08a3c", "opacus_per_sample": "#b9b9b9"}
COLUMNS = (
    "plain step",
    "ours, flat",
    "ours, limit",
    "gap: noise",
    "gap: rest",
    "ours, per layer",
    "Opacus ghost",
    "Opacus per sample",
    "ours / ghost",
    "memory, flat",
)
PACKINGS = {
    "plain": "plain, padded in the order drawn",
    "padded": "private, padded in the order drawn",
    "padded_by_length": "private, padded, rows of like length together (what DPTrainer does)",
    "packed": "private, packed without padding",
}


def ratio(figures: Mapping[str, Any] | None, name: str = "step_ratio") -> str:
    """ "1.23x", or why there is no such figure."""
    if figures is None:
        return ""
    if figures["status"] == "wrong":
        return f"**wrong** by {figures['error']:.0e}"
    if figures["status"] != "timed":
        return figures["status"]
    return f"{figures[name]:.2f}x" if name in figures else ""


def row(case: Mapping[str, Any]) -> list[str]:
    """The cells of one case. The gap between step and limit is the noise, and whatever else a micro-batch costs."""
    contenders = case["contenders"]
    plain, flat = contenders["plain"], contenders.get("flat")
    limit = case["operations_per_row"]["limit"]
    noise = rest = against_ghost = ""
    if flat is not None and flat["status"] == "timed":
        share = flat["noise_seconds"] / plain["step_seconds"]
        noise, rest = f"{share:+.2f}", f"{flat['step_ratio'] - limit - share:+.2f}"
        ghost = contenders.get("opacus_ghost")
        if ghost is not None and ghost["status"] == "timed":
            against_ghost = f"{flat['step_ratio'] / ghost['step_ratio']:.2f}x"
    peers = (ratio(contenders.get(name)) for name in ("per_layer", "opacus_ghost", "opacus_per_sample"))
    memory = ratio(flat, "memory_ratio")
    return [f"{plain['step_seconds']:.1f} s", ratio(flat), f"{limit:.2f}x", noise, rest, *peers, against_ghost, memory]


def table(results: Mapping[str, Any]) -> str:
    """The table of steps and, below it, packing and what was not measured."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    notes = ["*Quick run: small micro-batches, two rounds, rough figures.*"] if results["quick"] else []
    for name, case in results["cases"].items():
        if "failed" in case:
            notes.append(f"{name} failed: {case['failed']}.")
        elif not name.startswith("packing"):
            size = f"{case['micro_batch_size']} rows a micro-batch"
            lines.append(f"| {case['description']}, {size} | {' | '.join(row(case))} |")
            notes += long_rows(name, case)
            refused = {each: found for each, found in case["contenders"].items() if "reason" in found}
            notes += [
                f"{name}, {LABELS[each]}, {found['status']}: {found['reason']}" for each, found in refused.items()
            ]
    for name, packing in results["cases"].items():
        if name.startswith("packing") and "failed" not in packing:
            lines += ["", *packing_table(packing)]
    notes += [f"{name} was not measured: {reason}." for name, reason in results["not_measured"].items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def long_rows(name: str, case: Mapping[str, Any]) -> list[str]:
    """How the price of long rows compares with the operation count's, noise aside."""
    flat, limit = case["contenders"].get("flat"), case["operations_per_row"]["limit"]
    if case["tokens"] < LONG_ROWS or flat is None or flat["status"] != "timed":
        return []
    found = flat["micro_batch_ratio"]
    return [f"{name}: forward and backward take {found:.2f}x, {found / limit - 1:+.0%} of the predicted {limit:.2f}x."]


def packing_table(packing: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| {packing['description']} of {packing['micro_batch_size']} | documents a second | tokens, with padding |"
    ]
    lines.append("|---|---|---|")
    for name, found in packing["contenders"].items():
        if found["status"] == "timed":
            lines.append(f"| {PACKINGS[name]} | {found['documents_per_second']:.2f} | {found['tokens']:,} |")
        else:
            lines.append(f"| {PACKINGS[name]} | {ratio(found)} | |")
    packed = packing["contenders"]["packed"]
    for base in ("padded", "padded_by_length"):
        if f"speed_over_{base}" in packed:
            tokens = packing["contenders"][base]["tokens"] / packed["tokens"]
            speed = packed[f"speed_over_{base}"]
            lines.append(f"| packed over *{PACKINGS[base]}* | {speed:.2f}x | {tokens:.2f}x |")
    return lines


def figure(results: Mapping[str, Any]) -> str:
    """An SVG of bars, one group a case: step over plain step, with the limit from the operation count as a mark."""
    cases = {k: v for k, v in results["cases"].items() if not k.startswith("packing") and "failed" not in v}
    bars = [
        (name, who, found)
        for name, case in cases.items()
        for who, found in case["contenders"].items()
        if who != "plain" and found["status"] == "timed"
    ]
    longest = max((found["step_ratio"] for *_, found in bars), default=1.0)
    left, width, height, gap, top = 330, 430, 15, 30, 46
    scale = width / max(1, math.ceil(longest))
    parts = []
    for tick in range(math.ceil(longest) + 1):
        x = left + tick * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="BOTTOM" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{top - 12}" text-anchor="middle" fill="#555">{tick}x</text>')
    y = top
    for name, case in cases.items():
        own = [(who, found) for each, who, found in bars if each == name]
        parts.append(f'<text x="8" y="{y + 11}" font-weight="bold">{escape(case["description"])}</text>')
        y += 20
        start = y
        for who, found in own:
            length, label = found["step_ratio"] * scale, f"{found['step_ratio']:.2f}x"
            parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end" fill="#333">{LABELS[who]}</text>')
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{height}" fill="{COLORS[who]}">'
                f"<title>{escape(name)}, {LABELS[who]}: {label}</title></rect>"
            )
            parts.append(f'<text x="{left + length + 5:.1f}" y="{y + 12}" fill="#333">{label}</text>')
            y += height + 3
        limit = left + case["operations_per_row"]["limit"] * scale
        parts.append(
            f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{start - 2}" y2="{y}" stroke="#111" stroke-dasharray="3 2"/>'
        )
        y += gap - 14
    size = f'width="{left + width + 60}" height="{y + 12}" viewBox="0 0 {left + width + 60} {y + 12}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" role="img">'
    title = "Time of a step over that of a plain Trainer step; dashed: limit from the operation count"
    body = "\n".join(parts).replace("BOTTOM", str(y))
    background = f'<rect width="100%" height="100%" fill="#fff"/>\n<text x="8" y="16" font-size="13">{title}</text>'
    return f"{head}\n<title>{title}</title>\n{background}\n{body}\n</svg>\n"


def block(results: Mapping[str, Any]) -> str:
    """What stands between README's markers."""
    return f"![Time of a step over that of a plain one]({FIGURE.relative_to(README.parent)})\n\n{table(results)}"


def write(results: Mapping[str, Any]) -> None:
    """Writes the figure, and README's part between its markers."""
    FIGURE.write_text(figure(results))
    README.write_text(replaced(README.read_text(), {"training": block(results)}))
