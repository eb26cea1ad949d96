"""What the chart's pods run, taken from the rendered manifests and really run: training, report, gate, server, backup.

No cluster is at hand, so this starts the very commands as processes. Volumes become folders, and 0.0.0.0 becomes
127.0.0.1; nothing else of a command or of its environment is changed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from kubeflow.trainer import CustomTrainer, LocalProcessBackendConfig, TrainerClient
from kubeflow.trainer.constants import constants as kubeflow

import dpfa_hf
from dpfa_hf.ledger import Ledger, RunRecord

DEPLOY = Path(__file__).parents[1]
CHART = DEPLOY / "helm" / "dpfa"
TEXTS, STEPS, EPSILON, DELTA = 200, 12, 8, 5e-4
WORDS = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(60))]


def run_command(parameters: dict[str, list[str]]) -> None:
    """What Kubeflow's local backend runs: the command of the manifest, in place of itself."""
    import os

    os.execvp(parameters["command"][0], parameters["command"])


class Place:
    """One machine for the chart's pods: each volume is a folder under `root`, and /app is this repository's deploy/."""

    def __init__(self, root: Path, helm: str, values: dict[str, Any]) -> None:
        self.root = root
        (root / "values.json").write_text(json.dumps(values))
        command = [helm, "template", "dpfa", str(CHART), "--namespace", "dpfa"]
        for file in (CHART / "values-one-node.yaml", root / "values.json"):
            command += ["--values", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        self.manifests = [each for each in yaml.safe_load_all(done.stdout) if each]
        pods = module("dpfa_manifests", DEPLOY / "manifests.py").pods(self.manifests)
        for each in self.manifests:
            spec = each.get("spec", {})
            if each["kind"] in ("Job", "CronJob"):
                spec = spec.get("jobTemplate", {"spec": spec})["spec"]
                pods.append({"metadata": {"name": each["metadata"]["name"]}, "spec": spec["template"]["spec"]})
        self.containers = {
            container["name"]: (container, pod["spec"])
            for pod in pods
            for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
        }

    def folder(self, container: dict[str, Any], pod: dict[str, Any], mount: dict[str, Any]) -> Path:
        volume = next(each for each in pod["volumes"] if each["name"] == mount["name"])
        claim = volume.get("persistentVolumeClaim", {}).get("claimName", mount["name"])
        folder = self.root / claim / mount.get("subPath", "")
        if "subPath" not in mount:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def process(self, name: str) -> tuple[list[str], dict[str, str]]:
        """(command, environment) of the container of that name."""
        container, pod = self.containers[name]
        folders = {each["mountPath"]: self.folder(container, pod, each) for each in container["volumeMounts"]}
        folders["/app"] = DEPLOY

        paths = re.compile(rf"(^|=|sqlite:///)({'|'.join(folders)})(?=/|$)")

        def here(text: str) -> str:
            text = paths.sub(lambda found: f"{found[1]}{folders[found[2]]}", text)
            return text.replace("0.0.0.0", "127.0.0.1")

        environment = {each["name"]: here(each["value"]) for each in container.get("env", [])}
        for each in container.get("envFrom", []):
            environment |= json.loads((self.root / f"{each['secretRef']['name']}.json").read_text())
        # Two cores are shared by all tests.
        environment |= {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        return [here(each) for each in [*container["command"], *container.get("args", [])]], environment

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        command, environment = self.process(name)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, cwd=self.root)

    def runs(self) -> list[RunRecord]:
        _, environment = self.process("node")
        with Ledger(environment["DPFA_LEDGER"], witness=environment["DPFA_LEDGER_WITNESS"], create=False) as ledger:
            assert ledger.verify() == []
            return ledger.runs()


def module(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def write_data(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [json.dumps({"text": " ".join(f"w{(i * 7 + j) % 60}" for j in range(8))}) for i in range(TEXTS)]
    (folder / "letters.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str], str]) -> Place:
    root = tmp_path_factory.mktemp("node")
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        metrics, server = one.getsockname()[1], other.getsockname()[1]
    args = ["--model=/data/base", "--train_file=/data/letters.jsonl", f"--max_steps={STEPS}", "--save_steps=2"]
    args += ["--per_device_train_batch_size=8", "--learning_rate=1e-3", "--max_tokens=16"]
    values = {
        "training": {
            "kind": "TrainJob",
            "args": args,
            "privacy": {"targetEpsilon": EPSILON, "targetDelta": DELTA, "expectedBatchSize": 16}
            | {"datasetBudgetEpsilon": EPSILON, "datasetBudgetDelta": 2 * DELTA},
        },
        "monitoring": {"port": metrics},
        "evidence": {"enabled": True, "model": "run-1/model", "signingKey": {"existingSecret": "dpfa-signing-key"}},
        "gate": {"maxEpsilon": EPSILON, "maxDelta": DELTA, "publicKey": {"existingConfigMap": "dpfa-public-key"}},
        "serving": {"enabled": True, "strategy": "blueGreen", "device": "cpu", "port": server}
        | {"model": {"path": "run-1/model"}},
    }
    found = Place(root, tool("helm"), values)
    write_data(found.folder(*found.containers["node"], {"name": "data", "mountPath": "/data"}))
    return found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerClient]:
    """Kubeflow's local backend, which makes an empty virtual environment for each job under tempfile's folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("kubeflow"))
    yield TrainerClient(backend_config=LocalProcessBackendConfig())
    tempfile.tempdir = before


def submit(client: TrainerClient, place: Place) -> str:
    """Hands the container `node` to the local backend.

    It runs a Python function in its new environment, which has no torch: the function becomes the manifest's command.
    """
    command, environment = place.process("node")
    # What Kubeflow's Trainer sets in a cluster comes from torchrun itself here.
    environment |= {"PET_STANDALONE": "1", "PET_NPROC_PER_NODE": "1"}
    runtime = client.get_runtime("torch-distributed")
    runtime.trainer.framework = "python"
    return client.train(
        runtime=runtime, trainer=CustomTrainer(func=run_command, func_args={"command": command}, env=environment)
    )


def processes_of(place: Place) -> list[psutil.Process]:
    mark = f"--output_dir={place.root}"
    return [each for each in psutil.Process().children(recursive=True) if any(mark in part for part in each.cmdline())]


def wait_until(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.2)
    pytest.fail(f"{what} did not come within {seconds} s")


def answer(url: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """(status, text); 0 where nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except (urllib.error.URLError, ConnectionError):
        return 0, ""


@pytest.fixture(scope="module")
def trained(client: TrainerClient, place: Place) -> tuple[int, list[str], Path]:
    """(steps charged when the job was killed, its log after that, the model): killed with SIGKILL and run again."""
    first = submit(client, place)
    checkpoints = place.root / "dpfa-checkpoints" / "run-1"
    metrics = f"http://127.0.0.1:{place.containers['node'][0]['ports'][0]['containerPort']}/metrics"
    wait_until(
        lambda: (
            (checkpoints / "checkpoint-2" / "privacy.json").exists()
            or client.get_job(first).status == kubeflow.TRAINJOB_FAILED
        ),
        150,
        "a checkpoint",
    )
    assert client.get_job(first).status == kubeflow.TRAINJOB_RUNNING, "\n".join(client.get_job_logs(first))
    status, exported = answer(metrics)
    assert status == 200 and re.search(r'^dpfa_epsilon_spent\{[^}]*dataset="letters"[^}]*\} \d', exported, re.M)
    for each in processes_of(place):
        each.send_signal(signal.SIGKILL)
    client.wait_for_job_status(first, {kubeflow.TRAINJOB_FAILED}, timeout=60, polling_interval=1)
    (killed,) = place.runs()
    assert 2 <= killed.steps < STEPS and killed.status == "running"

    second = submit(client, place)
    ended = {kubeflow.TRAINJOB_COMPLETE, kubeflow.TRAINJOB_FAILED}
    job = client.wait_for_job_status(second, ended, timeout=170, polling_interval=1)
    log = list(client.get_job_logs(second))
    assert job.status == kubeflow.TRAINJOB_COMPLETE, "\n".join(log)
    return killed.steps, log, checkpoints / "model"


def test_a_killed_job_goes_on_and_no_step_is_refunded(trained: tuple[int, list[str], Path], place: Place) -> None:
    killed_at, log, model = trained
    (run,) = place.runs()
    assert run.dataset == "letters" and run.steps == run.max_steps == STEPS and run.steps > killed_at
    assert run.status == "completed"
    report = json.loads((model / "privacy.json").read_text())
    assert report["run"] == run.run and report["steps"] == {"charged": STEPS, "planned": STEPS, "resumed": 1}
    assert report["guarantee"]["epsilon"] <= EPSILON
    assert any(f"{STEPS} steps charged" in line for line in log)
    assert not [each for each in model.iterdir() if each.name.startswith(("checkpoint", "run."))]


def test_a_job_that_had_finished_spends_nothing_more(trained: tuple[int, list[str], Path], place: Place) -> None:
    done = place.run("node")
    assert done.returncode == 0 and "nothing to do" in done.stdout, done.stderr
    assert len(place.runs()) == 1


def test_a_run_killed_before_its_first_checkpoint_is_not_spent_twice(tmp_path: Path) -> None:
    train = module("dpfa_train", DEPLOY / "train.py")
    assert not train.resumable(tmp_path / "new")
    (tmp_path / train.OPENED).touch()
    with pytest.raises(dpfa_hf.PrivacyError, match="stays reserved.*another output_dir"):
        train.resumable(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    assert train.resumable(tmp_path)


@pytest.fixture(scope="module")
def signed(trained: tuple[int, list[str], Path], place: Place) -> Path:
    """The model with its evidence, as the chart's Job `report` writes and signs it."""
    key = ec.generate_private_key(ec.SECP256R1())
    secret, public = place.root / "signing-key" / "key.pem", place.root / "public-key" / "public.pem"
    for file in (secret, public):
        file.parent.mkdir()
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    done = place.run("report")
    assert done.returncode == 0, done.stderr
    assert (trained[2] / "evidence.json").exists() and (trained[2] / "model.sig").exists()
    return trained[2]


def gate(place: Place) -> tuple[int, dict[str, Any]]:
    analysis = next(each for each in place.manifests if each["kind"] == "AnalysisTemplate")
    container = analysis["spec"]["metrics"][0]["provider"]["job"]["spec"]["template"]["spec"]["containers"][0]
    assert place.containers["gate"][0] == container
    done = place.run("gate")
    return done.returncode, json.loads(done.stdout)


def test_the_gate_of_the_analysis_passes_a_good_model_only(signed: Path, place: Place) -> None:
    code, verdict = gate(place)
    assert code == 0 and verdict["passed"], verdict
    assert {"signature", "ledger", "epsilon"} <= {each["check"] for each in verdict["checks"] if each["passed"]}

    def refused_after(spoil: Callable[[], Any], mend: Callable[[], Any]) -> set[str]:
        spoil()
        try:
            code, verdict = gate(place)
        finally:
            mend()
        assert code == 1 and not verdict["passed"]
        return {each["check"] for each in verdict["checks"] if each["passed"] is False}

    weights = signed / "model.safetensors"
    good = weights.read_bytes()
    assert "signature" in refused_after(
        lambda: weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1])), lambda: weights.write_bytes(good)
    )
    command = place.containers["gate"][0]["command"]
    at = command.index("--max-epsilon") + 1
    limit = command[at]
    assert "epsilon" in refused_after(
        lambda: command.__setitem__(at, str(EPSILON / 2)), lambda: command.__setitem__(at, limit)
    )


def test_the_probes_hit_the_server_that_the_chart_starts(signed: Path, place: Place) -> None:
    container, _ = place.containers["serve"]
    command, environment = place.process("serve")
    port = container["ports"][0]["containerPort"]
    probes = {kind: container[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["port"] for probe in probes.values()} == {container["ports"][0]["name"]}
    url = f"http://127.0.0.1:{port}"
    with (place.root / "serve.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        assert answer(url + probes["startupProbe"]["path"])[0] == 0
        wait_until(
            lambda: server.poll() is not None or answer(url + probes["startupProbe"]["path"])[0] == 200,
            150,
            "the startup probe",
        )
        assert {kind: answer(url + probe["path"])[0] for kind, probe in probes.items()} == dict.fromkeys(probes, 200)
        assert answer(url + "/healthz")[0] == 404, "a server that answers anything would pass any probe"
        status, text = answer(url + "/v1/completions", {"prompt": "w1 w2", "max_tokens": 3})
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] >= 1
        assert answer(url + "/v1/completions", {"model": "another", "prompt": "w1"})[0] == 400
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    finally:
        server.kill()
        server.wait()


def test_the_backup_of_the_cron_job_can_be_restored(
    trained: tuple[int, list[str], Path], place: Place, tool: Callable[[str], str]
) -> None:
    restic = tool("restic")
    secret = {"RESTIC_REPOSITORY": str(place.root / "repository"), "RESTIC_PASSWORD": "backup"}
    (place.root / "dpfa-restic.json").write_text(json.dumps(secret))
    environment = {**secret, "PATH": os.environ["PATH"], "HOME": str(place.root)}
    subprocess.run([restic, "init"], env=environment, check=True, capture_output=True, timeout=60)
    for name in ("ledger", "copy", "forget"):
        done = place.run(name)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    subprocess.run(
        [restic, "restore", "latest", "--target", str(place.root / "restored")],
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )
    (copy,) = (place.root / "restored").rglob("ledger.jsonl")
    before, new = place.runs(), f"sqlite:///{place.root / 'restored.db'}"
    _, environment = place.process("ledger")
    witness = environment["DPFA_LEDGER_WITNESS"]
    done = subprocess.run(
        ["dpfa", "ledger", "restore", str(copy), "--ledger", new, "--witness", witness],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    with Ledger(new, witness=witness, create=False) as restored:
        assert [(each.run, each.steps) for each in restored.runs()] == [(each.run, each.steps) for each in before]
    # The old ledger must not live on beside it.
    with Ledger(environment["DPFA_LEDGER"], witness=witness, create=False) as old:
        assert any("witness has seen an entry" in problem for problem in old.verify())
