"""What each single change to a plan would buy, and what tuning costs: for `dpfa plan --compare`, from public numbers.

Every point is a plan made by `accounting.make_plan`, the code that training uses. Points are ranked by a proxy, the
noise over the run, sigma / (expected batch x sqrt(steps)): the standard deviation, on one coordinate and in units of
the clipping norm C, of the noise in the mean of all the average gradients that the run takes. Its inverse is the
signal-to-noise ratio of a gradient that is C long and stays the same. It is a proxy, not accuracy: `PROXY_IGNORES`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any, Literal

from dpfa_hf.accounting import make_plan
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan, sensitivity_slack

PROXY = "noise_over_the_run"
PROXY_MEANING = "sigma / (expected batch x sqrt(steps)): noise in the mean of all average gradients, in units of C"
PROXY_IGNORES = (
    "the choice of C, and what clipping takes away",
    "how fast the model learns from a gradient, and that gradients shrink as it does",
    "that batches past some size, and steps past some number, teach no more",
    "how many parameters the noise falls on",
)
SELECTION_CONDITIONS = (
    "The number of runs is drawn once, from the named distribution, before the first run; results do not change it.",
    "Nobody learns that number: a ledger, dashboard or bill that others see tells it.",
    "Every run has this very plan, and draws its other settings afresh from a list fixed beforehand, whatever earlier "
    "runs gave.",
    "The score that picks the best run comes from public data, or from what the noise covers (private_loss).",
    "One model is released, the best run's. Of all other runs nothing is: no log, no score, no checkpoint, no remark.",
)
# Sigma is calibrated to 1 %: smaller gains may be the calibration's.
_LEAST_GAIN = 1.01
# Delta may rise to this share of 1/n, which it must stay below (P24).
_LARGEST_DELTA_SHARE = 0.99
# What the ceiling on the batch may take of delta in private selection; as in planning.
_CEILING_SHARE = 1 / 100
# Fewer orders than dp_accounting's own: leaving some out only raises epsilon, and a fractional order takes long.
_ORDERS = (*(order / 2 for order in range(3, 20)), *range(10, 64), 128, 256, 512, 1024)
# The shape of the distribution of the number of runs, in dp_accounting's terms, from the cheapest to the dearest at
# small epsilon.
DISTRIBUTIONS = {"logarithmic": 0.0, "geometric": 1.0, "Poisson": math.inf}
_LOG_NOISE_STEPS, _LOG_NOISE_RANGE = 1e-3, (-3.5, 14.0)

Kind = Literal["free", "needs data", "costs privacy"]
Progress = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Case:
    """A run that might be planned: arguments and sizes as `make_plan` takes them."""

    arguments: PrivacyArguments
    num_units: int
    expected_batch_size: int
    max_steps: int

    def with_arguments(self, **changes: Any) -> Case:
        """The same sizes with other privacy arguments."""
        return replace(self, arguments=replace(self.arguments, **changes))

    @property
    def computing(self) -> int:
        """Units that the run is expected to compute gradients of."""
        return self.expected_batch_size * self.max_steps


@dataclass(frozen=True)
class Point:
    """A case and its plan, or why there is none."""

    case: Case
    plan: PrivacyPlan | None
    refused: str | None

    @property
    def noise_over_the_run(self) -> float:
        """The proxy; infinite where there is no plan."""
        return math.inf if self.plan is None else noise_over_the_run(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        case, plan = self.case, self.plan
        row: dict[str, Any] = {
            "target_epsilon": case.arguments.target_epsilon,
            "num_units": case.num_units,
            "expected_batch_size": case.expected_batch_size,
            "max_steps": case.max_steps,
            "refused": self.refused,
        }
        if plan is not None:
            row |= {name: getattr(plan, name) for name in ("epsilon", "delta", "noise_multiplier", "max_batch_size")}
            row["noise_per_example"] = plan.noise_standard_deviation / plan.expected_batch_size
            row[PROXY] = self.noise_over_the_run
        return row


@dataclass(frozen=True)
class Change:
    """One single change to the base case.

    Attributes:
        name: what is changed.
        kind: "free" keeps the promise and the data, "needs data" keeps the promise, "costs privacy" weakens it.
        costs: what is paid for it.
        point: the changed case's plan.
        gain: by what factor the noise over the run falls; 0 where there is no plan.
        computing: by what factor the computing grows.
    """

    name: str
    kind: Kind
    costs: str
    point: Point
    gain: float
    computing: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        own = {"change": self.name, "kind": self.kind, "costs": self.costs}
        return {**own, "gain": self.gain, "computing": self.computing, **self.point.to_dict()}


@dataclass(frozen=True)
class Comparison:
    """A base plan, points around it, and single changes, the most useful first.

    Attributes:
        base: the plan that was asked about.
        curves: the field that varies -> points in ascending order, the base among them.
        changes: every single change, by descending gain.
    """

    base: Point
    curves: dict[str, tuple[Point, ...]]
    changes: tuple[Change, ...]

    def best(self, kind: Kind) -> Change | None:
        """The change of that kind that buys the most, or None where none buys more than 1 %."""
        return next((each for each in self.changes if each.kind == kind and each.gain > _LEAST_GAIN), None)

    def most(self) -> Change | None:
        """The change of any kind that buys the most, or None where none buys more than 1 %."""
        return next((each for each in self.changes if each.gain > _LEAST_GAIN), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        kinds: tuple[Kind, ...] = ("free", "needs data", "costs privacy")
        best = {kind: self.best(kind) for kind in kinds}
        return {
            "proxy": {"name": PROXY, "meaning": PROXY_MEANING, "better": "lower", "ignores": list(PROXY_IGNORES)},
            "base": self.base.to_dict(),
            "curves": {name: [point.to_dict() for point in points] for name, points in self.curves.items()},
            "changes": [change.to_dict() for change in self.changes],
            "best": {kind: None if change is None else change.name for kind, change in best.items()},
        }


@dataclass(frozen=True)
class Composition:
    """What K tuning runs cost by the ledger's rule (P22): epsilons and deltas add up, and nothing is refunded.

    Attributes:
        runs: K.
        epsilon, delta: what K runs of the base plan reserve together.
        within: the plan of each of K runs that together stay within the base plan's epsilon and delta.
    """

    runs: int
    epsilon: float
    delta: float
    within: Point


@dataclass(frozen=True)
class Selection:
    """What releasing the best of a random, hidden number of runs costs where `SELECTION_CONDITIONS` hold.

    Attributes:
        distribution: a key of `DISTRIBUTIONS`.
        mean_runs: E[K], the expected number of runs.
        few_runs: P(K <= 1), the chance that there is nothing to choose from.
        epsilon: of the selected model, at the base plan's delta and noise; None where `refused`.
        max_batch_size: the ceiling on the batch that this epsilon needs.
        noise_multiplier: sigma at which the selected model has the base plan's target epsilon; None where `refused`.
        noise_over_the_run: the proxy at that sigma.
        refused: why there is no such statement.
    """

    distribution: str
    mean_runs: int
    few_runs: float
    epsilon: float | None = None
    max_batch_size: int | None = None
    noise_multiplier: float | None = None
    noise_over_the_run: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Tuning:
    """What tuning costs, by both ways to count; the ledger counts by `composition` and grants no other."""

    composition: Composition
    selections: tuple[Selection, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        both = self.composition
        return {
            "composition": {
                "runs": both.runs,
                "epsilon": both.epsilon,
                "delta": both.delta,
                "within": {
                    **both.within.to_dict(),
                    "target_delta": both.within.case.arguments.target_delta,
                },
            },
            "selection": {
                "granted_by_the_ledger": False,
                "source": "Papernot and Steinke 2022, arXiv:2110.03620, theorems 2 and 6",
                "conditions": list(SELECTION_CONDITIONS),
                "by_distribution": [vars(each) for each in self.selections],
            },
        }


def noise_over_the_run(plan: PrivacyPlan) -> float:
    """The proxy: standard deviation of the noise in the mean of all average gradients, per coordinate, in units of C.

    T independent noises of standard deviation sigma C / batch have a mean of standard deviation
    sigma C / (batch sqrt(T)).
    """
    return plan.noise_multiplier / (plan.expected_batch_size * math.sqrt(plan.max_steps))


def compare(base: Case, progress: Progress = iter) -> Comparison:
    """Plans the base case, its surroundings and every single change to it; a second or a few for each of some 15 plans.

    Args:
        base: with sigma left to calibration and q to the expected batch.
        progress: wraps the sequence of cases, for a progress bar.

    Raises:
        PrivacyError: there is nothing to calibrate, or the base case cannot be planned.
    """
    arguments = base.arguments
    if not math.isfinite(arguments.target_epsilon):
        raise PrivacyError("target_epsilon=inf is NOT PRIVATE and has nothing to compare; give a finite one.")
    for name in ("noise_multiplier", "sampling_probability", "expected_batch_size"):
        if getattr(arguments, name) is not None:
            raise PrivacyError(f"{name}={getattr(arguments, name)} fixes what a comparison varies; leave {name} out.")
    curves = {
        "expected_batch_size": [
            replace(base, expected_batch_size=size)
            for size in _around(base.expected_batch_size)
            if size <= base.num_units
        ],
        "max_steps": [replace(base, max_steps=steps) for steps in _around(base.max_steps)],
        "target_epsilon": [
            base.with_arguments(target_epsilon=epsilon)
            for epsilon in (arguments.target_epsilon / 2, arguments.target_epsilon, arguments.target_epsilon + 1)
        ],
    }
    changes = _changes(base)
    wanted = [base, *(case for cases in curves.values() for case in cases), *(case for *_, case in changes)]
    points: dict[Case, Point] = {}
    for case in progress(list(dict.fromkeys(wanted))):
        points[case] = _point(case)
    origin = points[base]
    if origin.refused is not None:
        raise PrivacyError(origin.refused)
    listed = [
        Change(
            name=name,
            kind=kind,
            costs=costs,
            point=points[case],
            gain=origin.noise_over_the_run / points[case].noise_over_the_run,
            computing=case.computing / base.computing,
        )
        for name, kind, costs, case in changes
    ]
    return Comparison(
        base=origin,
        curves={name: tuple(points[case] for case in cases) for name, cases in curves.items()},
        changes=tuple(sorted(listed, key=lambda change: -change.gain)),
    )


def tuning_costs(base: Point, runs: int, progress: Progress = iter) -> Tuning:
    """What `runs` tuning runs cost: by composition, and by private selection with that many runs expected.

    Args:
        base: a planned case; its target epsilon and its delta are also the total that `within` keeps.
        runs: K, 2 or more.
        progress: wraps the sequence of distributions, for a progress bar.

    Raises:
        PrivacyError: `base` has no plan, or `runs` is below 2.
    """
    if base.plan is None:
        raise PrivacyError(f"there is no plan whose tuning could be counted: {base.refused}")
    if runs < 2:
        raise PrivacyError(f"tuning_runs={runs} leaves nothing to choose from; give 2 or more.")
    each = base.case.with_arguments(
        target_epsilon=_share(base.case.arguments.target_epsilon, runs), target_delta=_share(base.plan.delta, runs)
    )
    composition = Composition(runs, runs * base.plan.epsilon, runs * base.plan.delta, _point(each))
    plan = base.plan
    return Tuning(composition, tuple(_selection(plan, name, runs) for name in progress(list(DISTRIBUTIONS))))


def selected_epsilon(plan: PrivacyPlan, mean_runs: float, shape: float) -> float:
    """Epsilon, at `plan.delta`, of the best of a random number of runs of `plan`; inf where no order gives one.

    Guarantee: where `SELECTION_CONDITIONS` hold. Theorems 2 and 6 of Papernot and Steinke (ICLR 2022, arXiv:2110.03620)
    bound the Renyi divergences of the selected output by those of one run. With K from the truncated negative binomial
    distribution of shape eta, order lambda > 1 and any order lambda' >= 1,

        rdp'(lambda) = rdp(lambda) + (1 + eta) [(1 - 1/lambda') rdp(lambda') + ln(1/gamma) / lambda']
                       + ln E[K] / (lambda - 1),

    and with K from the Poisson distribution, rdp(lambda) + E[K] delta' + ln E[K] / (lambda - 1), where one run is
    (ln(1 + 1/(lambda - 1)), delta')-DP. dp_accounting computes both. They are applied to Poisson sampling; the ceiling
    on the batch makes the real output differ from that one with a probability of at most
    p = E[K] T P(Bin(n, q) > B_max), summed over the runs, so (1 + e^epsilon) p is charged to delta (P6).

    Args:
        plan: of every run; its `max_batch_size` is the ceiling.
        mean_runs: E[K], at least 1.
        shape: eta: 0 for the logarithmic distribution, 1 for the geometric one, infinity for the Poisson one.

    Raises:
        PrivacyError: RDP cannot account for the plan's adjacency, or its ceiling is passed too often.
    """
    epsilon = _selected_epsilon(plan, mean_runs, shape)
    spent = mean_runs * plan.max_steps * _exceeding_probability(plan, plan.max_batch_size)
    spent *= 1 + math.exp(min(epsilon, 700.0))
    if spent > plan.delta * _CEILING_SHARE:
        raise PrivacyError(
            f"max_batch_size={plan.max_batch_size} is passed too often for private selection among {mean_runs:g} runs; "
            "raise max_batch_size."
        )
    return epsilon


def _changes(base: Case) -> list[tuple[str, Kind, str, Case]]:
    """Name, kind, cost and changed case. Neither adjacency nor unit nor finite precision: those are other promises."""
    arguments, batch, steps, units = base.arguments, base.expected_batch_size, base.max_steps, base.num_units
    found: list[tuple[str, Kind, str, Case]] = []
    if batch < units:
        larger = min(2 * batch, units)
        name = "double the batch" if larger == 2 * batch else f"a batch of all {units} units"
        found.append((name, "free", "computing, and memory unless micro-batches stay", _sized(base, batch=larger)))
    found.append(("double the steps", "free", "computing", _sized(base, steps=2 * steps)))
    if steps > 1:
        found.append(("half the steps", "free", "nothing; computing is saved", _sized(base, steps=steps // 2)))
    if arguments.private_loss_weight > 0:
        without = base.with_arguments(private_loss_weight=0.0)
        found.append(("no private loss curve", "free", "no loss in the log", without))
    if arguments.clipping == "adaptive":
        flat = base.with_arguments(clipping="flat", clipping_quantile=None, clipping_learning_rate=None)
        found.append(("flat instead of adaptive clipping", "free", "C must be right from the start", flat))
    if arguments.accountant == "rdp":
        found.append(("count by pld instead of rdp", "free", "nothing", base.with_arguments(accountant="pld")))
    if arguments.max_batch_size is not None:
        found.append(("lift the batch ceiling", "free", "rare larger steps", base.with_arguments(max_batch_size=None)))
    found.append(("twice the data", "needs data", "as many new units", _sized(base, units=2 * units)))
    weaker = base.with_arguments(target_epsilon=arguments.target_epsilon + 1)
    found.append(
        ("epsilon one higher", "costs privacy", "odds of telling if a unit took part may be 2.7 times as large", weaker)
    )
    loosest = _rounded_down(_LARGEST_DELTA_SHARE / units, 3)
    if arguments.target_delta is None or arguments.target_delta < loosest:
        meaning = "about one unit in the data set may get no promise at all"
        found.append(
            (f"delta just below 1/n ({loosest:g})", "costs privacy", meaning, base.with_arguments(target_delta=loosest))
        )
    return found


def _sized(base: Case, *, batch: int | None = None, steps: int | None = None, units: int | None = None) -> Case:
    return replace(
        base,
        num_units=units or base.num_units,
        expected_batch_size=batch or base.expected_batch_size,
        max_steps=steps or base.max_steps,
    )


def _around(value: int) -> list[int]:
    return sorted({max(value // 2, 1), value, 2 * value, 4 * value})


def _point(case: Case) -> Point:
    try:
        plan = make_plan(
            case.arguments,
            num_units=case.num_units,
            expected_batch_size=case.expected_batch_size,
            max_steps=case.max_steps,
            loss_scale=1.0,  # any will do: the price does not depend on it
        )
    except PrivacyError as error:
        return Point(case, None, str(error))
    return Point(case, plan, None)


def _rounded_down(value: float, digits: int) -> float:
    return float(Context(prec=digits, rounding=ROUND_FLOOR).create_decimal(Decimal(repr(value))))


def _share(total: float, runs: int) -> float:
    """A number to type, `runs` of which the ledger, which adds decimals exactly, finds to be within `total`."""
    return float(Context(prec=6, rounding=ROUND_FLOOR).divide(Decimal(repr(total)), Decimal(runs)))


def _selection(plan: PrivacyPlan, distribution: str, mean_runs: int) -> Selection:
    shape, few = DISTRIBUTIONS[distribution], _few_runs(distribution, mean_runs)
    try:
        if plan.adjacency != "zero_out":
            raise PrivacyError(
                f"private selection is counted by RDP, which cannot account for adjacency={plan.adjacency!r} under "
                "Poisson sampling; count by composition."
            )
        guess = _selected_epsilon(plan, mean_runs, shape)
        if math.isinf(guess):
            raise PrivacyError("RDP finds no epsilon for the selected model; use more noise, or fewer runs.")
        lifted = _with_ceiling(plan, mean_runs, guess * 1.01)
        epsilon = selected_epsilon(lifted, mean_runs, shape)
        quiet = _quiet_enough(_with_ceiling(plan, mean_runs, plan.target_epsilon), mean_runs, shape)
    except PrivacyError as error:
        return Selection(distribution, mean_runs, few, refused=str(error))
    return Selection(
        distribution,
        mean_runs,
        few,
        epsilon=epsilon,
        max_batch_size=max(lifted.max_batch_size, quiet.max_batch_size),
        noise_multiplier=quiet.noise_multiplier,
        noise_over_the_run=noise_over_the_run(quiet),
    )


def _quiet_enough(plan: PrivacyPlan, mean_runs: float, shape: float) -> PrivacyPlan:
    """`plan` with the smallest sigma, to 0.1 %, at which the selected model's epsilon is within the plan's target."""

    def within(log_noise: float) -> bool:
        candidate = replace(plan, noise_multiplier=math.exp(log_noise))
        return _selected_epsilon(candidate, mean_runs, shape) <= plan.target_epsilon

    low = high = math.log(plan.noise_multiplier)
    while not within(high):
        if high > _LOG_NOISE_RANGE[1]:
            raise PrivacyError(
                f"the best of {mean_runs:g} runs is never within target_epsilon={plan.target_epsilon:g}, whatever the "
                "noise; use fewer runs."
            )
        low, high = high, high + 0.5
    while low > _LOG_NOISE_RANGE[0] and within(low):
        low, high = low - 0.5, low
    while high - low > _LOG_NOISE_STEPS:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    quiet = replace(plan, noise_multiplier=math.exp(high))
    selected_epsilon(quiet, mean_runs, shape)  # refuses a ceiling that is passed too often
    return quiet


def _with_ceiling(plan: PrivacyPlan, mean_runs: float, epsilon: float) -> PrivacyPlan:
    """`plan` with a ceiling on the batch, its own or a higher one, that selection at `epsilon` hardly ever passes."""
    cost = mean_runs * plan.max_steps * (1 + math.exp(min(epsilon, 700.0)))
    rare = plan.delta * _CEILING_SHARE / cost
    ceilings = range(plan.max_batch_size, plan.num_units + 1)
    ceiling = ceilings[bisect_left(ceilings, True, key=lambda size: _exceeding_probability(plan, size) <= rare)]
    return replace(plan, max_batch_size=ceiling, sensitivity_slack=sensitivity_slack(ceiling, plan.floating_point))


def _exceeding_probability(plan: PrivacyPlan, ceiling: int) -> float:
    """P(Bin(n, q) > ceiling), of one step."""
    from scipy.stats import binom

    return float(binom.sf(ceiling, plan.num_units, plan.sampling_probability))


def _selected_epsilon(plan: PrivacyPlan, mean_runs: float, shape: float) -> float:
    """Without the ceiling, at the delta that it leaves."""
    from dp_accounting.dp_event import (
        GaussianDpEvent,
        PoissonSampledDpEvent,
        RepeatAndSelectDpEvent,
        SelfComposedDpEvent,
    )
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    step = PoissonSampledDpEvent(plan.sampling_probability, GaussianDpEvent(plan.accounted_noise_multiplier))
    run = SelfComposedDpEvent(step, plan.max_steps)
    accountant = RdpAccountant(_ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(RepeatAndSelectDpEvent(run, mean_runs, shape))
    return float(accountant.get_epsilon(plan.delta * (1 - _CEILING_SHARE)))


def _few_runs(distribution: str, mean_runs: float) -> float:
    """P(K <= 1) of the distribution with that mean."""
    if distribution == "Poisson":
        return math.exp(-mean_runs) * (1 + mean_runs)
    if distribution == "geometric":
        return 1 / mean_runs
    from scipy.optimize import brentq

    # P(K = k) = (1 - g)^k / (k ln(1/g)), whose mean is (1/g - 1) / ln(1/g).
    log_g = brentq(lambda log_g: math.expm1(-log_g) / -log_g - mean_runs, -100.0, -1e-9)
    return -math.expm1(log_g) / -log_g
