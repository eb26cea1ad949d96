"""The one order of a step: sums, the other processes' sums, ledger, noise, division. No Trainer is needed."""

from __future__ import annotations

import functools

import torch

from dpfa_hf.budget import PrivacyBudget
from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example.gradients import PerExampleGradients
from dpfa_hf.plan import PrivacyPlan
from dpfa_hf.processes import Processes
from dpfa_hf.statistics import StepStatistics, next_clipping_norm


class PrivateStep:
    """Turns the clipped sums of a step into noised gradients.

    Args:
        plan: of the run.
        engine: in which the step's micro-batches are accumulated before each call.
        statistics: the engine's, if the plan releases any.
        processes: who else has sums of the step; all of them call together. This process alone by default.

    Guarantee:
        A call returns with the noised mean in every trainable parameter's `grad`, float32 until it is stored. Sums are
        added up over all processes before one charge and one call of the noise (P16); of parameters that FSDP2 spreads,
        every process adds noise of the same full size to its own rows, with a key of its own (P9). The step is durable
        in the ledger before its noise is drawn (P21); if it cannot be charged, no noise is drawn and no gradient is
        set, in any process. An empty step has noise like any other (P7). Divided is by the plan's expected batch, never
        by what was drawn (P5).
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        engine: PerExampleGradients,
        *,
        statistics: StepStatistics | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.plan, self.engine, self.statistics = plan, engine, statistics
        self.processes = Processes() if processes is None else processes
        self.noise = self.new_noise(plan.clipping_norm)

    def __call__(self, budget: PrivacyBudget) -> float | None:
        """Takes the engine's sums and releases them; returns the noised estimate of their mean loss, or None.

        Args:
            budget: the run that is charged.

        Raises:
            PrivacyError: the budget is used up, the ledger cannot be written, an addition was interrupted, or a process
                was lost.
        """
        sums, loss, shards = self.engine.take(), None, self.engine.shards
        spread = {} if shards is None else {name: sums.pop(name) for name in list(sums) if name in shards}
        self.processes.sum_to_first(sums)
        budget.steps = self.processes.from_first(budget.charge)
        if sums:
            self.processes.from_first(functools.partial(self._add_noise, sums))
            self.processes.copy_from_first(sums)
        if spread:
            self.processes.together(functools.partial(self._add_noise, spread))
        if self.statistics is not None:
            norm = self.engine.clipping_norm
            found = self.statistics.estimates(sums[self.statistics.name], norm)
            loss = found.loss
            self.clip_to(next_clipping_norm(self.plan, norm, found.unclipped))
        for name, parameter in self.engine.parameters.values():
            own = name in spread
            mean = (spread if own else sums)[name].div_(self.plan.expected_batch_size).to(parameter.dtype)
            parameter.grad = shards.spread(name, mean) if own and shards is not None else mean
        return loss

    def _add_noise(self, sums: dict[str, torch.Tensor]) -> None:
        self.noise.add_noise(sums)

    def clip_to(self, clipping_norm: float) -> None:
        """Between steps: the norm and the noise that belongs to it."""
        if clipping_norm != self.engine.clipping_norm:
            self.engine.clipping_norm = clipping_norm
            self.noise = self.new_noise(clipping_norm)

    def new_noise(self, clipping_norm: float) -> GaussianNoise:
        """Noise of the plan's size for a clipping norm."""
        return GaussianNoise(
            self.plan.noise_standard_deviation_at(clipping_norm),
            generator=self.plan.noise_generator,
            floating_point=self.plan.floating_point,
        )
