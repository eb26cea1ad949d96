"""What a call of attention says beyond its tensors, and how packed sequences are told apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pattern(NamedTuple):
    """Who sees whom, and what is done to the scores; `dispatch.attention` describes the fields."""

    scale: float
    is_causal: bool = False
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


def segment_bounds(own: Tensor, other: Tensor) -> Tensor:
    """For each position of one side of a packed row, where its sequence lies on the other side.

    Args:
        own: int [B, S], the number of each position's sequence, never decreasing along a row.
        other: int [B, S'], the same for the other side.

    Returns:
        int32 [B, 3, S]: the first position of the sequence on the other side, the one after its last, and the distance
        to the position that stands beside this one when both sides' sequences are aligned at their ends.
    """
    own, other = own.contiguous(), other.contiguous()
    start = torch.searchsorted(other, own)
    stop = torch.searchsorted(other, own, right=True)
    own_stop = torch.searchsorted(own, own, right=True)
    return torch.stack([start, stop, stop - own_stop], dim=1).to(torch.int32)
