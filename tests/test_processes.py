"""Several processes that train one model: real ones, on gloo. They and one alone must give the same mechanism."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpfa_hf.errors import PrivacyError
from dpfa_hf.ledger import Ledger
from dpfa_hf.processes import Processes

WORKER = Path(__file__).with_name("processes_worker.py")
ALARM_Z = 6.0  # two false alarms in a thousand million comparisons
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("processes_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def launch(folder: Path, count: int, scenarios: str, *, survivors: int | None = None) -> Ranks:
    """What the processes have seen, by rank; of the first ones, where the others are not expected to live."""
    folder.mkdir(parents=True, exist_ok=True)
    survivors = count if survivors is None else survivors
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), scenarios, str(count), str(survivors)],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        timeout=400,
        check=False,
    )
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log*")))
    assert done.returncode == 0, logs
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(survivors)]


def of(ranks: Ranks, scenario: str, *path: str) -> Ranks:
    found = [rank[scenario] for rank in ranks]
    for name in path:
        found = [each[name] for each in found]
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    # The last one changes how many rows there are.
    scenarios = (
        "known,private,mutants,observed,of_trl,loops,one_fails,one_is_refused,one_has_another_order,one_has_a_shard"
    )
    return launch(tmp_path_factory.mktemp("two"), 2, scenarios)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return launch(tmp_path_factory.mktemp("four"), 4, "known,private")


@pytest.fixture(scope="module")
def alone(worker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker.known(tmp_path_factory.mktemp("alone"))


# ---- the mechanism --------------------------------------------------------------------------------------------------


def broken(ranks: Ranks, worker: ModuleType) -> set[str]:
    """The properties of the mechanism that a recorded run breaks."""
    found = set()
    steps = len(ranks[0]["indices"])
    for step in range(steps):
        slices = [rank["indices"][step] for rank in ranks]
        drawn = np.concatenate(slices)
        if len(set(drawn.tolist())) != len(drawn):
            found.add("a unit has two shares")
        if max(map(len, slices)) - min(map(len, slices)) > 1:
            found.add("uneven shares")
    first = ranks[0]["weights"]
    for rank in ranks[1:]:
        same = [
            torch.equal(a[k], b[k]) for a, b in zip(first, rank["weights"], strict=True) for k in a
        ]  # the weights that a rank begins with too
        if not all(same):
            found.add("ranks differ")
    residuals, along, products = [], [], []
    for step in range(steps):
        before, after = first[step], first[step + 1]
        clipped = {k: sum(rank["clipped"][step][k] for rank in ranks) for k in before}
        residual = {k: (before[k] - after[k]) * worker.EXPECTED - clipped[k] for k in before}
        whole = torch.cat([residual[k].flatten() for k in before])
        sums = torch.cat([torch.as_tensor(clipped[k]).flatten() for k in before])
        residuals.append(whole / (worker.SIGMA * worker.C))
        along.append(float(residuals[-1] @ sums / sums.norm()))
        for each in residual.values():
            one, other = (each / (worker.SIGMA * worker.C)).tensor_split(2)
            products.append((one[: len(other)] * other[: len(one)]).flatten())
    normals = torch.stack(residuals)
    spread = (normals.square().mean() - 1) / (2 / normals.numel()) ** 0.5
    if abs(spread) > ALARM_Z:
        found.add("noise of another size")
    alike = torch.cat(products)
    if abs(float(alike.mean())) * len(alike) ** 0.5 > ALARM_Z:
        found.add("halves alike")
    if abs(sum(along)) / steps**0.5 > ALARM_Z:
        found.add("another sum")
    return found


def test_the_noise_and_the_draws_of_several_processes_are_those_of_one(
    two: Ranks, four: Ranks, worker: ModuleType
) -> None:
    for ranks in (two, four):
        assert broken(of(ranks, "private"), worker) == set()
        sizes = [sum(len(rank["private"]["indices"][step]) for rank in ranks) for step in range(8)]
        assert len(set(sizes)) > 1, "Poisson draws differ in size"
        assert all(rank["private"]["steps"] == 8 for rank in ranks)


@pytest.mark.parametrize(
    ("mutant", "what"),
    [
        ("noise_everywhere", "noise of another size"),
        ("one_seed_for_all_ranks", "noise of another size"),
        ("averaged_gradients", "another sum"),
        ("draws_of_its_own", "a unit has two shares"),
        ("noise_after_the_copy", "ranks differ"),
        ("weights_of_its_own", "ranks differ"),
    ],
)
def test_planted_bugs_of_several_processes_are_seen(two: Ranks, worker: ModuleType, mutant: str, what: str) -> None:
    assert what in broken(of(two, "mutants", mutant), worker)


def float64_steps(worker: ModuleType) -> list[dict[str, torch.Tensor]]:
    """Weights after each step by a loop of autograd over single rows, in float64 and without noise."""
    model: nn.Module = worker.model().double()
    weights = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    for draw in worker.DRAWS:
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for index in draw:
            model.zero_grad()
            batch = worker.collate([worker.rows()[index]])
            model(**batch).loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for name, p in model.named_parameters():
                total[name] += p.grad * (worker.C / norm).clamp(max=1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= total[name] / worker.EXPECTED
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return weights


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Of the way that training went, relative."""
    off = torch.stack([(found[k] - wanted[k]).norm() for k in wanted]).norm()
    return float(off / torch.stack([(wanted[k] - start[k]).norm() for k in wanted]).norm())


def test_any_number_of_processes_agrees_with_a_float64_loop(
    alone: dict[str, Any], two: Ranks, four: Ranks, worker: ModuleType
) -> None:
    wanted = float64_steps(worker)
    for rank in (alone, *of(two, "known"), *of(four, "known")):
        assert distance(rank["exact"]["weights"][-1], wanted[-1], wanted[0]) < 1e-5
    halved = {k: (wanted[0][k] + wanted[-1][k]) / 2 for k in wanted[0]}
    assert distance(halved, wanted[-1], wanted[0]) > 0.1, "the mutant, averaged over two ranks, should have been seen"


def test_with_the_same_draws_and_key_the_number_of_processes_does_not_show(
    alone: dict[str, Any], two: Ranks, four: Ranks
) -> None:
    wanted = alone["noise"]["weights"]
    for ranks in (two, four):
        for rank in of(ranks, "known", "noise"):
            # A sum that rounds another way may lie on the other side of a point of the grid.
            assert distance(rank["weights"][-1], wanted[-1], wanted[0]) < 1e-5


def test_a_loop_of_ones_own_agrees_with_a_float64_loop_in_two_processes_whole_or_cut(
    two: Ranks, worker: ModuleType, tmp_path_factory: Any
) -> None:
    wanted = float64_steps(worker)
    for rank in of(two, "loops"):
        assert distance(rank["whole"], wanted[-1], wanted[0]) < 1e-5
        assert distance(rank["cut"], wanted[-1], wanted[0]) < 1e-5
        assert "model is wrapped in DistributedDataParallel" in rank["error"]
    (folder,) = tmp_path_factory.getbasetemp().glob("two0/loops")
    for kind in ("False", "True"):
        report = json.loads((folder / kind / "privacy.json").read_text())
        assert "2 processes" in report["mechanism"]["sampler"] and report["steps"]["charged"] == 4


def test_trainers_of_trl_give_the_same_weights_in_two_processes(two: Ranks, worker: ModuleType, tmp_path: Path) -> None:
    alone = worker.of_trl(tmp_path)
    for rank in of(two, "of_trl"):
        assert set(rank) == {"completion", "dpo", "reward"}
        for kind, weights in rank.items():
            for name, weight in alone[kind].items():
                assert torch.allclose(weights[name], weight, rtol=1e-5, atol=1e-6), (kind, name)


def test_every_unit_of_a_draw_goes_to_one_process(two: Ranks, four: Ranks, worker: ModuleType) -> None:
    for ranks in (two, four):
        for step, draw in enumerate(worker.DRAWS):
            slices = [rank["known"]["exact"]["indices"][step] for rank in ranks]
            assert sorted(np.concatenate(slices).tolist()) == sorted(draw)


# ---- what is logged and written -------------------------------------------------------------------------------------


def test_the_loss_that_is_logged_is_that_of_the_whole_draw(two: Ranks, worker: ModuleType, tmp_path: Path) -> None:
    trainer = worker.build(tmp_path, **worker.OBSERVED)
    worker.inject(trainer, noise=False)
    wanted = [log["loss"] for log in worker.run(trainer)["logs"] if "loss" in log]
    for rank in of(two, "observed"):
        assert [log["loss"] for log in rank["logs"] if "loss" in log] == pytest.approx(wanted, rel=1e-3)


def test_only_the_first_process_reports_and_the_others_say_so(two: Ranks, tmp_path_factory: Any) -> None:
    first, second = of(two, "observed", "error")
    assert first == "" and "the first process" in second and second.startswith("PrivacyError")
    (folder,) = tmp_path_factory.getbasetemp().glob("two0/observed")
    for written in (folder / "out", folder / "out" / "checkpoint-4"):
        report = json.loads((written / "privacy.json").read_text())
        assert "2 processes" in report["mechanism"]["sampler"]
    with Ledger(f"sqlite:///{folder / 'ledger.db'}") as ledger:
        (run,) = ledger.runs()
        assert run.steps == 4 and not ledger.verify()


def test_a_run_goes_on_in_another_number_of_processes_with_its_own_expected_batch(
    worker: ModuleType, tmp_path: Path
) -> None:
    halves = of(launch(tmp_path, 2, "first_half"), "first_half")
    rest = worker.second_half(tmp_path / "second_half")
    assert [half["steps"] for half in halves] == [2, 2] and rest["steps"] == 4
    assert rest["plan"] == halves[0]["plan"] and rest["plan"].expected_batch_size == 2 * 3
    for name, weight in rest["weights"][0].items():
        assert torch.equal(weight, halves[0]["weights"][-1][name])
    with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        assert [run.steps for run in ledger.runs()] == [4] and not ledger.verify()


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_ledger_that_fails_stops_all_processes_before_any_noise(two: Ranks) -> None:
    first, second = of(two, "one_fails")
    assert "disk full" in first["error"] and "disk full" in second["error"]
    assert (first["drawn"], second["drawn"]) == (1, 0)


def test_a_check_that_fails_in_one_process_stops_all(two: Ranks) -> None:
    first, second = of(two, "one_is_refused", "error")
    assert second.startswith("PrivacyError") and first.startswith("PrivacyError: rank 1 stopped: PrivacyError")


def test_a_shard_of_the_data_set_is_refused(two: Ranks) -> None:
    first, second = of(two, "one_has_a_shard", "error")
    assert second.startswith("PrivacyError: train_dataset has 24 rows") and "rank 1 stopped" in first


def test_rows_in_an_order_of_a_process_s_own_are_refused(two: Ranks) -> None:
    """The mutant compares numbers of rows alone: both have 48."""
    first, second = of(two, "one_has_another_order", "error")
    assert second.startswith("PrivacyError: train_dataset has other rows, or the same in another order")
    assert "rank 1 stopped" in first
    assert of(two, "one_has_another_order", "random") == ["", ""]


@pytest.mark.parametrize("how", ["one_dies", "one_hangs"])
def test_a_process_that_is_lost_is_named_and_its_step_neither_charged_nor_noised(tmp_path: Path, how: str) -> None:
    (first,) = launch(tmp_path, 2, how, survivors=1)
    assert first[how]["drawn"] == 1
    with Ledger(f"sqlite:///{tmp_path / how / 'ledger.db'}") as ledger:
        assert [run.steps for run in ledger.runs()] == [1]
    assert first[how]["error"].startswith("PrivacyError: rank 1 died or hangs")


def test_a_rank_that_skips_its_empty_share_is_seen(tmp_path: Path) -> None:
    (first,) = launch(tmp_path, 2, "one_skips", survivors=1)
    assert first["one_skips"]["error"]


# ---- a model that FSDP2 has cut -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    scenarios = "cut_known,cut_engines,cut_lora,cut_private,cut_mutants,cut_when_loaded,cut_refused,cut_first_half"
    return launch(tmp_path_factory.mktemp("cut"), 2, scenarios)


def test_one_and_two_shards_agree_with_a_float64_loop(cut: Ranks, worker: ModuleType, tmp_path: Path) -> None:
    wanted = float64_steps(worker)
    for rank in (*of(cut, "cut_known"), *of(launch(tmp_path, 1, "cut_known"), "cut_known")):
        assert distance(rank["weights"][-1], wanted[-1], wanted[0]) < 1e-5
    for rank in of(cut, "cut_mutants", "filler_that_counts"):
        assert distance(rank["weights"][-1], wanted[-1], wanted[0]) > 0.1, "the mutant should have been seen"


def test_noise_on_shards_is_of_full_size_and_independent(cut: Ranks, worker: ModuleType) -> None:
    assert broken(of(cut, "cut_private"), worker) == set()


@pytest.mark.parametrize(
    ("mutant", "what"),
    [
        ("noise_in_parts", "noise of another size"),
        ("noise_of_the_first", "noise of another size"),
        ("one_key_for_all_shards", "halves alike"),
        ("averaged_shards", "another sum"),
    ],
)
def test_planted_bugs_of_shards_are_seen(cut: Ranks, worker: ModuleType, mutant: str, what: str) -> None:
    assert what in broken(of(cut, "cut_mutants", mutant), worker)


def test_clipped_sums_of_a_cut_model_are_those_of_a_whole_one_however_it_is_clipped(cut: Ranks) -> None:
    for rank in of(cut, "cut_engines"):
        assert set(rank) == {"flat", "automatic", "per_layer"} and max(rank.values()) < 1e-5


def test_adapters_are_trained_on_a_frozen_base_that_is_cut(cut: Ranks, worker: ModuleType) -> None:
    for rank in of(cut, "cut_lora"):
        assert rank["base"] == {"DTensor"}
        assert_released(of(cut, "cut_lora"), worker)


def assert_released(ranks: Ranks, worker: ModuleType) -> None:
    """Without noise, what is released is the sum of all ranks' rows by engines that know no shards."""
    for step, released in enumerate(ranks[0]["released"]):
        for name, mean in released.items():
            total = sum(rank["clipped"][step][name] for rank in ranks)
            assert torch.allclose(mean * worker.EXPECTED, total, atol=1e-5)
    assert any(float(mean.norm()) > 0 for step in ranks[0]["released"] for mean in step.values())


def test_a_model_that_transformers_cuts_while_loading_is_trained_or_refused_by_name(
    cut: Ranks, worker: ModuleType, tmp_path_factory: Any
) -> None:
    assert_released(of(cut, "cut_when_loaded"), worker)
    for error in of(cut, "cut_when_loaded", "error"):
        assert "lm_head.weight is tied to another layer's weight" in error
    (folder,) = tmp_path_factory.getbasetemp().glob("cut0/cut_when_loaded/whole")
    whole = worker.transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in of(cut, "cut_when_loaded", "weights")[0][-1].items():
        assert torch.equal(whole.get_parameter(name).double(), weight)


def test_other_ways_to_spread_a_model_are_refused_by_name(cut: Ranks) -> None:
    wanted = {
        "replicas": "weight is spread over a mesh of several dimensions",
        "columns": "weight is cut along another dimension",
        "parallel": "0.weight is spread by something else than FSDP2",
        "hardened": "floating_point='hardened'",
    }
    for rank in of(cut, "cut_refused"):
        assert {name: wanted[name] in error for name, error in rank.items()} == dict.fromkeys(wanted, True)


def test_shards_that_two_processes_wrote_are_read_by_one_with_its_model_in_one_piece(
    cut: Ranks, worker: ModuleType, tmp_path_factory: Any
) -> None:
    (folder,) = tmp_path_factory.getbasetemp().glob("cut0")
    half = of(cut, "cut_first_half")[0]
    assert {path.name for path in folder.glob("out/checkpoint-2/*_shards")} == {"model_shards", "optimizer_shards"}
    rest = worker.second_half_in_one_piece(folder / "second")
    assert rest["steps"] == 4
    for name, weight in half["weights"][-1].items():
        assert torch.equal(rest["weights"][0][name], weight)
        assert torch.equal(rest["optimizer"][name], half["optimizer"][name])
    whole = worker.transformers.AutoModelForCausalLM.from_pretrained(folder / "whole")
    for name, weight in half["weights"][-1].items():
        assert torch.equal(whole.get_parameter(name).double(), weight)


def test_a_shard_whose_process_dies_ends_the_step_before_it_is_charged(tmp_path: Path) -> None:
    (first,) = launch(tmp_path, 2, "cut_dies", survivors=1)
    assert first["cut_dies"]["drawn"] == 1
    with Ledger(f"sqlite:///{tmp_path / 'cut_dies' / 'ledger.db'}") as ledger:
        assert [run.steps for run in ledger.runs()] == [1]
    assert first["cut_dies"]["error"].startswith("PrivacyError: rank 1 died or hangs")


def test_a_shard_that_skips_its_empty_share_is_seen(tmp_path: Path) -> None:
    (first,) = launch(tmp_path, 2, "cut_skips", survivors=1)
    assert first["cut_skips"]["error"]


# ---- one process ----------------------------------------------------------------------------------------------------


def test_one_process_alone_asks_nobody() -> None:
    alone, sums = Processes(), {"a": torch.ones(3)}
    alone.sum_to_first(sums)
    alone.copy_from_first(sums)
    assert alone.is_first and alone.from_first(lambda: 3) == alone.together(lambda: 3) == 3
    assert torch.equal(sums["a"], torch.ones(3)) and alone.own_slice(np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(PrivacyError, match="own"):
        alone.from_first(raising(PrivacyError("own")))


def raising(error: Exception) -> Callable[[], Any]:
    def function() -> Any:
        raise error

    return function


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PrivacyError, match="one of 2 processes"):
        Processes()


def test_the_page_states_the_costs_that_were_recorded() -> None:
    folder = WORKER.parent.parent / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        spec = importlib.util.spec_from_file_location("processes_benchmark", folder / "processes.py")
        assert spec is not None and spec.loader is not None
        benchmark = importlib.util.module_from_spec(spec)
        before = sys.modules.pop("sentiment", None)
        spec.loader.exec_module(benchmark)
        sys.modules.pop("sentiment", None)
        if before is not None:
            sys.modules["sentiment"] = before
    page = benchmark.PAGE.read_text()
    assert benchmark.rendered(page) == page
