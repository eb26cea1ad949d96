"""The kernels compiled ahead of time for chips that are not there: no spills, shared memory within the limit, matrix
instructions, and no more registers than what is recorded in benchmarks/results/kernels.json.

`benchmarks/compile_all.py` compiles the rest of the table and records it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from dpfa_hf._kernel import tiles  # noqa: E402
from dpfa_hf._kernel.tiles import Tile  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("ahead_of_time", Path(__file__).with_name("ahead_of_time.py"))
assert _SPEC is not None and _SPEC.loader is not None
aot = sys.modules[_SPEC.name] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(aot)

pytestmark = pytest.mark.compiled

SHIPPED = aot.Variant("sm_90", "forward", "bf16", 128, 128, ("causal",))


@pytest.fixture(scope="session")
def recorded() -> dict[str, object]:
    return aot.read_results()


@pytest.mark.parametrize("variant", aot.representatives(), ids=str)
def test_build_fits_its_chip_and_needs_no_more_than_before(variant, recorded) -> None:
    assert aot.faults(variant, aot.build(variant), recorded.get(str(variant))) == []


def test_mutant_tile_that_spills_is_caught() -> None:
    wide = aot.build(SHIPPED._replace(kernel="key_grad"), Tile(128, 128, 4, 2))
    assert any("spill" in fault for fault in aot.faults(SHIPPED, wide))


def test_mutant_tile_beyond_shared_memory_is_caught() -> None:
    deep = aot.build(SHIPPED._replace(architecture="sm_120"), Tile(64, 64, 4, 6))
    assert any("shared memory" in fault for fault in aot.faults(SHIPPED._replace(architecture="sm_120"), deep))


def test_mutant_tile_without_a_warp_group_is_caught() -> None:
    narrow = aot.build(SHIPPED, Tile(32, 64, 4, 2))
    assert any("HGMMA" in fault for fault in aot.faults(SHIPPED, narrow))


def test_mutant_spill_on_amd_is_caught() -> None:
    variant = aot.Variant("gfx942", "key_grad", "bf16", 128, 128, ("causal",))
    assert any("spill" in fault for fault in aot.faults(variant, aot.build(variant, Tile(64, 64, 8, 1))))


def test_mutant_that_sums_in_one_accumulator_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = "return total + tl.dot(a, b, input_precision="
    source = Path(aot.norm_kernels.__file__).read_text()
    assert source.count(right) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, "return tl.dot(a, b, total, input_precision="))
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setitem(aot.KERNELS, "tile", mutant.tile_kernel)
    for architecture in ("sm_90", "sm_100"):
        variant = aot.Variant(architecture, "tile", "bf16", 768, 768)
        assert any("one accumulator" in fault for fault in aot.faults(variant, aot.build(variant)))


def test_mutant_regression_is_caught() -> None:
    before = aot.Resources(None, registers=100, spilled=0, shared=0, matrix_instructions=1)
    assert aot.faults(SHIPPED, before._replace(registers=110), before) == []
    assert any("registers" in fault for fault in aot.faults(SHIPPED, before._replace(registers=111), before))


def test_every_entry_of_the_tile_table_is_compiled() -> None:
    def entry(variant):
        width = aot.flash._padded(max(variant.width, variant.value_width))
        return variant.architecture, variant.kernel, variant.dtype != "fp32", width, "dropout" in variant.features

    compiled = {entry(variant) for variant in aot.table() if variant.kernel in tiles.PASSES}
    assert len(compiled) == len(aot.TARGETS) * len(tiles.PASSES) * 2 * len(aot.WIDTHS) * 2
    assert set(aot.TARGETS) == set(tiles.SHARED_MEMORY)


def test_every_tile_of_the_norms_is_compiled_and_within_their_bounds() -> None:
    compiled = {
        (variant.architecture, variant.kernel, variant.dtype != "fp32", variant.aligned)
        for variant in aot.table()
        if variant.kernel in tiles.NORM_PASSES
    }
    assert len(compiled) == len(aot.TARGETS) * len(tiles.NORM_PASSES) * 2 * 2
    for *entry, aligned in compiled:
        tile = tiles.norm_tile(*entry, aligned=aligned)
        assert max(tile.block_m, tile.block_n) <= tiles.NORM_WIDEST


def test_recorded_table_has_every_build_and_no_fault(recorded) -> None:
    if not recorded:
        pytest.skip("benchmarks/results/kernels.json is another Triton's")
    names = {str(variant): variant for variant in aot.table()}
    assert set(recorded) <= set(names)
    assert {str(variant) for variant in aot.representatives()} <= set(recorded)
    assert [fault for name, resources in recorded.items() for fault in aot.faults(names[name], resources)] == []


def test_nothing_compiles_in_the_interpreters_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.build(SHIPPED)
