"""Compiles the kernels for chips that are not there, and reads from the machine code what each needs of its chip.

Triton compiles to machine code without a GPU, but does not look whether the result runs: more shared memory than there
is fails at the launch, and registers that spill are only slow. `faults` looks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import triton
from dpfa_hf._kernel import backward, chacha, flash, forward, noise, norm_kernels, norms, release, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels.json"
# Registers change a little with every change of a kernel; what needs this much more has lost something.
MOST_REGISTERS = 1.10

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The instruction by which a chip multiplies matrices of 16 bits, and where its name can be read.
MATRIX_INSTRUCTIONS = {
    "sm_80": ("mma.sync", "ptx"),
    "sm_90": ("HGMMA", "sass"),
    "sm_100": ("tcgen05.mma", "ptx"),
    "sm_120": ("mma.sync", "ptx"),
    "gfx942": ("v_mfma", "amdgcn"),
}
# Dropout with heads this wide leaves no registers for a tile of 64 keys, which those instructions need.
OLDER_INSTRUCTIONS = {("sm_90", "key_grad", 256), ("sm_100", "key_grad", 256)}
KERNELS = {
    "forward": forward.forward_kernel,
    "query_grad": backward.query_grad_kernel,
    "key_grad": backward.key_grad_kernel,
    "delta": backward.delta_kernel,
    "row_bounds": forward.row_bounds_kernel,
    "clip_factor": release.clip_factor_kernel,
    "clip_and_noise": release.clip_and_noise_kernel,
    "gaussian_noise": noise.gaussian_noise_kernel,
    "gram": norm_kernels.gram_kernel,
    "tile": norm_kernels.tile_kernel,
    "lookup": norm_kernels.lookup_kernel,
    "cross": norm_kernels.cross_kernel,
    "mass": norm_kernels.mass_kernel,
    "moments": norm_kernels.moments_kernel,
    "position_sums": norm_kernels.position_sums_kernel,
    "finish": norm_kernels.finish_kernel,
}
# Of norms; the width of a variant is that of left, its value width that of right.
NORM_KERNELS = (*tiles.NORM_PASSES, "mass", "moments", "position_sums", "finish")
MULTIPLYING = (*tiles.PASSES, *tiles.NORM_PASSES)
WIDTHS = (16, 32, 64, 128, 256)
# Everything at once but dropout, which may have smaller tiles.
MOST = ("causal", "window", "packed", "padded", "sinks", "softcap")
ALL = (*MOST, "dropout")

# Absent pointers are constants, and so is what a stride of the mask always is.
_POINTERS = {
    "packed": ("BOUNDS",),
    "padded": ("ROWS", "KEY_MASK"),
    "sinks": ("SINKS", "DSINKS"),
    "dropout": ("SEED",),
}
_DTYPES_OF_POINTERS = {
    "*i32": ("BOUNDS", "ROWS", "KEY"),
    "*i64": ("SEED", "BOUNDARIES", "SEGMENT", "ROW"),
    "*u8": ("KEY_MASK",),
    "*fp32": ("LSE", "DLSE", "DELTA", "SINKS", "DSINKS", "RELEASED"),
    "*fp64": ("FACTORS",),
}
_DTYPES_OF_NORMS = {
    "*i32": ("ENDS", "BOUNDARIES"),
    "*i64": ("KEY", "ORDER", "INDEX"),
    "*fp32": ("MASS", "MOMENTS"),
    "*fp64": ("PARTIAL", "OUT", "WEIGHT", "BIAS"),
}
_FLOATS = (
    "scale", "softcap", "dropout", "bound", "standard_deviation", "grid", "inverse_grid",
    "absolute", "squared", "relative", "eps",
)  # fmt: skip


class Variant(NamedTuple):
    """One build: a kernel with constants, for a chip. `dtype` is Triton's name; features are from ALL."""

    architecture: str
    kernel: str
    dtype: str = "bf16"
    width: int = 128
    value_width: int = 128
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        widths = f"{self.width}x{self.value_width}"
        return "/".join([self.architecture, self.kernel, self.dtype, widths, "+".join(self.features) or "plain"])

    @property
    def aligned(self) -> bool:
        """Whether rows begin at multiples of 16 elements, as Triton is told of arguments that are."""
        return self.width % 16 == self.value_width % 16 == 0

    @property
    def tile(self) -> tiles.Tile | None:
        """What the launcher takes; None for the kernels without a tile in the table."""
        if self.kernel in tiles.NORM_PASSES:
            narrow = min(self.width, self.value_width)
            return tiles.norm_tile(self.architecture, self.kernel, self.dtype != "fp32", narrow, self.aligned)
        if self.kernel not in tiles.PASSES:
            return None
        width = flash._padded(max(self.width, self.value_width))
        return tiles.tile(self.architecture, self.kernel, self.dtype != "fp32", width, "dropout" in self.features)


class Resources(NamedTuple):
    """What one program needs.

    Attributes:
        tile: (queries, keys, warps, stages), or None.
        registers: of one thread; on AMD vector registers, accumulators included.
        spilled: bytes of one thread that are in memory for want of registers, or for any other reason.
        shared: bytes.
        matrix_instructions: how many `MATRIX_INSTRUCTIONS` there are.
        chained: products of matrices that are added up in the accumulator of others, instead of in float32.
    """

    tile: tuple[int, int, int, int] | None
    registers: int
    spilled: int
    shared: int
    matrix_instructions: int
    chained: int = 0


def build(variant: Variant, tile: tiles.Tile | None = None) -> Resources:
    """Compiles a variant with the table's tile or another one, into a cache of its own."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("with TRITON_INTERPRET=1 Triton compiles nothing: unset it for a process that compiles")
    tile = tile or variant.tile
    kernel = KERNELS[variant.kernel]
    constants = _constants(variant, tile)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, variant) for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or (name.startswith("stride_") or name in ("rows", "columns")) and variant.aligned
        },
    )
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if tile is not None:
        options |= {"num_warps": tile.warps, "num_stages": tile.stages}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compiled = triton.compile(source, target=TARGETS[variant.architecture], options=options)
    read = _read_amd if "amdgcn" in compiled.asm else _read_nvidia
    registers, spilled = read(compiled.asm)
    instruction, where = MATRIX_INSTRUCTIONS[variant.architecture]
    text = _disassembled(compiled.asm["cubin"]) if where == "sass" else compiled.asm[where]
    count = len(re.findall(rf"\b{re.escape(instruction)}", text))
    size, shared = None if tile is None else tuple(tile), compiled.metadata.shared
    return Resources(size, registers, spilled, shared, count, _chained(compiled.asm["ttgir"]))


def faults(variant: Variant, resources: Resources, recorded: Resources | None = None) -> list[str]:
    """Why a build must not be: what a chip cannot do, and what it did better when `recorded` was."""
    found = []
    limit = tiles.SHARED_MEMORY[variant.architecture]
    if resources.spilled:
        found.append(f"{variant}: {resources.spilled} bytes of registers spill with {resources.tile}")
    if resources.shared > limit:
        found.append(f"{variant}: {resources.shared} bytes of shared memory of {limit} with {resources.tile}")
    older = (variant.architecture, variant.kernel, flash._padded(variant.width)) in OLDER_INSTRUCTIONS
    needed = variant.kernel in MULTIPLYING and variant.dtype != "fp32" and not (older and "dropout" in variant.features)
    if needed and not resources.matrix_instructions:
        found.append(f"{variant}: no {MATRIX_INSTRUCTIONS[variant.architecture][0]} with {resources.tile}")
    # The bounds of norms are those of short chains (P14); attention's sums are of one chain.
    if variant.kernel in tiles.NORM_PASSES and resources.chained:
        found.append(f"{variant}: {resources.chained} sums of products go on in one accumulator")
    if recorded is not None:
        if resources.registers > MOST_REGISTERS * recorded.registers:
            found.append(f"{variant}: {resources.registers} registers, {recorded.registers} before")
        if resources.matrix_instructions == 0 < recorded.matrix_instructions:
            found.append(f"{variant}: no matrix instructions, {recorded.matrix_instructions} before")
    return found


def table() -> Iterator[Variant]:
    """Every build that is checked: the tile table with the features that cost most, and the kernels without tiles."""
    for architecture in TARGETS:
        for kernel in tiles.PASSES:
            for width in WIDTHS:
                # Widths that are no power of two are masked, which costs registers.
                odd = {16: 16, 32: 32}.get(width, width * 3 // 4)
                yield Variant(architecture, kernel, "bf16", width, width, ("causal",))
                for dtype in ("bf16", "fp32"):
                    yield Variant(architecture, kernel, dtype, odd, odd, MOST)
                    yield Variant(architecture, kernel, dtype, odd, odd, ALL)
            for feature in ALL[1:]:
                yield Variant(architecture, kernel, "fp16", 128, 128, ("causal", feature))
            yield Variant(architecture, kernel, "fp16", 64, 64, ("padded",))
            yield Variant(architecture, kernel, "fp16", 80, 80, ("causal", "padded"))
            yield Variant(architecture, kernel, "bf16", 192, 128, ("causal", "packed"))
        for kernel in ("delta", "clip_factor", "clip_and_noise"):
            for dtype in ("bf16", "fp32"):
                for width in (64, 256):
                    yield Variant(architecture, kernel, dtype, width, width, ("sinks",) if kernel == "delta" else ())
        yield Variant(architecture, "row_bounds")
        for dtype in ("fp32", "fp64"):
            yield Variant(architecture, "gaussian_noise", dtype)
        for dtype in ("bf16", "fp32"):
            for kernel in NORM_KERNELS:
                yield Variant(architecture, kernel, dtype, 768, 768)
                # Widths that are no multiple of 16 elements take registers for addresses, and so does packing.
                yield Variant(architecture, kernel, dtype, 72, 72, ("packed",))
            for narrow in (8, 16, 32, 64):
                yield Variant(architecture, "tile", dtype, 768, narrow, ("packed",))
            yield Variant(architecture, "gram", dtype, 768, 8, ("packed",))
        for kernel in tiles.NORM_PASSES:
            yield Variant(architecture, kernel, "fp16", 768, 768, ("packed",))


def representatives() -> Iterator[Variant]:
    """The builds of `table` that every run of the tests repeats: of each tile those that need most."""
    for variant in table():
        everything, most = variant.features == ALL, variant.features == MOST
        if variant.kernel in NORM_KERNELS:
            shipped = variant.architecture == "sm_90" and variant.kernel in tiles.NORM_PASSES
            wanted = variant.dtype == "bf16" and (
                variant.kernel in ("gram", "tile", "lookup") and variant.width == variant.value_width == 72
                or shipped and variant.width == variant.value_width == 768
            )  # fmt: skip
        elif variant.kernel not in tiles.PASSES:
            wanted = variant.dtype == "bf16" and variant.width > 64 or variant.kernel == "gaussian_noise"
        elif variant.dtype == "fp32":
            wanted = everything and variant.width == 192
        else:
            wanted = (
                everything and variant.width == 192
                or most and variant.width == 192
                or variant.features == ("causal",) and variant.architecture == "sm_90"
            )  # fmt: skip
        if wanted:
            yield variant


def read_results() -> dict[str, Resources]:
    """The recorded builds by name; none where they are another Triton's, which allots registers in its own way."""
    if not RESULTS.exists():
        return {}
    results = json.loads(RESULTS.read_text())
    if results["triton"] != triton.__version__:
        return {}
    return {name: Resources(**resources) for name, resources in results["builds"].items()}


def write_results(builds: Mapping[str, Resources]) -> None:
    """One line for each build, sorted, so that a change of a kernel can be read in a diff."""
    versions = {name: version(name) for name in ("triton", "torch")}
    head = "".join(f"  {json.dumps(name)}: {json.dumps(number)},\n" for name, number in versions.items())
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(builds[name]._asdict())}" for name in sorted(builds))
    RESULTS.write_text(f'{{\n{head}  "builds": {{\n{lines}\n  }}\n}}\n')


def _constants(variant: Variant, tile: tiles.Tile | None) -> dict[str, Any]:
    """Every constexpr of the kernel, and the arguments that a launch would make one."""
    features, names = set(variant.features), KERNELS[variant.kernel].arg_names
    if variant.kernel in NORM_KERNELS:
        return {name: value for name, value in _norm_constants(variant, tile).items() if name in names}
    width, value_width = variant.width, variant.value_width
    constants: dict[str, Any] = {
        "IS_CAUSAL": "causal" in features,
        "HAS_WINDOW": "window" in features,
        "PACKED": "packed" in features,
        "PADDED": "padded" in features,
        "SOFTCAP": "softcap" in features,
        "HAS_SINKS": "sinks" in features,
        "DROPOUT": "dropout" in features,
        "HEAD_DIM": width,
        "VALUE_DIM": value_width,
        "D": flash._padded(width),
        "DV": flash._padded(value_width),
        "UPCAST": False,
        "BLOCK": 1024,
        "BLOCKS": noise.BLOCKS_PER_TILE,
        "HEADS": 8,
        "WIDTH": width,
        "TILE_WIDTH": triton.next_power_of_2(width),
        "TILE_TOKENS": max(1, release.TILE_ELEMENTS // triton.next_power_of_2(width)),
        "BLOCKS_PER_ROW": triton.cdiv(width, chacha.NORMALS_PER_BLOCK),
        "TILE_BLOCKS": release.TILE_BLOCKS,
        "stride_mask_s": 1,
        "stride_d": 1,
    }
    constants |= {"BLOCK_M": flash._DELTA_BLOCK} if tile is None else {"BLOCK_M": tile[0], "BLOCK_N": tile[1]}
    if variant.kernel != "row_bounds":
        for feature, pointers in _POINTERS.items():
            if feature not in features:
                constants |= dict.fromkeys(pointers)
    return {name: value for name, value in constants.items() if name in names}


def _norm_constants(variant: Variant, tile: tiles.Tile | None) -> dict[str, Any]:
    packed, half = "packed" in variant.features, variant.dtype != "fp32"
    constants: dict[str, Any] = {
        "SEGMENTED": packed,
        "RAGGED": packed,
        "HAS_MASS": True,
        "PAIRED": True,
        "CENTERED": True,
        "NORMALISED": True,
        "UPCAST": False,
        "UPCAST_LEFT": False,
        "UPCAST_RIGHT": False,
        "SEARCH": norms.SEARCH,
        "CHUNK": tiles.NORM_CHUNK[half],
        "CHUNK_LEFT": tiles.NORM_CHUNK[half],
        "CHUNK_RIGHT": tiles.NORM_CHUNK[half],
        "BLOCK": {"position_sums": norms.SUMS_BLOCK, "finish": norms.FINISH_BLOCK}.get(
            variant.kernel, norms.MASS_BLOCK
        ),
        "WIDTH": norms.SUMS_WIDTH if variant.kernel == "position_sums" else norms.MASS_WIDTH,
    }
    if tile is not None:
        constants |= {"BLOCK": tile.block_m, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return constants | ({} if packed else {"BOUNDARIES": None, "ENDS": None})


def _type(name: str, variant: Variant) -> str:
    """Pointers are in capitals, to tensors of the inputs' dtype unless said otherwise; all else is a number."""
    dtypes = _DTYPES_OF_NORMS if variant.kernel in NORM_KERNELS else _DTYPES_OF_POINTERS
    for kind, pointers in dtypes.items():
        if name in pointers:
            return kind
    if name.isupper():
        return f"*{variant.dtype}"
    return "fp32" if name in _FLOATS else "i32"


def _run(tool: str, *options: str, cubin: bytes) -> str:
    """One of CUDA's tools, which come with Triton, on a cubin."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", tool)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def _disassembled(cubin: bytes) -> str:
    return _run("nvdisasm", "-c", cubin=cubin)


def _chained(ttgir: str) -> int:
    products = len(re.findall(r"= tt\.dot |ttng\.warp_group_dot |ttng\.tc_gen5_mma ", ttgir))
    additions = len(re.findall(r"arith\.addf .*: tensor<\d+x\d+xf32", ttgir))
    return max(0, products - additions)


def _read_nvidia(asm: Mapping[str, Any]) -> tuple[int, int]:
    # Without a stack and local memory there is nowhere to spill to.
    usage = _run("cuobjdump", "-res-usage", cubin=asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]) + int(found[3])


def _read_amd(asm: Mapping[str, Any]) -> tuple[int, int]:
    # Scalar registers spill into lanes of vector registers, which `registers` counts.
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"])
        assert found is not None, name
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
