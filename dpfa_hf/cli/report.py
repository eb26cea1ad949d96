"""`dpfa report`: the evidence about a model, to hand over."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dpfa_hf.cli.options import AsJson
from dpfa_hf.cli.printing import print_json
from dpfa_hf.markdown import up


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that save_model or a checkpoint of a private run wrote.")
    ],
    ledger: Annotated[
        str | None,
        typer.Option(
            help="Hold the report against this ledger, a database URL. Default: DPFA_LEDGER in the environment; "
            "without either no ledger is asked, and the evidence says so.",
            show_default=False,
        ),
    ] = None,
    sign_key: Annotated[
        Path | None,
        typer.Option(help="Sign every file of DIR with this private key (EC P-256, PEM), into model.sig."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What can be handed over about this model: numbers, plots, assumptions, and where they may be relevant.

    Writes evidence.json (its JSON schema is published with dpfa_hf), evidence.md and evidence.html into DIR, and the
    model card's section, from privacy.json and, if it is there, audit.json. Refuses what contradicts the plan, the
    audit or the ledger. It gives no score and no verdict: no law names an epsilon.

    Example: dpfa report output/movie_reviews --ledger sqlite:////home/me/ledger.db --sign-key key.pem
    """
    from dpfa_hf import signing
    from dpfa_hf.evidence import build_evidence, write_bundle

    ledger = ledger or os.environ.get("DPFA_LEDGER") or None
    if sign_key is not None:
        # Before files change: a key that cannot sign would leave a folder whose old signature is void.
        signing.load_private_key(sign_key)
    if ledger is None:
        evidence = build_evidence(directory)
    else:
        from dpfa_hf.cli.ledger import existing_ledger

        with existing_ledger(ledger) as opened:
            evidence = build_evidence(directory, ledger=opened)
    files = write_bundle(directory, evidence)
    signature = None if sign_key is None else signing.sign_model(directory, sign_key)
    voided = signature is None and (directory / signing.SIGNATURE_NAME).exists()
    stated, audit, recorded = evidence["report"], evidence["audit"], evidence["ledger"]
    guarantee = stated["guarantee"]
    if as_json:
        print_json(
            {
                "files": [str(file) for file in files],
                "signature": None if signature is None else str(signature),
                "signature_void": voided,
                "private": stated["private"],
                "epsilon": guarantee["epsilon"],
                "delta": guarantee["delta"],
                "run": stated["run"],
                "audit_passed": None if audit is None else audit["passed"],
                "ledger_head": None if recorded is None else list(recorded["head"].values()),
            }
        )
        return
    for file in (*files, *([] if signature is None else [signature])):
        typer.echo(f"wrote {file}")
    if stated["private"]:
        typer.echo(f"ε = {up(guarantee['epsilon'])} at δ = {up(guarantee['delta'])}, unit: {stated['unit']['what']}")
    else:
        typer.echo(f"NOT PRIVATE: {stated['not_private_because']}")
    typer.echo("audit: none" if audit is None else f"audit: {'passed' if audit['passed'] else 'FAILED'}")
    if recorded is None:
        typer.echo("ledger: not asked")
    else:
        head = recorded["head"]
        typer.echo(f"ledger: {recorded['place']} agrees; head {head['sequence']} {head['hash']}")
    if voided:
        typer.echo(f"{signing.SIGNATURE_NAME} is of older files now: sign again with --sign-key")
