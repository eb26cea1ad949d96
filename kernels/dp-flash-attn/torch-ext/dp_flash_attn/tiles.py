"""Static tile tables by architecture: no autotuning, so that the same call always computes the same bits.

Chosen by compiling ahead of time (registers, spills, shared memory); a GPU has not timed them yet.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a block, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Bytes of shared memory that one program may use.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

PASSES = ("forward", "query_grad", "key_grad")

_INTERPRETER = Tile(64, 64, 4, 1)


def tile(architecture: str, kernel: str, half: bool, width: int) -> Tile:
    """The tile of a kernel.

    Args:
        architecture: a key of `SHARED_MEMORY`, or "interpreter".
        kernel: one of `PASSES`.
        half: whether the inputs have 16 bits instead of 32.
        width: the larger of the padded head dimensions: 16, 32, 64, 128 or 256.
    """
    if architecture == "interpreter":
        return _INTERPRETER
    if half:
        return Tile(128, 64, 4, 3) if width <= 64 else Tile(64, 64, 4, 2) if width <= 128 else Tile(32, 32, 4, 1)
    return Tile(32, 32, 4, 1)
