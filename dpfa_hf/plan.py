"""What was decided: the one frozen object that sampler, clipper, noise, accountant and ledger read (P19)."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from dpfa_hf.errors import PrivacyError
from dpfa_hf.rounding import contribution_error, summation_error

# A float32 norm, and the scale factor made from it, are right to a few parts in 2**-23 times the root of the depth of
# the sum; 2**-12 leaves room for the sums over d coordinates that a norm is made of.
_PER_EXAMPLE_ROUNDING = 2.0**-12
# Error of a float32 sum per addend, in units of C: sums at 4,096 rows measured 1e-3 to 4e-3 of C, and twice
# 4096 * 2**-21 is 4e-3; twice, because the sums over two neighbouring data sets round independently.
_SUMMATION_ROUNDING = 2.0**-21


def sensitivity_slack(max_batch_size: int, floating_point: str = "snapped") -> float:
    """The part of C by which rounding may lengthen one unit's influence on the clipped sum (P15, P18).

    "snapped": what float32 is declared to do, per-example rounding (2**-12) plus twice the summation error of
    `max_batch_size` addends (2**-21 each). "hardened": what float64 is proven to do, see `dpfa_hf.rounding`.

    Guarantee: the accountant is given sigma / (1 + slack), that is, noise of sigma * C against a sensitivity of
    (1 + slack) * C, so an engine whose norms and sums stay within the slack has the epsilon that is printed. (A joint
    sensitivity above C multiplies both; only its gradient part is summed in float32.)
    """
    if floating_point == "hardened":
        return contribution_error() + 2 * summation_error(1.0, examples=max_batch_size)
    return _PER_EXAMPLE_ROUNDING + 2 * max_batch_size * _SUMMATION_ROUNDING


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything about a run that its guarantee depends on, fixed before step 1 and never recomputed (P19).

    Guarantee: with every unit in every step independently with `sampling_probability`, at most `max_batch_size` of them
    kept at random, unit contributions (a user's: of at most `max_examples_per_user` rows, averaged) clipped to the
    clipping norm and lengthened by the coordinates of `dpfa_hf.statistics`, Gaussian noise of
    `noise_standard_deviation_at` that norm added once to every coordinate of their sum, and at most `max_steps` steps,
    the released weights and statistics are (`epsilon`, `delta`)-DP for `privacy_unit` under `adjacency`. An `epsilon`
    of inf is no guarantee at all.

    Built by `dpfa_hf.accounting.make_plan`. Construction checks types and ranges only.

    Attributes:
        privacy_unit: what is protected, "example", "document" or "user".
        privacy_unit_column: the column that names the user; "" for other units.
        max_examples_per_user: k, the most rows of one unit in a step; 1 for other units.
        adjacency: "zero_out" or "replace_one".
        accountant: "pld" or "rdp".
        clipping: "flat", "automatic", "per_layer" or "adaptive".
        num_units: n, the public number of privacy units.
        sampling_probability: q.
        expected_batch_size: the public constant that divides the noised sum, in units.
        max_batch_size: B_max, in units.
        noise_multiplier: sigma, noise standard deviation over the clipping norm.
        clipping_norm: C, the L2 bound on a unit's gradient; under "adaptive" clipping that of the first step.
        clipping_quantile: gamma, the share of units whose gradients "adaptive" clipping leaves whole; otherwise unused.
        clipping_learning_rate: eta of "adaptive" clipping; otherwise unused.
        clipping_quantile_weight: s, distance of the two values of a unit's quantile coordinate in units of C; 0 for
            none.
        private_loss_weight: beta, largest value of a unit's loss coordinate in units of C; 0 for none.
        private_loss_max: the loss at which that coordinate is largest; larger ones count as this one.
        floating_point: "snapped" (epsilon is for real arithmetic) or "hardened" (for the numbers in the machine).
        sensitivity_slack: rounding allowance on C, see `sensitivity_slack()`.
        max_steps: T_max, the last step that may be charged.
        delta: delta of the guarantee.
        truncation_delta: the part of `delta` that RDP gives up for the ceiling B_max; 0 under PLD, which accounts for
            the ceiling exactly.
        target_epsilon: what the user asked for.
        epsilon: epsilon at `max_steps`, the guarantee; at most `target_epsilon`.
        noise_generator: "chacha20" or "torch".
        accountant_version: library and version that computed `epsilon`.

    Raises:
        PrivacyError: a field has the wrong type or an impossible value.
    """

    privacy_unit: str
    privacy_unit_column: str
    max_examples_per_user: int
    adjacency: str
    accountant: str
    clipping: str
    num_units: int
    sampling_probability: float
    expected_batch_size: int
    max_batch_size: int
    noise_multiplier: float
    clipping_norm: float
    clipping_quantile: float
    clipping_learning_rate: float
    clipping_quantile_weight: float
    private_loss_weight: float
    private_loss_max: float
    floating_point: str
    sensitivity_slack: float
    max_steps: int
    delta: float
    truncation_delta: float
    target_epsilon: float
    epsilon: float
    noise_generator: str
    accountant_version: str

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            abstract = {int: numbers.Integral, float: numbers.Real, str: str}[kind]
            if isinstance(value, bool) or not isinstance(value, abstract) or value != value:
                raise PrivacyError(f"plan field {name}={value!r} is not {kind.__name__}; the plan is damaged.")
            object.__setattr__(self, name, kind(value))
        adaptive = self.clipping == "adaptive"
        possible = {
            "max_examples_per_user": self.max_examples_per_user >= 1,
            "num_units": self.num_units >= 1,
            "sampling_probability": 0 < self.sampling_probability <= 1,
            "expected_batch_size": self.expected_batch_size >= 1,
            "max_batch_size": 1 <= self.max_batch_size <= self.num_units,
            "noise_multiplier": 0 <= self.noise_multiplier < math.inf,
            "clipping_norm": 0 < self.clipping_norm < math.inf,
            "clipping_quantile": 0 <= self.clipping_quantile < 1 and (self.clipping_quantile > 0 or not adaptive),
            "clipping_learning_rate": 0 <= self.clipping_learning_rate < math.inf,
            "clipping_quantile_weight": (
                0 <= self.clipping_quantile_weight <= 1 and (self.clipping_quantile_weight > 0 or not adaptive)
            ),
            "private_loss_weight": 0 <= self.private_loss_weight <= 1,
            "private_loss_max": (
                0 <= self.private_loss_max < math.inf and (self.private_loss_max > 0 or self.private_loss_weight == 0)
            ),
            "sensitivity_slack": 0 <= self.sensitivity_slack < math.inf,
            "floating_point": self.floating_point in ("snapped", "hardened"),
            "max_steps": self.max_steps >= 1,
            "delta": 0 < self.delta < 1 / max(self.num_units, 1),
            "truncation_delta": 0 <= self.truncation_delta < self.delta,
            "epsilon": 0 <= self.epsilon <= self.target_epsilon,
        }
        for name, good in possible.items():
            if not good:
                raise PrivacyError(f"plan field {name}={getattr(self, name)!r} is impossible; the plan is damaged.")

    def noise_standard_deviation_at(self, clipping_norm: float) -> float:
        """Standard deviation of the noise on every coordinate of the sum of a step clipped to `clipping_norm`."""
        return self.noise_multiplier * clipping_norm

    @property
    def declared_unit(self) -> str:
        """What a data set's budget is bound to: users by one column are other units than users by another (P22)."""
        return f"user by {self.privacy_unit_column}" if self.privacy_unit == "user" else self.privacy_unit

    @property
    def noise_standard_deviation(self) -> float:
        """Standard deviation of the noise on every coordinate of the first step's clipped sum, before division."""
        return self.noise_standard_deviation_at(self.clipping_norm)

    @property
    def joint_sensitivity(self) -> float:
        """Longest vector that one unit adds to a step, in units of C: gradient, loss and centred quantile bit."""
        return math.sqrt(1 + self.private_loss_weight**2 + (self.clipping_quantile_weight / 2) ** 2)

    @property
    def accounted_noise_multiplier(self) -> float:
        """Noise over the joint sensitivity that rounding allows (P15): what the accountant is given."""
        return self.noise_multiplier / (self.joint_sensitivity * (1 + self.sensitivity_slack))

    @property
    def is_private(self) -> bool:
        """Whether the plan carries a guarantee; where False everything must say NOT PRIVATE."""
        return math.isfinite(self.epsilon)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; infinity as the string "inf", which every JSON reader keeps."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        """The inverse of `to_dict`.

        Raises:
            PrivacyError: a field is unknown, missing, of the wrong type or impossible.
        """
        names = {spec.name for spec in fields(cls)}
        if names != set(values):
            missing, unknown = sorted(names - set(values)), sorted(map(str, set(values) - names))
            raise PrivacyError(
                f"plan does not fit this version: missing {missing}, unknown {unknown}; use the version that wrote it."
            )
        restored: dict[str, Any] = {name: math.inf if value == "inf" else value for name, value in values.items()}
        return cls(**restored)

    def sha256(self) -> str:
        """Hex SHA-256 of the canonical JSON (sorted keys, no spaces): changes with any field, the same everywhere."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()
