"""The command line: what it prints, what it refuses, and that looking changes nothing."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
)
from typer.testing import CliRunner, Result

import dpfa_hf
from dpfa_hf import cli
from dpfa_hf.accounting import make_plan
from dpfa_hf.arguments import PrivacyArguments
from dpfa_hf.ledger import Ledger
from dpfa_hf.per_example import layers

TINY = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 20}
QUICK_PLAN = ("plan", "-n", "5000", "--accountant", "rdp", "--noise-multiplier", "1.0", "--max-steps", "40")


def dpfa(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def refused(result: Result) -> str:
    """The one line of a refusal; nothing on stdout, no traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("dpfa: ")
    return result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    BertForSequenceClassification(BertConfig(**TINY)).save_pretrained(root / "bert")
    BertModel(BertConfig(**TINY)).save_pretrained(root / "headless")
    gpt2 = GPT2Config(n_embd=8, n_layer=2, n_head=1, vocab_size=20, n_positions=32, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    llama = LlamaConfig(architectures=["LlamaForCausalLM"], num_key_value_heads=1, **TINY)
    llama.save_pretrained(root / "weightless")
    DebertaV2ForSequenceClassification(DebertaV2Config(**TINY)).save_pretrained(root / "deberta")
    return root


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A ledger with a named data set under a budget, an unnamed one, and a run that is NOT PRIVATE."""
    url = f"sqlite:///{tmp_path}/ledger.sqlite3"
    with Ledger(url) as ledger:
        shared: dict[str, Any] = {
            "plan": {"noise_multiplier": 1.0},
            "plan_hash": "0" * 64,
            "max_steps": 5,
            "privacy_unit": "example",
            "adjacency": "zero_out",
        }
        run = ledger.open_run(dataset="notes [bold]", epsilon=2.5, delta=1e-5, budget=(3.0, 1e-4), **shared)
        ledger.charge_step(run, 1)
        ledger.charge_step(run, 2)
        ledger.end_run(run, "stopped")
        for data in (b"one", b"two"):
            name = "unnamed-" + ledger.fingerprint(data)
            ledger.open_run(dataset=name, epsilon=float("inf"), delta=1e-5, budget=None, **shared)
    return url


# ---- every command --------------------------------------------------------------------------------------------------


LEDGER_COMMANDS = ("show", "verify", "head", "export", "import", "backup", "restore", "witness")


@pytest.mark.parametrize("command", [(), ("plan",), ("check",), ("ledger",), *(("ledger", c) for c in LEDGER_COMMANDS)])
def test_help_explains_and_gives_an_example(command: tuple[str, ...]) -> None:
    result = dpfa(*command, "--help")
    assert result.exit_code == 0
    assert command in ((), ("ledger",)) or "Example: dpfa" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("plan",),
        ("plan", "-n", "0"),
        ("plan", "-n", "100", "--adjacency", "nearby"),
        ("plan", "-n", "100", "--epochs", "1", "--max-steps", "2"),
        ("plan", "-n", "100", "--epochs", "0"),
        ("check",),
        ("check", "x", "--task", "poetry"),
        ("check", "x", "--lora", "0"),
        ("ledger", "burn"),
        ("ledger", "export"),
        ("ledger", "import"),
        ("ledger", "restore"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    result = dpfa(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)


def test_as_a_process_version_and_refusals_are_one_line_without_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "DPFA_LEDGER": f"sqlite:///{tmp_path}/none.db", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dpfa_hf.cli", *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    version = run("--version")
    assert (version.returncode, version.stdout.strip()) == (0, f"dpfa_hf {dpfa_hf.__version__}")
    missing = run("ledger", "show", "--json")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "there is no ledger" in missing.stderr and "Traceback" not in missing.stderr
    assert list(tmp_path.iterdir()) == []


# ---- plan -----------------------------------------------------------------------------------------------------------


def test_plan_gives_the_numbers_that_training_would_use() -> None:
    result = dpfa(*QUICK_PLAN, "--target-epsilon", "8", "--expected-batch-size", "200", "--json")
    (row,) = json.loads(result.stdout)
    arguments = PrivacyArguments(target_epsilon=8.0, noise_multiplier=1.0, accountant="rdp")
    expected = make_plan(arguments, num_units=5000, expected_batch_size=200, max_steps=40, loss_scale=2 * math.log(2))
    for name in ("epsilon", "delta", "noise_multiplier", "max_steps", "max_batch_size", "sampling_probability"):
        assert row[name] == getattr(expected, name)
    assert row["noise_per_example"] == 1.0 / 200 and row["refused"] is None and result.exit_code == 0


def test_plan_knows_the_hardened_mode() -> None:
    arguments = (*QUICK_PLAN, "--target-epsilon", "8", "--expected-batch-size", "200", "--json")
    snapped, hardened = (
        json.loads(dpfa(*arguments, "--floating-point", mode).stdout)[0]["epsilon"] for mode in ("snapped", "hardened")
    )
    assert hardened < snapped < hardened * 1.001


def test_plan_prints_what_loss_curve_and_adaptive_clipping_cost() -> None:
    arguments = (*QUICK_PLAN, "--target-epsilon", "8", "--expected-batch-size", "200")

    def row(*more: str) -> dict:
        return json.loads(dpfa(*arguments, *more, "--json").stdout)[0]

    default, neither = row(), row("--private-loss-weight", "0")
    both = row("--clipping", "adaptive")
    assert neither["price_private_loss"] is None and neither["price_adaptive_clipping"] is None
    assert default["epsilon"] - default["price_private_loss"] == pytest.approx(neither["epsilon"], rel=1e-9)
    assert 0 < default["price_private_loss"] < 0.01 * default["epsilon"]
    assert 0 < both["price_adaptive_clipping"] < 0.01 * both["epsilon"] and both["epsilon"] > default["epsilon"]
    printed = dpfa(*arguments).stdout
    assert f"{default['price_private_loss']:.4f}" in printed and "loss curve" in printed
    assert dpfa(*arguments, "--clipping", "quantile").exit_code == 2


def test_plan_calibrates_within_the_target_by_default() -> None:
    result = dpfa(
        "plan", "-n", "2000", "--target-epsilon", "3", "--expected-batch-size", "200", "--epochs", "1", "--json"
    )
    (row,) = json.loads(result.stdout)
    assert 2.9 < row["epsilon"] <= 3 and row["max_steps"] == row["asked_steps"] == 10 and row["accountant"] == "pld"


def test_plan_prints_impossible_rows_with_the_reason_beside_the_possible_ones() -> None:
    sizes = ("--expected-batch-size", "200", "--expected-batch-size", "6000")
    result = dpfa(*QUICK_PLAN, "--target-epsilon", "8", *sizes)
    assert result.exit_code == 0
    assert "batch 6000: expected_batch_size=6000 is more than the 5000 units" in result.stdout
    assert "Lower is better" in result.stdout and "0.005" in result.stdout
    assert dpfa(*QUICK_PLAN, "--expected-batch-size", "6000").exit_code == 1


def test_plan_without_a_guarantee_says_so() -> None:
    arguments = ("plan", "-n", "5000", "--target-epsilon", "inf", "--noise-multiplier", "0", "--max-steps", "4")
    assert "NOT PRIVATE" in dpfa(*arguments).stdout
    rows = json.loads(dpfa(*arguments, "--json").stdout)
    assert all(row["epsilon"] == "inf" and row["private"] is False for row in rows)


# ---- check ----------------------------------------------------------------------------------------------------------


def test_check_lists_repeated_layers_once_with_rule_and_count(models: Path) -> None:
    result = dpfa("check", str(models / "bert"))
    assert result.exit_code == 0 and result.stdout.strip().splitlines()[-1].startswith("Covered")
    line = next(row for row in result.stdout.splitlines() if "bert.encoder.layer.*.attention.self.query" in row)
    assert "linear" in line and "×3" in line
    assert "layer.0" not in result.stdout


@pytest.mark.parametrize(
    ("name", "options", "model_class", "weights"),
    [
        ("bert", (), "BertForSequenceClassification", "loaded"),
        ("bert", ("--task", "masked_lm"), "BertForMaskedLM", "loaded"),
        ("headless", ("--task", "sequence_classification"), "BertForSequenceClassification", "loaded"),
        ("gpt2", ("--attn-implementation", "eager"), "GPT2LMHeadModel", "loaded"),
        ("weightless", (), "LlamaForCausalLM", "random (none found)"),
    ],
)
def test_check_counts_every_trainable_parameter_once(
    models: Path, name: str, options: tuple[str, ...], model_class: str, weights: str
) -> None:
    result = dpfa("check", str(models / name), *options, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["covered"] and found["refusal"] is None
    assert (found["class"], found["weights"]) == (model_class, weights)
    import transformers

    config = transformers.AutoConfig.from_pretrained(models / name)
    model = getattr(transformers, model_class)(config)
    assert sum(layer["parameters"] for layer in found["layers"]) == sum(p.numel() for p in model.parameters())
    assert all(layer["rule"] for layer in found["layers"])


def test_check_says_who_computes_the_attention_here_and_on_a_gpu(models: Path) -> None:
    found = json.loads(dpfa("check", str(models / "bert"), "--json").stdout)["attention"]
    layers = json.loads((models / "bert" / "config.json").read_text())["num_hidden_layers"]
    by_form = {each["call"].split(",")[0]: each for each in found}
    assert {form: (each["count"], each["here"]) for form, each in by_form.items()} == {
        "no padding": (layers, "sdpa"),
        "padded": (layers, "reference"),
    }
    assert {form: each["cuda"] for form, each in by_form.items()} == {"no padding": "sdpa", "padded": "triton"}
    assert "computed here by" in dpfa("check", str(models / "bert")).stdout


def test_check_says_who_computes_the_attention_of_packed_rows(models: Path) -> None:
    found = json.loads(dpfa("check", str(models / "gpt2"), "--json").stdout)["attention"]
    packed = [each for each in found if each["call"].startswith("packed")]
    assert [(each["here"], each["cuda"]) for each in packed] == [("reference", "varlen")]


def test_check_without_dp_flash_says_nothing_about_it(models: Path) -> None:
    assert not json.loads(dpfa("check", str(models / "bert"), "--attn-implementation", "sdpa", "--json").stdout)[
        "attention"
    ]


def test_check_with_lora_lists_the_adapter_alone(models: Path) -> None:
    pytest.importorskip("peft")
    found = json.loads(dpfa("check", str(models / "bert"), "--lora", "2", "--json").stdout)
    names = [layer["name"] for layer in found["layers"]]
    assert found["covered"] and all("lora_" in name or "modules_to_save" in name for name in names)


def test_check_refuses_a_layer_without_a_rule_and_names_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(layers._RULES, torch.nn.Linear.forward)
    result = dpfa("check", str(models / "bert"))
    assert result.exit_code == 1 and "NONE" in result.stdout and "Covered" not in result.stdout
    assert "no norm rule covers" in result.stderr and "query" in result.stderr
    found = dpfa("check", str(models / "bert"), "--json")
    assert found.exit_code == 1 and json.loads(found.stdout)["covered"] is False


def test_mutant_rule_that_is_wrong_is_caught_by_check(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layers._RULES[torch.nn.Linear.forward]

    def half(call: layers.LayerCall) -> dict[str, Any]:
        found = linear(call)
        assert isinstance(found["weight"], layers.Outer)
        return {**found, "weight": layers.Outer(found["weight"].left / 2, found["weight"].right)}

    monkeypatch.setitem(layers._RULES, torch.nn.Linear.forward, half)
    result = dpfa("check", str(models / "bert"))
    assert result.exit_code == 1 and "differ from autograd" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "no configuration"),
        (("headless",), "--task"),
        (("deberta",), "eager"),
        (("bert", "--attn-implementation", "magic"), "--attn-implementation"),
    ],
)
def test_check_refuses_in_one_line_with_the_way_out(models: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(dpfa("check", str(models / arguments[0]), *arguments[1:]))


# ---- ledger ---------------------------------------------------------------------------------------------------------


def test_ledger_show_json_lists_runs_with_charged_steps_and_reservations(url: str) -> None:
    first, second, third = json.loads(dpfa("ledger", "show", "--json", "--ledger", url).stdout)
    assert first["dataset"] == "notes [bold]" and first["steps"] == 2 and first["max_steps"] == 5
    assert (first["epsilon"], first["delta"]) == (2.5, 1e-5)
    assert first["budget"] == {"epsilon": 3.0, "delta": 1e-4} and second["budget"] is None
    assert second["epsilon"] == "inf" and [second["dataset"], third["dataset"]] == ["unnamed 1", "unnamed 2"]
    assert re.fullmatch("[0-9a-f]{32}", first["run"])


def test_ledger_show_prints_whole_ids_and_names_and_no_fingerprint(url: str) -> None:
    runs = json.loads(dpfa("ledger", "show", "--json", "--ledger", url).stdout)
    shown = dpfa("ledger", "show", "--ledger", url)
    assert shown.exit_code == 0 and all(run["run"] in shown.stdout for run in runs)
    assert "notes [bold]" in shown.stdout and "NOT PRIVATE" in shown.stdout and "2 of 5" in shown.stdout
    assert not re.search("[0-9a-f]{64}", shown.stdout)
    one = dpfa("ledger", "show", "--ledger", url, "--run", runs[0]["run"])
    assert "noise_multiplier" in one.stdout and runs[1]["run"] not in one.stdout
    (only,) = json.loads(dpfa("ledger", "show", "--json", "--ledger", url, "--run", runs[0]["run"]).stdout)
    assert only == {**runs[0], "plan": {"noise_multiplier": 1.0}}
    assert "is not in ledger" in refused(dpfa("ledger", "show", "--ledger", url, "--run", "0" * 32))


def test_mutant_fingerprint_shown_is_caught(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ledger, "_UNNAMED", re.compile("(?!)"))
    assert re.search("[0-9a-f]{64}", dpfa("ledger", "show", "--json", "--ledger", url).stdout)


def test_ledger_environment_is_the_default(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFA_LEDGER", url)
    assert len(json.loads(dpfa("ledger", "show", "--json").stdout)) == 3


def test_ledger_verify_tells_whole_from_broken(url: str, tmp_path: Path) -> None:
    import sqlite3

    whole = dpfa("ledger", "verify", "--ledger", url)
    assert whole.exit_code == 0 and "whole" in whole.stdout
    assert json.loads(dpfa("ledger", "verify", "--json", "--ledger", url).stdout)["ok"] is True
    with sqlite3.connect(tmp_path / "ledger.sqlite3") as connection:
        connection.execute("UPDATE dpfa_runs SET steps = 0")
    broken = dpfa("ledger", "verify", "--ledger", url)
    assert broken.exit_code == 1 and "BROKEN" in broken.stdout and not re.search("unnamed-[0-9a-f]{64}", broken.stdout)
    assert json.loads(dpfa("ledger", "verify", "--json", "--ledger", url).stdout)["problems"]


@pytest.mark.parametrize("command", [("show",), ("verify",), ("export", "x"), ("backup", "x"), ("witness",)])
def test_looking_for_a_ledger_never_creates_one(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    monkeypatch.chdir(tmp_path)
    assert "there is no ledger" in refused(dpfa("ledger", *command, "--ledger", f"sqlite:///{tmp_path}/none.db"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.db").touch()
    assert "there is no ledger" in refused(dpfa("ledger", *command, "--ledger", f"sqlite:///{tmp_path}/empty.db"))
    assert (tmp_path / "empty.db").stat().st_size == 0
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE mine (x)")
    assert "there is no ledger" in refused(dpfa("ledger", *command, "--ledger", f"sqlite:///{tmp_path}/other.db"))
    with sqlite3.connect(tmp_path / "other.db") as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
    (tmp_path / "text.db").write_text("not a database, but long enough to look like one " * 40)
    assert "cannot be read" in refused(dpfa("ledger", *command, "--ledger", f"sqlite:///{tmp_path}/text.db"))


def test_no_password_is_printed_when_a_server_is_out_of_reach() -> None:
    line = refused(dpfa("ledger", "show", "--ledger", "postgresql://alice:s3cr3t@127.0.0.1:1/db?sslpassword=s3cr3t"))
    assert "s3cr3t" not in line


def test_a_ledger_moves_from_sqlite_to_postgresql_and_the_old_one_closes(
    url: str, tmp_path: Path, postgresql: Any
) -> None:
    server = postgresql.url(postgresql.emptied_database())
    file = str(tmp_path / "moving.jsonl")
    before = json.loads(dpfa("ledger", "show", "--json", "--ledger", url).stdout)
    moved = dpfa("ledger", "export", file, "--to", server, "--ledger", url)
    assert moved.exit_code == 0 and "closed now" in moved.stdout
    done = json.loads(dpfa("ledger", "import", file, "--ledger", server, "--json").stdout)
    assert done["head"] == json.loads(dpfa("ledger", "verify", "--json", "--ledger", server).stdout)["head"]
    assert json.loads(dpfa("ledger", "show", "--json", "--ledger", server).stdout) == before
    old = dpfa("ledger", "verify", "--ledger", url)
    assert old.exit_code == 0 and "It is closed: it moved to postgresql:///ledger" in old.stdout
    again = refused(dpfa("ledger", "import", file, "--ledger", server))
    assert "is in use" in again
    secret = json.loads(Path(file).read_text().splitlines()[0])["secret"]
    for shown in (moved.output, str(done), old.output, again):
        assert "hunter2" not in shown and secret not in shown


def test_a_backup_is_restored_unless_its_witness_knows_better(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPFA_LEDGER", url)
    monkeypatch.setenv("DPFA_LEDGER_WITNESS", f"sqlite:///{tmp_path}/witness.db")
    assert "cannot be reached" in refused(dpfa("ledger", "verify"))
    started = dpfa("ledger", "witness")
    assert started.exit_code == 0 and "is witnessed from entry" in started.stdout
    assert dpfa("ledger", "backup", str(tmp_path / "old.jsonl")).exit_code == 0
    with Ledger(url) as ledger:
        run = ledger.runs()[0].run
        ledger.resume_run(run, "0" * 64)
        ledger.charge_step(run, 3)
    head = json.loads(dpfa("ledger", "backup", str(tmp_path / "new.jsonl"), "--json").stdout)["head"]
    (tmp_path / "ledger.sqlite3").rename(tmp_path / "lost")
    for leftover in tmp_path.glob("ledger.sqlite3-*"):
        leftover.unlink()
    assert "restore a newer backup" in refused(dpfa("ledger", "restore", str(tmp_path / "old.jsonl")))
    assert "there is no ledger" in refused(dpfa("ledger", "show"))
    assert json.loads(dpfa("ledger", "restore", str(tmp_path / "new.jsonl"), "--json").stdout)["head"][0] == head[0] + 1
    assert json.loads(dpfa("ledger", "show", "--json").stdout)[0]["steps"] == 3
    assert dpfa("ledger", "verify").exit_code == 0
    monkeypatch.delenv("DPFA_LEDGER_WITNESS")
    assert "which was not asked" in dpfa("ledger", "verify").stdout


def test_an_export_for_an_auditor_has_no_secret_and_changes_nothing(url: str, tmp_path: Path) -> None:
    before = dpfa("ledger", "verify", "--ledger", url).stdout
    assert dpfa("ledger", "export", str(tmp_path / "audit.jsonl"), "--ledger", url).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert lines[0]["entries"] == len(lines) - 1 == lines[-1]["seq"] and lines[0]["head"] == lines[-1]["hash"]
    assert not any("secret" in line for line in lines)
    assert dpfa("ledger", "verify", "--ledger", url).stdout == before
    assert "has no secret" in refused(
        dpfa("ledger", "restore", str(tmp_path / "audit.jsonl"), "--unwitnessed", "--ledger", f"{url}.new")
    )


def test_the_commands_of_the_ledgers_page_run_in_its_order(
    url: str, tmp_path: Path, postgresql: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "ledger.md").read_text()
    monkeypatch.setenv("DPFA_LEDGER", url)
    server = postgresql.url(postgresql.emptied_database())
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    ((?:dpfa|openssl) .*)$", page, re.MULTILINE)
    assert {command.split()[2] for command in commands if command.startswith("dpfa")} == set(LEDGER_COMMANDS)
    for folder in ("mnt/witness", "mnt/backup", "var/lib/dpfa"):
        (tmp_path / folder).mkdir(parents=True)
    for command in commands:
        for said, meant in (
            ("postgresql://trainer:password@db.example.org/ledger", server),
            ("/mnt/", f"{tmp_path}/mnt/"),
            ("/var/", f"{tmp_path}/var/"),
        ):
            command = command.replace(said, meant)
        program, *arguments = command.split()
        if program == "openssl":
            subprocess.run([program, *arguments], check=True, capture_output=True)
            continue
        result = dpfa(*arguments)
        if " restore " in command:  # the ledger is not lost, and took no harm
            monkeypatch.setenv("DPFA_LEDGER", f"sqlite:///{tmp_path}/var/lib/dpfa/restored.db")
        if " witness " in command:
            monkeypatch.setenv("DPFA_LEDGER_WITNESS", f"sqlite:///{tmp_path}/mnt/witness/witness.db")
        assert result.exit_code == 0, (command, result.output)
        if " export " in command and "--to" not in command:
            assert json.loads((tmp_path / "mnt/backup/audit.jsonl").read_text().splitlines()[0])["entries"]
