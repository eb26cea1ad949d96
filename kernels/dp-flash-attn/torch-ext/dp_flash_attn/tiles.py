"""Static tile tables by architecture: no autotuning, so that the same call always computes the same bits.

Chosen by compiling ahead of time, without a GPU to time them: of each kernel the largest tile with which no feature,
and no head dimension beneath the padded one, spills registers, and which fits the shared memory of every chip of the
architecture. `benchmarks/results/kernels.json` has what each build needs.
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

# By padded head dimension, up to and including the key. The scores are [queries, keys] but for key_grad, where they
# are [keys, queries]; sm_90 multiplies in groups of four warps with 64 of the scores' rows each, so it has no fewer.
# On AMD a thread has 512 registers in a program of 4 warps, and half of them in one of 8. One stage, where NVIDIA's
# chips have two, is where the shared memory of two would be too much.
_HALF = {
    "sm_80": {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        "query_grad": {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
        "key_grad": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
    },
    "sm_90": {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
        "query_grad": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "key_grad": {64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(16, 64, 8, 2)},
    },
    "sm_100": {
        "forward": {64: Tile(64, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
        "query_grad": {64: Tile(64, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
        "key_grad": {64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
    },
    # The instructions of sm_80, with less shared memory.
    "sm_120": {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
        "query_grad": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 1), 256: Tile(32, 32, 8, 1)},
        "key_grad": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
    },
    "gfx942": {
        "forward": {64: Tile(128, 64, 4, 1), 128: Tile(128, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
        "query_grad": {64: Tile(128, 64, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 4, 1)},
        "key_grad": {64: Tile(64, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
    },
}

# Products exact to float32 are made of multiplications and additions of single numbers on NVIDIA's chips.
_FLOAT32_NVIDIA = {
    "forward": {64: Tile(32, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(16, 16, 4, 2)},
    "query_grad": {64: Tile(32, 16, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 2)},
    "key_grad": {64: Tile(32, 32, 8, 2), 128: Tile(16, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
}
_FLOAT32 = {
    "sm_80": _FLOAT32_NVIDIA,
    "sm_90": _FLOAT32_NVIDIA,
    "sm_100": _FLOAT32_NVIDIA,
    "sm_120": _FLOAT32_NVIDIA,
    "gfx942": {
        "forward": {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
        "query_grad": {64: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 16, 4, 1)},
        "key_grad": {64: Tile(32, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    },
}

# Where the random numbers of dropout leave too few registers for the tile above; only of 16-bit inputs.
_DROPOUT = {
    ("sm_80", "query_grad", 64): Tile(64, 32, 8, 2),
    ("sm_80", "key_grad", 64): Tile(32, 64, 8, 2),
    ("sm_80", "key_grad", 256): Tile(32, 32, 8, 2),
    ("sm_90", "query_grad", 256): Tile(64, 16, 8, 2),
    ("sm_90", "key_grad", 64): Tile(32, 128, 8, 2),
    ("sm_90", "key_grad", 128): Tile(16, 128, 8, 2),
    # No tile of 64 keys is without spills: here and on sm_100 the products are those of older chips.
    ("sm_90", "key_grad", 256): Tile(32, 32, 8, 2),
    ("sm_100", "query_grad", 128): Tile(64, 64, 8, 2),
    ("sm_100", "key_grad", 64): Tile(64, 64, 8, 2),
    ("sm_100", "key_grad", 256): Tile(32, 32, 8, 2),
    ("sm_120", "forward", 64): Tile(128, 32, 8, 3),
    ("sm_120", "key_grad", 64): Tile(32, 64, 8, 2),
    ("gfx942", "query_grad", 128): Tile(64, 32, 4, 1),
}


def tile(architecture: str, kernel: str, half: bool, width: int, dropout: bool = False) -> Tile:
    """The tile of a kernel.

    Args:
        architecture: a key of `SHARED_MEMORY`, or "interpreter".
        kernel: one of `PASSES`.
        half: whether the inputs have 16 bits instead of 32.
        width: the larger of the padded head dimensions: 16, 32, 64, 128 or 256.
        dropout: whether weights are dropped.
    """
    if architecture == "interpreter":
        return _INTERPRETER
    width = max(width, 64)
    if dropout and half and (architecture, kernel, width) in _DROPOUT:
        return _DROPOUT[architecture, kernel, width]
    return (_HALF if half else _FLOAT32)[architecture][kernel][width]


NORM_PASSES = ("gram", "tile", "lookup", "cross")

# Of "gram" and "cross": positions on both sides of a block of pairs; of "tile": rows and columns of a tile of the
# gradient; of "lookup": a chunk of positions, and columns. The widest side of any is what the bounds of `norms` allow.
NORM_WIDEST = 128
# Products summed in one accumulator of a matrix unit, and of float32's: the bounds of `norms` grow with both.
NORM_CHUNK = {True: 64, False: 32}

_NORM_HALF = {
    "gram": Tile(128, 128, 8, 3),
    "tile": Tile(128, 128, 8, 3),
    "lookup": Tile(64, 64, 4, 2),
    "cross": Tile(64, 64, 4, 2),
}
_NORM_FLOAT32 = {
    "gram": Tile(64, 64, 8, 2),
    "tile": Tile(64, 64, 8, 2),
    "lookup": Tile(32, 64, 4, 2),
    "cross": Tile(64, 64, 8, 2),
}
_NORM = {architecture: {True: _NORM_HALF, False: _NORM_FLOAT32} for architecture in SHARED_MEMORY}
_NORM["gfx942"] = {
    True: _NORM_HALF | {"gram": Tile(128, 128, 8, 2), "tile": Tile(128, 128, 8, 2)},
    False: _NORM_FLOAT32,
}
_NORM["sm_120"] = {
    True: {
        "gram": Tile(64, 64, 4, 3),
        "tile": Tile(128, 64, 8, 3),
        "lookup": Tile(64, 64, 8, 2),
        "cross": Tile(64, 64, 4, 2),
    },
    False: _NORM_FLOAT32 | {"gram": Tile(64, 64, 8, 3)},
}
# Where rows do not begin at multiples of 16 elements, which takes more registers for addresses; only of 16-bit inputs.
_NORM_UNALIGNED = {("sm_90", "gram"): Tile(64, 64, 4, 3), ("sm_100", "gram"): Tile(64, 64, 4, 3)}

# What an operation of the Gram form costs, in operations of the tile form: to be measured by `benchmarks/norms.py`.
GRAM_COST = dict.fromkeys(SHARED_MEMORY, 1.0)


def norm_tile(architecture: str, kernel: str, half: bool, columns: int = NORM_WIDEST, aligned: bool = True) -> Tile:
    """The tile of a kernel of `norms`.

    Args:
        architecture: a key of `SHARED_MEMORY`, or "interpreter".
        kernel: one of `NORM_PASSES`.
        half: whether the inputs have 16 bits instead of 32.
        columns: of "tile", the narrower side of the gradient: a narrow one (LoRA) is not computed in a wide tile.
        aligned: whether widths and strides are multiples of 16.
    """
    found = _INTERPRETER if architecture == "interpreter" else _NORM[architecture][half][kernel]
    if half and not aligned:
        found = _NORM_UNALIGNED.get((architecture, kernel), found)
    if kernel == "lookup":
        found = found._replace(block_m=NORM_CHUNK[half])
    if kernel == "tile":
        narrow = 16
        while narrow < min(columns, found.block_n):
            narrow *= 2
        found = found._replace(block_n=narrow)
    return found
