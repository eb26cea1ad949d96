from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant, privacy_loss_distribution
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant

from dpfa_hf import accounting
from dpfa_hf.accounting import EpsilonCurve, make_plan, statistics_prices
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.plan import PrivacyPlan

RELATION = {"zero_out": NeighboringRelation.REPLACE_SPECIAL, "replace_one": NeighboringRelation.REPLACE_ONE}
# The noise is large and the steps many because privacy loss distributions with small losses are quick to compose.
SIZES = {"num_units": 2000, "expected_batch_size": 100, "max_steps": 600}


@pytest.fixture(autouse=True)
def _no_cached_distributions() -> Iterator[None]:
    cached = accounting._step_pld  # a test may put something else in its place
    cached.cache_clear()
    yield
    cached.cache_clear()


@functools.cache
def plan_for(
    num_units: int = 2000,
    expected_batch_size: int = 100,
    max_steps: int = 600,
    loss_scale: float | None = None,
    **arguments: Any,
) -> PrivacyPlan:
    return make_plan(
        PrivacyArguments(**{"target_epsilon": 2.0, **arguments}),
        num_units=num_units,
        expected_batch_size=expected_batch_size,
        max_steps=max_steps,
        loss_scale=loss_scale,
    )


def noise_over_sensitivity(plan: PrivacyPlan) -> float:
    """P15 written out again: per-example rounding plus twice the summation error at B_max; and the joint vector of a
    gradient of length 1, a loss of at most beta and a bit of plus or minus s / 2."""
    joint = math.sqrt(1 + plan.private_loss_weight**2 + plan.clipping_quantile_weight**2 / 4)
    slack = 2**-12 + 2 * plan.max_batch_size / 2**21
    if plan.floating_point == "hardened":
        # P18: a contribution, and twice the error of a sum of B_max of them in float64.
        unit, most = 2.0**-53, plan.max_batch_size
        slack = unit * 2**40 + 256**2 * unit * 2**24 + 2 * 256 * most * (2**20 + 3 * most + 4) * unit
    return plan.noise_multiplier / joint / (1 + slack)


@functools.cache
def dp_accounting_epsilon(
    plan: PrivacyPlan, steps: int, noise_multiplier: float | None = None, ceiling: int | None = None
) -> float:
    """The event of P6 given to dp_accounting's own accountant."""
    accountant = PLDAccountant(RELATION[plan.adjacency])
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
        dataset_size=plan.num_units,
        sampling_probability=plan.sampling_probability,
        truncated_batch_size=plan.max_batch_size if ceiling is None else ceiling,
        noise_multiplier=noise_over_sensitivity(plan) if noise_multiplier is None else noise_multiplier,
    )
    return float(accountant.compose(event, steps).get_epsilon(plan.delta))


def is_accounted_for(plan: PrivacyPlan) -> bool:
    """The check that every bug planted in the accounting must fail."""
    return plan.epsilon <= plan.target_epsilon and plan.epsilon >= dp_accounting_epsilon(plan, plan.max_steps) - 1e-7


# ---------------------------------------------------------------------------------------------------------------------
# Epsilon is what others compute


@pytest.mark.parametrize(
    ("sizes", "arguments"),
    [
        (SIZES, {"noise_multiplier": 4.0}),
        (SIZES, {"noise_multiplier": 4.0, "target_delta": 1e-8}),
        (SIZES, {"noise_multiplier": 8.0, "adjacency": "replace_one"}),
        (SIZES, {"noise_multiplier": 4.0, "loss_scale": 1.0, "private_loss_weight": 0.5}),
        (SIZES, {"noise_multiplier": 4.0, "clipping": "adaptive"}),
        (SIZES, {"noise_multiplier": 4.0, "floating_point": "hardened"}),
        (SIZES, {"noise_multiplier": 8.0, "loss_scale": 1.0, "clipping": "adaptive", "adjacency": "replace_one"}),
        (SIZES, {"noise_multiplier": 8.0, "max_batch_size": 110}),
        (SIZES, {"noise_multiplier": 8.0, "max_batch_size": 110, "adjacency": "replace_one"}),
        (SIZES, {"noise_multiplier": 6.0, "sampling_probability": 0.02, "target_delta": 4e-4}),
        ({"num_units": 50, "expected_batch_size": 50, "max_steps": 7}, {"noise_multiplier": 5.0}),
        ({"num_units": 100_000, "expected_batch_size": 2000, "max_steps": 3000}, {"noise_multiplier": 5.0}),
        ({"num_units": 3, "expected_batch_size": 1, "max_steps": 1}, {"noise_multiplier": 3.0}),
    ],
    ids=str,
)
def test_epsilon_is_that_of_dp_accounting_called_directly(sizes: dict[str, int], arguments: dict[str, Any]) -> None:
    plan = plan_for(**sizes, **arguments, target_epsilon=30.0)
    assert plan.max_steps == sizes["max_steps"]
    assert plan.epsilon == pytest.approx(dp_accounting_epsilon(plan, plan.max_steps), rel=1e-6)
    assert is_accounted_for(plan)


@pytest.mark.parametrize(("noise_multiplier", "batch", "steps"), [(1.5, 20, 400), (2.0, 100, 300), (4.0, 200, 500)])
def test_epsilon_without_truncation_is_that_of_the_prv_accountant_to_one_percent(
    noise_multiplier: float, batch: int, steps: int
) -> None:
    plan = plan_for(2000, batch, steps, noise_multiplier=noise_multiplier, max_batch_size=2000, target_epsilon=30.0)
    prv = PRVAccountant()
    prv.history = [(noise_over_sensitivity(plan), plan.sampling_probability, steps)]
    assert plan.epsilon == pytest.approx(prv.get_epsilon(plan.delta, eps_error=0.002), rel=0.01)


def test_full_batch_epsilon_is_the_analytic_gaussian_mechanism() -> None:
    plan = plan_for(1000, 1000, 40, noise_multiplier=10.0, target_epsilon=30.0)
    assert plan.sampling_probability == 1.0 and plan.max_batch_size == 1000
    analytic = dp_accounting.get_epsilon_gaussian(noise_over_sensitivity(plan) / math.sqrt(40), plan.delta)
    assert plan.epsilon == pytest.approx(analytic, rel=1e-3)


def test_rdp_charges_the_ceiling_to_delta_and_is_never_below_pld() -> None:
    plan = plan_for(noise_multiplier=4.0, accountant="rdp", target_epsilon=4.0)
    tail = sum(_binomial_pmf(2000, 0.05, k) for k in range(plan.max_batch_size + 1, 2001))
    assert plan.truncation_delta == pytest.approx(600 * (1 + math.exp(4.0)) * tail, rel=1e-6)
    assert 0 < plan.truncation_delta <= plan.delta / 100
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    gaussian = dp_accounting.GaussianDpEvent(noise_over_sensitivity(plan))
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.05, gaussian), 600)
    assert plan.epsilon == pytest.approx(accountant.get_epsilon(plan.delta - plan.truncation_delta), rel=1e-9)
    assert plan.epsilon > plan_for(noise_multiplier=4.0).epsilon
    assert EpsilonCurve(plan).at(600) == plan.epsilon


# ---------------------------------------------------------------------------------------------------------------------
# Planted bugs


@pytest.mark.parametrize("floating_point", ["snapped", "hardened"])
def test_check_catches_rounding_left_out_of_the_sensitivity(
    floating_point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_accounted_for(plan_for(noise_multiplier=4.0, floating_point=floating_point))
    monkeypatch.setattr(accounting, "sensitivity_slack", lambda *_: 0.0)
    assert not is_accounted_for(plan_for.__wrapped__(noise_multiplier=4.0, floating_point=floating_point))


@pytest.mark.parametrize(
    ("added", "price"),
    [({"loss_scale": 1.0}, "private_loss"), ({"clipping": "adaptive"}, "adaptive_clipping")],
    ids=str,
)
def test_check_catches_an_added_coordinate_accounted_as_free(
    added: dict[str, Any], price: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_units": 2000, "expected_batch_size": 100, "max_steps": 600, "noise_multiplier": 4.0}
    honest = plan_for(**sizes, **added)
    assert is_accounted_for(honest)
    assert list(statistics_prices(honest)) == [price]
    monkeypatch.setattr(PrivacyPlan, "joint_sensitivity", 1.0)
    plan_for.cache_clear()
    free = plan_for(**sizes, **added)
    monkeypatch.undo()
    plan_for.cache_clear()
    assert free.epsilon < honest.epsilon and not is_accounted_for(free)
    assert honest.epsilon - free.epsilon == pytest.approx(statistics_prices(honest)[price], rel=0.05)


def test_the_loss_curve_costs_about_one_percent_of_epsilon_and_calibration_pays_for_it() -> None:
    target = 1.5
    sizes = {"num_units": 2000, "expected_batch_size": 100, "max_steps": 20}
    without, with_loss = (plan_for(**sizes, target_epsilon=target, loss_scale=scale) for scale in (None, 1.4))
    assert (without.private_loss_weight, with_loss.private_loss_weight) == (0, 0.08)
    assert statistics_prices(without) == {} and list(statistics_prices(with_loss)) == ["private_loss"]
    assert 0 < statistics_prices(with_loss)["private_loss"] < 0.01 * target
    assert with_loss.epsilon <= target and is_accounted_for(with_loss)
    assert with_loss.noise_multiplier / without.noise_multiplier == pytest.approx(math.hypot(1, 0.08), rel=5e-3)


def test_a_loss_is_released_only_where_its_scale_is_known_and_something_protects_it() -> None:
    def plan(loss_scale: float | None, **arguments: Any) -> PrivacyPlan:
        return plan_for(max_steps=3, loss_scale=loss_scale, noise_multiplier=4.0, accountant="rdp", **arguments)

    assert (plan(2.0).private_loss_weight, plan(2.0).private_loss_max) == (0.08, 2.0)
    assert plan(2.0, private_loss_max=5.0).private_loss_max == plan(None, private_loss_max=5.0).private_loss_max == 5.0
    assert plan(2.0, private_loss_weight=0.2).private_loss_weight == 0.2
    for nothing in (plan(None), plan(2.0, private_loss_weight=0.0), plan(2.0, target_epsilon=math.inf)):
        assert (nothing.private_loss_weight, nothing.private_loss_max, nothing.joint_sensitivity) == (0, 0, 1)
    adaptive = plan(None, clipping="adaptive", clipping_quantile=0.3)
    assert (adaptive.clipping_quantile, adaptive.clipping_learning_rate, adaptive.clipping_quantile_weight) == (
        0.3, 0.2, 0.16,
    )  # fmt: skip


@pytest.mark.parametrize("adjacency", RELATION)
def test_check_catches_a_hard_ceiling_accounted_as_plain_poisson(
    monkeypatch: pytest.MonkeyPatch, adjacency: str
) -> None:
    asked = {"noise_multiplier": 8.0, "max_batch_size": 110, "adjacency": adjacency, "target_epsilon": 30.0}
    honest = plan_for(**asked)
    assert is_accounted_for(honest)
    real = accounting._step_pld

    def plain_poisson(num_units: int, probability: float, ceiling: int, *rest: Any) -> Any:
        return real(num_units, probability, num_units, *rest)

    monkeypatch.setattr(accounting, "_step_pld", plain_poisson)
    planted = plan_for.__wrapped__(**asked)
    assert planted.epsilon < 0.95 * honest.epsilon
    assert not is_accounted_for(planted)


def test_check_catches_the_default_neighbouring_relation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"noise_multiplier": 8.0, "adjacency": "replace_one", "target_epsilon": 30.0}
    honest = plan_for(**asked)
    assert is_accounted_for(honest)
    real = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism

    def silent(*, neighboring_relation: Any, **rest: Any) -> Any:
        return real(**rest)

    monkeypatch.setattr(privacy_loss_distribution, "from_truncated_subsampled_gaussian_mechanism", silent)
    accounting._step_pld.cache_clear()
    planted = plan_for.__wrapped__(**asked)
    monkeypatch.undo()
    assert planted.epsilon < 0.8 * honest.epsilon
    assert not is_accounted_for(planted)


def test_poisson_epsilon_does_not_hold_for_rows_visited_in_turn() -> None:
    """A unit in exactly T q known steps has the unsampled Gaussian's epsilon: epochs are never accounted as Poisson."""
    plan = plan_for(noise_multiplier=4.0)
    visits = plan.max_steps * plan.sampling_probability
    in_turn = dp_accounting.get_epsilon_gaussian(noise_over_sensitivity(plan) / math.sqrt(visits), plan.delta)
    assert in_turn > 2 * plan.epsilon


# ---------------------------------------------------------------------------------------------------------------------
# Calibration, halting, ceiling


@pytest.mark.parametrize(
    ("sizes", "arguments"),
    [
        (SIZES, {"target_epsilon": 1.0}),
        (SIZES, {"target_epsilon": 1.0, "adjacency": "replace_one"}),
        (SIZES, {"target_epsilon": 1.0, "max_batch_size": 110}),
        ({"num_units": 200, "expected_batch_size": 200, "max_steps": 10}, {"target_epsilon": 0.5}),
        ({"num_units": 100_000, "expected_batch_size": 2000, "max_steps": 3000}, {"target_epsilon": 0.3}),
    ],
    ids=str,
)
def test_calibrated_noise_never_overshoots_and_is_the_smallest_within_one_percent(
    sizes: dict[str, int], arguments: dict[str, Any]
) -> None:
    plan = plan_for(**sizes, **arguments)
    assert plan.max_steps == sizes["max_steps"]
    assert is_accounted_for(plan)
    assert dp_accounting_epsilon(plan, plan.max_steps) <= plan.target_epsilon
    one_percent_less = 0.99 * noise_over_sensitivity(plan)
    assert dp_accounting_epsilon(plan, plan.max_steps, one_percent_less) > plan.target_epsilon


def test_the_guarantee_never_exceeds_the_target_when_the_coarse_search_is_too_hopeful(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, fine = accounting._epsilon_by_steps, accounting._FINE_INTERVAL

    def hopeful(plan: PrivacyPlan, interval: float) -> Callable[[int], float]:
        exact = real(plan, interval)
        return exact if interval <= fine else lambda steps: 0.9 * exact(steps)

    monkeypatch.setattr(accounting, "_epsilon_by_steps", hopeful)
    calibrated = plan_for.__wrapped__(200, 100, 600, target_epsilon=3.0)
    given = plan_for.__wrapped__(200, 100, 600, target_epsilon=3.0, noise_multiplier=12.0)
    assert calibrated.max_steps == 600
    assert given.max_steps < 600
    for plan in (calibrated, given):
        assert 0.99 * plan.target_epsilon <= plan.epsilon <= plan.target_epsilon
        assert is_accounted_for(plan)


def stops_at_the_last_step_within(plan: PrivacyPlan, epsilon_after: Callable[[int], float]) -> bool:
    return epsilon_after(plan.max_steps) <= plan.target_epsilon < epsilon_after(plan.max_steps + 1)


@pytest.mark.parametrize("adjacency", RELATION)
def test_ten_budgets_each_stop_at_the_last_step_within_the_target(adjacency: str) -> None:
    asked = {"noise_multiplier": 12.0, "adjacency": adjacency, "max_batch_size": 160}
    one_step = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        2000,
        0.05,
        160,
        12.0 / (1 + 2**-12 + 320 / 2**21),
        neighboring_relation=RELATION[adjacency],
    )

    @functools.cache
    def epsilon_after(steps: int) -> float:
        return float(one_step.self_compose(steps).get_epsilon_for_delta(1 / 20_000))

    for target in np.linspace(0.05, 0.5, 10):
        plan = plan_for(max_steps=3000, target_epsilon=float(target), **asked)
        assert plan.max_steps < 3000
        assert stops_at_the_last_step_within(plan, epsilon_after), (target, plan.max_steps)
        # Halting after the overshoot, or one step early, is caught.
        for planted in (plan.max_steps + 1, plan.max_steps - 1):
            assert not epsilon_after(planted) <= target < epsilon_after(planted + 1)


def test_the_search_for_the_last_step_stays_near_it_however_long_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composing a million steps that the target never affords would exhaust the memory."""
    asked: list[int] = []

    def square_root(step: int) -> float:
        asked.append(step)
        return 0.1 * math.sqrt(step)

    monkeypatch.setattr(accounting, "_epsilon_by_steps", lambda plan, interval: square_root)
    plan = plan_for.__wrapped__(max_steps=10**6, noise_multiplier=4.0, target_epsilon=2.0)
    assert (plan.max_steps, plan.epsilon) == (400, 2.0)
    assert max(asked) < 10 * plan.max_steps and len(asked) < 40


def _binomial_pmf(trials: int, probability: float, successes: int) -> float:
    logarithm = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    logarithm += successes * math.log(probability) + (trials - successes) * math.log1p(-probability)
    return math.exp(logarithm)


@pytest.mark.parametrize(
    ("num_units", "batch", "steps", "delta"),
    [(8530, 512, 73, 1e-5), (8530, 8, 3000, 1e-5), (2000, 100, 1, 1e-6), (50, 3, 10, 1e-2), (10**6, 20, 100, 1e-9)],
)
def test_ceiling_is_the_smallest_that_a_hundredth_of_delta_pays_for(
    num_units: int, batch: int, steps: int, delta: float
) -> None:
    plan = make_plan(
        PrivacyArguments(math.inf, target_delta=delta, noise_multiplier=1.0),
        num_units=num_units,
        expected_batch_size=batch,
        max_steps=steps,
    )

    def affordable(ceiling: int) -> bool:
        upper = range(ceiling + 1, min(num_units, ceiling + 400) + 1)
        return steps * math.fsum(_binomial_pmf(num_units, batch / num_units, k) for k in upper) <= delta / 100

    assert affordable(plan.max_batch_size)
    assert not affordable(plan.max_batch_size - 1)


def test_the_automatic_ceiling_costs_next_to_nothing() -> None:
    plan = plan_for(noise_multiplier=4.0)
    plain_poisson = dp_accounting_epsilon(plan, plan.max_steps, ceiling=plan.num_units)
    assert plan.max_batch_size < plan.num_units
    assert 0 <= plan.epsilon - plain_poisson < 1e-5


def test_a_ceiling_above_the_data_set_is_the_data_set() -> None:
    assert plan_for(50, 10, 3, noise_multiplier=4.0, max_batch_size=10**9).max_batch_size == 50


# ---------------------------------------------------------------------------------------------------------------------
# The curve

CURVE_PLAN = {"noise_multiplier": 6.0, "max_steps": 1000, "target_epsilon": 30.0}


def never_claims_too_little(curve: Callable[[int], float], plan: PrivacyPlan, steps: list[int]) -> bool:
    return all(curve(step) >= dp_accounting_epsilon(plan, step) - 1e-9 for step in steps)


def test_curve_rises_from_zero_to_exactly_the_guarantee_in_at_most_64_values() -> None:
    plan = plan_for(**CURVE_PLAN)
    curve = EpsilonCurve(plan)
    values = [curve.at(step) for step in range(plan.max_steps + 1)]
    assert values[0] == 0.0 and values[-1] == plan.epsilon
    assert values == sorted(values)
    assert len(set(values[1:])) <= 64 and len(curve.steps) <= 64 and curve.steps[-1] == plan.max_steps
    # Rounded up, the figure is still informative: nowhere far above the truth.
    for step in (50, 300, 777):
        assert values[step] <= 1.1 * dp_accounting_epsilon(plan, step)


def test_curve_is_rounded_up_and_the_check_catches_interpolation() -> None:
    plan = plan_for(**CURVE_PLAN)
    curve = EpsilonCurve(plan)
    between = [(low + high) // 2 for low, high in zip(curve.steps[8::16], curve.steps[9::16], strict=False)]
    assert never_claims_too_little(curve.at, plan, [*between, 1, 999])
    for step in between:
        above = next(tabulated for tabulated in curve.steps if tabulated >= step)
        assert curve.at(step) == curve.at(above)
    coarse = [0, 250, 1000]
    tabulated = [0.0, dp_accounting_epsilon(plan, 250), dp_accounting_epsilon(plan, 1000)]
    assert not never_claims_too_little(lambda step: float(np.interp(step, coarse, tabulated)), plan, [100, 500])


def test_curve_asks_the_accountant_once_per_tabulated_step_and_only_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(**CURVE_PLAN)
    asked: list[int] = []

    def counted(step: int) -> float:
        asked.append(step)
        return 0.0

    monkeypatch.setattr(accounting, "_epsilon_by_steps", lambda plan, interval: counted)
    curve = EpsilonCurve(plan)
    assert (curve.at(0), curve.at(plan.max_steps), asked) == (0.0, plan.epsilon, [])
    for _ in range(2):
        for step in range(plan.max_steps + 1):
            curve.at(step)
    assert asked == list(curve.steps[:-1])


def test_short_curve_has_every_step() -> None:
    assert EpsilonCurve(plan_for(50, 10, 9, noise_multiplier=4.0)).steps == tuple(range(1, 10))


@pytest.mark.parametrize("step", [-1, 1001])
def test_curve_refuses_steps_outside_the_plan(step: int) -> None:
    with pytest.raises(PrivacyError, match="1000 steps"):
        EpsilonCurve(plan_for(**CURVE_PLAN)).at(step)


# ---------------------------------------------------------------------------------------------------------------------
# What goes into the plan, and what is refused


def test_plan_needs_only_size_batch_steps_and_epsilon_and_survives_storage() -> None:
    plan = plan_for()
    assert plan.delta == 1 / (10 * 2000)
    assert plan.sampling_probability == 100 / 2000
    assert plan.accountant_version == f"dp_accounting {version('dp-accounting')}"
    restored = PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert restored == plan and restored.sha256() == plan.sha256()
    assert EpsilonCurve(restored).at(1) == EpsilonCurve(plan).at(1)


def test_sampling_probability_samples_and_expected_batch_size_only_divides() -> None:
    plan = plan_for(noise_multiplier=6.0, sampling_probability=0.02, expected_batch_size=5000)
    assert (plan.sampling_probability, plan.expected_batch_size) == (0.02, 5000)
    assert plan.epsilon == plan_for(noise_multiplier=6.0, sampling_probability=0.02, expected_batch_size=40).epsilon


def test_expected_batch_size_of_the_user_wins_over_that_of_the_trainer() -> None:
    arguments = PrivacyArguments(math.inf, noise_multiplier=1.0, expected_batch_size=64)
    plan = make_plan(arguments, num_units=640, expected_batch_size=8, max_steps=5)
    assert (plan.expected_batch_size, plan.sampling_probability) == (64, 0.1)


def test_users_cost_what_as_many_rows_would_whatever_the_most_examples_of_one() -> None:
    of_rows = plan_for(noise_multiplier=6.0)
    assert (of_rows.privacy_unit_column, of_rows.max_examples_per_user) == ("", 1)
    users = {"noise_multiplier": 6.0, "privacy_unit": "user", "privacy_unit_column": "author"}
    plans = [plan_for(**users), plan_for(**users, max_examples_per_user=1), plan_for(**users, max_examples_per_user=99)]
    assert [plan.max_examples_per_user for plan in plans] == [8, 1, 99]
    assert {plan.epsilon for plan in plans} == {of_rows.epsilon}
    assert len({plan.sha256() for plan in [of_rows, *plans]}) == 4
    assert {plan.declared_unit for plan in plans} == {"user by author"} and of_rows.declared_unit == "example"


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_infinite_target_is_not_private_and_runs_all_its_steps(noise_multiplier: float, accountant: str) -> None:
    plan = plan_for(target_epsilon=math.inf, noise_multiplier=noise_multiplier, accountant=accountant)
    assert plan.epsilon == math.inf and not plan.is_private and plan.max_steps == 600
    curve = EpsilonCurve(plan)
    assert (curve.at(0), curve.at(1), curve.at(600)) == (0.0, math.inf, math.inf)


@pytest.mark.parametrize(
    ("named", "sizes", "arguments"),
    [
        ("expected_batch_size", {"expected_batch_size": 2001}, {}),
        ("expected_batch_size", {}, {"expected_batch_size": 2001}),
        ("expected_batch_size", {"expected_batch_size": 0}, {}),
        ("num_units", {"num_units": 0}, {}),
        ("num_units", {"num_units": True}, {}),
        ("max_steps", {"max_steps": 0}, {}),
        ("max_steps", {"max_steps": 1.5}, {}),
        ("target_delta", {}, {"target_delta": 1 / 2000}),
        ("target_delta", {}, {"target_delta": 0.5}),
        ("target_delta", {}, {"target_delta": 1e-13}),
        ("noise_multiplier", {}, {"noise_multiplier": 4.0, "target_epsilon": 0.002}),
        ("max_batch_size", {}, {"accountant": "rdp", "max_batch_size": 110}),
    ],
    ids=str,
)
def test_contradictions_with_the_data_set_are_refused_in_one_line(
    named: str, sizes: dict[str, Any], arguments: dict[str, Any]
) -> None:
    with pytest.raises(PrivacyError, match=named) as caught:
        make_plan(PrivacyArguments(**{"target_epsilon": 2.0, **arguments}), **{**SIZES, **sizes})
    assert "\n" not in str(caught.value)
