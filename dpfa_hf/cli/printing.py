"""How every command prints: JSON values, and tables that survive a pipe."""

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
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return "inf" if value == math.inf else value


def console() -> Console:
    """Where tables are printed: a narrow pipe would cut ids in two, and names of data sets may look like markup."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    table = Table(*head)
    for row in rows:
        table.add_row(*map(str, row))
    console().print(table)
