"""One run's budget: the plan, its entry in the ledger, and the steps charged so far. No Trainer is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpfa_hf.accounting import EpsilonCurve
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger
from dpfa_hf.plan import PrivacyPlan

# What the name of a data set that got none begins with.
UNNAMED = "unnamed-"


@dataclass(frozen=True)
class PrivacySpent:
    """What a run has cost.

    Attributes:
        epsilon: the guarantee, epsilon at the plan's last step, whether or not it was reached (P20).
        delta: delta of the guarantee.
        steps: steps charged in the ledger; after a crash this may be more than the optimiser took.
    """

    epsilon: float
    delta: float
    steps: int


class PrivacyBudget:
    """Charges steps to the ledger before their noise is drawn and says when to stop.

    Args:
        plan: the plan of the run.
        ledger: where the run is recorded; None in processes that follow what the first one has charged.
        run: the run's id in the ledger.
        steps: steps that the ledger has charged to it already.

    Guarantee:
        `charge` returns only after the step is durable in the ledger (P21), and refuses any step past
        `plan.max_steps`, the last one whose epsilon is within the target (P20).
    """

    def __init__(self, plan: PrivacyPlan, ledger: Ledger | None, run: str, steps: int = 0) -> None:
        self.plan, self.ledger, self.run, self.steps = plan, ledger, run, steps
        self._curve = EpsilonCurve(plan)

    def charge(self) -> int:
        """Write the next step ahead; call it before drawing its noise. Returns the steps charged.

        Raises:
            PrivacyError: the budget is exhausted, or the ledger cannot be written. The step must not be taken then.
        """
        self.refuse_exhausted()
        if self.ledger is None:
            raise PrivacyError(f"this process has no ledger: the first one charges the steps of run {self.run}")
        self.steps = self.ledger.charge_step(self.run, self.steps + 1)
        return self.steps

    def refuse_exhausted(self) -> None:
        """Raises where no step may be taken any more.

        Raises:
            PrivacyError: the budget is used up.
        """
        if self.exhausted:
            raise PrivacyError(
                f"the budget is used up: {self.steps} of {self.plan.max_steps} steps of run {self.run} are charged; "
                "the model is final, or train anew with a new DPTrainer"
            )

    @property
    def exhausted(self) -> bool:
        """Whether one more step would pass the target: looks ahead, in integers (P20)."""
        return self.steps >= self.plan.max_steps

    @property
    def epsilon(self) -> float:
        """Epsilon so far, rounded up: a progress figure, never the guarantee (P20)."""
        return self._curve.at(self.steps)

    def curve(self) -> dict[int, float]:
        """Step -> epsilon for the steps at which it was shown, and the last: progress figures but for the last."""
        return self._curve.tabulated()

    def spent(self) -> PrivacySpent:
        """The guarantee and the steps charged."""
        return PrivacySpent(self.plan.epsilon, self.plan.delta, self.steps)


def open_run(ledger: Ledger, plan: PrivacyPlan, args: PrivacyArguments, dataset: Any) -> str:
    """The id of a new run, of which nothing is charged yet.

    A data set without a name gets a keyed fingerprint of what it says of itself, which leaves the ledger nowhere (P22).

    Raises:
        PrivacyError: the data set's budget has no room for the plan, or the ledger cannot be written.
    """
    name = args.ledger_dataset
    if name is None:
        identity = getattr(dataset, "_fingerprint", None) or type(dataset).__qualname__
        name = UNNAMED + ledger.fingerprint(f"{identity}:{len(dataset)}".encode())
    budget = None
    if args.dataset_budget_epsilon is not None and args.dataset_budget_delta is not None:
        budget = (args.dataset_budget_epsilon, args.dataset_budget_delta)
    return ledger.open_run(
        dataset=name,
        plan=plan.to_dict(),
        plan_hash=plan.sha256(),
        epsilon=plan.epsilon,
        delta=plan.delta,
        max_steps=plan.max_steps,
        privacy_unit=plan.declared_unit,
        adjacency=plan.adjacency,
        budget=budget,
    )
