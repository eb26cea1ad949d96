"""From what was asked for to what will be done: the plan, its epsilon, and epsilon along the way.

dp_accounting does the mathematics; it is imported at first use, because it costs seconds that `import dpfa_hf` need not
pay. Everything here is computed from public numbers only.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan, sensitivity_slack

# dp_accounting's default width of the bins of a privacy loss distribution (PLD). Wider bins only raise epsilon.
_FINE_INTERVAL = 1e-4
_COARSE_INTERVAL = 1e-3
# Below this delta the rounding of the FFT that composes PLDs is no longer on the safe side (at 1e-12 the Gaussian
# mechanism's epsilon came out 6e-5 too small, at 1e-10 1e-8).
_SMALLEST_DELTA = 1e-10
# The ceiling on the batch may use this share of delta, summed over all steps: its cost in epsilon is then below 1e-5.
_CEILING_SHARE = 1 / 100
# Calibration looks for the natural logarithm of the noise multiplier between 0.03 and a million.
_LOG_NOISE_RANGE = (-3.5, 14.0)
_PROGRESS_POINTS = 64
# Andrew et al. 2021 (arXiv:1905.03871) aim at the median at this rate, at which C moves tenfold in two dozen steps; the
# weight makes the quantile coordinate, whose half counts, as dear as the loss curve at its default.
_CLIPPING_QUANTILE, _CLIPPING_LEARNING_RATE, _CLIPPING_QUANTILE_WEIGHT = 0.5, 0.2, 0.16
_MAX_EXAMPLES_PER_USER = 8


def make_plan(
    privacy_args: PrivacyArguments,
    *,
    num_units: int,
    expected_batch_size: int,
    max_steps: int,
    loss_scale: float | None = None,
) -> PrivacyPlan:
    """Decides everything that the guarantee depends on, before step 1.

    Without `noise_multiplier` the smallest one is found (to 1 %) whose epsilon after `max_steps` steps is within the
    target. With it, `plan.max_steps` is the largest number of steps, at most `max_steps`, whose epsilon is within it.

    Guarantee: `plan.epsilon` is an upper bound on the epsilon at `plan.delta` of `plan.max_steps` steps of truncated
    Poisson sampling with sensitivity (1 + slack) C sqrt(1 + beta^2 + s^2 / 4), that of gradient, loss and quantile bit
    as one vector, under the declared adjacency, and is at most the target. It is computed from
    `TruncatedSubsampledGaussianDpEvent`'s PLD (Ganesh et al., arXiv 2508.15089) with the neighbouring relation explicit
    (P6), or, with accountant="rdp", from Poisson sampling's RDP with the ceiling charged to delta. A target of infinity
    gives a plan that is not private.

    Args:
        privacy_args: what the user asked for; its `expected_batch_size`, where set, replaces the argument below.
        num_units: n, the public number of privacy units, counted before any filter that looks at rows (P5).
        expected_batch_size: expected units in a step, the public divisor of the noised sum.
        max_steps: T, the steps that the schedule asks for.
        loss_scale: public default for `private_loss_max`; where neither is known no loss is released, and none charged.
            Nor is one under a target of infinity, where nothing would protect it.

    Raises:
        PrivacyError: the arguments and the sizes contradict each other, or not even one step fits the target.
    """
    if privacy_args.expected_batch_size is not None:
        expected_batch_size = privacy_args.expected_batch_size
    sizes = {"num_units": num_units, "expected_batch_size": expected_batch_size, "max_steps": max_steps}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise PrivacyError(f"{name}={value!r} must be a whole number of at least 1; change {name}.")
    probability = privacy_args.sampling_probability
    if probability is None:
        if expected_batch_size > num_units:
            raise PrivacyError(
                f"expected_batch_size={expected_batch_size} is more than the {num_units} units of the data set; lower "
                "expected_batch_size, or give sampling_probability if the divisor is meant to differ from the batch."
            )
        probability = expected_batch_size / num_units
    delta = _delta(privacy_args, num_units)
    private = math.isfinite(privacy_args.target_epsilon)
    by_rdp = privacy_args.accountant == "rdp" and private
    # RDP knows no ceiling: by P6 each truncated step costs (1 + e^epsilon) of delta, bounded here at the target.
    truncation_cost = 1 + math.exp(min(privacy_args.target_epsilon, 700)) if by_rdp else 1.0
    ceiling = privacy_args.max_batch_size
    if ceiling is None:
        ceiling = _smallest_ceiling(num_units, probability, delta * _CEILING_SHARE / truncation_cost / max_steps)
    ceiling = min(ceiling, num_units)
    truncation_delta = (
        max_steps * truncation_cost * _exceeding_probability(num_units, probability, ceiling) if by_rdp else 0.0
    )
    if truncation_delta >= delta:
        raise PrivacyError(
            f"max_batch_size={ceiling} is exceeded so often that accountant='rdp' has no delta left; raise "
            "max_batch_size or use accountant='pld'."
        )
    adaptive, of_users = privacy_args.clipping == "adaptive", privacy_args.privacy_unit == "user"
    loss_max = privacy_args.private_loss_max if privacy_args.private_loss_max is not None else loss_scale
    shows_loss = private and loss_max is not None and privacy_args.private_loss_weight > 0
    draft = PrivacyPlan(
        privacy_unit=privacy_args.privacy_unit,
        privacy_unit_column=privacy_args.privacy_unit_column or "",
        max_examples_per_user=(privacy_args.max_examples_per_user or _MAX_EXAMPLES_PER_USER) if of_users else 1,
        adjacency=privacy_args.adjacency,
        accountant=privacy_args.accountant,
        clipping=privacy_args.clipping,
        num_units=num_units,
        sampling_probability=probability,
        expected_batch_size=expected_batch_size,
        max_batch_size=ceiling,
        noise_multiplier=1.0 if privacy_args.noise_multiplier is None else privacy_args.noise_multiplier,
        clipping_norm=privacy_args.per_example_max_grad_norm,
        clipping_quantile=(privacy_args.clipping_quantile or _CLIPPING_QUANTILE) if adaptive else 0.0,
        clipping_learning_rate=(privacy_args.clipping_learning_rate or _CLIPPING_LEARNING_RATE) if adaptive else 0.0,
        clipping_quantile_weight=_CLIPPING_QUANTILE_WEIGHT if adaptive else 0.0,
        private_loss_weight=privacy_args.private_loss_weight if shows_loss else 0.0,
        private_loss_max=(loss_max or 0.0) if shows_loss else 0.0,
        floating_point=privacy_args.floating_point,
        sensitivity_slack=sensitivity_slack(ceiling, privacy_args.floating_point),
        max_steps=max_steps,
        delta=delta,
        truncation_delta=truncation_delta,
        target_epsilon=privacy_args.target_epsilon,
        epsilon=privacy_args.target_epsilon,
        noise_generator=privacy_args.noise_generator,
        accountant_version=f"dp_accounting {version('dp-accounting')}",
    )
    if not private:
        return draft
    # The automatic ceiling costs next to nothing, so the search may do without it: half the work.
    sketch = replace(draft, max_batch_size=num_units) if privacy_args.max_batch_size is None else draft
    if privacy_args.noise_multiplier is None:
        return _with_calibrated_noise(draft, sketch)
    return _with_affordable_steps(draft, sketch)


def statistics_prices(plan: PrivacyPlan) -> dict[str, float]:
    """What each released statistic costs: name -> epsilon with it less epsilon of the same noise and steps without it.

    Epsilon itself already contains them. Empty for a plan that releases none, or is not private.
    """
    if not plan.is_private:
        return {}
    without = {}
    if plan.private_loss_weight:
        without["private_loss"] = replace(plan, private_loss_weight=0.0)
    if plan.clipping_quantile_weight:
        without["adaptive_clipping"] = replace(plan, clipping="flat", clipping_quantile_weight=0.0)

    def epsilon(each: PrivacyPlan) -> float:
        return _epsilon_by_steps(each, _coarse_interval(plan))(plan.max_steps)

    return {name: epsilon(plan) - epsilon(each) for name, each in without.items()}


def privacy_curve(plan: PrivacyPlan, epsilons: Sequence[float]) -> list[float]:
    """An upper bound on delta for each of `epsilons` after all of the plan's steps, by its own accountant.

    The whole privacy of the planned mechanism, of which (`plan.epsilon`, `plan.delta`) is one point. No bound is below
    1e-10, where the rounding of the accountant's sums is no longer on the safe side.

    Raises:
        PrivacyError: the plan carries no guarantee.
    """
    if not plan.is_private:
        raise PrivacyError("the plan is NOT PRIVATE, so it has no privacy curve; make one with a finite target_epsilon")
    if plan.accountant == "rdp":
        accountant = _rdp_accountant(plan, plan.max_steps)
        # What the ceiling takes from delta grows with e^epsilon (P6).
        share = plan.truncation_delta / (1 + math.exp(min(plan.target_epsilon, 700)))
        deltas = [float(accountant.get_delta(each)) + share * (1 + math.exp(min(each, 700))) for each in epsilons]
    else:
        # Wide bins are quick and err upwards.
        run_pld = _planned_step_pld(plan, _coarse_interval(plan)).self_compose(plan.max_steps)
        deltas = [float(each) for each in run_pld.get_delta_for_epsilon(list(epsilons))]
    return [min(1.0, max(each, _SMALLEST_DELTA)) for each in deltas]


class EpsilonCurve:
    """Epsilon on the way to `plan.max_steps`: for progress bars and logs, a guarantee only at the end (P20).

    The curve is tabulated at no more than 64 steps, closer together early on where it is steep, and computed when first
    asked for. A step in between gets the value of the next tabulated one: the curve is concave, so interpolation would
    claim too little.

    Attributes:
        steps: the tabulated steps, ascending; the last is `plan.max_steps`.
    """

    def __init__(self, plan: PrivacyPlan) -> None:
        self._plan = plan
        last, points = plan.max_steps, _PROGRESS_POINTS
        grid = range(1, last + 1) if last <= points else (-(-last * k * k // points**2) for k in range(1, points + 1))
        self.steps: tuple[int, ...] = tuple(sorted(set(grid)))
        self._values: dict[int, float] = {0: 0.0, last: plan.epsilon}

    def at(self, step: int) -> float:
        """An upper bound on epsilon at `plan.delta` after `step` charged steps; `plan.epsilon` at `plan.max_steps`.

        Raises:
            PrivacyError: `step` is negative or past `plan.max_steps`.
        """
        if not 0 <= step <= self._plan.max_steps:
            raise PrivacyError(f"step={step} is outside the plan's 0 to {self._plan.max_steps} steps; make a new plan.")
        point = next(tabulated for tabulated in (0, *self.steps) if tabulated >= step)
        if point not in self._values:
            self._values[point] = self._epsilon(point)
        return self._values[point]

    def tabulated(self) -> dict[int, float]:
        """Step -> epsilon for the steps asked for so far and the last one, for the report."""
        return dict(sorted(self._values.items()))

    def _epsilon(self, step: int) -> float:
        if not self._plan.is_private:
            return math.inf
        # Wide bins are quick and err upwards; no step before the last can cost more than the last.
        return min(_epsilon_by_steps(self._plan, _coarse_interval(self._plan))(step), self._plan.epsilon)


def _delta(privacy_args: PrivacyArguments, num_units: int) -> float:
    delta = 1 / (10 * num_units) if privacy_args.target_delta is None else privacy_args.target_delta
    if delta >= 1 / num_units:
        raise PrivacyError(
            f"target_delta={delta} must be below 1/n = {1 / num_units:.3g} for n = {num_units} units (P24); lower "
            "target_delta or leave it out."
        )
    if delta < _SMALLEST_DELTA:
        raise PrivacyError(f"target_delta={delta} is below {_SMALLEST_DELTA}, too small to compute; raise it.")
    return delta


def _exceeding_probability(num_units: int, probability: float, ceiling: int) -> float:
    """P(Bin(num_units, probability) > ceiling)."""
    from scipy.stats import binom

    return float(binom.sf(ceiling, num_units, probability))


def _smallest_ceiling(num_units: int, probability: float, tail: float) -> int:
    """The smallest B >= 1 with P(Bin(num_units, probability) > B) <= tail."""
    low, high = 0, num_units
    while high - low > 1:
        middle = (low + high) // 2
        if _exceeding_probability(num_units, probability, middle) <= tail:
            high = middle
        else:
            low = middle
    return high


def _with_calibrated_noise(plan: PrivacyPlan, sketch: PrivacyPlan) -> PrivacyPlan:
    """`plan` with the smallest noise multiplier, to within 1 %, whose epsilon at `max_steps` is within the target.

    The search reads `sketch` in wide bins; `plan` itself, in narrow ones, then confirms it or corrects the aim.
    """
    from scipy.optimize import brentq

    target, steps = plan.target_epsilon, plan.max_steps

    @functools.cache
    def log_epsilon(log_noise: float) -> float:
        candidate = replace(sketch, noise_multiplier=math.exp(log_noise))
        epsilon = _epsilon_by_steps(candidate, _coarse_interval(candidate))(steps)
        return math.log(min(max(epsilon, 1e-9), 1e9))

    def search(log_aim: float) -> float:
        low = high = 0.0
        while log_epsilon(high) > log_aim and high < _LOG_NOISE_RANGE[1]:
            low, high = high, high + 1
        while log_epsilon(low) <= log_aim and low > _LOG_NOISE_RANGE[0]:
            low, high = low - 1, low
        if not log_epsilon(high) <= log_aim < log_epsilon(low):
            return low if log_epsilon(low) <= log_aim else high
        return float(brentq(lambda log_noise: log_epsilon(log_noise) - log_aim, low, high, xtol=5e-5))

    best = None
    log_aim = math.log(target * (1 - 5e-4))
    for _ in range(5):
        candidate = replace(plan, noise_multiplier=math.exp(search(log_aim)))
        epsilon = _epsilon_by_steps(candidate, _fine_interval(candidate))(steps)
        if epsilon <= target and (best is None or candidate.noise_multiplier < best.noise_multiplier):
            best = replace(candidate, epsilon=epsilon)
        if target * (1 - 5e-3) <= epsilon <= target or not 0 < epsilon < math.inf:
            break
        log_aim += math.log(target * (1 - 1e-3) / epsilon)
    if best is None:
        raise PrivacyError(
            f"target_epsilon={target} at delta={plan.delta:.3g} is out of reach in {steps} steps whatever the noise; "
            "raise target_epsilon or take fewer steps."
        )
    return best


def _with_affordable_steps(plan: PrivacyPlan, sketch: PrivacyPlan) -> PrivacyPlan:
    """`plan` with the largest number of steps, at most its own, whose epsilon is within the target."""
    rough = _epsilon_by_steps(sketch, _coarse_interval(sketch))
    # From below, because composing far more steps than the target affords may not fit in memory.
    guess = _last_step(lambda step: rough(step) <= plan.target_epsilon, plan.max_steps, guess=1)
    exact = functools.cache(_epsilon_by_steps(plan, _fine_interval(plan)))
    steps = _last_step(lambda step: exact(step) <= plan.target_epsilon, plan.max_steps, guess)
    if steps == 0:
        raise PrivacyError(
            f"noise_multiplier={plan.noise_multiplier} spends epsilon {exact(1):.3g} in one step, more than "
            f"target_epsilon={plan.target_epsilon}; raise noise_multiplier, or leave it out to have it calibrated."
        )
    return replace(plan, max_steps=steps, epsilon=exact(steps))


def _last_step(within: Callable[[int], bool], most: int, guess: int) -> int:
    """The largest step in 0..most for which the falling predicate `within` holds (0 always does), near `guess`."""
    low, high = 0, most + 1
    probe, stride = guess, 1
    while high - low > 1:
        probe = min(max(probe, low + 1), high - 1)
        if within(probe):
            low, probe = probe, probe + stride
        else:
            high, probe = probe, probe - stride
        stride *= 4
        if low > 0 and high <= most:
            probe = (low + high) // 2
    return low


def _fine_interval(plan: PrivacyPlan) -> float:
    """Bin width of the PLD behind a guarantee: dp_accounting's own, wider only where losses are huge."""
    losses = max(0.25 / plan.noise_multiplier**2, plan.target_epsilon / 100)
    return _FINE_INTERVAL * max(1.0, losses)


def _coarse_interval(plan: PrivacyPlan) -> float:
    """Bin width for searching and for progress figures: as wide as keeps epsilon within about 2e-4 of its value."""
    wide = plan.target_epsilon / (100 * math.sqrt(plan.max_steps))
    return _fine_interval(plan) / _FINE_INTERVAL * min(max(wide, _FINE_INTERVAL), _COARSE_INTERVAL)


def _epsilon_by_steps(plan: PrivacyPlan, interval: float) -> Callable[[int], float]:
    """Epsilon at `plan.delta` as a function of the number of steps, an upper bound whatever the `interval`.

    Reads the mechanism in `plan` and neither its `max_steps` nor its `epsilon`. Infinite where there is no noise.
    """
    if plan.accountant == "rdp":
        return functools.partial(_rdp_epsilon, plan)
    step_pld = _planned_step_pld(plan, interval)
    return lambda steps: float(step_pld.self_compose(steps).get_epsilon_for_delta(plan.delta))


def _planned_step_pld(plan: PrivacyPlan, interval: float) -> Any:
    return _step_pld(
        plan.num_units,
        plan.sampling_probability,
        plan.max_batch_size,
        plan.accounted_noise_multiplier,
        plan.adjacency,
        interval,
    )


@functools.lru_cache(maxsize=2)
def _step_pld(
    num_units: int, probability: float, ceiling: int, noise_multiplier: float, adjacency: str, interval: float
) -> Any:
    """The PLD of one step, what `PLDAccountant` builds for `TruncatedSubsampledGaussianDpEvent`; seconds to build."""
    from dp_accounting.pld.privacy_loss_distribution import from_truncated_subsampled_gaussian_mechanism
    from dp_accounting.privacy_accountant import NeighboringRelation

    relations = {"zero_out": NeighboringRelation.REPLACE_SPECIAL, "replace_one": NeighboringRelation.REPLACE_ONE}
    return from_truncated_subsampled_gaussian_mechanism(
        dataset_size=num_units,
        sampling_probability=probability,
        truncated_batch_size=ceiling,
        noise_multiplier=noise_multiplier,
        value_discretization_interval=interval,
        neighboring_relation=relations[adjacency],
    )


def _rdp_epsilon(plan: PrivacyPlan, steps: int) -> float:
    """Epsilon of Poisson sampling by RDP at the delta that the ceiling's charge leaves (P6)."""
    return float(_rdp_accountant(plan, steps).get_epsilon(plan.delta - plan.truncation_delta))


def _rdp_accountant(plan: PrivacyPlan, steps: int) -> Any:
    """RDP of `steps` steps of Poisson sampling, without the ceiling."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    event = PoissonSampledDpEvent(plan.sampling_probability, GaussianDpEvent(plan.accounted_noise_multiplier))
    return accountant.compose(event, steps)
