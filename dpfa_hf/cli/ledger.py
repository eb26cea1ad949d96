"""`dpfa ledger`: what every run has reserved, and whether the record of it is whole."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpfa_hf.cli.options import AsJson, LedgerUrl, WitnessUrl
from dpfa_hf.cli.printing import print_json, print_table

if TYPE_CHECKING:
    from dpfa_hf.ledger import Ledger, RunRecord

_UNNAMED = re.compile(r"unnamed-[0-9a-f]{64}")
app = typer.Typer(help="The record of what every run on every data set may spend.", no_args_is_help=True)


@app.command()
def show(
    ledger: LedgerUrl = None,
    run: Annotated[str | None, typer.Option(help="One run's id, as privacy.json has it; adds its plan.")] = None,
    as_json: AsJson = False,
) -> None:
    """What did every run reserve, and what is left of the budgets?

    Epsilon and delta are what a run reserved before its first step, the guarantee for its last one. Nothing is given
    back, however early a run stopped.

    Example: dpfa ledger show --ledger sqlite:////home/me/ledger.db
    """
    with existing_ledger(ledger) as opened:
        if run is not None:
            opened.run(run)
        records, sums, place = opened.runs(), opened.datasets(), opened.display_url
    names = public_names(record.dataset for record in records)
    shown = [record for record in records if run in (None, record.run)]
    if as_json:
        print_json([_run_values(record, names, with_plan=run is not None) for record in shown])
        return
    typer.echo(f"ledger {place}")
    print_table(
        ("run", "data set", "steps charged", "ε", "δ", "status", "opened (UTC)"),
        [
            (
                each.run,
                names[each.dataset],
                f"{each.steps} of {each.max_steps}",
                f"{each.epsilon:.6g}" if math.isfinite(each.epsilon) else "NOT PRIVATE",
                f"{each.delta:.3g}",
                each.status,
                each.created[:16].replace("T", " "),
            )
            for each in shown
        ],
    )
    if run is not None:
        print_table(("plan", ""), shown[0].plan.items())
    print_table(
        ("data set", "runs", "ε reserved", "of budget", "δ reserved", "of budget", "unit", "adjacency"),
        [
            (
                names[each.dataset],
                each.runs,
                f"{each.epsilon:.6g}",
                f"{each.budget[0]:g}" if each.budget else "no budget",
                f"{each.delta:.3g}",
                f"{each.budget[1]:g}" if each.budget else "no budget",
                each.privacy_unit,
                each.adjacency,
            )
            for each in sums
            if any(each.dataset == record.dataset for record in shown)
        ],
    )


@app.command()
def verify(
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    signed_head: Annotated[
        Path | None, typer.Option(help="What `dpfa ledger head` signed: the chain must still have that entry.")
    ] = None,
    public_key: Annotated[Path | None, typer.Option(help="The public key, in PEM, of whoever signed it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Is the ledger's chain of entries whole, and has it every entry that its witness has seen?

    Replays every entry and compares it with its hash and with the totals; exit code 1 if anything differs. Whoever may
    write to the database can rewrite all of it, or put back an older copy: only a witness notices (`dpfa ledger
    witness`), or a head that was signed before and kept elsewhere (`dpfa ledger head`).

    Example: dpfa ledger verify --ledger sqlite:////home/me/ledger.db --signed-head head.json --public-key key.pub
    """
    from dpfa_hf.signed_heads import missing_from, read_signed_head

    if (signed_head is None) != (public_key is None):
        raise typer.BadParameter("give both or neither", param_hint="--signed-head and --public-key")
    signed = read_signed_head(signed_head, public_key) if signed_head is not None and public_key is not None else None
    with existing_ledger(ledger, witness) as opened:
        problems, head, place, moved = opened.verify(), opened.head(), opened.display_url, opened.moved_to()
        problems += missing_from(opened, signed) if signed is not None else []
    problems = [_UNNAMED.sub("unnamed", problem) for problem in problems]
    if as_json:
        print_json({"ledger": place, "ok": not problems, "problems": problems, "head": list(head), "moved_to": moved})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"ledger {place}: {'BROKEN' if problems else 'whole'}; head {head[0]} {head[1]}")
        if moved:
            typer.echo(f"It is closed: it moved to {moved}.")
    if problems:
        raise typer.Exit(1)


@app.command()
def head(
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    sign_key: Annotated[
        Path | None, typer.Option(help="An EC P-256 private key in PEM, to sign the head with.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new file for the signed head; keep it elsewhere.")] = None,
    as_json: AsJson = False,
) -> None:
    """How far has the ledger come? Number and hash of its last entry, signed if you like.

    A signed head that somebody else keeps shows later that no entry before it was changed, dropped or added: see
    `dpfa ledger verify --signed-head`. The ledger is verified first, and only read.

    Example: dpfa ledger head --sign-key key.pem --out head-2026-11-29.json
    """
    from dpfa_hf.signed_heads import read_head, sign_head

    if (sign_key is None) != (out is None):
        raise typer.BadParameter("give both or neither", param_hint="--sign-key and --out")
    with existing_ledger(ledger, witness) as opened:
        place = opened.display_url
        found = sign_head(opened, sign_key, out) if sign_key is not None and out is not None else read_head(opened)
    if as_json:
        print_json({**asdict(found), "file": None if out is None else str(out)})
    else:
        typer.echo(f"ledger {place}: head {found.seq} {found.hash} at {found.time}")
        if out is not None:
            typer.echo(f"{out}: signed with key {found.key}; keep it where whoever writes to the ledger cannot")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A new file. It is readable by you alone.")],
    ledger: LedgerUrl = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Move: close this ledger for good, to go on at this database URL after `dpfa ledger import`."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write every entry, as JSON lines: for an auditor, or to move to another database.

    The file names data sets. Without --to it does not hold the ledger's secret and cannot be imported. With --to it
    does: delete it once it is imported. This ledger then refuses to be used, since two that are alive would spend the
    budget twice; if the file gets lost, the same command writes it again.

    Example: dpfa ledger export moving.jsonl --to postgresql://ledger@db.example.org/ledger
    """
    with existing_ledger(ledger) as opened:
        head, place = opened.export(file, to=to), opened.display_url
    done = f"the entries of {place}" if to is None else f"ledger {place}, which is closed now: import it, and delete it"
    _print_copy(file, head, done, as_json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="What `dpfa ledger export --to` wrote.")],
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a ledger that was moved here: from SQLite to PostgreSQL, for example.

    Every byte of the file is checked. The place must be empty, and the one that the export named. Runs go on from their
    checkpoints; set DPFA_LEDGER to the new place first.

    Example: dpfa ledger import moving.jsonl --ledger postgresql://ledger@db.example.org/ledger
    """
    from dpfa_hf.ledger import import_ledger

    with import_ledger(file, ledger, witness=witness) as opened:
        _print_copy(file, opened.head(), f"ledger {opened.display_url}, which is in use now", as_json)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="A new file. It is readable by you alone.")],
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write a copy for `dpfa ledger restore`, of one moment, while runs go on.

    The file holds the ledger's secret and names data sets: keep it as safe as the ledger.

    Example: dpfa ledger backup /backup/ledger-2026-11-23.jsonl
    """
    with existing_ledger(ledger, witness) as opened:
        head, place = opened.backup(file), opened.display_url
    _print_copy(file, head, f"ledger {place}", as_json)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `dpfa ledger backup` wrote.")],
    ledger: LedgerUrl = None,
    witness: WitnessUrl = None,
    unwitnessed: Annotated[
        bool, typer.Option("--unwitnessed", help="Your word that nothing was written after the backup; recorded.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup in the place of a lost ledger, unless it is older than what the witness has seen.

    An older backup would refund what was spent after it. Every byte is checked, and the place must be empty.

    Example: dpfa ledger restore ledger-2026-11-23.jsonl --ledger sqlite:////home/me/ledger.db --witness sqlite:////nas/w.db
    """
    from dpfa_hf.ledger import restore_ledger

    with restore_ledger(file, ledger, witness=witness, unwitnessed=unwitnessed) as opened:
        _print_copy(file, opened.head(), f"ledger {opened.display_url}, which is in use now", as_json)


@app.command("witness")
def start_witness(ledger: LedgerUrl = None, witness: WitnessUrl = None, as_json: AsJson = False) -> None:
    """Give the ledger a witness: a second database, kept elsewhere, that remembers how far the ledger has come.

    From now on the ledger is refused without it, and if an older copy of it is put in its place. Set
    DPFA_LEDGER_WITNESS for everybody who trains. A new ledger gets the witness that is set there by itself.

    Example: dpfa ledger witness --witness sqlite:////nas/witness.db
    """
    with existing_ledger(ledger, witness) as opened:
        opened.start_witness()
        head, place = opened.head(), opened.display_url
    if as_json:
        print_json({"ledger": place, "head": list(head)})
    else:
        typer.echo(f"ledger {place} is witnessed from entry {head[0]} on; set DPFA_LEDGER_WITNESS wherever it is used")


def _print_copy(file: Path, head: tuple[int, str], what: str, as_json: bool) -> None:
    if as_json:
        print_json({"file": str(file), "head": list(head)})
    else:
        typer.echo(f"{file}: {what}; head {head[0]} {head[1]}")


def existing_ledger(url: str | None, witness: str | None = None) -> Ledger:
    """The ledger, opened only if it is there: looking for one creates none."""
    from dpfa_hf.ledger import Ledger

    return Ledger(url, witness=witness, create=False)


def public_names(datasets: Iterable[str]) -> dict[str, str]:
    """By data set: its name, or a number where the name is a fingerprint, which nothing may show (P22)."""
    names: dict[str, str] = {}
    for dataset in dict.fromkeys(datasets):
        unnamed = sum(name.startswith("unnamed ") for name in names.values())
        names[dataset] = f"unnamed {unnamed + 1}" if _UNNAMED.fullmatch(dataset) else dataset
    return names


def _run_values(record: RunRecord, names: Mapping[str, str], *, with_plan: bool) -> dict[str, Any]:
    budget = None if record.budget is None else dict(zip(("epsilon", "delta"), record.budget, strict=True))
    same = ("run", "steps", "max_steps", "epsilon", "delta", "privacy_unit", "adjacency", "status", "created")
    values = {name: getattr(record, name) for name in same}
    plan = {"plan": record.plan} if with_plan else {}
    return {**values, "dataset": names[record.dataset], "budget": budget, **plan}
