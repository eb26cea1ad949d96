"""What the user asks for: the privacy arguments that stand beside `transformers.TrainingArguments`."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dpfa_hf.errors import PrivacyError

# Abstract types, so that NumPy's numbers pass; each is stored as the plain Python type.
_ACCEPTED_TYPES: dict[type, tuple[type, str]] = {
    float: (numbers.Real, "a number"),
    int: (numbers.Integral, "a whole number"),
    bool: (bool, "True or False"),
    str: (str, "text"),
}


@dataclass(frozen=True)
class PrivacyArguments:
    """The privacy that a run must keep and the means it may use, for code and for `transformers.HfArgumentParser`.

    Every field is checked by itself and against the others when the object is built, and the object is frozen so that
    what was checked is what is used; `dataclasses.replace` makes a changed, checked copy. Rules that need the size of
    the data set (delta < 1/n, expected batch <= n) are checked by `dpfa_hf.accounting.make_plan`.

    Raises:
        PrivacyError: one line naming the field that cannot stand and the way out.
    """

    target_epsilon: float = field(
        metadata={
            "help": "Epsilon that the whole run may spend: training stops before it would be passed. Smaller is more "
            "private; 1 to 8 is usual in research. inf (with noise_multiplier) is for debugging and is NOT PRIVATE."
        }
    )
    target_delta: float | None = field(
        default=None,
        metadata={
            "help": "Delta of the guarantee. Must be below 1/n, n being the number of privacy units in the data set. "
            "Default: 1/(10 n)."
        },
    )
    noise_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of the noise divided by the clipping norm (sigma). Default: the smallest that "
            "keeps the planned steps within target_epsilon. When given, the number of steps is cut to what it affords. "
            "0 needs target_epsilon=inf."
        },
    )
    per_example_max_grad_norm: float = field(
        default=1.0,
        metadata={
            "help": "Clipping norm C: no privacy unit moves the summed gradient by more than this (L2). With "
            "clipping=adaptive, the one to start from."
        },
    )
    clipping: Literal["flat", "automatic", "per_layer", "adaptive"] = field(
        default="flat",
        metadata={
            "help": "flat: scale a gradient down to C when it is longer. automatic: scale every gradient to about C, "
            "so that C needs no tuning. per_layer: clip layer by layer, with C the root of the sum of squares. "
            "adaptive: as flat, with C following the clipping_quantile of the gradients' norms, for about a hundredth "
            "of epsilon."
        },
    )
    clipping_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Share of the gradients that clipping=adaptive aims to leave whole. Default: 0.5, the median norm."
        },
    )
    clipping_learning_rate: float | None = field(
        default=None,
        metadata={"help": "How fast clipping=adaptive moves C: by exp(-rate x error) a step. Default: 0.2."},
    )
    private_loss_weight: float = field(
        default=0.08,
        metadata={
            "help": "Log private_loss, an estimate of the mean training loss that the noise protects, at this share of "
            "the clipping norm: the default costs about a hundredth of epsilon. A larger one is less noisy and costs "
            "its square; 0 switches it off."
        },
    )
    private_loss_max: float | None = field(
        default=None,
        metadata={
            "help": "Losses above this count as this in private_loss, whose noise grows with it; choose it without "
            "looking at the data. Default: twice the loss of a uniform guess, 2 ln K for K labels or tokens; "
            "regression and per_example_loss_fn have no default, and no private_loss unless you give one."
        },
    )
    expected_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Expected number of privacy units in a step, the public constant that divides the noised sum. "
            "Large is good (hundreds or thousands). Default: per_device_train_batch_size x "
            "gradient_accumulation_steps x world size; once set, those three change memory and speed only."
        },
    )
    sampling_probability: float | None = field(
        default=None,
        metadata={
            "help": "Probability with which each unit is in each step, independently (Poisson sampling). Default: "
            "expected_batch_size / n. With both given, this one samples and expected_batch_size only divides."
        },
    )
    max_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Ceiling on the units in one step; what is drawn beyond it is dropped at random and the ceiling is "
            "accounted for. Default: so high that it costs next to nothing; a low one costs epsilon."
        },
    )
    privacy_unit: Literal["example", "document", "user"] = field(
        default="example",
        metadata={
            "help": "What is protected. example: one row of the data set. document: the same, and a padding-free data "
            "collator may pack the rows of a draw. user: all rows that share a value of privacy_unit_column; batch "
            "sizes then count users."
        },
    )
    privacy_unit_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of a datasets.Dataset, of text or whole numbers, whose value names the user that a row "
            "belongs to. Only with privacy_unit=user."
        },
    )
    max_examples_per_user: int | None = field(
        default=None,
        metadata={
            "help": "How many of a user's rows, drawn at random, a step takes at most: their losses are averaged and "
            "the user's gradient is clipped once. A micro-batch holds at most per_device_train_batch_size times as "
            "many rows. Only with privacy_unit=user. Default: 8."
        },
    )
    adjacency: Literal["zero_out", "replace_one"] = field(
        default="zero_out",
        metadata={
            "help": "Which data sets count as neighbours. zero_out: one unit is replaced by nothing (n is public). "
            "replace_one: one unit is replaced by any other; stronger, and dearer by about a factor of two in noise."
        },
    )
    accountant: Literal["pld", "rdp"] = field(
        default="pld",
        metadata={
            "help": "How epsilon is computed. pld: privacy loss distributions, tight. rdp: Renyi DP, looser, for "
            "comparison with older work; zero_out only."
        },
    )
    ledger: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "Database URL of the budget ledger, such as sqlite:////home/me/ledger.db or postgresql://host/db. "
            "Default: the environment variable DPFA_LEDGER, else a SQLite file in your user data folder."
        },
    )
    ledger_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Name of the data set in the ledger. Give the same name whenever the same people's data are used, "
            "also after filtering or editing: runs on one data set add up."
        },
    )
    dataset_budget_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Epsilon that all runs on ledger_dataset together may spend in its lifetime. Needs ledger_dataset "
            "and dataset_budget_delta. Default: runs are recorded, not limited."
        },
    )
    dataset_budget_delta: float | None = field(
        default=None,
        metadata={
            "help": "Delta that all runs on ledger_dataset together may spend in its lifetime. Needs ledger_dataset "
            "and dataset_budget_epsilon."
        },
    )
    eval_data: Literal["public", "private"] | None = field(
        default=None,
        metadata={
            "help": "Whose data the evaluation set is. public: anybody may see its metrics, all as usual. private: "
            "metrics return to the caller only and steer nothing. Default: a Trainer that evaluates is refused."
        },
    )
    log_private_metrics: bool = field(
        default=False,
        metadata={
            "help": "Log training loss and other figures that the noise does not protect. They are releases outside "
            "the guarantee, and the report says that you chose this."
        },
    )
    noise_generator: Literal["chacha20", "torch"] = field(
        default="chacha20",
        metadata={
            "help": "Source of the noise. chacha20: cryptographic, keyed by the operating system. torch: also seeded "
            "by the operating system but not cryptographic, and the report says so."
        },
    )
    floating_point: Literal["snapped", "hardened"] = field(
        default="snapped",
        metadata={
            "help": "Which numbers epsilon is for. snapped: real ones; the noised sum is rounded to a grid. hardened: "
            "those in the machine, with sums in float64 and exactly rounded noise. On the CPU, with "
            "per_device_train_batch_size=1; slower and of twice the memory for sums, at about the same epsilon."
        },
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value is None and _is_optional(hints[spec.name]):
                continue
            object.__setattr__(self, spec.name, _checked_type(spec.name, value, hints[spec.name]))
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        def require(name: str, good: bool, rule: str) -> None:
            if not good:
                raise PrivacyError(f"{name}={getattr(self, name)!r} must be {rule}; change {name}.")

        require("target_epsilon", self.target_epsilon > 0, "greater than 0 (inf only with a noise_multiplier)")
        require("per_example_max_grad_norm", 0 < self.per_example_max_grad_norm < math.inf, "positive and finite")
        require("private_loss_weight", 0 <= self.private_loss_weight <= 1, "between 0 and 1")
        if self.private_loss_max is not None:
            require("private_loss_max", 0 < self.private_loss_max < math.inf, "positive and finite")
        if self.clipping_quantile is not None:
            require("clipping_quantile", 0 < self.clipping_quantile < 1, "strictly between 0 and 1")
        if self.clipping_learning_rate is not None:
            require("clipping_learning_rate", 0 < self.clipping_learning_rate <= 10, "above 0 and at most 10")
        if self.noise_multiplier is not None:
            require("noise_multiplier", 0 <= self.noise_multiplier < math.inf, "finite and not negative")
        if self.sampling_probability is not None:
            require("sampling_probability", 0 < self.sampling_probability <= 1, "above 0 and at most 1")
        if self.dataset_budget_epsilon is not None:
            require("dataset_budget_epsilon", 0 < self.dataset_budget_epsilon < math.inf, "positive and finite")
        for name in ("target_delta", "dataset_budget_delta"):
            if (value := getattr(self, name)) is not None:
                require(name, 0 < value < 1, "strictly between 0 and 1")
        for name in ("expected_batch_size", "max_batch_size", "max_examples_per_user"):
            if (value := getattr(self, name)) is not None:
                require(name, value >= 1, "at least 1")
        for name in ("ledger_dataset", "privacy_unit_column"):
            if (value := getattr(self, name)) is not None:
                require(name, bool(value.strip()), "a name, not blank")
        # The URL may carry a password: it is named, never quoted.
        if self.ledger is not None and "://" not in self.ledger:
            raise PrivacyError("ledger must be a database URL such as sqlite:////home/me/ledger.db; change ledger.")

    def _check_combinations(self) -> None:
        if math.isinf(self.target_epsilon) and self.noise_multiplier is None:
            raise PrivacyError(
                "target_epsilon=inf leaves nothing to calibrate the noise from; give noise_multiplier (the run will be "
                "NOT PRIVATE) or a finite target_epsilon."
            )
        if self.noise_multiplier == 0 and not math.isinf(self.target_epsilon):
            raise PrivacyError(
                f"noise_multiplier=0 cannot keep target_epsilon={self.target_epsilon}; raise noise_multiplier, or set "
                "target_epsilon=inf for a run that is NOT PRIVATE."
            )
        if self.privacy_unit == "user" and self.privacy_unit_column is None:
            raise PrivacyError("privacy_unit='user' needs privacy_unit_column, the column that names the user.")
        for name in ("privacy_unit_column", "max_examples_per_user"):
            if self.privacy_unit != "user" and getattr(self, name) is not None:
                raise PrivacyError(
                    f"{name} is only for privacy_unit='user', not {self.privacy_unit!r}, whose rows are clipped one by "
                    "one and protect no user; drop it or set privacy_unit='user'."
                )
        if self.privacy_unit == "user" and self.floating_point == "hardened":
            raise PrivacyError(
                "floating_point='hardened' is proven for rows computed alone, and privacy_unit='user' computes a "
                "user's rows together; set floating_point='snapped'."
            )
        for name in ("clipping_quantile", "clipping_learning_rate"):
            if self.clipping != "adaptive" and getattr(self, name) is not None:
                raise PrivacyError(
                    f"{name} is only for clipping='adaptive', not {self.clipping!r}; drop it or set "
                    "clipping='adaptive'."
                )
        if self.floating_point == "hardened" and self.noise_generator != "chacha20":
            raise PrivacyError(
                f"floating_point='hardened' needs as many random bits as a rounding takes, which noise_generator="
                f"{self.noise_generator!r} does not have; set noise_generator='chacha20'."
            )
        if self.accountant == "rdp" and self.adjacency != "zero_out":
            raise PrivacyError(
                "accountant='rdp' cannot account for adjacency='replace_one' under Poisson sampling; use "
                "accountant='pld'."
            )
        if (self.dataset_budget_epsilon is None) != (self.dataset_budget_delta is None):
            raise PrivacyError("dataset_budget_epsilon and dataset_budget_delta are one budget; give both or neither.")
        if self.dataset_budget_epsilon is not None:
            if self.ledger_dataset is None:
                raise PrivacyError("dataset_budget_epsilon limits a named data set; give its name in ledger_dataset.")
            if math.isinf(self.target_epsilon):
                raise PrivacyError(
                    "target_epsilon=inf can never fit dataset_budget_epsilon; give a finite target_epsilon or drop the "
                    "dataset budget."
                )


def _checked_type(name: str, value: Any, hint: Any) -> Any:
    """Returns `value` as the plain Python type that `hint` asks for; NaN, and bools posing as numbers, are refused."""
    kind = get_args(hint)[0] if _is_optional(hint) else hint
    if get_origin(kind) is Literal:
        if value not in (choices := get_args(kind)):
            raise PrivacyError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}; change {name}.")
        return value
    accepted, wording = _ACCEPTED_TYPES[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool) or value != value:
        # A text field may hold a password, so a refused value is shown only where a number or a flag is expected.
        shown = name if kind is str else f"{name}={value!r}"
        raise PrivacyError(f"{shown} must be {wording}; change {name}.")
    return kind(value)


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)
