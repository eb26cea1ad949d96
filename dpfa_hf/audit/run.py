"""One audit: all checks on a subject, the planted mutants, and the record of both."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dpfa_hf.audit import canaries, draws, mutants, noise_law, replay
from dpfa_hf.audit.isolation import ledgers_only_in
from dpfa_hf.audit.results import Check, audit_record
from dpfa_hf.audit.steps import RefusedError
from dpfa_hf.audit.subject import Subject, model_subject, script_subject

REFUSED = "trains at all"
Tick = Callable[[str], None]


def audit(
    target: str,
    *,
    task: str = "auto",
    attention: str = "dp_flash",
    lora: int | None = None,
    all_mutants: bool = False,
    seconds: float = 60.0,
    tick: Tick = lambda what: None,
) -> dict[str, Any]:
    """Audits a model's folder or, if it ends in .py, a script; returns the values of `audit.json`.

    Guarantee:
        No row that is not the audit's own reaches a step, whatever the script loads, and no ledger but its own is
        opened (`isolation.ledgers_only_in`): nobody is charged.

    Args:
        target: what is audited.
        task: of a model, as in `dpfa check`.
        attention: of a model, as in `dpfa check`.
        lora: train a model with an adapter of this rank.
        all_mutants: plant all mutants, not the quick ones alone.
        seconds: about how long the canaries may take.
        tick: hears what is done next.

    Raises:
        PrivacyError: the target is neither a model nor a script that can be audited.
    """
    with _workshop() as folder:
        tick("building")
        if target.endswith(".py"):
            subject = script_subject(target, folder=folder)
        else:
            subject = model_subject(target, task=task, attention=attention, lora=lora, folder=folder)
        return _record(subject, folder, scaled=[], quick=not all_mutants, seconds=seconds, tick=tick)


def self_test(*, tick: Tick = lambda what: None) -> dict[str, Any]:
    """Audits the tiny model in which mutants are planted, and plants all of them."""
    with _workshop() as folder:
        tick("building")
        subject = mutants.tiny_subject(folder)
        scaled = ["the audit's own tiny model"]
        return _record(subject, folder, scaled=scaled, quick=False, seconds=20.0, tick=tick)


def _record(
    subject: Subject, folder: Path, *, scaled: list[str], quick: bool, seconds: float, tick: Tick
) -> dict[str, Any]:
    checks, attack = checked(subject, folder, seconds=seconds, tick=tick)
    # An audit that has failed need not show that it could have.
    sound = all(check.passed for check in checks)
    planted = mutants.plant(folder, quick=quick, tick=lambda name: tick(f"mutant: {name}")) if sound else []
    claim = subject.plan_epsilon() if attack is None else attack.epsilon_of_plan
    return audit_record(
        subject=subject.to_dict(),
        scaled_down=[*scaled, *scaled_down(subject, checks)],
        checks=checks,
        mutants=planted,
        epsilon_lower_bound=None if attack is None else attack.epsilon_lower_bound,
        confidence=canaries.CONFIDENCE,
        epsilon_claimed=claim if attack is None else attack.epsilon_claimed,
        epsilon_of_plan=claim,
        canaries=0 if attack is None else attack.canaries,
    )


def checked(
    subject: Subject, folder: Path, *, seconds: float, tick: Tick
) -> tuple[list[Check], canaries.Attack | None]:
    """All checks; a trainer that refuses to train fails one, and is not attacked."""
    try:
        tick(replay.CLIPPED_SUM)
        checks = replay.replay(subject, folder / "replay")
        tick(noise_law.NOISE_LAW)
        checks += noise_law.noise_law(subject)
        tick(draws.DRAWS)
        checks += draws.draws(subject)
        tick(canaries.CANARIES)
        attack = canaries.canaries(subject, seconds=seconds)
    except RefusedError as error:
        what = "The private trainer passes its own checks before step 1."
        return [Check(REFUSED, False, what, {"refusal": str(error)})], None
    return [*checks, attack.check], attack


def scaled_down(subject: Subject, checks: list[Check]) -> list[str]:
    """What was smaller, or other, than in the run that was planned."""
    found = list(subject.told)
    for check in checks:
        figures = check.figures
        if check.name == canaries.CANARIES and figures["steps"] < figures["planned_steps"]:
            found.append(f"canaries: {figures['steps']} of {figures['planned_steps']} steps, and the epsilon of these")
        if check.name == replay.CLIPPED_SUM and "micro_batch" in figures:
            found.append("replay: micro-batches of one, because half precision rounds by the padding")
    return found


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """A folder that is thrown away, ledgers only there, and the process's generators and modules as they were."""
    gc.collect()
    gc.freeze()  # Trainer collects garbage often, and the libraries' objects are not garbage
    try:
        with tempfile.TemporaryDirectory(prefix="dpfa-audit-") as name, torch.random.fork_rng(devices=[]):
            folder = Path(name).resolve()
            with ledgers_only_in(folder):
                yield folder
    finally:
        gc.unfreeze()
