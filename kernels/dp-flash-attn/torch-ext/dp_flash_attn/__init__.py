"""Exact attention whose rows and packed sequences are isolated from one another; needs torch, and Triton on a GPU."""

from __future__ import annotations

from .dispatch import Call, attention, choose, observed
from .noise import add_gaussian_noise
from .pattern import Pattern
from .release import dp_release, release_sensitivity

__all__ = [
    "Call",
    "Pattern",
    "add_gaussian_noise",
    "attention",
    "choose",
    "dp_release",
    "observed",
    "release_sensitivity",
]
