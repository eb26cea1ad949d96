"""What the plots show, as numbers: bounds of the planned mechanism, computed from the plan alone.

Every curve errs towards less privacy, between its points too: a staircase where joining the points would flatter, and
straight lines only where the bound itself is straight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dpfa_hf.accounting import EpsilonCurve, make_plan, privacy_curve
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan

_STEPS = 16
_EPSILONS = 48
# Of the plan's expected batch.
_BATCHES = (0.5, 1.0, 2.0, 4.0)


def curves(plan: PrivacyPlan) -> dict[str, list[dict[str, float]]]:
    """The points of all four plots; takes some seconds, most of them for the noise at other batch sizes."""
    points = _privacy(plan)
    return {
        "epsilon_by_step": _epsilon_by_step(plan),
        "privacy_curve": points,
        "trade_off": trade_off(points),
        "noise_by_batch": _noise_by_batch(plan),
    }


def trade_off(points: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """A lower bound on the errors of whoever tests for one unit, from points (epsilon, delta) of the privacy curve.

    Returns corners {"false_alarms", "misses"}, by rising false alarms from 0 to 1: straight lines between them are the
    bound. A test that accuses the innocent with probability "false_alarms" misses with at least probability "misses".

    Guarantee:
        No test does better, provided that delta bounds the mechanism at each epsilon in both directions. Then for every
        point misses >= 1 - delta - e^epsilon alpha and misses >= e^-epsilon (1 - delta - alpha) (Dong, Roth and Su
        2022, arXiv 1905.02383, proposition 2.5), and the largest of finitely many true lower bounds is one.
    """
    lines = {(0.0, 0.0)}
    for point in points:
        likelihood, rest = math.exp(min(point["epsilon"], 700.0)), 1 - point["delta"]
        lines |= {(-likelihood, rest), (-1 / likelihood, rest / likelihood)}
    corners = [(0.0, max(intercept for _, intercept in lines))]
    slope = min(slope for slope, intercept in lines if intercept == corners[0][1])
    while slope < 0:
        alpha, misses = corners[-1]
        # The next line to rise above this one on the way to the right.
        crossings = [((misses - slope * alpha - b) / (a - slope), a) for a, b in lines if a > slope]
        right = min(max(each, alpha) for each, _ in crossings)
        slope, before = max(a for each, a in crossings if max(each, alpha) == right), slope
        corners.append((right, max(0.0, misses + before * (right - alpha))))
    corners.append((1.0, 0.0))
    return [{"false_alarms": min(alpha, 1.0), "misses": misses} for alpha, misses in dict.fromkeys(corners)]


def _epsilon_by_step(plan: PrivacyPlan) -> list[dict[str, float]]:
    curve = EpsilonCurve(plan)
    stride = -(-len(curve.steps) // _STEPS)
    shown = sorted({*curve.steps[::-stride], curve.steps[0]})
    return [{"step": step, "epsilon": curve.at(step)} for step in (0, *shown)]


def _privacy(plan: PrivacyPlan) -> list[dict[str, float]]:
    epsilons = [2 * plan.epsilon * k / _EPSILONS for k in range(_EPSILONS + 1)]
    points = [{"epsilon": e, "delta": d} for e, d in zip(epsilons, privacy_curve(plan, epsilons), strict=True)]
    # The guarantee itself stands on the curve, as the plan has it.
    guarantee = {"epsilon": plan.epsilon, "delta": plan.delta}
    return sorted(
        [each for each in points if each["epsilon"] != plan.epsilon] + [guarantee], key=lambda p: p["epsilon"]
    )


def _noise_by_batch(plan: PrivacyPlan) -> list[dict[str, float]]:
    """Noise on a coordinate of the averaged gradient at other batch sizes, with sigma recalibrated each time."""
    found = []
    for factor in _BATCHES:
        batch = round(plan.expected_batch_size * factor)
        probability = plan.sampling_probability * batch / plan.expected_batch_size
        if batch < 1 or probability > 1:
            continue
        try:
            noise = plan.noise_multiplier if factor == 1 else _recalibrated(plan, batch, probability).noise_multiplier
        except PrivacyError:
            # No noise gives this epsilon at that batch, or no ceiling fits it.
            continue
        found.append(
            {
                "expected_batch_size": batch,
                "noise_multiplier": noise,
                "noise_of_mean": noise * plan.clipping_norm / batch,
            }
        )
    return found


def _recalibrated(plan: PrivacyPlan, batch: int, probability: float) -> PrivacyPlan:
    adaptive = plan.clipping == "adaptive"
    arguments = PrivacyArguments(
        target_epsilon=plan.epsilon,
        target_delta=plan.delta,
        per_example_max_grad_norm=plan.clipping_norm,
        clipping=plan.clipping,  # type: ignore[arg-type]
        clipping_quantile=plan.clipping_quantile if adaptive else None,
        clipping_learning_rate=plan.clipping_learning_rate if adaptive else None,
        private_loss_weight=plan.private_loss_weight,
        private_loss_max=plan.private_loss_max or None,
        expected_batch_size=batch,
        sampling_probability=probability,
        privacy_unit=plan.privacy_unit,  # type: ignore[arg-type]
        privacy_unit_column=plan.privacy_unit_column or None,
        max_examples_per_user=plan.max_examples_per_user if plan.privacy_unit == "user" else None,
        adjacency=plan.adjacency,  # type: ignore[arg-type]
        accountant=plan.accountant,  # type: ignore[arg-type]
        floating_point=plan.floating_point,  # type: ignore[arg-type]
    )
    return make_plan(arguments, num_units=plan.num_units, expected_batch_size=batch, max_steps=plan.max_steps)
