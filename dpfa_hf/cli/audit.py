"""`dpfa audit`: tries to refute what a private trainer claims."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpfa_hf.cli.options import AsJson, Attention, Task
from dpfa_hf.cli.printing import print_json, print_table
from dpfa_hf.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Callable

_OWN_STEPS, _QUICK = 5, 7


def audit(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_SCRIPT",
            help="A model's directory, with privacy.json if it was trained privately; or a Python file with a function "
            "make_trainer(train_dataset, output_dir).",
            show_default=False,
        ),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Plant every bug that this audit can see in a model of its own.")
    ] = False,
    all_mutants: Annotated[
        bool, typer.Option("--all-mutants", help="Plant every bug, not only the quick ones, beside the audit.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write audit.json, a file or a folder. Default: the model's directory.", show_default=False
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="About how many seconds of a processor the canaries may take.")
    ] = 60.0,
    task: Task = "auto",
    attn_implementation: Attention = "dp_flash",
    lora: Annotated[
        int | None, typer.Option(min=1, help="Audit a LoRA adapter of this rank on all linear layers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Does anything refute the epsilon that this private trainer claims?

    Moves one unit between two data sets, tests the noise and the draws of real steps, attacks a run with canaries, and
    plants bugs to show that these checks can fail. All rows are invented, and your ledger is neither read nor charged.
    Exit code 1 if a check fails or a planted bug is not caught. An audit that passes proves nothing.

    Example: dpfa audit ./my-private-model
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (subject is None) is not self_test:
        raise PrivacyError("name what to audit, MODEL_OR_SCRIPT, or give --self-test, and not both")
    place = _place(subject, out)
    from dpfa_hf.audit import run, write_audit

    with _progress(self_test or all_mutants, as_json) as tick:
        if subject is None:
            record = run.self_test(tick=tick)
        else:
            record = run.audit(
                subject,
                task=task,
                attention=attn_implementation,
                lora=lora,
                all_mutants=all_mutants,
                seconds=seconds,
                tick=tick,
            )
    written = None if place is None else write_audit(place, record)
    if as_json:
        print_json(record)
    else:
        _show(record, written)
    if not record["passed"]:
        failed = [check["name"] for check in record["checks"] if not check["passed"]]
        missed = [mutant["name"] for mutant in record["mutants"] if not mutant["caught"]]
        raise PrivacyError(
            "the audit failed: "
            + "; ".join(
                [f"check {name!r}" for name in failed]
                + [f"the planted bug {name!r} was not caught, so that nothing that passed counts" for name in missed]
            )
            + "; do not release what this trainer makes"
        )


def _place(subject: str | None, out: Path | None) -> Path | None:
    """Where audit.json goes; told before anything takes minutes."""
    if out is not None:
        if not (out if out.is_dir() else out.parent).is_dir():
            raise PrivacyError(f"--out {out} is in a folder that is not there; create it")
        return out
    if subject is None or subject.endswith(".py"):
        return None
    if not Path(subject).is_dir():
        raise PrivacyError(f"{subject} is no folder to write audit.json into; name a place with --out")
    return Path(subject)


def _progress(every: bool, as_json: bool) -> _Progress:
    from dpfa_hf.audit.mutants import MUTANTS

    planted = len(MUTANTS) if every else sum(each.quick for each in MUTANTS.values())
    return _Progress(_OWN_STEPS + planted, shown=not as_json)


class _Progress:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, total: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Callable[[str], None]:
        self._bar.__enter__()
        return self._tick

    def __exit__(self, *rest: Any) -> None:
        self._bar.__exit__(*rest)

    def _tick(self, what: str) -> None:
        self._bar.update(self._task, description=what, advance=1)


def _show(record: dict[str, Any], written: Path | None) -> None:
    subject = record["subject"]
    typer.echo(f"{subject['name']} ({subject['kind']})" + (f", run {subject['run']}" if subject["run"] else ""))
    for what in record["scaled_down"]:
        typer.echo(f"  {what}")
    print_table(
        ("check", "", "what was seen"),
        [(c["name"], "passed" if c["passed"] else "FAILED", _figures(c)) for c in record["checks"]],
    )
    print_table(
        ("planted bug", "", "by"),
        [(m["name"], "caught" if m["caught"] else "MISSED", m["by"]) for m in record["mutants"]],
    )
    if record["epsilon_lower_bound"] is not None:
        typer.echo(
            f"Epsilon is at least {record['epsilon_lower_bound']:.4g}, with confidence {record['confidence']:g}; "
            f"claimed for the steps audited: {_number(record['epsilon_claimed'])}; for the whole plan: "
            f"{_number(record['epsilon_of_plan'])}."
        )
    typer.echo("Not looked at: " + "; ".join(record["not_looked_at"]) + ".")
    if record["passed"]:
        typer.echo("Passed: nothing refuted the claim, and every planted bug was caught. That proves no privacy.")
    if written is not None:
        typer.echo(f"Written to {written}.")


def _figures(check: dict[str, Any]) -> str:
    shown = {name: value for name, value in check.items() if name not in ("name", "passed", "what")}
    return "; ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in shown.items()) or check["what"]


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return "yes" if value is True else "no" if value is False else str(value)
    return f"{value:.4g}"
