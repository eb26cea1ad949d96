"""Metrics read back from the real thing: Prometheus, a Pushgateway, and what other loggers store."""

from __future__ import annotations

import contextlib
import glob
import http.server
import importlib.util
import json
import os
import pty
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from dpfa_hf import PrivacyError, PrometheusCallback
from dpfa_hf.ledger import Ledger
from dpfa_hf.metrics import METRICS

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "metrics.md"
BUDGET = {"ledger_dataset": "letters", "dataset_budget_epsilon": 10.0, "dataset_budget_delta": 1e-2}


def worker_module() -> Any:
    spec = importlib.util.spec_from_file_location("metrics_worker", HERE / "metrics_worker.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running(*command: str, **kwargs: Any) -> Iterator[subprocess.Popen[str]]:
    """A program, ended with its children when the block is left."""
    process = subprocess.Popen(command, text=True, start_new_session=True, **kwargs)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def training(options: dict[str, Any], *launcher: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A training in a process of its own, which stays after its end until the block is left."""
    command = [sys.executable, *launcher, str(HERE / "metrics_worker.py"), json.dumps(options)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    folder = Path(options["folder"])
    with (
        open(folder / "worker.err", "w") as errors,
        running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=settings, cwd=folder) as it,
    ):
        yield it


def result(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What the training says of itself when it is over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("DONE "):
            return json.loads(line.removeprefix("DONE "))
    pytest.fail((folder / "worker.err").read_text()[-3000:])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def until(found: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """The first true answer; what is not there yet may be refused as a connection."""
    deadline, last = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            last = found()
            if last:
                return last
        except (OSError, urllib.error.URLError) as error:
            last = error
        time.sleep(0.1)
    pytest.fail(f"{what}: still {last!r} after {seconds} s")


class Prometheus:
    """The HTTP API of a server on `port`."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        return "Ready" in get(f"{self._base}/-/ready")

    def query(self, expression: str) -> list[dict[str, Any]]:
        answer = json.loads(get(f"{self._base}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        assert answer["status"] == "success"
        return answer["data"]["result"]

    def values(self, selector: str) -> dict[str, float]:
        """Name -> value; every name once."""
        found = [(each["metric"]["__name__"], float(each["value"][1])) for each in self.query(selector)]
        assert len(found) == len(dict(found))
        return dict(found)


def documented(language: str, having: str) -> str:
    """The code block of the document that has a certain text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (block,) = [each for each in blocks if having in each]
    return block


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    import socket

    with contextlib.ExitStack() as stack:
        probes = {name: stack.enter_context(socket.socket()) for name in ("training", "gateway", "prometheus")}
        for probe in probes.values():
            probe.bind(("127.0.0.1", 0))
        found = {name: probe.getsockname()[1] for name, probe in probes.items()}
    yield found


@pytest.fixture(scope="module")
def gateway(ports: dict[str, int], tool: Callable[[str], str]) -> Iterator[str]:
    listen = f"127.0.0.1:{ports['gateway']}"
    with running(tool("prometheus-pushgateway"), f"--web.listen-address={listen}", stderr=subprocess.DEVNULL):
        until(lambda: "OK" in get(f"http://{listen}/-/ready"), "the Pushgateway")
        yield f"http://{listen}"


@pytest.fixture(scope="module")
def prometheus(
    ports: dict[str, int], tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """With the configuration of docs/metrics.md, but for ports and haste."""
    folder = tmp_path_factory.mktemp("prometheus")
    text = documented("yaml", "scrape_configs")
    for written, used in {":9464": f":{ports['training']}", ":9091": f":{ports['gateway']}", "15s": "200ms"}.items():
        assert written in text
        text = text.replace(written, used)
    (folder / "prometheus.yml").write_text(text)
    subprocess.run([tool("promtool"), "check", "config", str(folder / "prometheus.yml")], check=True)
    command = [
        tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
    ]  # fmt: skip
    server = Prometheus(ports["prometheus"])
    with open(folder / "log", "w") as log, running(*command, stdout=log, stderr=log):
        until(server.ready, "Prometheus")
        yield server


def test_a_real_prometheus_gets_every_metric_of_a_real_training_and_the_gateway_keeps_the_last_values(
    prometheus: Prometheus, gateway: str, ports: dict[str, int], tool: Callable[[str], str], tmp_path: Path
) -> None:
    options = {
        "folder": str(tmp_path), "privacy": BUDGET,
        "metrics": {"port": ports["training"], "pushgateway": gateway},
    }  # fmt: skip
    with training(options) as process:
        until(lambda: prometheus.query("dpfa_training == 1"), "a scrape during the training")
        run = result(process, tmp_path)
        scraped = f'{{job="dpfa", instance="127.0.0.1:{ports["training"]}", run="{run["run"]}"}}'
        until(lambda: prometheus.query(f"dpfa_halts_total{scraped} == 1"), "the last scrape")
        found = prometheus.values(scraped)
        lint = subprocess.run(
            [tool("promtool"), "check", "metrics"], input=get(f"http://127.0.0.1:{ports['training']}/metrics"),
            text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
    plan, last = run["plan"], [line for line in run["logs"] if "grad_norm" in line][-1]
    with Ledger(f"sqlite:///{tmp_path}/ledger.db", create=False) as ledger:
        record, head = ledger.run(run["run"]), ledger.head()[0]
    assert set(found) == set(METRICS)
    assert found == {
        "dpfa_info": 1,
        "dpfa_training": 0,
        "dpfa_epsilon_spent": plan["epsilon"],
        "dpfa_epsilon_planned": plan["epsilon"],
        "dpfa_epsilon_guarantee": record.epsilon,
        "dpfa_epsilon_target": 4.0,
        "dpfa_delta": 1e-3,
        "dpfa_steps_charged": record.steps,
        "dpfa_steps_taken": last["step"],
        "dpfa_steps_planned": record.max_steps,
        "dpfa_steps_remaining": 0,
        "dpfa_noise_multiplier": plan["noise_multiplier"],
        "dpfa_sampling_probability": plan["sampling_probability"],
        "dpfa_clipping_norm": 1.0,
        "dpfa_expected_batch_size": 6,
        "dpfa_max_batch_size": plan["max_batch_size"],
        "dpfa_num_units": 60,
        "dpfa_processes": 1,
        "dpfa_ledger_head_sequence": head,
        "dpfa_ledger_lag_steps": 0,
        "dpfa_noised_gradient_norm": last["grad_norm"],
        "dpfa_private_loss": last["private_loss"],
        "dpfa_learning_rate": last["learning_rate"],
        "dpfa_dataset_budget_epsilon": 10.0,
        "dpfa_dataset_reserved_epsilon": record.epsilon,
        "dpfa_dataset_budget_delta": 1e-2,
        "dpfa_dataset_reserved_delta": 1e-3,
        "dpfa_halts_total": 1,
        "dpfa_refusals_total": 0,
        "dpfa_resumes_total": 0,
    }
    (seen,) = prometheus.query(f"dpfa_steps_charged{scraped}[10m]")
    steps = [float(value) for _, value in seen["values"]]
    assert steps == sorted(steps) and len(set(steps)) > 3 and steps[-1] == record.max_steps
    # The process is gone; what it pushed is not.
    until(lambda: prometheus.query(f'up{{instance="127.0.0.1:{ports["training"]}"}} == 0'), "the end of the process")
    pushed = f'{{job="dpfa", instance="", run="{run["run"]}", __name__=~"dpfa_.*"}}'
    until(lambda: prometheus.query(pushed), "the pushed values")
    assert prometheus.values(pushed) == found


def test_the_gateway_gets_refusals_of_trainings_that_never_began(gateway: str, tmp_path: Path) -> None:
    small = {**BUDGET, "dataset_budget_epsilon": 0.05, "noise_multiplier": 4.0, "accountant": "rdp"}
    watched = PrometheusCallback(pushgateway=gateway, job="nightly/letters")
    with pytest.raises(PrivacyError, match="does not fit"):
        worker_module().trainer_for(str(tmp_path), [watched], steps=4, arguments={}, privacy=small).train()
    text = get(f"{gateway}/metrics")
    assert re.search(
        r'^dpfa_refusals_total\{dataset="letters",instance="",job="nightly/letters",run="none"\} 1$', text, re.MULTILINE
    )


def test_the_gateway_gets_the_last_values_of_a_training_that_was_interrupted(gateway: str, tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    callbacks = [PrometheusCallback(pushgateway=gateway), Interrupt()]
    privacy = {"accountant": "rdp", "noise_multiplier": 4.0}
    trainer = worker_module().trainer_for(str(tmp_path), callbacks, steps=4, arguments={}, privacy=privacy)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run = trainer.privacy_report()["run"]
    found = dict(re.findall(rf'^(dpfa_\w+)\{{.*run="{run}".*\}} (\S+)$', get(f"{gateway}/metrics"), re.MULTILINE))
    ends = ("dpfa_training", "dpfa_steps_charged", "dpfa_halts_total", "dpfa_refusals_total")
    assert [float(found[name]) for name in ends] == [0, 2, 0, 0]


def test_of_two_processes_the_first_alone_exports(free_port: Callable[[], int], tmp_path: Path) -> None:
    port = free_port()
    privacy = {"accountant": "rdp", "noise_multiplier": 4.0}
    options = {"folder": str(tmp_path), "steps": 3, "metrics": {"port": port}, "privacy": privacy}
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    # A second exporter would find the port in use, and end the training.
    with training(options, *launcher) as process:
        run = result(process, tmp_path)
        text = get(f"http://127.0.0.1:{port}/metrics")
    assert f'dpfa_processes{{dataset="unnamed",run="{run["run"]}"}} 2.0' in text
    assert len(re.findall(r"^dpfa_training\{", text, re.MULTILINE)) == 1


# ---- beside other loggers -------------------------------------------------------------------------------------------


class Controller(http.server.BaseHTTPRequestHandler):
    """What Kubeflow's controller is to a training: it takes notes of its progress."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.headers["Authorization"], body["trainerStatus"]))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], list[Any]]]:
    """One training that reports to everybody: its folder, what it says of itself, what Kubeflow was told."""
    folder = tmp_path_factory.mktemp("loggers")
    (folder / "token").write_text("secret\n")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Controller)
    server.received = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
        "KUBEFLOW_TRAINER_SERVER_URL": f"http://127.0.0.1:{server.server_address[1]}/status",
        "KUBEFLOW_TRAINER_SERVER_TOKEN": str(folder / "token"),
    }
    reporters = ["tensorboard", "wandb", "mlflow", "trackio", "kubeflow"]
    options = {
        "folder": str(folder), "steps": 5, "arguments": {"report_to": reporters, "run_name": "letters"},
        "metrics": {"job": "dpfa"}, "privacy": {"accountant": "rdp", "noise_multiplier": 4.0},
    }  # fmt: skip
    try:
        with training(options, **environment) as process:
            run = result(process, folder)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=120)
        yield folder, run, server.received  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def epsilons(run: dict[str, Any]) -> dict[int, float]:
    return {line["step"]: line["epsilon"] for line in run["logs"] if "grad_norm" in line}


def from_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def from_mlflow(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for path in glob.glob(f"{folder}/mlruns/*/*/metrics/**", recursive=True):
        if os.path.isfile(path):
            lines = [line.split() for line in Path(path).read_text().splitlines()]
            # MLflow gets the keys as Trainer logs them, without "train/".
            found["train/" + path.partition("/metrics/")[2]] = {int(step): float(value) for _, value, step, *_ in lines}
    return found


def from_wandb(folder: Path) -> dict[str, dict[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = glob.glob(f"{folder}/wandb/offline-run-*/run-*.wandb")
    found: dict[str, dict[int, float]] = {}
    for data in records_of_leveldb(Path(path).read_bytes()):
        record = Record()
        record.ParseFromString(data)
        values = {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item}
        for key, value in values.items():
            found.setdefault(key, {})[values["train/global_step"]] = value
    return found


def records_of_leveldb(data: bytes) -> Iterator[bytes]:
    """W&B keeps a run in the form of LevelDB's log behind 7 bytes of its own: blocks of 32 KiB, which cut records."""
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def from_trackio(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for path in glob.glob(f"{folder}/trackio/*.db"):
        with contextlib.closing(sqlite3.connect(path)) as connection:
            for (text,) in connection.execute("SELECT metrics FROM metrics"):
                values = json.loads(text)
                for key, value in values.items():
                    found.setdefault(key, {})[values["train/global_step"]] = value
    return found


@pytest.mark.parametrize("read", [from_tensorboard, from_mlflow, from_wandb, from_trackio])
def test_epsilon_is_in_the_logger_s_own_store_and_the_raw_loss_is_not(
    read: Callable[[Path], dict[str, dict[int, float]]], logged: tuple[Path, dict[str, Any], list[Any]]
) -> None:
    folder, run, _ = logged
    found = read(folder)
    assert found["train/epsilon"] == pytest.approx(epsilons(run), rel=1e-6)
    assert len(epsilons(run)) == 5
    assert {"train/grad_norm", "train/learning_rate", "train/private_loss"} <= set(found)
    private = {"train/loss", "train/train_loss", "train_loss", "train/train_runtime", "train_runtime", "total_flos"}
    assert not private & set(found)


def test_kubeflow_is_told_epsilon(logged: tuple[Path, dict[str, Any], list[Any]]) -> None:
    _, run, received = logged
    authorization, last = received[-1]
    told = {each["name"]: each["value"] for each in last["metrics"]}
    assert authorization == "Bearer secret" and last["progressPercentage"] == 100
    assert float(told["epsilon"]) == epsilons(run)[5] == run["plan"]["epsilon"]
    assert not {"loss", "train_loss", "train_runtime", "total_flos"} & set(told)


# ---- a terminal -----------------------------------------------------------------------------------------------------


def test_dpfa_watch_ends_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    privacy = {"accountant": "rdp", "noise_multiplier": 4.0}
    worker_module().trainer_for(str(tmp_path), [], steps=3, arguments={}, privacy=privacy).train()
    ours, theirs = pty.openpty()
    shown, deadline = "", time.monotonic() + 120
    command = [sys.executable, "-m", "dpfa_hf.cli", "watch", "--ledger", url, "--interval", "0.1"]
    settings = {**os.environ, "COLUMNS": "140", "LINES": "40", "TERM": "xterm"}
    with running(*command, stdin=theirs, stdout=theirs, stderr=theirs, env=settings) as process:
        os.close(theirs)
        interrupted = False
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                shown += os.read(ours, 65536).decode(errors="replace")
            except OSError:  # the program has ended
                break
            if "3 of 3" in shown and not interrupted:
                process.send_signal(signal.SIGINT)
                interrupted = True
        assert process.wait(timeout=60) == 0
    os.close(ours)
    assert "completed" in shown and "Traceback" not in shown and "Aborted" not in shown
