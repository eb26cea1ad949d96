"""How every command prints: JSON values, tables that survive a pipe,."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 160


def print_json(value: Any) -> None:
    """Infinity as the string "inf", as in privacy.json."""
    value = [_finite(each) for each in value] if isinstance(value, list) else _finite(value)
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "inf" if value == math.inf else value for name, value in values.items()}


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    # A narrow pipe would cut ids in two; names of data sets may look like markup.
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    table = Table(*head)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
