"""The command line `dpfa`: what a guarantee costs, whether a model can have one, and what has been spent.

Each module holds one command; a command is a plain function, and this module gives it its name. Exit codes: 0 done; 1
refused, in one line on stderr; 2 wrong usage. With `--json` stdout holds one JSON value only.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import dpfa_hf
from dpfa_hf.cli import audit, check, gate, ledger, plan, report, watch
from dpfa_hf.errors import PrivacyError


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
app.command()(plan.plan)
app.command()(check.check)
app.command()(audit.audit)
app.command()(gate.gate)
app.command()(report.report)
app.command()(watch.watch)
app.add_typer(ledger.app, name="ledger")


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


def main() -> None:
    """The entry point of the console script `dpfa`."""
    app(prog_name="dpfa")
