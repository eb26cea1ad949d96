"""Markdown of cards and evidence: nothing that is shown can begin markup, and no number flatters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Context


def up(number: float | str) -> str:
    """Four significant digits, rounded up, so that no page claims more than the numbers behind it."""
    return f"{float(Context(prec=4, rounding=ROUND_CEILING).create_decimal(repr(float(number)))):.4g}"


def shown(value: object) -> str:
    """As text of a Markdown table cell in which no markup, and no marker of ours, can begin."""
    escaped = str(value).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"([|*`\[\]])", r"\\\1", escaped).split())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
