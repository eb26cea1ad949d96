"""Losses of preference pairs: the privacy unit is the pair, a chosen and a rejected text (P10).

A batch of B pairs is a mapping of tensors [B, 2, T], the chosen text first. The model is called once with the B chosen
and once with the B rejected texts, so that every layer sees B rows of which row i belongs to pair i. Both calls use the
same weights, and the engine adds up the uses of a weight before it takes norms: the norm is that of the pair's whole
gradient, cross term included (P12).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpfa_hf.errors import PrivacyError
from dpfa_hf.per_example.losses import IGNORE_INDEX, as_float, next_token_labels, token_losses

Loss = Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]

# What stands in a batch beside the model's own inputs.
_BESIDE = ("completion_mask", "margin", "ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class PairCollator:
    """Gives what a preference collator returns one entry per pair.

    Attributes:
        collate: rows -> tensors [2 B, ...], those of the B chosen texts before those of the B rejected ones, and [B]
            for what a pair has once.

    Returns [B, 2, ...] for the former when called; the latter are left alone.

    Raises:
        PrivacyError: a tensor has another number of rows, so that nobody knows which pair they belong to.
    """

    collate: Callable[[list[Any]], Mapping[str, Any]]

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return {name: self._by_pair(name, value, len(rows)) for name, value in self.collate(rows).items()}

    def _by_pair(self, name: str, value: Any, pairs: int) -> torch.Tensor:
        size = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else 0
        if size == 2 * pairs:
            return torch.stack(value.chunk(2), 1)
        if size == pairs:
            return value
        raise PrivacyError(
            f"data_collator returned {name!r} with {size} rows for {pairs} pairs; return the chosen rows and then the "
            "rejected ones, as TRL's DataCollatorForPreference does"
        )


def unpaired(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of what `PairCollator` does: [B, 2, ...] -> [2 B, ...]."""
    return {
        name: torch.cat(value.unbind(1)) if value.dim() > 2 and value.shape[1] == 2 else value
        for name, value in batch.items()
    }


def dpo_loss(*, beta: float, reference: nn.Module | None = None) -> Loss:
    """Direct preference optimisation (arXiv:2305.18290): -log sigmoid(beta ((c - c_ref) - (r - r_ref))) for each pair.

    c and r are the log-probabilities of the chosen and the rejected completion, summed over their tokens.

    Args:
        beta: how much it costs to leave the reference.
        reference: the frozen model to compare with; None for the model itself with its PEFT adapter switched off.

    Returns:
        (causal language model, batch) -> [B]. The batch holds "input_ids", "attention_mask" and "completion_mask",
        int64 [B, 2, T]; right padding.

    Guarantee:
        Entry i depends on pair i and on the weights alone, if both models treat rows separately. The reference takes no
        gradient.
    """

    def log_ratios(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        chosen, rejected = (_completion_log_probability(model, _side(batch, side)) for side in (0, 1))
        return chosen - rejected

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        with torch.no_grad(), _reference(model, reference) as frozen:
            expected = log_ratios(frozen, batch)
        return -F.logsigmoid(beta * (log_ratios(model, batch) - expected))

    return loss


def reward_loss(*, center_coefficient: float | None = None) -> Loss:
    """Bradley and Terry's loss of a reward model: -log sigmoid(r_chosen - r_rejected - margin) for each pair.

    Args:
        center_coefficient: adds this times (r_chosen + r_rejected)^2, which keeps rewards near zero (arXiv:2312.09244,
            equation 2).

    Returns:
        (model with one output a row, batch) -> [B]. The batch holds "input_ids" and "attention_mask", int64 [B, 2, T],
        and "margin", float [B], or none.

    Guarantee:
        Entry i depends on pair i and on the weights alone, if the model treats rows separately.
    """

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        chosen, rejected = (as_float(model(**_inputs(_side(batch, side))).logits.squeeze(-1)) for side in (0, 1))
        losses = -F.logsigmoid(chosen - rejected - batch.get("margin", 0.0))
        if center_coefficient is not None:
            losses = losses + center_coefficient * (chosen + rejected) ** 2
        return losses

    return loss


@contextlib.contextmanager
def _reference(model: Any, reference: nn.Module | None) -> Iterator[nn.Module]:
    if reference is not None:
        yield reference
        return
    if not hasattr(model, "disable_adapter"):
        raise PrivacyError("a model without an adapter has no reference in itself; pass reference=, a frozen copy")
    # Switching an adapter on again makes all of it trainable, also what was frozen on purpose.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield model
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _side(batch: Mapping[str, Any], side: int) -> dict[str, Any]:
    """The chosen (0) or the rejected (1) rows, [B, T]."""
    return {
        name: value[:, side] if isinstance(value, torch.Tensor) and value.dim() > 2 else value
        for name, value in batch.items()
    }


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in batch.items() if name not in _BESIDE}, "use_cache": False}


def _completion_log_probability(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """[B]: the sum over a row's completion."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    return -token_losses(as_float(model(**_inputs(batch)).logits), next_token_labels(labels)).sum(1)
