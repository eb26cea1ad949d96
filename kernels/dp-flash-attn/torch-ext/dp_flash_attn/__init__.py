"""Exact attention whose rows and packed sequences are isolated from one another, and per-example norms of gradients;
needs torch, and Triton on a GPU."""

from __future__ import annotations

from .dispatch import Call, attention, choose, observed
from .noise import add_gaussian_noise
from .norms import PositionSums, SquaredNorm, lookup_squared_norm, outer_squared_norm, position_sums, tied_squared_norm
from .pattern import Pattern
from .release import dp_release, release_sensitivity

__all__ = [
    "Call",
    "Pattern",
    "PositionSums",
    "SquaredNorm",
    "add_gaussian_noise",
    "attention",
    "choose",
    "dp_release",
    "lookup_squared_norm",
    "observed",
    "outer_squared_norm",
    "position_sums",
    "release_sensitivity",
    "tied_squared_norm",
]
