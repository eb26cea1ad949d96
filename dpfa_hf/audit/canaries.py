"""An attack on one training run, and the lower bound on epsilon that its guesses prove.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023 (arXiv:2305.08846). Each of m canaries
is in the data set with probability 1/2. Whoever sees the releases of the run guesses for some of them whether they were
in. If the run is (epsilon, delta)-DP, the number of right guesses is hardly larger than that of a coin that falls right
with probability e^epsilon / (1 + e^epsilon) (their Theorem 5.2); so many right ones refute a small epsilon.

The attack is white-box: it sees the noised gradient of every step, knows each canary's clipped gradient, and takes the
mechanism's own parameters for the likelihood of each canary's part in each step.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpfa_hf.audit.results import Check
from dpfa_hf.audit.steps import Observer, Tensors, Units, columns_of, invented_rows, ready_to_compute, run_steps
from dpfa_hf.audit.subject import Subject, scaled
from dpfa_hf.errors import PrivacyError

CANARIES = "canaries"
CONFIDENCE = 0.95
_GRID, _LARGEST_EPSILON = 0.01, 20.0
# Shares of the canaries that are guessed; each bound gets its part of the error that the confidence leaves.
_GUESSED = (1.0, 0.5, 0.25, 0.1)
_MOST_CANARIES, _MOST_COORDINATES, _MOST_NUMBERS = 512, 200_000, 60_000_000
_LENGTH = 8


def p_values(canaries: int, guesses: int, right: int, epsilons: np.ndarray, delta: float) -> np.ndarray:
    """For every epsilon, the largest probability that an (epsilon, delta)-DP run has of so many right guesses or more.

    beta + 2 m delta alpha with W ~ Bin(guesses, e^epsilon / (1 + e^epsilon)), beta = P(W >= right) and alpha =
    max over i of P(right > W >= right - i) / i (Theorem 5.2; m is the number of canaries).
    """
    from scipy import stats

    if not 0 <= right <= guesses <= canaries:
        raise PrivacyError(f"{right} right guesses of {guesses} about {canaries} canaries are impossible; count again")
    probabilities = 1 / (1 + np.exp(-np.asarray(epsilons, float)))
    beta = stats.binom.sf(right - 1, guesses, probabilities)
    if right == 0 or delta == 0:
        return np.minimum(beta, 1.0)
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1)[:, None], guesses, probabilities), axis=0)
    alpha = (below / np.arange(1, right + 1)[:, None]).max(axis=0)
    return np.minimum(beta + 2 * canaries * delta * alpha, 1.0)


def epsilon_lower_bound(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """An epsilon below the true one with probability `confidence` at least; 0 says nothing.

    Searched upwards in steps of 0.01 and rounded down: the first epsilon that the guesses do not refute ends the
    search, so that no smaller one is left out, even where the p-value is not monotone.
    """
    if not 0 < confidence < 1:
        raise PrivacyError(f"confidence={confidence} must be strictly between 0 and 1; 0.95 is usual")
    grid = np.arange(round(_LARGEST_EPSILON / _GRID) + 1)
    for steps in np.split(grid, np.arange(50, len(grid), 50)):
        held = p_values(canaries, guesses, right, steps * _GRID, delta) >= 1 - confidence
        if held.any():
            return max(int(steps[held.argmax()]) - 1, 0) * _GRID
    return _LARGEST_EPSILON


@dataclass(frozen=True)
class Bound:
    """What the guesses prove, and with how many of them."""

    epsilon: float
    guesses: int
    right: int


def best_bound(attacks: list[np.ndarray], included: np.ndarray, delta: float, confidence: float = CONFIDENCE) -> Bound:
    """The largest bound over all attacks, and over guessing all, or the surest half, quarter or tenth, of the canaries.

    As many canaries are guessed in, from the highest scores, as are guessed out, from the lowest. The choice is made
    after seeing, so each bound has an even share of the error that the confidence leaves (Bonferroni).

    Args:
        attacks: of each its scores, [m], higher where a canary seems to be in.
        included: bool [m], the truth.
        delta: of the claim.
    """
    number, found = len(included), []
    each = 1 - (1 - confidence) / (len(_GUESSED) * len(attacks))
    for scores in attacks:
        order = np.argsort(scores, kind="stable")
        for half in (int(number * share / 2) for share in _GUESSED):
            if half:
                right = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
                found.append(Bound(epsilon_lower_bound(number, 2 * half, right, delta, each), 2 * half, right))
    if not found:
        raise PrivacyError(f"{number} canaries are too few to guess about; use 2 or more")
    return max(found, key=lambda bound: bound.epsilon)


@dataclass(frozen=True)
class Attack:
    """What an attack on one run found: the check, its bound, and the claims for the steps attacked and for all."""

    check: Check
    epsilon_lower_bound: float
    epsilon_claimed: float
    epsilon_of_plan: float
    canaries: int


class _Releases(Observer):
    """The noised gradients of all steps, at some coordinates, in units of the sum at the plan's C."""

    def __init__(self, trainer: Any, coordinates: torch.Tensor, tick: Callable[[], None]) -> None:
        self.trainer, self.coordinates, self.tick = trainer, coordinates, tick
        self.vectors: list[torch.Tensor] = []
        self._norm = trainer.privacy_plan.clipping_norm

    def before_step(self, step: int) -> None:
        self._norm = self.trainer._engine.clipping_norm

    def released(self, step: int, gradients: Tensors) -> None:
        plan = self.trainer.privacy_plan
        scale = plan.expected_batch_size * plan.clipping_norm / self._norm
        flat = torch.cat([gradient.detach().flatten().float() for gradient in gradients.values()])
        self.vectors.append(flat[self.coordinates] * scale)
        self.tick()


def canaries(
    subject: Subject,
    *,
    seconds: float = 60.0,
    mutate: Callable[[Any], None] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Attack:
    """Attacks one run of the trainer's own draws and noise.

    The number of canaries and of steps follows from how long a processor takes for one, so as to take about `seconds`
    of it; the claim is that of the steps taken.
    """
    trainer = subject.build(False)
    if mutate is not None:
        mutate(trainer)
    columns = columns_of(trainer, trainer._task)
    plan = trainer.privacy_plan
    gradients = _Gradients(trainer, subject.num_units, columns)
    gradients.of(0)
    began = time.process_time()
    gradients.of(1)
    each = max(time.process_time() - began, 1e-4)
    passes = 1 if gradients.size <= _MOST_COORDINATES else 2
    most = min(_MOST_CANARIES, subject.num_units - 1, _MOST_NUMBERS // min(gradients.size, _MOST_COORDINATES))
    number = int(max(min(most, seconds / 2 / passes / each), min(most, 64)))
    coordinates, matrix = gradients.matrix(number, tick)
    included = np.array([bool(secrets.randbits(1)) for _ in range(number)])
    # Noise costs time for every coordinate, units for every one that is drawn; together they cost less than alone.
    drawn = plan.sampling_probability * number / 2
    cost = each * drawn / 3 + 3e-8 * gradients.size + 0.01
    steps = int(max(min(plan.max_steps, seconds / 2 / cost), min(plan.max_steps, 4)))
    claimed = scaled(plan, steps)
    units = {1 + canary: gradients.rows[canary] for canary in range(number) if included[canary]}
    units[0] = gradients.rows[number]  # from which the columns are told, in whatever data set
    observer = _Releases(trainer, coordinates, tick)
    run_steps(trainer, Units(subject.num_units, units), observer, draws=steps)
    # One attacker believes in the claimed noise, the other in one that was divided by the batch.
    beliefs = [plan.noise_standard_deviation, plan.noise_standard_deviation / plan.expected_batch_size]
    releases = torch.stack(observer.vectors)
    scores = [attack(matrix, releases, plan.sampling_probability, belief) for belief in beliefs]
    bound = best_bound(scores, included, plan.delta)
    error = (1 - CONFIDENCE) / (len(_GUESSED) * len(beliefs))
    provable = epsilon_lower_bound(number, number, number, plan.delta, 1 - error)
    check = Check(
        CANARIES,
        bound.epsilon <= claimed.epsilon,
        f"An attack on one run proves no epsilon above the {claimed.epsilon:.4g} that is claimed for its steps.",
        {
            "epsilon_lower_bound": bound.epsilon,
            "epsilon_claimed": claimed.epsilon if math.isfinite(claimed.epsilon) else "inf",
            "delta": plan.delta,
            "confidence": CONFIDENCE,
            "canaries": number,
            "guesses": bound.guesses,
            "right": bound.right,
            "steps": steps,
            "planned_steps": plan.max_steps,
            "largest_provable_epsilon": provable,
        },
    )
    return Attack(check, bound.epsilon, claimed.epsilon, plan.epsilon, number)


def attack(matrix: torch.Tensor, releases: torch.Tensor, probability: float, deviation: float) -> np.ndarray:
    """[m] log-likelihood ratios: how much likelier the releases are with each canary in the data set than without.

    In every step the other canaries, each in with probability q / 2, count as noise beside the mechanism's; against
    both, the best linear discriminant says whether the canary was drawn, and q what that says about the data set.

    Args:
        matrix: [m, coordinates], the canaries' clipped gradients.
        releases: [steps, coordinates], noised sums.
        probability: q.
        deviation: of the noise that the attacker believes in.
    """
    gram = matrix.double() @ matrix.double().T
    present = probability / 2
    spread = present * (1 - present)
    floor = 1e-9 * float(gram.diagonal().mean())
    inverse = torch.linalg.inv(spread * gram + (deviation**2 + floor) * torch.eye(len(gram), dtype=torch.float64))
    strength = (gram * inverse).sum(1)
    others = present * (gram.sum(0) @ inverse - strength)
    alone = (1 - spread * strength).clamp_min(1e-9)
    ratios = ((releases.double() @ matrix.double().T @ inverse - others - strength / 2) / alone).clamp(-500, 500)
    return torch.log1p(probability * torch.expm1(ratios)).sum(0).numpy()


class _Gradients:
    """The canaries, invented rows, and the clipped gradient of each by the trainer's own engine."""

    def __init__(self, trainer: Any, num_units: int, columns: Any) -> None:
        self.trainer = trainer
        most = min(_MOST_CANARIES, num_units - 1)
        self.rows = invented_rows(trainer, columns, [_LENGTH] * (most + 1))
        ready_to_compute(trainer, Units(num_units, dict(enumerate(self.rows))))
        self.names = [name for name, _ in trainer._engine.parameters.values()]
        self.size = sum(parameter.numel() for _, parameter in trainer._engine.parameters.values())

    def of(self, canary: int) -> torch.Tensor:
        """[size] float32."""
        trainer = self.trainer
        for batch in trainer._batches[trainer._batches.units(np.array([canary]))]:
            with trainer._forward_context():
                trainer._engine.accumulate(dict(trainer._prepare_inputs(dict(batch))))
        taken = trainer._engine.take()
        return torch.cat([taken[name].flatten().float() for name in self.names])

    def matrix(self, number: int, tick: Callable[[], None]) -> tuple[torch.Tensor, torch.Tensor]:
        """(coordinates, [number, coordinates]): all, or of a large model those where the canaries are largest."""
        coordinates = torch.arange(self.size)
        if self.size > _MOST_COORDINATES:
            energy = torch.zeros(self.size)
            for canary in range(number):
                energy += self.of(canary).square_()
                tick()
            coordinates = torch.topk(energy, _MOST_COORDINATES).indices
        rows = []
        for canary in range(number):
            rows.append(self.of(canary)[coordinates])
            tick()
        return coordinates, torch.stack(rows)
