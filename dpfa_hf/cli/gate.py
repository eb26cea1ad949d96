"""`dpfa gate`: may this model be served?"""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from dpfa_hf.cli.options import WitnessUrl
from dpfa_hf.cli.printing import print_json


def gate(
    model: Annotated[str, typer.Option(help="The model's folder, as save_model of a private run wrote it.")],
    max_epsilon: Annotated[float, typer.Option(help="The largest epsilon that you accept, at the last planned step.")],
    max_delta: Annotated[float, typer.Option(help="The largest delta that you accept.")],
    ledger: Annotated[
        str | None,
        typer.Option(
            envvar="DPFA_LEDGER",
            help="The ledger's database URL: the run must be recorded there. It is only read. Default: DPFA_LEDGER in "
            "the environment, else no ledger is looked at.",
            show_default=False,
            show_envvar=False,
        ),
    ] = None,
    witness: WitnessUrl = None,
    public_key: Annotated[
        Path | None,
        typer.Option(help="The signer's public key, in PEM: every file must be as it was signed.", show_default=False),
    ] = None,
    require_ledger: Annotated[
        bool, typer.Option("--require-ledger", help="Refuse if no ledger was named, by --ledger or DPFA_LEDGER.")
    ] = False,
    require_evidence: Annotated[
        bool, typer.Option("--require-evidence", help="Refuse a model without evidence.json (`dpfa report`).")
    ] = False,
    require_audit: Annotated[
        bool, typer.Option("--require-audit", help="Refuse a model without audit.json (`dpfa audit`).")
    ] = False,
) -> None:
    """May this model be served? Exit code 0 if so, 1 if not, 2 for wrong usage; JSON on stdout either way.

    Recomputes epsilon from the plan, and compares the model's files with what was signed (--public-key) and its run
    with what the ledger reserved (--ledger). A check that was not asked for has "passed": null, and is no proof: give
    both options wherever others may write to the folder.

    Example: dpfa gate --model out --max-epsilon 3 --max-delta 1e-5 --public-key key.pub --ledger sqlite:////srv/dp.db
    """
    from dpfa_hf.gate import judge

    if not model:
        # An empty path would be the working directory.
        raise typer.BadParameter("it is empty", param_hint="--model")
    if not 0 <= max_epsilon < math.inf:
        raise typer.BadParameter(f"{max_epsilon} is no finite number of at least 0", param_hint="--max-epsilon")
    if not 0 <= max_delta < 1:
        raise typer.BadParameter(f"{max_delta} is not at least 0 and below 1", param_hint="--max-delta")
    # Libraries that print must not get into the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        verdict = judge(
            model,
            max_epsilon=max_epsilon,
            max_delta=max_delta,
            ledger=ledger,
            witness=witness or None,
            public_key=public_key,
            require_ledger=require_ledger,
            require_evidence=require_evidence,
            require_audit=require_audit,
        )
    print_json(verdict)
    if not verdict["passed"]:
        for check in verdict["checks"]:
            if check["passed"] is False:
                typer.echo(f"dpfa: gate: {check['check']}: {check['detail']}", err=True)
        raise typer.Exit(1)
