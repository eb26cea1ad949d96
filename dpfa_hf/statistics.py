"""What a step releases beside the gradient: its mean loss, and whether C is too long or too short.

The clipped gradient of every unit is lengthened by two coordinates, so that the step is still one vector with one
sensitivity, noised by one call and charged once:

- beta C clamp(loss, 0, L) / L, of which the noised sum estimates the mean training loss;
- s C (b - 1/2), where b is whether the unit's norm is within C: the noised sum estimates the share of units that are
  not clipped, and moves C towards the norm that the planned share of units has (Andrew et al. 2021, arXiv:1905.03871).

Beta, L, s and the target share are in the plan. Both estimates are covered by the guarantee: they may be logged, and
may steer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from dpfa_hf.plan import PrivacyPlan

# C stays within this factor of the norm that it began with, far from what float32 cannot hold.
_LARGEST_MOVE = 2.0**20
# A bit falls from 1 to 0 while the norm goes from 63/64 to 65/64 of C. At a hard threshold the last digit of a norm,
# which may follow the padding that a row's neighbours need, could move the sum by s C for every row; this way it moves
# it by no more than the float32 sums of gradients are allowed to (P15).
_BIT_SLOPE = 32.0


@dataclass(frozen=True)
class StepEstimates:
    """What a step's noised coordinates say; the noise is in all of it.

    Attributes:
        loss: estimate of the mean loss of the units drawn, each clamped to [0, L]; unbiased, so that noise may take it
            below 0 or above L. None where the plan releases no loss.
        unclipped: estimate of the share of units with a norm within C. None without adaptive clipping.
    """

    loss: float | None
    unclipped: float | None


class StepStatistics:
    """The added coordinates of a step: sums to be noised, and what they say afterwards.

    Args:
        plan: weights, L, and the numbers that the sums are divided by, all public.

    Guarantee:
        A unit adds to the sums a vector of length at most C sqrt(beta^2 + s^2 / 4), so that with its clipped gradient
        it is within `plan.joint_sensitivity` C; a unit that is absent, or of which loss or gradient is not finite, adds
        exactly zero. Bits are centred because of this: s (b - 1/2) is s / 2 away from absent, s b would be s. The sums
        are float64 and divided by public numbers only.
    """

    name = ".statistics"  # no parameter's name begins with a dot

    def __init__(self, plan: PrivacyPlan) -> None:
        self._plan = plan
        self._expected_units = _expected_units(plan)
        self._sums: torch.Tensor | None = None

    def add(self, losses: torch.Tensor, norms: torch.Tensor, clipping_norm: float) -> None:
        """Adds the coordinates of the examples of a micro-batch.

        Args:
            losses: [B], one for each unit.
            norms: [groups, B], what the units are clipped by; not finite where a unit contributes nothing.
            clipping_norm: C of this step.
        """
        plan = self._plan
        present = torch.isfinite(norms).all(0) & torch.isfinite(losses)
        losses = torch.where(present, losses.double(), 0.0).clamp(0, plan.private_loss_max)
        loss = plan.private_loss_weight * losses / (plan.private_loss_max or 1.0)
        centred = (_BIT_SLOPE * (1 - norms.amax(0).double() / clipping_norm)).clamp(-0.5, 0.5)
        bit = plan.clipping_quantile_weight * torch.where(present, centred, 0.0)
        added = clipping_norm * torch.stack([loss.sum(), bit.sum()])
        self._sums = added if self._sums is None else self._sums + added

    def take(self, device: torch.device) -> torch.Tensor:
        """[2] float64: the sums since the last `take`, of losses and of bits; the next begin at zero."""
        sums, self._sums = self._sums, None
        return torch.zeros(2, dtype=torch.float64, device=device) if sums is None else sums

    def discard(self) -> None:
        """Throws away the sums since the last `take`."""
        self._sums = None

    def estimates(self, noised: torch.Tensor, clipping_norm: float) -> StepEstimates:
        """What the noised sums say; [2], of a step clipped to `clipping_norm`."""
        plan = self._plan
        loss, bits = (value / (clipping_norm * self._expected_units) for value in noised.tolist())
        return StepEstimates(
            loss=loss / plan.private_loss_weight * plan.private_loss_max if plan.private_loss_weight else None,
            unclipped=bits / plan.clipping_quantile_weight + 0.5 if plan.clipping_quantile_weight else None,
        )


def next_clipping_norm(plan: PrivacyPlan, clipping_norm: float, unclipped: float | None) -> float:
    """C exp(-eta (b - gamma)), within 2^20 of the plan's C either way; C itself without adaptive clipping.

    Args:
        clipping_norm: C of the step that is over.
        unclipped: b, the noised estimate of the share of units within C; None without adaptive clipping.
    """
    if unclipped is None:
        return clipping_norm
    move = -plan.clipping_learning_rate * (unclipped - plan.clipping_quantile)
    farthest = math.log(_LARGEST_MOVE)
    return plan.clipping_norm * math.exp(
        min(max(math.log(clipping_norm / plan.clipping_norm) + move, -farthest), farthest)
    )


def public_loss_scale(config: Any, task: str | None) -> float | None:
    """2 ln K, twice the loss of a guess that favours none of K labels or tokens; from a model's public configuration.

    Args:
        config: the Transformers model's.
        task: one of `per_example.losses.TASKS`; None for a loss of the operator's own.

    Returns:
        None for regression and for a loss of the operator's own, which have no scale that everybody knows.
    """
    if task in ("causal_lm", "masked_lm", "seq2seq_lm"):
        choices = getattr(config.get_text_config(), "vocab_size", None)
    elif task == "question_answering":
        choices = getattr(config, "max_position_embeddings", None)
    elif task == "token_classification":
        choices = config.num_labels
    elif task == "sequence_classification":
        special = {"regression": None, "multi_label_classification": 2}
        choices = special.get(str(config.problem_type), config.num_labels)
    else:
        choices = None
    return 2 * math.log(choices) if choices is not None and choices > 1 else None


def _expected_units(plan: PrivacyPlan) -> float:
    """Expected units in a step: q n less what the ceiling drops; `expected_batch_size` may be set to another number."""
    import numpy as np
    from scipy.stats import binom

    below = binom.cdf(np.arange(plan.max_batch_size), plan.num_units, plan.sampling_probability)
    return plan.max_batch_size - float(below.sum())
