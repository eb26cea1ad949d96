"""Rules, alerts, routes and dashboard, tried with promtool, amtool, a real Prometheus and a real training."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import torch
import transformers as tf
import yaml
from torch.utils.data import Dataset
from typer.testing import CliRunner

from dpfa_hf import DPTrainer, PrivacyArguments, PrivacyError, PrometheusCallback, cli
from dpfa_hf.ledger import Ledger, restore_ledger
from dpfa_hf.metrics import METRICS

REPOSITORY = Path(__file__).parents[2]
MONITORING = REPOSITORY / "deploy" / "monitoring"
PAGES = REPOSITORY / "docs" / "runbooks"
# What Prometheus and its Pushgateway write themselves.
FOREIGN = {"ALERTS", "push_time_seconds"}
# What tells how fast something moves: of steps, that follows private batch sizes (P23).
SPEEDS = {"rate", "irate", "increase", "delta", "idelta", "deriv", "predict_linear"}
MAY_HAVE_SPEED = {"dpfa_refusals_total", "dataset:dpfa_budget:used_ratio"}
PROGRESS = {"dpfa_epsilon_spent", "dpfa_epsilon_planned", "run:dpfa_epsilon_drift:ratio"}
SECTIONS = [
    "What it means",
    "What it says about privacy, and what it does not",
    "First checks",
    "What to do",
    "What never to do",
]

Rules = dict[str, Any]


@pytest.fixture(scope="session")
def rules() -> Rules:
    return yaml.safe_load((MONITORING / "rules.yaml").read_text())


@pytest.fixture(scope="session")
def dashboard() -> dict[str, Any]:
    return json.loads((MONITORING / "dashboard.json").read_text())


def every(rules: Rules) -> list[dict[str, Any]]:
    return [rule for group in rules["groups"] for rule in group["rules"]]


def alerts(rules: Rules) -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in every(rules) if "alert" in rule}


def records(rules: Rules) -> set[str]:
    return {rule["record"] for rule in every(rules) if "record" in rule}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for panel in dashboard["panels"] for each in (panel, *panel.get("panels", []))]


def targets(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel.get("targets", [])]


def kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


# ---- expressions ----------------------------------------------------------------------------------------------------


def nodes(expression: str) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), lambda node: found.append(node))
    return found


def names(expression: str) -> set[str]:
    return {node.name for node in nodes(expression) if isinstance(node, promql_parser.VectorSelector)}


def unknown_names(rules: Rules, expressions: Iterable[str] = ()) -> set[str]:
    """Metrics that nobody exports, and records that are read before they are written."""
    known, unknown = set(METRICS) | FOREIGN, set()
    for rule in every(rules):
        unknown |= names(rule["expr"]) - known
        known |= {rule["record"]} if "record" in rule else set()
    return unknown | {name for expression in expressions for name in names(expression) - known}


def speeds(expressions: Iterable[str]) -> set[str]:
    """Metrics of which an expression asks how fast they move, and must not."""
    return {
        name
        for expression in expressions
        for node in nodes(expression)
        if isinstance(node, promql_parser.Call) and node.func.name in SPEEDS
        for name in names(str(node)) - MAY_HAVE_SPEED
    }


def without_guarantee(dashboard: dict[str, Any]) -> set[str]:
    """Panels that show epsilon on the way and do not say what the guarantee is (P20)."""
    return {
        panel["title"]
        for panel in panels(dashboard)
        if any(names(target["expr"]) & PROGRESS for target in panel.get("targets", []))
        and "guarantee is epsilon at the last planned step" not in panel["description"]
    }


def test_expressions_read_only_what_is_exported(rules: Rules, dashboard: dict[str, Any]) -> None:
    assert len(alerts(rules)) > 15 and len(targets(dashboard)) > 30
    assert unknown_names(rules, targets(dashboard)) == set()


def test_a_misspelt_metric_or_a_record_that_is_read_too_early_is_caught(rules: Rules) -> None:
    broken = {"groups": [{"name": "x", "rules": [{"alert": "A", "expr": "max by (run) (dpfa_epsilon_spend) > 1"}]}]}
    assert unknown_names(broken) == {"dpfa_epsilon_spend"}
    backwards = {"groups": [{"name": "x", "rules": every(rules)[::-1]}]}
    assert "run:dpfa_noised_gradient_norm:live" in unknown_names(backwards)
    assert unknown_names(rules, ["sum(dpfa_clip_fraction)"]) == {"dpfa_clip_fraction"}


def test_nothing_asks_how_fast_steps_are_taken(rules: Rules, dashboard: dict[str, Any]) -> None:
    expressions = [rule["expr"] for rule in every(rules)] + targets(dashboard)
    assert any(
        isinstance(node, promql_parser.Call) and node.func.name in SPEEDS for e in expressions for node in nodes(e)
    )
    assert speeds(expressions) == set()


@pytest.mark.parametrize("expression", ["sum(rate(dpfa_steps_charged[5m])) > 0", "deriv(dpfa_epsilon_spent[1h])"])
def test_a_rate_of_steps_is_caught(expression: str) -> None:
    assert speeds([expression])


def test_epsilon_on_the_way_says_what_the_guarantee_is(dashboard: dict[str, Any]) -> None:
    assert any(names(expression) & PROGRESS for expression in targets(dashboard))
    assert without_guarantee(dashboard) == set()


def test_a_panel_that_shows_epsilon_on_the_way_as_if_it_were_the_guarantee_is_caught() -> None:
    panel = {"title": "ε", "description": "What was spent.", "targets": [{"expr": "max(dpfa_epsilon_spent)"}]}
    assert without_guarantee({"panels": [panel]}) == {"ε"}


def test_the_dashboard_chooses_by_data_set_and_run(dashboard: dict[str, Any]) -> None:
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "dataset", "run"]
    for expression in targets(dashboard):
        assert 'dataset=~"$dataset"' in expression
    for panel in panels(dashboard):
        if panel["type"] not in ("row", "text"):
            assert panel["datasource"]["uid"] == "${datasource}" and panel["description"] and panel["title"]
            queries = [target["refId"] for target in panel["targets"]]
            assert queries and len(queries) == len(set(queries)) and panel["options"] is not None
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(ids) == len(set(ids)) and None not in ids


# ---- what is checked in ---------------------------------------------------------------------------------------------


def build(folder: Path, *options: str) -> None:
    command = [sys.executable, str(MONITORING / "build.py"), "--to", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True, cwd=folder.parent)


def test_rules_and_dashboard_are_as_the_code_builds_them_here_and_in_the_chart(tmp_path: Path) -> None:
    build(tmp_path / "built")
    for folder in (MONITORING, REPOSITORY / "deploy" / "helm" / "dpfa" / "files"):
        for name in ("rules.yaml", "dashboard.json"):
            assert (folder / name).read_bytes() == (tmp_path / "built" / name).read_bytes(), (
                f"{folder / name}: build.py"
            )


def test_the_place_of_the_runbooks_is_an_option(tmp_path: Path) -> None:
    build(tmp_path / "built", "--base-url", "https://git.example.com/ml/")
    built = yaml.safe_load((tmp_path / "built" / "rules.yaml").read_text())
    pages = {alert["annotations"]["runbook_url"] for alert in alerts(built).values()}
    assert "https://git.example.com/ml/docs/runbooks/dpfa-not-private.md" in pages
    assert all(page.startswith("https://git.example.com/ml/docs/runbooks/dpfa-") for page in pages)


def test_promtool_and_amtool_accept_the_files(tool: Callable[[str], str]) -> None:
    for command in (
        ["promtool", "check", "rules", "rules.yaml"],
        ["promtool", "check", "config", "prometheus.yml"],
        ["amtool", "check-config", "alertmanager.yml"],
    ):
        done = subprocess.run([tool(command[0]), *command[1:]], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- each alert, in promtool ----------------------------------------------------------------------------------------

ALERTS = re.compile(r'ALERTS\{alertname="(\w+)"(?:, alertstate="firing")?\}')


def cases() -> list[tuple[str, dict[str, Any]]]:
    """(name of the case, case) of all unit tests."""
    files = sorted((MONITORING / "tests").glob("*.yaml"))
    return [(case["name"], case) for file in files for case in yaml.safe_load(file.read_text())["tests"]]


def outcomes() -> tuple[dict[str, list[dict[str, str]]], set[str]]:
    """(alert -> labels with which it fires in some case, alerts that never fire in some other case)."""
    fires: dict[str, list[dict[str, str]]] = {}
    silent: set[str] = set()
    for _, case in cases():
        seen: dict[str, list[dict[str, str]]] = {}
        for check in case["promql_expr_test"]:
            if found := ALERTS.fullmatch(check["expr"]):
                labels = [sample["labels"] for sample in check["exp_samples"]]
                seen.setdefault(found[1], []).extend(dict(re.findall(r'(\w+)="([^"]*)"', each)) for each in labels)
        for alert, samples in seen.items():
            if samples:
                fires.setdefault(alert, []).extend(samples)
            else:
                silent.add(alert)
    return fires, silent


def unit_tests(tool: Callable[[str], str], rules: Rules, folder: Path) -> str:
    """What promtool says of the rules; empty if all is well."""
    folder.mkdir()
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    shutil.copytree(MONITORING / "tests", folder / "tests")
    files = sorted(str(file) for file in (folder / "tests").glob("*.yaml"))
    done = subprocess.run([tool("promtool"), "test", "rules", *files], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def failed(output: str) -> set[str]:
    return set(re.findall(r'ALERTS\{alertname=\\"(\w+)\\"', output))


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent(rules: Rules) -> None:
    fires, silent = outcomes()
    assert set(fires) == silent == set(alerts(rules))


def test_what_the_annotations_name_is_there_when_the_alert_fires(rules: Rules) -> None:
    fires, _ = outcomes()
    for name, alert in alerts(rules).items():
        named = {label for text in alert["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
        for labels in fires[name]:
            assert named <= set(labels), f"{name} names {named}, and fires with {set(labels)}"
            assert labels["severity"] == alert["labels"]["severity"]


def test_alerts_fire_and_are_silent_as_the_cases_say(rules: Rules, tool: Callable[[str], str], tmp_path: Path) -> None:
    assert unit_tests(tool, rules, tmp_path / "as is") == ""


@pytest.mark.parametrize("expression", ["vector(1) > 2", "vector(1)"], ids=["never fires", "always fires"])
def test_the_cases_catch_each_alert_that_is_broken(
    expression: str, rules: Rules, tool: Callable[[str], str], tmp_path: Path
) -> None:
    group = [{**rule, "expr": expression} if "alert" in rule else rule for rule in every(rules)]
    broken = {"groups": [{"name": "dpfa", "rules": group}]}
    assert failed(unit_tests(tool, broken, tmp_path / "broken")) == set(alerts(rules))


def test_the_cases_catch_a_misspelt_metric(rules: Rules, tool: Callable[[str], str], tmp_path: Path) -> None:
    text = yaml.safe_dump(rules, width=10_000)
    assert text.count("dpfa_dataset_reserved_delta") > 0
    broken = yaml.safe_load(text.replace("dpfa_dataset_reserved_delta", "dpfa_dataset_reserve_delta"))
    assert failed(unit_tests(tool, broken, tmp_path / "broken")) == {"DpfaDatasetBudgetExceeded"}


# ---- runbooks and documentation -------------------------------------------------------------------------------------


def test_every_alert_has_its_page_and_every_page_its_alert(rules: Rules) -> None:
    pages = {page.name for page in PAGES.glob("dpfa-*.md")}
    assert pages == {f"{kebab(name)}.md" for name in alerts(rules)}
    for name, alert in alerts(rules).items():
        annotations = alert["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"} and all(annotations.values())
        assert annotations["runbook_url"] == f"https://example.org/dpfa_hf/docs/runbooks/{kebab(name)}.md"
        text = (PAGES / f"{kebab(name)}.md").read_text()
        assert text.startswith(f"# {name}\nSeverity: {alert['labels']['severity']}.\n")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
        assert "Never" in text.split(SECTIONS[-1])[1]


def documents() -> list[Path]:
    return [*sorted(PAGES.glob("dpfa-*.md")), REPOSITORY / "docs" / "monitoring.md"]


def test_links_lead_somewhere() -> None:
    for page in documents():
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_commands_in_the_pages_exist() -> None:
    commands = {
        line.strip()
        for page in documents()
        for line in re.findall(r"^    (dpfa .+)$|`(dpfa [a-z][^`]*)`", page.read_text(), re.MULTILINE)
        for line in line
        if line
    }
    assert {"dpfa ledger verify", "dpfa ledger show --run RUN"} <= commands
    for command in sorted(commands):
        words = command.split()[1:]
        path = [word for word in words[: 2 if words[0] == "ledger" else 1] if word.isalpha()]
        done = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert done.exit_code == 0, f"{command}: {done.output}"
        for option in (word for word in words if word.startswith("--")):
            assert option in done.output, f"{command}: no {option}"


def test_the_table_of_alerts_is_complete(rules: Rules) -> None:
    text = (REPOSITORY / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| `(Dpfa\w+)` \| (\w+) \| .+ \| \[.+\]\(runbooks/(.+)\) \|$", text, re.MULTILINE)
    assert rows == [(name, alert["labels"]["severity"], f"{kebab(name)}.md") for name, alert in alerts(rules).items()]


# ---- Alertmanager ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=DpfaNotPrivate severity=critical dataset=mails run=a", "privacy-on-call"),
        ("alertname=DpfaDatasetBudgetExceeded severity=critical dataset=mails part=delta", "privacy-on-call"),
        ("alertname=DpfaTrainingStalled severity=warning dataset=mails run=a", "privacy-team"),
        ("alertname=DpfaDatasetHasNoBudget severity=info dataset=unnamed run=a", "privacy-notes"),
        ("alertname=DpfaSomethingOfYours dataset=mails", "privacy-team"),
        ("alertname=NodeDown severity=critical", "others"),
        ("severity=critical", "others"),
    ],
)
def test_routes(labels: str, receiver: str, tool: Callable[[str], str]) -> None:
    command = [tool("amtool"), "config", "routes", "test", f"--config.file={MONITORING / 'alertmanager.yml'}"]
    command += [f"--verify.receivers={receiver}", *labels.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [receiver], done.stdout + done.stderr


def answer(url: str, **parameters: str) -> Any:
    query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
    with urllib.request.urlopen(url + query, timeout=10) as response:
        return json.load(response)


@contextlib.contextmanager
def server(command: list[str], ready: str, folder: Path) -> Iterator[None]:
    """A server that answers at `ready`, until the end of the block."""
    with open(folder / "log", "wb") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(ready, timeout=5) as response:
                        response.read()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                    time.sleep(0.1)
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def alertmanager(tool: Callable[[str], str], port: int, folder: Path) -> Iterator[str]:
    """With our configuration, but for groups that wait for an hour: nothing is sent from here."""
    folder.mkdir()
    config = re.sub(r"group_wait: \w+", "group_wait: 1h", (MONITORING / "alertmanager.yml").read_text())
    assert config.count("group_wait: 1h") == 3
    (folder / "alertmanager.yml").write_text(
        config.replace("receiver: others\n", "receiver: others\n  group_wait: 1h\n")
    )
    url = f"http://127.0.0.1:{port}"
    command = [tool("prometheus-alertmanager"), "--config.file=alertmanager.yml", f"--storage.path={folder}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--log.level=error"]
    with server(command, f"{url}/-/ready", folder):
        yield url


def states(url: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(alert, run) -> (state, receiver), of what Alertmanager has; nothing until it has looked at all of them."""
    found = {
        (each["labels"]["alertname"], each["labels"].get("run", "")): (
            each["status"]["state"],
            each["receivers"][0]["name"],
        )
        for each in answer(f"{url}/api/v2/alerts")
    }
    return {} if any(state == "unprocessed" for state, _ in found.values()) else found


def until(found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return value


def test_a_critical_alert_silences_what_is_below_it_of_its_run_and_nothing_else(
    tool: Callable[[str], str], free_port: Callable[[], int], tmp_path: Path
) -> None:
    def alert(name: str, severity: str, **labels: str) -> dict[str, Any]:
        return {"labels": {"alertname": name, "severity": severity, **labels}}

    sent = [
        alert("DpfaNotPrivate", "critical", dataset="mails", run="a"),
        alert("DpfaTrainingStalled", "warning", dataset="mails", run="a"),
        alert("DpfaDatasetHasNoBudget", "info", dataset="mails", run="a"),
        alert("DpfaTrainingStalled", "warning", dataset="mails", run="b"),
        alert("DpfaDatasetHasNoBudget", "info", dataset="mails", run="b"),
        alert("DpfaDatasetHasNoBudget", "info", dataset="mails", run="c"),
        alert("NodeDown", "critical"),
        alert("DiskFull", "warning"),
    ]
    with alertmanager(tool, free_port(), tmp_path / "alertmanager") as url:
        body = json.dumps(sent).encode()
        request = urllib.request.Request(f"{url}/api/v2/alerts", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()
        found = until(lambda: states(url), "alerts are not taken")
    assert found == {
        ("DpfaNotPrivate", "a"): ("active", "privacy-on-call"),
        ("DpfaTrainingStalled", "a"): ("suppressed", "privacy-team"),
        ("DpfaDatasetHasNoBudget", "a"): ("suppressed", "privacy-notes"),
        ("DpfaTrainingStalled", "b"): ("active", "privacy-team"),
        ("DpfaDatasetHasNoBudget", "b"): ("suppressed", "privacy-notes"),
        ("DpfaDatasetHasNoBudget", "c"): ("active", "privacy-notes"),
        ("NodeDown", ""): ("active", "others"),
        ("DiskFull", ""): ("active", "others"),
    }


# ---- a real training ------------------------------------------------------------------------------------------------

N, EXPECTED, STEPS = 60, 12, 40


class Rows(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [index % 7 + 1] * 5, "attention_mask": [1] * 5, "labels": index % 2}


class UntilSeen(tf.TrainerCallback):
    """Takes its time over steps, and goes no further than step 30, until the test has seen what it wanted."""

    def __init__(self) -> None:
        self.seen = threading.Event()

    def on_step_end(self, args: Any, state: tf.TrainerState, control: Any, **kwargs: Any) -> None:
        self.seen.wait(0.3 if state.global_step < 30 else 120)


def trainer(
    folder: Path, *callbacks: tf.TrainerCallback, budget: float = 10, ledger: str = "ledger.db", save_steps: int = 1000
) -> DPTrainer:
    """Of a run that reserves just below 9."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
    model = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")
    args = tf.TrainingArguments(
        str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=STEPS, logging_steps=1,
        per_device_train_batch_size=EXPECTED, save_steps=save_steps,
    )  # fmt: skip
    asked = PrivacyArguments(
        target_epsilon=9, target_delta=1e-3, accountant="rdp", ledger=f"sqlite:///{folder / ledger}",
        ledger_dataset="mails", dataset_budget_epsilon=budget, dataset_budget_delta=2e-3,
    )  # fmt: skip
    return DPTrainer(model=model, args=args, train_dataset=Rows(), privacy_args=asked, callbacks=list(callbacks))


@contextlib.contextmanager
def prometheus(
    tool: Callable[[str], str], port: int, folder: Path, *, manager: str | None = None, **scraped: int
) -> Iterator[str]:
    """With our rules, and our configuration but for addresses (job -> port), and for times, which are of a test."""
    folder.mkdir()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(MONITORING / "rules.yaml")]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = (
        [] if manager is None else [manager.removeprefix("http://")]
    )
    config["scrape_configs"] = [each for each in config["scrape_configs"] if each["job_name"] in scraped]
    for each in config["scrape_configs"]:
        each["static_configs"][0]["targets"] = [f"127.0.0.1:{scraped[each['job_name']]}"]
    assert len(config["scrape_configs"]) == len(scraped)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"
    command = [tool("prometheus"), "--config.file=prometheus.yml", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with server(command, f"{url}/-/ready", folder):
        yield url


def series(url: str, expression: str) -> list[dict[str, Any]]:
    for variable in ("dataset", "run"):
        expression = expression.replace(f"${variable}", ".*")
    return [
        each for each in answer(f"{url}/api/v1/query", query=expression)["data"]["result"] if each["value"][1] != "NaN"
    ]


def test_a_real_training_fills_every_panel_and_fires_the_alert_that_it_should(
    rules: Rules,
    dashboard: dict[str, Any],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    exporter, pace = free_port(), UntilSeen()
    metrics = PrometheusCallback(port=exporter)
    run = trainer(tmp_path, metrics, pace)
    empty = dict.fromkeys(targets(dashboard))
    with (
        contextlib.closing(metrics),
        alertmanager(tool, free_port(), tmp_path / "alertmanager") as manager,
        prometheus(tool, free_port(), tmp_path / "prometheus", manager=manager, dpfa=exporter) as url,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        training = threads.submit(run.train)
        try:

            def fill() -> bool:
                training.done() and training.result()
                for expression in list(empty):
                    if series(url, expression):
                        del empty[expression]
                return not empty

            until(fill, f"no data: {list(empty)}", 90)
            # Data sets and runs to choose from.
            for variable in dashboard["templating"]["list"][1:]:
                metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()
                assert {each["metric"][label] for each in series(url, metric)} <= {"mails", run._run_budget.run}
                assert series(url, metric)
            fired = [each for each in answer(f"{url}/api/v1/alerts")["data"]["alerts"] if each["state"] == "firing"]
            assert not series(url, "max(dpfa_clip_fraction)")
            reached = until(lambda: states(manager), "no alert reached Alertmanager")
        finally:
            pace.seen.set()
        training.result(timeout=120)
        # All of its metrics were there, and all rules could be evaluated.
        assert {each["metric"]["__name__"] for each in series(url, '{__name__=~"dpfa_.+"}')} == set(METRICS)
        groups = answer(f"{url}/api/v1/rules")["data"]["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
        until(lambda: not series(url, "dpfa_training == 1"), "the end of the training is not shown")
        # Steps and guarantee as the trainer knows them.
        shown = {
            name: float(series(url, name)[0]["value"][1]) for name in ("dpfa_steps_charged", "dpfa_epsilon_guarantee")
        }
    spent = run.privacy_spent()
    assert shown == {"dpfa_steps_charged": STEPS, "dpfa_epsilon_guarantee": pytest.approx(spent.epsilon)}
    assert {alert["labels"]["alertname"] for alert in fired} == {"DpfaDatasetBudgetNearlyUsed"}
    (alert,) = [alert for alert in fired if alert["labels"]["part"] == "epsilon"]
    used = spent.epsilon / 10
    assert float(alert["value"]) == pytest.approx(used)
    shown_used = re.fullmatch(
        r"Data set mails: ([\d.]+)% of its epsilon budget is used", alert["annotations"]["summary"]
    )
    assert shown_used and float(shown_used[1]) == pytest.approx(100 * used, rel=1e-3)
    assert reached == {("DpfaDatasetBudgetNearlyUsed", ""): ("active", "privacy-notes")}
    assert kebab(alert["labels"]["alertname"]) in alert["annotations"]["runbook_url"]


def test_a_refused_training_reaches_its_alert_by_the_pushgateway_every_time(
    tool: Callable[[str], str], free_port: Callable[[], int], tmp_path: Path
) -> None:
    gateway, name = free_port(), 'max(ALERTS{alertname="DpfaRefusals", alertstate="firing"})'
    command = [tool("prometheus-pushgateway"), f"--web.listen-address=127.0.0.1:{gateway}", "--log.level=error"]
    # Debian's keeps what was pushed in /var/lib unless it is told another place.
    command += [f"--persistence.file={tmp_path / 'gateway' / 'pushed'}"]
    (tmp_path / "gateway").mkdir()

    def refused() -> None:
        metrics = PrometheusCallback(pushgateway=f"http://127.0.0.1:{gateway}")
        with pytest.raises(PrivacyError, match="budget"):
            trainer(tmp_path, metrics, budget=8).train()

    with (
        server(command, f"http://127.0.0.1:{gateway}/-/ready", tmp_path / "gateway"),
        prometheus(tool, free_port(), tmp_path / "prometheus", pushgateway=gateway) as url,
    ):
        refused()
        until(lambda: series(url, name), "the alert did not fire", 30)
        shown = series(url, "dpfa_refusals_total")
        assert len(shown) == 1, shown
        # As they were pushed: Prometheus leaves the labels alone.
        assert {key: shown[0]["metric"].get(key) for key in ("job", "run", "dataset", "exported_job")} == {
            "job": "dpfa", "run": "none", "dataset": "mails", "exported_job": None,
        }  # fmt: skip
        # The second time nothing but the time of the push is new, which the alert looks at.
        again = "changes(push_time_seconds[1h]) > 0"
        assert not series(url, again)
        refused()
        until(lambda: series(url, again), "the second push is not seen", 30)
        assert series(url, "dpfa_refusals_total")[0]["value"][1] == "1"


class BackUpThenDie(tf.TrainerCallback):
    """A backup of the ledger at step 5, and an end that nobody planned at step 25."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: tf.TrainerState, control: Any, **kwargs: Any) -> None:
        time.sleep(0.1)
        if state.global_step == 5:
            with Ledger(f"sqlite:///{self.folder}/ledger.db", create=False) as ledger:
                ledger.backup(self.folder / "backup.jsonl")
        if state.global_step == 25:
            raise RuntimeError("the machine went down")


def test_a_run_that_is_resumed_on_an_older_copy_of_its_ledger_fires_the_alert(
    tool: Callable[[str], str], free_port: Callable[[], int], tmp_path: Path
) -> None:
    exporter, pace = free_port(), UntilSeen()
    firing = 'ALERTS{alertname="DpfaLedgerHeadWentBackwards", alertstate="firing"}'
    with (
        prometheus(tool, free_port(), tmp_path / "prometheus", dpfa=exporter) as url,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        with contextlib.closing(PrometheusCallback(port=exporter)) as metrics:
            run = trainer(tmp_path, metrics, BackUpThenDie(tmp_path), save_steps=5)
            with pytest.raises(RuntimeError, match="went down"):
                run.train()
            until(lambda: series(url, "dpfa_training == 0"), "the end is not shown")
            assert not series(url, firing)
        restore_ledger(tmp_path / "backup.jsonl", f"sqlite:///{tmp_path}/old.db", unwitnessed=True).close()
        # A checkpoint that has seen more steps than this ledger is refused; one of before the backup goes on.
        with pytest.raises(PrivacyError, match="older copy"):
            trainer(tmp_path, ledger="old.db").train(resume_from_checkpoint=True)
        with contextlib.closing(PrometheusCallback(port=exporter)) as metrics:
            resumed = trainer(tmp_path, metrics, pace, ledger="old.db")
            training = threads.submit(resumed.train, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
            try:
                (alert,) = until(
                    lambda: training.done() and training.result() or series(url, firing), "the alert did not fire"
                )
            finally:
                pace.seen.set()
            training.result(timeout=120)
    assert alert["metric"]["run"] == run._run_budget.run and alert["metric"]["severity"] == "critical"
