"""The benchmark of training steps: who is timed, what is counted, and what is made of the results."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("sentiment", "families", "operations", "contenders", "training_report", "training")
PEERS = ("opacus_ghost", "opacus_per_sample")
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


@pytest.fixture(scope="module")
def benchmark() -> Iterator[SimpleNamespace]:
    """The scripts as modules; what stood under their names before does so again afterwards."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def llama(*, tied: bool = False, lora: bool = False) -> nn.Module:
    config = LlamaConfig(**SIZE, num_key_value_heads=1, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def bert() -> nn.Module:
    config = BertConfig(**SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")


def workload(benchmark: SimpleNamespace, build: Any = llama) -> Any:
    return benchmark.contenders.Workload(benchmark.contenders.Case("tiny", build, 2, 8))


def admit(benchmark: SimpleNamespace, load: Any, **contenders: type) -> tuple[dict, dict]:
    training = benchmark.training
    return training.admit({name: kind(load) for name, kind in contenders.items()}, training.against_autograd(load))


# ---- who is timed ---------------------------------------------------------------------------------------------------


def test_ours_and_peers_that_equal_autograd_are_admitted(benchmark: SimpleNamespace) -> None:
    for build in (llama, bert):
        admitted, found = admit(benchmark, workload(benchmark, build), **benchmark.contenders.CONTENDERS)
        assert set(admitted) == set(benchmark.contenders.CONTENDERS), found
        assert all(each["error"] < 1e-4 for name, each in found.items() if name != "plain")


def test_a_wrong_contender_is_reported_and_not_timed(benchmark: SimpleNamespace) -> None:
    class Unclipped(benchmark.contenders.Ours):
        def start(self, clipping_norm: float) -> None:
            super().start(10 * clipping_norm)

    class ClipsLayersAsOne(benchmark.contenders.OursPerLayer):
        clipping = "flat"

    class NotFinite(benchmark.contenders.Ours):
        def clipped_sum(self) -> dict[str, torch.Tensor]:
            return {name: value * torch.nan for name, value in super().clipped_sum().items()}

    wrong = {"unclipped": Unclipped, "as_one": ClipsLayersAsOne, "not_finite": NotFinite}
    admitted, found = admit(benchmark, workload(benchmark), plain=benchmark.contenders.Plain, **wrong)
    assert set(admitted) == {"plain"}
    assert all(found[name]["status"] == "wrong" and found[name]["error"] > 1e-3 for name in wrong)


def test_a_peer_that_refuses_is_reported_with_its_reason(benchmark: SimpleNamespace) -> None:
    load = workload(benchmark, lambda: llama(tied=True))
    kinds = {name: benchmark.contenders.CONTENDERS[name] for name in ("flat", "opacus_ghost", "opacus_per_sample")}
    admitted, found = admit(benchmark, load, **kinds)
    assert set(admitted) == {"flat", "opacus_per_sample"}
    assert found["opacus_ghost"]["status"] == "refused" and "tying" in found["opacus_ghost"]["reason"]


def test_a_peer_that_refuses_leaves_nothing_to_the_next_one(benchmark: SimpleNamespace) -> None:
    contenders = benchmark.contenders
    load = contenders.Workload(contenders.Case("tiny", lambda: llama(tied=True), contenders.CHECKED_ROWS + 1, 8))
    admitted, _ = admit(benchmark, load, **{name: contenders.CONTENDERS[name] for name in PEERS})
    assert set(admitted) == {"opacus_per_sample"}
    assert benchmark.training.step(admitted["opacus_per_sample"], [load.micro_batch])["last"] > 0


def test_a_contender_that_fails_at_the_full_micro_batch_is_reported_and_the_others_are_timed(
    benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders = benchmark.contenders

    class TooLarge(contenders.Ours):
        def micro_batch(self, batch: Any) -> None:
            if len(batch["input_ids"]) > contenders.CHECKED_ROWS:
                raise MemoryError("no room for more rows")
            super().micro_batch(batch)

    monkeypatch.setitem(contenders.CONTENDERS, "too_large", TooLarge)
    case = contenders.Case("tiny", llama, contenders.CHECKED_ROWS + 1, 8)
    found = benchmark.training.time_case(case, 1, ["plain", "flat", "too_large"])["contenders"]
    assert found["too_large"] == {"status": "failed", "reason": "MemoryError: no room for more rows"}
    assert found["flat"]["step_ratio"] > 0


def test_a_step_leaves_no_hook_and_no_gradient_behind(benchmark: SimpleNamespace) -> None:
    load = workload(benchmark)
    for kind in benchmark.contenders.CONTENDERS.values():
        parts = benchmark.training.step(kind(load), [load.micro_batch] * 2)
        assert parts["micro_batches"] >= parts["first"] + parts["last"] > 0
        hooks = [m for m in load.model.modules() if m._forward_hooks or m._backward_hooks]
        assert not hooks and all(p.grad is None for p in load.model.parameters())


def test_who_takes_too_much_memory_is_not_timed_beside_the_others(
    benchmark: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def child(kind: str, *arguments: Any) -> Any:
        calls.append((kind, *arguments))
        if kind == "memory":
            killed = {"failed": "killed by signal 9"}
            return killed if arguments[1] == "opacus_ghost" else {"plain": 300, "flat": 320}.get(arguments[1], 500)
        return {"contenders": {name: {"status": "timed"} for name in arguments[3:]}}

    monkeypatch.setattr(benchmark.training, "child", child)
    found = benchmark.training.measure("bert-128", None, 1, 100)["contenders"]
    assert "opacus_ghost" not in calls[-1] and found["opacus_ghost"]["status"] == "failed"
    assert found["flat"]["memory_ratio"] == 1.1


# ---- what is made of times -------------------------------------------------------------------------------------------


def test_everyone_runs_once_in_every_round_and_another_one_begins(benchmark: SimpleNamespace) -> None:
    order: list[str] = []
    benchmark.training.interleave("abc", 3, lambda name, number: order.append(f"{name}{number}") or {})
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]


def test_ratios_are_medians_of_ratios_within_a_round(benchmark: SimpleNamespace) -> None:
    def parts(micro: float, noise: float) -> dict[str, float]:
        return {"first": micro, "last": micro, "micro_batches": 2 * micro, "noise": noise, "update": 1.0}

    # The machine is three times slower in the second round, which a ratio of medians would show and this does not.
    rounds = {
        "plain": [parts(1.0, 0.0), parts(3.0, 0.0), parts(1.0, 0.0)],
        "flat": [parts(1.0, 0.5), parts(3.0, 1.3), parts(2.0, 0.5)],
    }
    figures = benchmark.training.summarise(rounds, repeats=2)
    assert figures["plain"]["step_ratio"] == 1.0 and figures["plain"]["step_seconds"] == 5.0
    assert figures["flat"]["step_ratios"] == [1.1, 1.1, 1.9] and figures["flat"]["step_ratio"] == pytest.approx(1.1)
    assert figures["flat"]["noise_seconds"] == 0.5 and figures["flat"]["micro_batch_ratio"] == 1.0


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, bert, lambda: llama(lora=True)], ids=["llama", "bert", "lora"])
def test_operations_are_those_that_torch_counts(benchmark: SimpleNamespace, build: Any) -> None:
    load = workload(benchmark, build)
    row = benchmark.contenders.first_rows(load.batch, 1)
    counted = benchmark.operations.count(load.model, row, load.config, causal=False)
    forward, backward = benchmark.operations.attention_operations(load.config, 8, causal=False)
    aten = torch.ops.aten

    def products(counter: FlopCounterMode, *kinds: Any) -> int:
        return sum(counter.get_flop_counts()["Global"].get(kind, 0) for kind in kinds)

    with FlopCounterMode(display=False) as counter:
        loss = load.model(**load.micro_batch).loss
    assert products(counter, aten.mm, aten.addmm) == 2 * (counted.forward - forward)
    attention = products(counter, aten.bmm, aten.baddbmm)
    assert 2 * forward <= attention <= 1.1 * 2 * forward  # Llama's rotary angles are a product too
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert products(counter, aten.mm, aten.addmm) == 2 * (counted.backward - backward)
    # The attention that is counted does one product of five over again.
    assert products(counter, aten.bmm, aten.baddbmm) == pytest.approx(2 * backward * 4 / 5)


def test_norm_takes_the_cheaper_form_and_the_limit_is_that_of_the_design(benchmark: SimpleNamespace) -> None:
    operations = benchmark.operations
    cost = operations.squared_norm_operations
    # Either side of the crossover T* = 2dp / (d + p) = 768, and at it.
    assert cost(767, 768, 768, written_out=False) == 767**2 * 1536
    assert cost(769, 768, 768, written_out=False) == 2 * 769 * 768 * 768
    assert cost(768, 768, 768, written_out=False) == 2 * 768**3
    # From 40 % of it on, a row's gradient takes at most 1.25 times its factors' memory, and needs no other product.
    assert cost(307, 768, 768, written_out=True) == 307**2 * 1536
    assert cost(308, 768, 768, written_out=True) == 0
    # The share of one layer's three products: 3 % at T = 128, 14 % at 1024, width 4096.
    for tokens, share in ((128, 0.01), (1024, 0.083)):
        product = 2 * tokens * 4096**2
        norms = cost(tokens, 4096, 4096, written_out=True)
        assert operations.Operations(product, 2 * product, norms).limit == pytest.approx(1 + share, abs=3e-3)


# ---- the report -----------------------------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    timed = {"status": "timed", "step_seconds": 20.0, "noise_seconds": 0.0, "step_ratio": 1.0, "micro_batch_ratio": 1.0}
    flat = timed | {"noise_seconds": 1.0, "step_ratio": 1.2, "memory_ratio": 1.3, "error": 1e-6}
    case = {
        "description": "A < B",
        "micro_batch_size": 4,
        "tokens": 8,
        "operations_per_row": {"limit": 1.03},
        "contenders": {
            "plain": timed,
            "flat": flat,
            "opacus_ghost": timed | {"step_ratio": 2.4},
            "opacus_per_sample": {"status": "wrong", "error": 0.3},
        },
    }
    refusing = case | {
        "contenders": {"plain": timed, "flat": flat, "opacus_ghost": {"status": "refused", "reason": "E: no"}}
    }
    packed = {name: timed | {"documents_per_second": 4.0, "tokens": 200} for name in ("plain", "padded", "packed")}
    packed["packed"] |= {"speed_over_padded": 1.8, "tokens": 100}
    packed["padded_by_length"] = {"status": "wrong", "error": 0.3}
    packing = {"description": "Reviews", "micro_batch_size": 16, "contenders": packed}
    cases = {"one": case, "two": refusing, "three": {"description": "", "failed": "no memory"}, "packing": packing}
    return {"quick": True, "cases": cases, "not_measured": {"fastDP": "no such package"}}


def test_table_shows_ratio_limit_gap_and_what_could_not_be_timed(benchmark: SimpleNamespace) -> None:
    text = benchmark.training_report.table(results())
    (row,) = (line for line in text.splitlines() if "A < B" in line and "wrong" in line)
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    columns = benchmark.training_report.COLUMNS
    assert dict(zip(columns, cells, strict=True)) == {
        "plain step": "20.0 s",
        "ours, flat": "1.20x",
        "ours, limit": "1.03x",
        "gap: noise": "+0.05",
        "gap: rest": "+0.12",
        "ours, per layer": "",
        "Opacus ghost": "2.40x",
        "Opacus per sample": "**wrong** by 3e-01",
        "ours / ghost": "0.50x",
        "memory, flat": "1.30x",
    }
    for words in (
        "two, Opacus, ghost clipping, refused: E: no",
        "three failed: no memory",
        "Quick run",
        "fastDP was not",
    ):
        assert words in text
    assert "| 1.80x | 2.00x |" in text


def test_long_rows_are_compared_with_the_operation_count(benchmark: SimpleNamespace) -> None:
    stored = results()
    stored["cases"]["one"]["tokens"] = 1024
    stored["cases"]["one"]["contenders"]["flat"]["micro_batch_ratio"] = 1.133
    text = benchmark.training_report.table(stored)
    assert "one: forward and backward take 1.13x, +10% of the predicted 1.03x." in text


def test_figure_is_one_bar_for_each_time_and_the_same_every_time(benchmark: SimpleNamespace) -> None:
    svg = benchmark.training_report.figure(results())
    assert svg == benchmark.training_report.figure(json.loads(json.dumps(results())))
    titles = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")][1:]
    assert titles == [
        "one, dpfa_hf, flat: 1.20x",
        "one, Opacus, ghost clipping: 2.40x",
        "two, dpfa_hf, flat: 1.20x",
    ]


def test_readme_holds_what_the_stored_results_say(benchmark: SimpleNamespace) -> None:
    report, stored = benchmark.training_report, benchmark.training.OUTPUT
    readme = report.README.read_text()
    block = report.block(json.loads(stored.read_text())) if stored.exists() else "Not measured yet: `make bench`."
    assert report.replaced(readme, {"training": block}) == readme
    if stored.exists():
        assert report.FIGURE.read_text() == report.figure(json.loads(stored.read_text()))
