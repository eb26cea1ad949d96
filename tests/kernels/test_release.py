from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dpfa_hf._kernel import release
from dpfa_hf._kernel.chacha import chacha20_blocks, standard_normals
from dpfa_hf._kernel.release import dp_release, release_sensitivity
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy import stats

import dpfa_hf

KEY = bytes(range(7, 39))


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    skipped = pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own"
    )
    return pytest.mark.interpreter(skipped(test))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program costs the interpreter half a second whatever it holds."""
    monkeypatch.setattr(release, "TILE_BLOCKS", 1024)
    monkeypatch.setattr(release, "TILE_ELEMENTS", 512)


# --- Sensitivity: what the segments contribute before noise ---

Contribute = Callable[..., torch.Tensor]  # (output, clipping_norm, cu_seq_lens, query_mask) -> float32, as the output


def contribute(
    output: torch.Tensor,
    clipping_norm: float,
    cu_seq_lens: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    bound = release._mechanism(clipping_norm, 1.0).bound
    return release._clipped(output, *release._segments(output, cu_seq_lens, query_mask), bound)


def contribute_in_a_kernel(
    output: torch.Tensor,
    clipping_norm: float,
    cu_seq_lens: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    mechanism = release._mechanism(clipping_norm, 1.0)._replace(standard_deviation=0.0, grid=2.0**-90)
    segments = release._segments(output, cu_seq_lens, query_mask)
    return release._release_triton(output, *segments, torch.zeros(8, dtype=torch.int32), mechanism)


def adversarial(shape: tuple[int, ...], seed: int, scale: float, special: float | None) -> torch.Tensor:
    """Random float32 of one scale with a few elements of every scale, zero and perhaps one that is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * scale
    wild = torch.tensor([0.0, 1e-45, -1e-39, 1e-20, 1.0, -1e19, 3e38])
    chosen = torch.randint(len(wild), shape, generator=generator)
    x = torch.where(torch.rand(shape, generator=generator) < 0.05, wild[chosen], x)
    if special is not None and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = special
    return x


SCALES = st.sampled_from([0.0, 1e-45, 1e-30, 1e-4, 1.0, 1e4, 1e30])
SPECIALS = st.sampled_from([None, None, None, math.nan, math.inf, -math.inf, 3.4e38])


@st.composite
def neighbours(draw: st.DrawFn) -> dict[str, Any]:
    heads, width = draw(st.integers(1, 4)), draw(st.sampled_from([1, 8, 20]))
    packed = draw(st.booleans())
    if packed:
        lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
        cu_seq_lens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
        rows, length = 1, int(cu_seq_lens[-1]) + draw(st.integers(0, 2))
    else:
        cu_seq_lens, rows, length = None, draw(st.integers(1, 3)), draw(st.integers(1, 6))
    shape = (rows, length, heads, width)
    seeds = st.integers(0, 2**31)
    output = adversarial(shape, draw(seeds), draw(SCALES), None)
    changed = torch.zeros(rows, length, dtype=torch.bool)
    number = draw(st.integers(0, (len(cu_seq_lens) - 2) if packed else rows - 1))
    if packed:
        changed[0, cu_seq_lens[number] : cu_seq_lens[number + 1]] = True
    else:
        changed[number] = True
    one = adversarial(shape, draw(seeds), draw(SCALES), draw(SPECIALS))
    other = -one if draw(st.booleans()) else adversarial(shape, draw(seeds), draw(SCALES), draw(SPECIALS))
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(draw(seeds))) < 0.8
    return {
        "outputs": [torch.where(changed[:, :, None, None], segment, output) for segment in (one, other)],
        "changed": changed,
        "clipping_norm": draw(st.sampled_from([1e-12, 0.3, 1.0, 7.7])),
        "cu_seq_lens": cu_seq_lens,
        # Neighbours of padded rows may differ in the row's padding as well.
        "masks": draw(st.sampled_from([[None, None], [mask, mask | changed], [mask & ~changed, mask]])),
    }


def check_neighbours(contribute: Contribute, case: dict[str, Any]) -> None:
    """One segment changes the whole tensor by no more than the sensitivity, and no other segment's contribution."""
    norm, heads = case["clipping_norm"], case["outputs"][0].shape[2]
    first, second = (
        contribute(output, norm, case["cu_seq_lens"], mask).double()
        for output, mask in zip(case["outputs"], case["masks"], strict=True)
    )
    assert first.isfinite().all() and second.isfinite().all()
    assert torch.equal(first[~case["changed"]], second[~case["changed"]])
    replaced = math.sqrt(math.fsum((first - second).square().flatten().tolist()))
    assert replaced <= release_sensitivity(heads, norm, "replace_one")
    for contribution in (first, second):
        zeroed = contribution[case["changed"]]
        assert math.sqrt(math.fsum(zeroed.square().flatten().tolist())) <= release_sensitivity(heads, norm, "zero_out")
        for head in zeroed.unbind(1):
            assert math.sqrt(math.fsum(head.square().flatten().tolist())) <= norm


def search(contribute: Contribute, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(neighbours())
    def attempt(case: dict[str, Any]) -> None:
        check_neighbours(contribute, case)

    attempt()


def test_no_neighbour_found_by_search_changes_the_contributions_by_more_than_the_sensitivity() -> None:
    search(contribute, 300)


@interpreted
def test_no_neighbour_found_by_search_exceeds_the_sensitivity_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    search(contribute_in_a_kernel, 6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sensitivity_is_attained_by_aligned_segments(scale: float, dtype: torch.dtype) -> None:
    segment = torch.full((1, 5, 3, 16), scale, dtype=dtype)
    norm = 1e-4
    contribution = contribute(segment, norm).double()
    opposite = contribute(-segment, norm).double()
    nearly = 1 - 2.0**-19
    assert (contribution - opposite).norm() >= nearly * release_sensitivity(3, norm, "replace_one")
    assert contribution.norm() >= nearly * release_sensitivity(3, norm, "zero_out")
    two_rows = contribute(segment.repeat(2, 1, 1, 1), norm).double()
    assert two_rows.norm() >= nearly * release_sensitivity(3, norm, segments_per_unit=2)


def test_segments_below_the_norm_contribute_themselves() -> None:
    output = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(contribute(output, 100.0), output)


def test_padding_contributes_zero_and_takes_nothing_from_the_norm() -> None:
    output = torch.ones(2, 3, 1, 4)
    output[0, 2], output[1, 1] = 1e30, math.nan
    mask = torch.tensor([[True, True, False], [True, False, True]])
    expected = mask[:, :, None, None] * (0.5 / math.sqrt(8)) * torch.ones(2, 3, 1, 4)
    torch.testing.assert_close(contribute(output, 0.5, query_mask=mask), expected)
    tail = contribute(torch.full((1, 4, 1, 4), 1.0), 0.5, torch.tensor([0, 1, 2]))
    assert torch.equal(tail.norm(dim=(2, 3)) > 0, torch.tensor([[True, True, False, False]]))


def unclipped(output: torch.Tensor, *_: Any) -> torch.Tensor:
    return output.float().nan_to_num(0, 0, 0)


def clipped_by_token(output: torch.Tensor, norm: float, *_: Any) -> torch.Tensor:
    tokens = output.double()
    factor = norm / tokens.norm(dim=-1, keepdim=True).clamp(min=norm)
    return torch.where(factor > 0, tokens * factor * (1 - 2**-20), 0.0).float()


def clipped_over_all_segments(output: torch.Tensor, norm: float, *_: Any) -> torch.Tensor:
    return contribute(output.flatten(0, 1)[None], norm).view(output.shape)


def clipped_over_all_heads_to_more(output: torch.Tensor, norm: float, cu: Any, mask: Any) -> torch.Tensor:
    return contribute(output.flatten(2)[:, :, None], 2 * norm, cu, mask).view(output.shape)


def clipped_in_float32(output: torch.Tensor, norm: float, cu: Any, mask: Any) -> torch.Tensor:
    """No margin for rounding, and squares that overflow or vanish."""
    boundaries, segment = release._segments(output, cu, mask)
    tokens = torch.where((segment < len(boundaries) - 1)[:, None, None], output.flatten(0, 1), 0.0)
    squares = torch.zeros(len(boundaries), output.shape[2]).index_add_(0, segment, tokens.square().sum(-1))
    factor = torch.where(squares < math.inf, norm / squares.sqrt().clamp(min=norm), 1.0)
    return (tokens * factor[segment][:, :, None]).nan_to_num(0, 0, 0).view(output.shape)


def clipped_without_margin(output: torch.Tensor, norm: float, cu: Any, mask: Any) -> torch.Tensor:
    return release._clipped(output, *release._segments(output, cu, mask), norm)


def keeping_what_is_not_finite(output: torch.Tensor, norm: float, cu: Any, mask: Any) -> torch.Tensor:
    return torch.where(output.isfinite(), contribute(output, norm, cu, mask), output)


MUTANTS = [
    unclipped,
    clipped_by_token,
    clipped_over_all_segments,
    clipped_over_all_heads_to_more,
    clipped_in_float32,
    clipped_without_margin,
    keeping_what_is_not_finite,
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_that_clips_wrongly_is_found_by_the_search(mutant: Contribute) -> None:
    with pytest.raises(AssertionError):
        search(mutant, 300)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((4, 0.5), 1.0), ((4, 0.5, "zero_out"), 1.0), ((4, 0.5, "replace_one"), 2.0), ((1, 3.0), 3.0)],
)
def test_sensitivity_is_root_heads_times_the_norm_and_twice_that_for_replace_one(
    arguments: tuple[Any, ...], expected: float
) -> None:
    assert release_sensitivity(*arguments) == expected
    assert release_sensitivity(*arguments, segments_per_unit=9) == 3 * expected


@pytest.mark.parametrize("arguments", [(4, 1.0, "add_remove"), (0, 1.0), (4, 0.0), (4, -1.0), (4, math.nan)])
def test_sensitivity_refuses_what_it_does_not_know(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="adjacency|heads"):
        release_sensitivity(*arguments)


# --- Noise: what lies over the contributions ---

Release = Callable[..., torch.Tensor]

NORM, MULTIPLIER = 3.0, 0.25
keyed = functools.partial(dp_release, _key_source=lambda count: KEY[:count])


def regions() -> tuple[torch.Tensor, torch.Tensor, dict[str, slice]]:
    """A packed row with a segment of each kind, and tokens behind the last one."""
    generator = torch.Generator().manual_seed(3)
    kinds = ("plain", "huge", "fully masked", "NaN", "infinite", "outside")
    output = torch.randn(1, 64 * len(kinds), 4, 20, generator=generator)
    parts = {kind: slice(64 * i, 64 * i + 64) for i, kind in enumerate(kinds)}
    output[:, parts["huge"]] *= 1e30
    output[:, parts["fully masked"]] = 0.0
    output[0, parts["NaN"].start, 0, 0] = math.nan
    output[0, parts["infinite"].stop - 1, :, 1] = math.inf
    cu_seq_lens = torch.tensor([0, 64, 64, 128, 192, 256, 320])
    return output, cu_seq_lens, parts


def check_noise(release_: Release) -> None:
    """Every region has the whole noise, of the promised standard deviation and law, on the grid."""
    output, cu_seq_lens, parts = regions()
    released = release_(output, clipping_norm=NORM, noise_multiplier=MULTIPLIER, cu_seq_lens=cu_seq_lens)
    assert released.shape == output.shape and released.dtype == torch.float32 and released.is_contiguous()
    noise = (released.double() - contribute(output, NORM, cu_seq_lens)) / (NORM * MULTIPLIER)
    for part in parts.values():
        for z in noise[0, part].unbind(1):
            assert abs(z.mean()) < 4.5 / math.sqrt(z.numel())
            assert abs(z.std() - 1) < 4.5 / math.sqrt(2 * z.numel())
            assert len(z.unique()) > 0.9 * z.numel()
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * noise.numel())
    assert abs((noise**4).mean() / noise.var() ** 2 - 3) < 4 * math.sqrt(24 / noise.numel())
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(noise[0].flatten(1))  # of tokens with one another
    assert (correlation - torch.eye(len(correlation))).abs().max() < 6 / math.sqrt(80)
    steps = released.double() / 2.0**-13
    assert torch.equal(steps, steps.round()) and NORM * MULTIPLIER / 8192 <= 2.0**-13 <= NORM * MULTIPLIER / 4096


def check_freshness(release_: Release) -> None:
    output = torch.zeros(1, 16, 2, 64)
    first, second = (release_(output, clipping_norm=1.0, noise_multiplier=1.0) for _ in range(2))
    assert (first == second).double().mean() < 0.01
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 6 / math.sqrt(2048)


def check_support(release_: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cipher gives zeros, the noise is beyond 9 standard deviations (P17)."""
    monkeypatch.setattr(release, "chacha20_blocks", lambda key, counters: torch.zeros(16, len(counters)).int())
    assert release_(torch.zeros(1, 1, 1, 8), clipping_norm=1.0, noise_multiplier=1.0).abs().max() > 9


def test_noise_has_the_promised_law_on_every_element_of_every_kind_of_segment() -> None:
    check_noise(keyed)


def test_two_calls_take_32_fresh_bytes_each_from_the_operating_system() -> None:
    assert dp_release.__kwdefaults__["_key_source"] is os.urandom
    check_freshness(dp_release)
    asked: list[int] = []
    dp_release(
        torch.zeros(2, 3, 1, 8), clipping_norm=1.0, noise_multiplier=1.0,
        _key_source=lambda count: asked.append(count) or os.urandom(count),
    )  # fmt: skip
    assert asked == [32]


def test_two_calls_of_a_compiled_function_take_different_keys() -> None:
    check_freshness(torch.compile(dp_release, backend="eager"))


def test_noise_reaches_beyond_nine_standard_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    check_support(keyed, monkeypatch)


def with_noise_not_scaled(output: torch.Tensor, clipping_norm: float, **arguments: Any) -> torch.Tensor:
    noise = keyed(torch.zeros_like(output), clipping_norm=1.0, noise_multiplier=arguments["noise_multiplier"])
    return contribute(output, clipping_norm, arguments["cu_seq_lens"]) + noise


def without_noise_where_nothing_is(output: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return torch.where((output == 0).all(dim=(2, 3), keepdim=True), 0.0, keyed(output, **arguments))


def without_noise_behind_the_last_segment(output: torch.Tensor, **arguments: Any) -> torch.Tensor:
    released = keyed(output, **arguments)
    released[:, arguments["cu_seq_lens"][-1] :] = 0.0
    return released


def one_noise_for_all_tokens(output: torch.Tensor, **arguments: Any) -> torch.Tensor:
    noise = keyed(torch.zeros_like(output[:, :1]), **{**arguments, "cu_seq_lens": None})
    return contribute(output, arguments["clipping_norm"], arguments["cu_seq_lens"]) + noise


def without_noise(output: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return contribute(output, arguments["clipping_norm"], arguments["cu_seq_lens"])


def clipped_after_the_noise(output: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return contribute(keyed(output, **arguments), arguments["clipping_norm"], arguments["cu_seq_lens"])


@pytest.mark.parametrize(
    "mutant",
    [
        with_noise_not_scaled,
        without_noise_where_nothing_is,
        without_noise_behind_the_last_segment,
        one_noise_for_all_tokens,
        without_noise,
        clipped_after_the_noise,
    ],
)
def test_mutant_with_other_noise_is_caught(mutant: Release) -> None:
    with pytest.raises(AssertionError):
        check_noise(mutant)


def test_mutant_with_a_fixed_key_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_freshness(keyed)


def test_mutant_with_the_tail_of_tl_randn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "standard_normals", lambda words: standard_normals(words).clamp(-5.678, 5.678))
    with pytest.raises(AssertionError):
        check_support(keyed, monkeypatch)


@pytest.mark.parametrize("width", [3, 8, 20])
def test_each_element_has_its_own_place_in_the_keystream(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "CHUNK_BLOCKS", 7)
    output = torch.zeros(2, 3, 5, width)
    mechanism = release._mechanism(1.0, 1.0)
    key = torch.frombuffer(bytearray(KEY), dtype=torch.int32)
    released = release._release_torch(output, *release._segments(output, None, None), key, mechanism)
    per_row = math.ceil(width / 8)
    normals = standard_normals(chacha20_blocks(key, torch.arange(30 * per_row)))
    places = set()
    for row in range(30):
        for d in range(width):
            place = (row * per_row + d % per_row, d // per_row)
            places.add(place)
            assert abs(float(released.view(30, width)[row, d] - normals[place])) <= mechanism.grid
    assert len(places) == output.numel()


# --- Kernels against torch ---


def padded() -> dict[str, Any]:
    output = torch.randn(2, 3, 5, 20, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    output[1, 2] *= 1e20
    return {"output": output, "query_mask": torch.arange(5) < torch.tensor([[5], [3]])}


def packed() -> dict[str, Any]:
    output = torch.randn(1, 13, 4, 16, generator=torch.Generator().manual_seed(2))
    output[0, 2, 1, 3], output[0, 12] = math.inf, math.nan
    return {"output": output[..., ::2], "cu_seq_lens": torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)}


@interpreted
@pytest.mark.parametrize("case", [padded, packed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_the_torch_path_under_one_key(
    case: Callable[[], dict[str, Any]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_programs(monkeypatch)
    arguments = case()
    output = arguments.pop("output").to(dtype)
    key = torch.frombuffer(bytearray(KEY), dtype=torch.int32)
    segments = release._segments(output, arguments.get("cu_seq_lens"), arguments.get("query_mask"))
    expected = release._release_torch(output, *segments, key, release._mechanism(1.5, 0.5))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        found = keyed(output, clipping_norm=1.5, noise_multiplier=0.5, **arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [padded, packed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu_equal_the_torch_path_but_for_one_step_of_the_grid(
    case: Callable[[], dict[str, Any]], dtype: torch.dtype
) -> None:
    arguments = case()
    output = arguments.pop("output").to(dtype)
    expected = keyed(output, clipping_norm=1.5, noise_multiplier=0.5, **arguments)
    on_gpu = {name: tensor.cuda() for name, tensor in arguments.items()}
    found = keyed(output.cuda(), clipping_norm=1.5, noise_multiplier=0.5, **on_gpu).cpu()
    assert (found - expected).abs().max() <= release._mechanism(1.5, 0.5).grid


@interpreted
def test_kernels_take_a_fresh_key_for_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    check_freshness(dp_release)


@interpreted
def test_mutant_of_the_kernels_with_a_fixed_key_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    few_programs(monkeypatch)
    with pytest.raises(AssertionError):
        check_freshness(keyed)


# --- Refusals ---


@pytest.mark.parametrize("frozen", [True, False])
def test_release_is_refused_where_a_model_could_be_training(frozen: bool) -> None:
    with torch.enable_grad():
        output = torch.zeros(1, 2, 1, 8, requires_grad=not frozen) * 1.0
        with pytest.raises(ValueError, match=r"not for training.*no_grad.*DPTrainer"):
            dp_release(output, clipping_norm=1.0, noise_multiplier=1.0)


def test_release_is_refused_while_a_graph_hangs_on_the_output() -> None:
    with torch.enable_grad():
        output = torch.zeros(1, 2, 1, 8, requires_grad=True) * 1.0
    with pytest.raises(ValueError, match=r"detach\(\)"):
        dp_release(output, clipping_norm=1.0, noise_multiplier=1.0)


def test_release_is_given_in_inference_mode() -> None:
    with torch.inference_mode():
        assert dp_release(torch.zeros(1, 2, 1, 8), clipping_norm=1.0, noise_multiplier=1.0).abs().max() > 0


def outside_the_kernel_package() -> list[Path]:
    return sorted(Path(dpfa_hf.__file__).parent.rglob("*.py"))


def mentioning_release(sources: dict[str, str]) -> list[str]:
    return [name for name, text in sources.items() if "dp_release" in text or "_kernel.release" in text]


def test_nothing_but_the_kernel_package_itself_mentions_the_release() -> None:
    sources = {str(path): path.read_text() for path in outside_the_kernel_package() if "_kernel" not in path.parts}
    assert any(name.endswith("attention.py") for name in sources)
    assert mentioning_release(sources) == []
    package = Path(release.__file__).parent
    kernels = {path.name: path.read_text() for path in package.glob("*.py")}
    assert set(mentioning_release(kernels)) <= {"__init__.py", "release.py"}


def test_mutant_that_reaches_the_release_from_attention_is_caught() -> None:
    assert mentioning_release({"attention.py": "from dpfa_hf._kernel import dp_release\n"})
    assert mentioning_release({"attention.py": "import dpfa_hf._kernel.release as r\n"})


OUTPUT = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"output": OUTPUT[0]}, "output must be"),
        ({"output": OUTPUT.double()}, "float64"),
        ({"clipping_norm": 0.0}, "clipping_norm"),
        ({"clipping_norm": math.inf}, "clipping_norm"),
        ({"clipping_norm": math.nan}, "clipping_norm"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": 1e-16}, "noise_multiplier"),
        ({"query_mask": torch.ones(1, 4)}, "query_mask"),
        ({"query_mask": torch.ones(1, 3, dtype=torch.bool)}, "query_mask"),
        ({"cu_seq_lens": torch.tensor([0.0, 4.0])}, "cu_seq_lens"),
        ({"cu_seq_lens": torch.tensor([0, 3, 2, 4])}, "must rise"),
        ({"cu_seq_lens": torch.tensor([1, 4])}, "must rise"),
        ({"cu_seq_lens": torch.tensor([0, 5])}, "must rise"),
        ({"cu_seq_lens": torch.tensor([], dtype=torch.int64)}, "must rise"),
        ({"cu_seq_lens": torch.tensor([0, 4]), "output": OUTPUT.repeat(2, 1, 1, 1)}, "packed row"),
    ],
)
def test_other_arguments_are_refused_in_one_line(changed: dict[str, Any], match: str) -> None:
    arguments = {"output": OUTPUT, "clipping_norm": 1.0, "noise_multiplier": 1.0, **changed}
    with pytest.raises(ValueError, match=match) as refusal:
        dp_release(arguments.pop("output"), **arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (1, 0, 2, 8), (2, 3, 2, 0)])
def test_nothing_is_released_of_an_empty_output(shape: tuple[int, ...]) -> None:
    released = dp_release(torch.zeros(shape).half(), clipping_norm=1.0, noise_multiplier=1.0)
    assert released.shape == shape and released.dtype == torch.float32
