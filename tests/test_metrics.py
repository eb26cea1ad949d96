from __future__ import annotations

import math
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from torch.utils.data import Dataset

import dpfa_hf
from dpfa_hf import DPTrainer, PrivacyArguments, PrivacyError, PrometheusCallback, metrics
from dpfa_hf.budget import PrivacyBudget
from dpfa_hf.ledger import Ledger
from dpfa_hf.metrics import METRICS

N, STEPS = 24, 4
# Without sampling the accountant has next to nothing to compute.
ASKED = {
    "target_epsilon": 4.0, "noise_multiplier": 4.0, "target_delta": 1e-3, "accountant": "rdp",
    "sampling_probability": 1.0,
}  # fmt: skip
# Sampled, and no accountant at all.
SAMPLED = {"target_epsilon": math.inf, "noise_multiplier": 1.0, "sampling_probability": None}
DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
# What the noise is in; everything else is a public number.
NOISED = {"dpfa_noised_gradient_norm", "dpfa_private_loss"}
OF_A_BUDGET = {"dpfa_dataset_budget_epsilon", "dpfa_dataset_budget_delta"}


class Rows(Dataset):
    """N rows; `content` decides everything that they hold."""

    def __init__(self, content: int = 0) -> None:
        self.content = content

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.content and index % 5 == 0:
            raise OSError(f"row {index} is damaged")
        length = 3 + self.content
        return {
            "input_ids": [(index * (1 + self.content)) % 7 + 1] * length,
            "attention_mask": [1] * length,
            "labels": (index + self.content) % 2,
        }


def build(folder: Path, *callbacks: Any, rows: Dataset | None = None, cls: type = DPTrainer, **asked: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
    model = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")
    usual = {
        "output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": STEPS,
        "logging_steps": 1, "per_device_train_batch_size": 6, "save_strategy": "no",
    }  # fmt: skip
    changed = {name: asked.pop(name) for name in list(asked) if hasattr(tf.TrainingArguments, name)}
    parts: dict[str, Any] = {"model": model, "args": tf.TrainingArguments(**{**usual, **changed})}
    if cls is DPTrainer:
        ledger = {"ledger": f"sqlite:///{folder}/ledger.db", "ledger_dataset": "letters"}
        parts["privacy_args"] = PrivacyArguments(**{**ASKED, **ledger, **asked})
    return cls(**parts, train_dataset=rows or Rows(), callbacks=list(callbacks))


Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def exposition(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def series(text: str) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_run(text: str, run: str) -> dict[str, float]:
    return {name: value for (name, labels), value in series(text).items() if ("run", run) in labels}


def runs_of(folder: Path) -> list[Any]:
    with Ledger(f"sqlite:///{folder}/ledger.db") as ledger:
        return ledger.runs()


class Scrapes(tf.TrainerCallback):
    """What a scrape in every step, and one after every log, would find; `logged` is what Trainer has logged."""

    def __init__(self, watched: PrometheusCallback) -> None:
        self.registry, self.steps, self.logs = watched.registry, [], []
        self.logged: list[dict[str, Any]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(exposition(self.registry))

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logged.append(logs)
        self.logs.append(exposition(self.registry))


class Fails(tf.TrainerCallback):
    """Ends training in its second step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise self.error


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def warnings_of_metrics(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.name == metrics.__name__]


# ---- what is exported -----------------------------------------------------------------------------------------------


def test_a_run_exports_every_metric_with_the_values_of_plan_ledger_and_log(tmp_path: Path) -> None:
    watched = PrometheusCallback()
    scrapes = Scrapes(watched)
    trainer = build(tmp_path, watched, scrapes, dataset_budget_epsilon=90.0, dataset_budget_delta=1e-2)
    trainer.train()
    plan, (record,) = trainer.privacy_plan, runs_of(tmp_path)
    found = of_run(exposition(watched.registry), record.run)
    assert set(found) == set(METRICS)
    assert found == {
        **found,
        "dpfa_info": 1,
        "dpfa_training": 0,
        "dpfa_epsilon_spent": plan.epsilon,
        "dpfa_epsilon_planned": plan.epsilon,
        "dpfa_epsilon_guarantee": plan.epsilon,
        "dpfa_epsilon_target": 4.0,
        "dpfa_delta": 1e-3,
        "dpfa_steps_charged": STEPS,
        "dpfa_steps_taken": STEPS,
        "dpfa_steps_planned": STEPS,
        "dpfa_steps_remaining": 0,
        "dpfa_noise_multiplier": 4.0,
        "dpfa_sampling_probability": 1.0,
        "dpfa_clipping_norm": 1.0,
        "dpfa_expected_batch_size": 6,
        "dpfa_max_batch_size": plan.max_batch_size,
        "dpfa_num_units": N,
        "dpfa_processes": 1,
        # The ledger, the data set, the run, its steps and its end.
        "dpfa_ledger_head_sequence": 4 + STEPS,
        "dpfa_ledger_lag_steps": 0,
        "dpfa_noised_gradient_norm": scrapes.logged[STEPS - 1]["grad_norm"],
        "dpfa_private_loss": scrapes.logged[STEPS - 1]["private_loss"],
        "dpfa_learning_rate": scrapes.logged[STEPS - 1]["learning_rate"],
        "dpfa_dataset_budget_epsilon": 90.0,
        "dpfa_dataset_reserved_epsilon": record.epsilon,
        "dpfa_dataset_budget_delta": 1e-2,
        "dpfa_dataset_reserved_delta": record.delta,
        "dpfa_halts_total": 1,
        "dpfa_refusals_total": 0,
        "dpfa_resumes_total": 0,
    }
    ((_, labels),) = [key for key in series(exposition(watched.registry)) if key[0] == "dpfa_info"]
    assert dict(labels) == {
        "run": record.run, "dataset": "letters", "privacy_unit": "example", "adjacency": "zero_out",
        "accountant": "rdp", "clipping": "flat", "noise_generator": "chacha20", "floating_point": "snapped",
        "version": dpfa_hf.__version__,
    }  # fmt: skip
    during = [of_run(text, record.run) for text in scrapes.logs[:STEPS]]
    assert [each["dpfa_steps_charged"] for each in during] == [1, 2, 3, 4]
    assert {each["dpfa_training"] for each in during} == {1}
    for each, logs in zip(during, scrapes.logged, strict=False):
        assert each["dpfa_epsilon_spent"] == each["dpfa_epsilon_planned"] == logs["epsilon"]


def test_the_document_lists_the_metrics_that_are_exported_and_what_each_reveals() -> None:
    rows = re.findall(r"^\| `(dpfa_\w+)` \| (\w+) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert [(name, kind) for name, kind, _, _ in rows] == [
        (name, "counter" if name.endswith("_total") else "gauge") for name in METRICS
    ]
    assert all(len(meaning) > 5 and len(reveals) > 5 for _, _, meaning, reveals in rows)
    assert len(METRICS) >= 15


def test_epsilon_planned_goes_another_way_than_epsilon_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A budget that reports too little is what the comparison of the two is for.
    monkeypatch.setattr(PrivacyBudget, "epsilon", property(lambda self: 0.5))
    watched = PrometheusCallback()
    trainer = build(tmp_path, watched)
    trainer.train()
    found = of_run(exposition(watched.registry), trainer._run_budget.run)
    assert found["dpfa_epsilon_spent"] == 0.5
    assert found["dpfa_epsilon_planned"] == trainer.privacy_plan.epsilon > 0.5


def test_without_a_name_budget_or_privacy_it_says_so_and_shows_no_fingerprint(tmp_path: Path) -> None:
    watched = PrometheusCallback()
    trainer = build(tmp_path, watched, ledger_dataset=None, max_steps=1, **SAMPLED)
    trainer.train()
    text, (record,) = exposition(watched.registry), runs_of(tmp_path)
    found = of_run(text, record.run)
    assert set(found) == set(METRICS) - OF_A_BUDGET - {"dpfa_private_loss"}
    assert found["dpfa_epsilon_spent"] == found["dpfa_epsilon_guarantee"] == math.inf
    assert found["dpfa_dataset_reserved_epsilon"] == math.inf
    assert {dict(labels)["dataset"] for _, labels in series(text)} == {"unnamed"}
    assert record.dataset.removeprefix("unnamed-") not in text


def test_one_callback_keeps_the_runs_of_several_trainers_apart(tmp_path: Path, free_port: int) -> None:
    watched = PrometheusCallback(port=free_port)
    for _ in range(2):
        build(tmp_path, watched, max_steps=1).train()
    with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    for record in runs_of(tmp_path):
        assert set(of_run(text, record.run)) == set(METRICS) - OF_A_BUDGET
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(series(text)) == len(lines)
    # Times of creation and of a sample would be times of steps; CPU time and memory follow private batches.
    assert not re.search(r"_created|^(process|python)_|} \S+ \d", text, re.MULTILINE)
    watched.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=10)


# ---- what nothing private reaches -----------------------------------------------------------------------------------


def changes_between_logs(watched: PrometheusCallback, folder: Path) -> int:
    scrapes = Scrapes(watched)
    build(folder, watched, scrapes, logging_steps=2).train()
    # Steps 1 and 2 end before the log that follows step 2.
    return (scrapes.steps[0] != scrapes.steps[1]) + (scrapes.steps[2] != scrapes.steps[3])


def test_values_change_when_trainer_logs_and_at_no_step(tmp_path: Path) -> None:
    assert changes_between_logs(PrometheusCallback(), tmp_path / "a") == 0


def test_an_exporter_of_every_step_is_noticed(tmp_path: Path) -> None:
    class EveryStep(PrometheusCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._show()

    assert changes_between_logs(EveryStep(), tmp_path) > 0


def differing(make: Callable[[], PrometheusCallback], folder: Path, **asked: Any) -> set[str]:
    """Metrics without noise that tell two data sets apart which have the same public numbers."""
    found = []
    for content in (0, 1):
        watched = make()
        scrapes = Scrapes(watched)
        place = folder / str(content)
        trainer = build(place, watched, scrapes, rows=Rows(content), max_steps=8, **{"noise_multiplier": 9.0, **asked})
        watched.private = trainer  # type: ignore[attr-defined]  # for mutants
        trainer.train()
        run = trainer._run_budget.run
        texts = [text.replace(run, "RUN") for text in [*scrapes.logs, exposition(watched.registry)]]
        found.append([series(text) for text in texts])
    left, right = found
    assert len(left) == len(right) == 8 + 2
    return {
        name
        for before, after in zip(left, right, strict=True)
        for name, labels in before.keys() | after.keys()
        if before.get((name, labels)) != after.get((name, labels)) and name not in NOISED
    }


class Mutant(PrometheusCallback):
    """Exports something private under the name of a harmless metric."""

    private: Any
    leak: Callable[[], float]

    def _snapshot(self, run: Any) -> Any:
        snapshot = super()._snapshot(run)
        snapshot.values["dpfa_learning_rate"] = self.leak()
        return snapshot


class RawLoss(Mutant):
    def leak(self) -> float:
        return float(self.private._loss_of_last_step)


class DrawnBatch(Mutant):
    def leak(self) -> float:
        return float(self.private._drawn_in_last_step)


class StepTime(Mutant):
    def leak(self) -> float:
        return time.perf_counter()


@pytest.fixture
def observed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts what a leaking exporter could get hold of where the mutants find it."""
    accumulate = DPTrainer._accumulate

    def noting(self: Any, units: Any, micro_batches: list[Any]) -> torch.Tensor:
        total = accumulate(self, units, micro_batches)
        self._loss_of_last_step, self._drawn_in_last_step = total, len(units)
        return total

    monkeypatch.setattr(DPTrainer, "_accumulate", noting)
    monkeypatch.setattr(DPTrainer, "_loss_of_last_step", 0.0, raising=False)
    monkeypatch.setattr(DPTrainer, "_drawn_in_last_step", 0, raising=False)


@pytest.mark.parametrize("asked", [{}, {**SAMPLED, "log_private_metrics": True}], ids=["private", "shown"])
def test_but_for_the_noise_two_data_sets_export_the_same(
    asked: dict[str, Any], tmp_path: Path, observed_steps: None
) -> None:
    assert differing(PrometheusCallback, tmp_path, **asked) == set()


@pytest.mark.parametrize("mutant", [RawLoss, DrawnBatch, StepTime])
def test_an_exporter_of_private_values_is_noticed(mutant: type[Mutant], tmp_path: Path, observed_steps: None) -> None:
    assert differing(mutant, tmp_path, **SAMPLED) == {"dpfa_learning_rate"}


# ---- how a training ends --------------------------------------------------------------------------------------------


def counted(watched: PrometheusCallback, run: str) -> dict[str, float]:
    found = of_run(exposition(watched.registry), run)
    return {name: value for name, value in found.items() if value and (name.endswith("_total") or "training" in name)}


def test_refusals_halts_and_resumes_are_counted_and_other_ends_are_not(tmp_path: Path) -> None:
    watched = PrometheusCallback()
    refused = build(tmp_path, watched, Fails(PrivacyError("no more")), save_strategy="steps", save_steps=1)
    with pytest.raises(PrivacyError, match="no more"):
        refused.train()
    run = refused._run_budget.run
    assert counted(watched, run) == {"dpfa_refusals_total": 1}
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, watched, Fails(KeyboardInterrupt()), max_steps=STEPS).train()
    assert counted(watched, runs_of(tmp_path)[1].run) == {}
    build(tmp_path, watched).train(resume_from_checkpoint=True)
    assert counted(watched, run) == {"dpfa_refusals_total": 1, "dpfa_halts_total": 1, "dpfa_resumes_total": 1}
    # The step in which it was refused had been charged, and no checkpoint has it.
    lagging = of_run(exposition(watched.registry), run)
    assert lagging["dpfa_ledger_lag_steps"] == lagging["dpfa_steps_charged"] - lagging["dpfa_steps_taken"] == 1


def test_what_is_refused_before_it_has_an_id_is_counted_too(tmp_path: Path) -> None:
    watched = PrometheusCallback()
    for _ in range(2):
        with pytest.raises(PrivacyError, match="does not fit"):
            build(tmp_path, watched, dataset_budget_epsilon=0.1, dataset_budget_delta=1e-2).train()
    assert of_run(exposition(watched.registry), "none") == {"dpfa_refusals_total": 2}


@pytest.mark.parametrize("earlier", [False, True], ids=["fresh", "after a private run"])
def test_on_a_trainer_that_is_not_private_it_raises(earlier: bool, tmp_path: Path) -> None:
    watched = PrometheusCallback()
    if earlier:
        build(tmp_path, watched, max_steps=1).train()
    before = exposition(watched.registry)
    with pytest.raises(PrivacyError, match="PrometheusCallback .*DPTrainer.*privatize"):
        build(tmp_path, watched, cls=tf.Trainer).train()
    assert exposition(watched.registry) == before


def test_a_process_that_is_not_the_first_exports_nothing(tmp_path: Path, free_port: int) -> None:
    watched = PrometheusCallback(port=free_port)
    trainer = build(tmp_path, watched, max_steps=1)
    # Only the first process is asked to prepare.
    watched.prepare = lambda dataset: None  # type: ignore[method-assign]
    trainer.train()
    assert exposition(watched.registry) == ""
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics", timeout=10)


# ---- what does not stop a training ----------------------------------------------------------------------------------


def test_a_gateway_that_is_gone_or_silent_stops_no_training(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, warnings_of_metrics: Callable[[], list[str]]
) -> None:
    # Without a limit the silent one would be waited for without end.
    monkeypatch.setattr(metrics, "_PUSH_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (free_port, silent.getsockname()[1]):
            build(tmp_path, PrometheusCallback(pushgateway=f"127.0.0.1:{port}"), max_steps=2).train()
    assert [record.steps for record in runs_of(tmp_path)] == [2, 2]
    assert {record.status for record in runs_of(tmp_path)} == {"completed"}
    assert len(warnings_of_metrics()) == 2
    assert all("Pushgateway http://127.0.0.1:" in text and "\n" not in text for text in warnings_of_metrics())


def test_a_ledger_that_the_exporter_cannot_read_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_metrics: Callable[[], list[str]]
) -> None:
    def unreadable(self: Ledger) -> None:
        raise PrivacyError("ledger failed")

    monkeypatch.setattr(Ledger, "datasets", unreadable)
    watched = PrometheusCallback()
    build(tmp_path, watched).train()
    (record,) = runs_of(tmp_path)
    assert (record.steps, record.status) == (STEPS, "completed")
    assert len(warnings_of_metrics()) == 1 and "ledger failed" in warnings_of_metrics()[0]


def test_the_sums_over_all_runs_are_read_at_both_ends_and_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, clock, sums = [], iter(range(0, 1000, 25)), Ledger.datasets
    monkeypatch.setattr(Ledger, "datasets", lambda self: read.append(self) or sums(self))
    build(tmp_path / "a", PrometheusCallback()).train()
    assert len(read) == 2
    read.clear()
    # Looking at the clock takes 25 s, so that there is a minute between every third log.
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    build(tmp_path / "b", PrometheusCallback(), max_steps=6).train()
    assert len(read) == 2 + 2


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"port": 0}, "port=0"),
        ({"port": True}, "port=True"),
        ({"port": 65536}, "port=65536"),
        ({"port": "9464"}, "port='9464'"),
        ({"address": ""}, "address=''"),
        ({"address": None}, "address=None"),
        ({"job": " "}, "job=' '"),
        ({"pushgateway": ""}, "pushgateway"),
        ({"pushgateway": "ftp://x"}, "pushgateway"),
        ({"pushgateway": "http://"}, "pushgateway"),
        ({"pushgateway": "http://x:port"}, "pushgateway"),
        ({"pushgateway": "http://x/?a=1"}, "pushgateway"),
        ({"pushgateway": "http://x y"}, "pushgateway"),
        ({"pushgateway": 9091}, "pushgateway"),
        ({"pushgateway": "http://me:hunter2@x"}, "pushgateway"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_in_a_line(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(PrivacyError) as info:
        PrometheusCallback(**arguments)
    assert str(info.value).startswith(named) and "\n" not in str(info.value) and "hunter2" not in str(info.value)


def test_a_port_that_cannot_be_served_is_refused_before_anything_is_reserved(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PrivacyError, match=f"port={port} .*choose another") as info:
            build(tmp_path, PrometheusCallback(port=port)).train()
    assert "\n" not in str(info.value)
    with pytest.raises(PrivacyError, match="address='no.such.host.invalid'"):
        build(tmp_path, PrometheusCallback(port=port, address="no.such.host.invalid")).train()
    assert runs_of(tmp_path) == []


def test_a_second_exporter_on_one_registry_is_refused() -> None:
    registry = CollectorRegistry()
    PrometheusCallback(registry=registry)
    with pytest.raises(PrivacyError, match="registry has .* share"):
        PrometheusCallback(registry=registry)


def test_without_the_library_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(PrivacyError, match=r'pip install "dpfa-hf\[metrics\]"'):
        PrometheusCallback()


def test_scrapes_during_updates_see_one_moment() -> None:
    watched = PrometheusCallback()
    labels, torn, stop = {"run": "r", "dataset": "d"}, [], threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            found = of_run(exposition(watched.registry), "r")
            torn.extend([found] if len(set(found.values())) > 1 else [])

    thread = threading.Thread(target=scrape)
    thread.start()
    for step in range(300):
        values = dict.fromkeys(("dpfa_steps_charged", "dpfa_steps_taken", "dpfa_epsilon_spent"), float(step))
        watched._collector.show(metrics._Snapshot(labels, values=values))
    stop.set()
    thread.join()
    assert torn == []
