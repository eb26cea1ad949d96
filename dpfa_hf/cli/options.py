"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from dpfa_hf.models import AUTO_CLASSES


def one_of(*choices: str) -> Callable[[str], str]:
    def checked(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}")
        return value

    return checked


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
Task = Annotated[
    str,
    typer.Option(
        callback=one_of("auto", *AUTO_CLASSES),
        help=f"auto (the head that the configuration names), or one of {', '.join(AUTO_CLASSES)}.",
    ),
]
Attention = Annotated[
    str,
    typer.Option("--attn-implementation", help="Attention to build the model with; eager where dp_flash is refused."),
]
