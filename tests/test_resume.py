from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils.data import Dataset

from dpfa_hf import DPTrainer, PrivacyArguments, PrivacyError
from dpfa_hf import trainer as trainer_module
from dpfa_hf.ledger import Ledger, restore_ledger
from dpfa_hf.noise import GaussianNoise

N = 20
ASKED: dict[str, Any] = {"target_epsilon": 50.0, "noise_multiplier": 1.0, "target_delta": 1e-3, "accountant": "rdp"}


class Rows(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [index % 7 + 1] * 5, "attention_mask": [1] * 5, "labels": index % 2}


def build(
    folder: Path, *, steps: int = 6, callbacks: Any = None, out: str = "out", micro_batch: int = 4, **asked: Any
) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = tf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes)
    model = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")
    args = tf.TrainingArguments(
        str(folder / out), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=steps, logging_strategy="no",
        per_device_train_batch_size=micro_batch, save_strategy="steps", save_steps=1, save_total_limit=3, optim="sgd",
    )  # fmt: skip
    privacy = PrivacyArguments(**{"ledger": f"sqlite:///{folder}/ledger.db", **ASKED, **asked})
    return DPTrainer(model=model, args=args, train_dataset=Rows(), privacy_args=privacy, callbacks=callbacks)


def ledger(folder: Path) -> Ledger:
    return Ledger(f"sqlite:///{folder}/ledger.db")


class StopAt(tf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder: Path, step: int = 2, **asked: Any) -> Any:
    trainer = build(folder, callbacks=[StopAt(step)], **asked)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def test_a_resumed_run_ends_where_the_plan_ends(tmp_path: Path) -> None:
    first = interrupted(tmp_path, 3)  # the third step is charged, and its checkpoint was not written
    trainer = build(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    runs = ledger(tmp_path).runs()
    assert len(runs) == 1 and runs[0].run == first._run_budget.run == trainer._run_budget.run
    assert runs[0].steps == runs[0].max_steps == trainer.privacy_spent().steps == 6
    assert trainer.state.global_step == 5 and trainer.privacy_report()["steps"]["resumed"] == 1
    assert ledger(tmp_path).verify() == []


def test_epsilon_starts_from_the_ledger_and_not_from_the_checkpoint(tmp_path: Path) -> None:
    before = interrupted(tmp_path, 3)._run_budget.epsilon
    seen = []

    class Look(tf.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append(trainer._run_budget.epsilon)

    trainer = build(tmp_path, callbacks=[Look])
    trainer.train(resume_from_checkpoint=True)
    assert seen == [before] and before > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 2.0),
        ("per_example_max_grad_norm", 0.5),
        ("clipping", "automatic"),
        ("clipping", "adaptive"),
        ("private_loss_weight", 0.1),
        ("private_loss_max", 3.0),
        ("expected_batch_size", 5),
        ("sampling_probability", 0.1),
        ("target_delta", 2e-3),
        ("noise_generator", "torch"),
        ("target_epsilon", 60.0),
    ],
)
def test_resuming_with_a_changed_setting_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(PrivacyError) as info:
        build(tmp_path, **{name: value}).train(resume_from_checkpoint=True)
    assert "resuming" in str(info.value) and "restore the arguments" in str(info.value) and "\n" not in str(info.value)
    assert ledger(tmp_path).runs()[0].steps == 2


@pytest.mark.parametrize(("before", "after"), [("people", "others"), ("people", None), (None, "others")])
def test_resuming_under_another_data_set_is_refused(before: str | None, after: str | None, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, callbacks=[StopAt(2)], ledger_dataset=before).train()
    with pytest.raises(PrivacyError, match="another ledger_dataset"):
        build(tmp_path, ledger_dataset=after).train(resume_from_checkpoint=True)
    build(tmp_path, ledger_dataset=before).train(resume_from_checkpoint=True)
    assert [run.steps for run in ledger(tmp_path).runs()] == [6]


ADAPTIVE: dict[str, Any] = {"clipping": "adaptive"}


def clipping_state(folder: Path, step: int) -> Path:
    return folder / "out" / f"checkpoint-{step}" / "clipping_norm.json"


def test_a_resumed_run_goes_on_from_the_norm_that_adaptive_clipping_had_reached(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []

    class Look(tf.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append((trainer._engine.clipping_norm, trainer._step.noise.standard_deviation))

    first = interrupted(tmp_path, 3, **ADAPTIVE)  # the norm after the third step is lost with its checkpoint
    reached = float.fromhex(json.loads(clipping_state(tmp_path, 2).read_text())["clipping_norm"])
    assert reached not in (first.privacy_plan.clipping_norm, first._engine.clipping_norm)
    trainer = build(tmp_path, callbacks=[Look], **ADAPTIVE)
    trainer.train(resume_from_checkpoint=True)
    assert seen == [(reached, trainer.privacy_plan.noise_multiplier * reached)]
    report = trainer.privacy_report()["mechanism"]
    assert (
        report["clipping_norm"] == 1.0 and report["clipping_norm_reached"] == trainer._engine.clipping_norm != reached
    )


@pytest.mark.parametrize(
    "damage", ["missing", "another norm", "of another step", "of another run", "empty", "no number"]
)
def test_resuming_without_the_norm_that_was_written_is_refused(damage: str, tmp_path: Path) -> None:
    interrupted(tmp_path, 3, **ADAPTIVE)
    state = clipping_state(tmp_path, 2)
    content = json.loads(state.read_text())
    if damage == "missing":
        state.unlink()
    elif damage == "of another step":
        state.write_text(clipping_state(tmp_path, 1).read_text())
    elif damage == "of another run":
        (tmp_path / "other").mkdir()
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, callbacks=[StopAt(3)], out="other/out", **ADAPTIVE).train()
        state.write_text(clipping_state(tmp_path / "other", 2).read_text())
    else:
        norm = {"another norm": (1e-3).hex(), "empty": None, "no number": "wide"}[damage]
        state.write_text(json.dumps({**content, "clipping_norm": norm}) if norm else "")
    with pytest.raises(PrivacyError) as info:
        build(tmp_path, **ADAPTIVE).train(resume_from_checkpoint=True)
    assert "clipping_norm.json" in str(info.value) and "\n" not in str(info.value)
    assert ledger(tmp_path).runs()[0].steps == 3


@pytest.mark.parametrize("name", ["clipping_quantile", "clipping_learning_rate"])
def test_resuming_with_another_rule_for_the_norm_is_refused(name: str, tmp_path: Path) -> None:
    interrupted(tmp_path, **ADAPTIVE)
    with pytest.raises(PrivacyError, match=name):
        build(tmp_path, **ADAPTIVE, **{name: 0.3}).train(resume_from_checkpoint=True)


def test_resuming_in_other_units_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(PrivacyError, match="adjacency"):
        build(tmp_path, adjacency="replace_one", accountant="pld").train(resume_from_checkpoint=True)


def test_resuming_in_another_floating_point_mode_is_refused(tmp_path: Path) -> None:
    alone = {"micro_batch": 1, "expected_batch_size": 4}
    interrupted(tmp_path, **alone)
    with pytest.raises(PrivacyError, match="another floating_point"):
        build(tmp_path, **alone, floating_point="hardened").train(resume_from_checkpoint=True)


def test_a_hardened_run_resumes_hardened(tmp_path: Path) -> None:
    hardened = {"micro_batch": 1, "expected_batch_size": 4, "floating_point": "hardened"}
    interrupted(tmp_path, **hardened)
    trainer = build(tmp_path, **hardened)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.privacy_plan.floating_point == "hardened" and trainer._engine.exact_sums
    assert trainer._step.noise.floating_point == "hardened"


def test_the_plan_in_the_ledger_is_used_and_not_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = interrupted(tmp_path).privacy_plan
    real = trainer_module.make_plan

    def newer_accountant(*args: Any, **kwargs: Any) -> Any:
        plan = real(*args, **kwargs)
        return trainer_module.PrivacyPlan(**{**vars(plan), "epsilon": plan.epsilon / 2, "accountant_version": "9"})

    monkeypatch.setattr(trainer_module, "make_plan", newer_accountant)
    trainer = build(tmp_path)
    assert trainer.privacy_plan != stored
    trainer.train(resume_from_checkpoint=True)
    assert trainer.privacy_plan == stored and trainer.privacy_spent().epsilon == stored.epsilon


def test_a_run_that_the_ledger_does_not_know_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(PrivacyError) as info:
        build(tmp_path, ledger=f"sqlite:///{tmp_path}/other.db").train(resume_from_checkpoint=True)
    assert "ledger" in str(info.value) and "\n" not in str(info.value)


def test_an_older_copy_of_the_ledger_does_not_give_back_steps_that_a_checkpoint_has_seen(tmp_path: Path) -> None:
    class BackUp(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                with ledger(tmp_path) as opened:
                    opened.backup(tmp_path / "backup.jsonl")

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, callbacks=[BackUp, StopAt(4)]).train()  # leaves checkpoints of steps 1, 2 and 3
    older = f"sqlite:///{tmp_path}/older.db"
    restore_ledger(tmp_path / "backup.jsonl", older, unwitnessed=True).close()
    with pytest.raises(PrivacyError) as info:
        build(tmp_path, ledger=older).train(resume_from_checkpoint=True)
    assert "older copy" in str(info.value) and "\n" not in str(info.value)
    assert Ledger(older).runs()[0].steps == 2
    # What was charged before the backup goes on: nothing after it is in that checkpoint.
    trainer = build(tmp_path, ledger=older)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert trainer.privacy_spent().steps == 6


def test_a_checkpoint_without_its_report_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    for path in tmp_path.glob("out/checkpoint-*/privacy.json"):
        path.unlink()
    with pytest.raises(PrivacyError, match="privacy.json"):
        build(tmp_path).train(resume_from_checkpoint=True)


def test_there_must_be_a_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="no complete checkpoint"):
        build(tmp_path).train(resume_from_checkpoint=True)
    interrupted(tmp_path, 4)
    newest = max(tmp_path.glob("out/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / "trainer_state.json").write_text('{"global_')
    trainer = build(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.privacy_spent().steps == 6


def test_restored_generators_do_not_bring_back_noise_or_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noises = []
    add = GaussianNoise.add_noise

    def watched(self: Any, sums: Any) -> Any:
        noised = add(self, {name: torch.zeros_like(tensor) for name, tensor in sums.items()})
        noises.append((torch.cat([t.flatten() for t in noised.values()]), torch.initial_seed()))
        return add(self, sums)

    interrupted(tmp_path, 2)
    monkeypatch.setattr(GaussianNoise, "add_noise", watched)
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
        (tmp_path / out / "checkpoint-1").symlink_to(tmp_path / "out" / "checkpoint-1")
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, out=out, callbacks=[StopAt(2)]).train(resume_from_checkpoint=True)
    (first, seed), (second, again) = noises
    assert seed == again
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / math.sqrt(first.numel())


# ---- kill -9 --------------------------------------------------------------------------------------------------------

CHILD = """if True:
    import hashlib, importlib.util, os, sys, time
    from pathlib import Path
    import transformers as tf
    spec = importlib.util.spec_from_file_location("drill", {file!r})
    drill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drill)
    folder, steps = Path({folder!r}), {steps}
    journal = os.open(folder / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*words):
        os.write(journal, (" ".join(map(str, words)) + chr(10)).encode())
        os.fsync(journal)

    class Slow(tf.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            note("begin", trainer._run_budget.run, trainer._run_budget.steps, trainer._run_budget.epsilon)

        def on_step_end(self, *args, **kwargs):
            time.sleep(0.05)

    def key(length):
        drawn = os.urandom(length)
        note("noise", trainer._run_budget.run, hashlib.sha256(drawn).hexdigest())
        return drawn

    # Planned once, before forking, for speed; each child opens the ledger itself.
    asked = drill.PrivacyArguments(**drill.ASKED)
    plan = drill.trainer_module.make_plan(asked, num_units=drill.N, expected_batch_size=4, max_steps=steps)
    drill.trainer_module.make_plan = lambda *args, **kwargs: plan
    try:
        sys.stdin.readline()
        while True:
            child = os.fork()
            if child:
                note("child", child)
                os.waitpid(child, 0)
                note("ended", child)
                sys.stdin.readline()
                continue
            trainer = drill.build(folder, steps=steps, callbacks=[Slow])
            trainer._step.noise._key_source = key
            resumable = drill.trainer_module._last_complete_checkpoint(str(folder / "out")) is not None
            trainer.train(resume_from_checkpoint=resumable)
            note("done")
            os._exit(0)
    except drill.PrivacyError as error:
        note("refused", str(error))
        os._exit(0)
"""


def journal(folder: Path) -> list[list[str]]:
    path = folder / "journal"
    return [line.split(" ") for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(folder: Path, seen: int, words: tuple[str, ...], seconds: float = 150) -> list[str]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for line in journal(folder)[seen:]:
            if line[0] in words:
                return line
        time.sleep(0.01)
    raise AssertionError(f"none of {words} came")


def violations(lines: list[list[str]], charged: dict[str, int], most: int) -> set[str]:
    """What a drill shows: `charged` is the ledger's count by run, `lines` the journal."""
    draws = Counter(line[1] for line in lines if line[0] == "noise")
    keys = [line[2] for line in lines if line[0] == "noise"]
    found = set()
    if any(count > charged.get(run, 0) for run, count in draws.items()):
        found.add("noise before the ledger")
    if len(set(keys)) != len(keys):
        found.add("a key was used twice")
    if any(count > most for count in charged.values()):
        found.add("past the plan")
    begun: dict[str, float] = {}
    for line in lines:
        if line[0] == "begin":
            if float(line[3]) < begun.get(line[1], 0.0):
                found.add("epsilon fell")
            begun[line[1]] = float(line[3])
    return found


def test_killed_at_random_moments_the_ledger_counts_every_noise(tmp_path: Path) -> None:
    steps, kills = 30, 10
    code = CHILD.format(file=__file__, folder=str(tmp_path), steps=steps)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "errors", "w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=errors, stderr=errors, text=True,
            env=environment,
        )  # fmt: skip
        assert server.stdin is not None
        killed, chance = 0, random.Random()
        try:
            for round_ in range(kills + 6):
                seen = len(journal(tmp_path))
                server.stdin.write("go\n")
                server.stdin.flush()
                child = int(wait_for(tmp_path, seen, ("child",))[1])
                if killed < kills:
                    wait_for(tmp_path, seen, ("noise", "done", "refused", "ended"))
                    time.sleep(chance.uniform(0.0, 0.4))
                    if not any(line[0] in ("done", "refused", "ended") for line in journal(tmp_path)[seen:]):
                        os.kill(child, signal.SIGKILL)
                        killed += 1
                wait_for(tmp_path, seen, ("ended",))
                runs = ledger(tmp_path).runs()
                charged = {run.run: run.steps for run in runs}
                assert violations(journal(tmp_path), charged, steps) == set(), f"in round {round_}"
                if any(line[0] in ("done", "refused") for line in journal(tmp_path)[seen:]):
                    break
        finally:
            server.kill()
            server.wait()
    lines = journal(tmp_path)
    assert killed == kills, (tmp_path / "errors").read_text()[-2000:]
    assert lines[-2][0] in ("done", "refused")
    final = ledger(tmp_path)
    assert final.runs()[-1].steps == steps and final.verify() == []
    # Mutants: the same journal with the ledger behind by a step, a key reused, epsilon from a checkpoint.
    noise = [line for line in lines if line[0] == "noise"]
    run = noise[-1][1]
    drawn = sum(line[1] == run for line in noise)
    assert violations(lines, {**charged, run: drawn - 1}, steps) == {"noise before the ledger"}
    assert "a key was used twice" in violations([*lines, noise[0]], {**charged, noise[0][1]: steps}, steps)
    # Where every kill came before the first checkpoint, no run has begun with more than epsilon 0 yet.
    fallen = [["begin", run, "1", "1.0"], ["begin", run, "0", "0.0"]]
    assert violations([*lines, *fallen], charged, steps) == {"epsilon fell"}
    assert violations(lines, charged, steps - 1) == {"past the plan"}
