"""`privacy_unit="user"` through the trainer: users are drawn, then rows of each, and a user is clipped once."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from typer.testing import CliRunner

from dpfa_hf import DPTrainer, PrivacyArguments, PrivacyError, cli, privatize
from dpfa_hf.batch_selection import LogicalBatches, Users
from dpfa_hf.per_example.units import Units
from dpfa_hf.report import read_report

Row = dict[str, Any]
VOCABULARY, LENGTH = 53, 24
SLACK = 1 + 2**-10
COUNTS = (3, 1, 5, 2, 1, 4)  # rows of each user
NAMES = ("alice@secret.example", "bob@secret.example", "carol@secret.example", "dora@secret.example",
         "emil@secret.example", "fritz@secret.example", "newcomer@secret.example")  # fmt: skip


def bert() -> nn.Module:
    config = tf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.AutoModelForSequenceClassification.from_config(config, attn_implementation="dp_flash")


def gpt2() -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def text(ids: list[int], labels: Any) -> Row:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def rows_of_users(build: Callable, counts: tuple[int, ...] = COUNTS, seed: int = 0) -> list[list[Row]]:
    """Of each user so many rows of 2 to 9 tokens."""
    generator = np.random.default_rng(seed)
    users = []
    for count in counts:
        ids = [generator.integers(1, VOCABULARY, generator.integers(2, 10)).tolist() for _ in range(count)]
        users.append([text(each, each if build is gpt2 else sum(each) % 2) for each in ids])
    return users


def data_set(users: list[list[Row]]) -> datasets.Dataset:
    """The users' rows in disorder, so that no user's rows are neighbours."""
    rows = [{**row, "who": NAMES[user]} for user, own in enumerate(users) for row in own]
    return datasets.Dataset.from_list([rows[i] for i in np.random.default_rng(1).permutation(len(rows))])


def padding(rows: list[Row]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        values = [row[name] for row in rows]
        if isinstance(values[0], list):
            values = [value + [filler] * (longest - len(value)) for value in values]
        batch[name] = torch.tensor(values)
    return batch


def training_args(folder: Path, **kwargs: Any) -> tf.TrainingArguments:
    usual: dict[str, Any] = {
        "output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 1,
        "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "save_strategy": "no",
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    return tf.TrainingArguments(**{**usual, **kwargs})


def privacy(folder: Path, **kwargs: Any) -> PrivacyArguments:
    folder.mkdir(parents=True, exist_ok=True)
    usual: dict[str, Any] = {
        "target_epsilon": math.inf, "noise_multiplier": 0.0, "expected_batch_size": 5, "sampling_probability": 1.0,
        "privacy_unit": "user", "privacy_unit_column": "who", "ledger": f"sqlite:///{folder}/ledger.db",
    }  # fmt: skip
    return PrivacyArguments(**{**usual, **kwargs})


def make(folder: Path, build: Callable = bert, users: list[list[Row]] | None = None, **kwargs: Any) -> Any:
    parts = {
        "model": build(),
        "args": kwargs.pop("args", None) or training_args(folder),
        "train_dataset": data_set(rows_of_users(build) if users is None else users),
        "data_collator": padding,
        "privacy_args": privacy(folder),
    }
    return DPTrainer(**{**parts, **kwargs})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])


def step(trainer: Any) -> torch.Tensor:
    """What one noiseless step adds up, times -1."""
    before = weights(trainer.model)
    trainer.train()
    return (before - weights(trainer.model)) * trainer.privacy_plan.expected_batch_size


def user_gradients(build: Callable, users: list[list[Row]]) -> list[torch.Tensor]:
    """The definition: one row at a time, the model's own loss, autograd in float64; a user's is the mean."""
    model = build().double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for rows in users:
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for row in rows:
            batch = {name: torch.tensor([value]) for name, value in row.items()}
            grads = torch.autograd.grad(model(**batch).loss, parameters)
            total += torch.cat([g.flatten() for g in grads]) / len(rows)
        found.append(total)
    return found


def clipped_sum(gradients: list[torch.Tensor], norm: float) -> torch.Tensor:
    return torch.stack([g * min(1.0, norm / float(g.norm())) for g in gradients]).sum(0)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- exactness ------------------------------------------------------------------------------------------------------


def worst_error(folder: Path, build: Callable) -> float:
    gradients = user_gradients(build, rows_of_users(build))
    norms = sorted(float(g.norm()) for g in gradients)
    found = []
    for norm in (norms[0] / 10, (norms[-1] * norms[-2]) ** 0.5):
        for size in (1, 2, 100):
            trainer = make(
                folder / f"{norm}-{size}", build, args=training_args(folder, per_device_train_batch_size=size),
                privacy_args=privacy(folder, per_example_max_grad_norm=norm, max_examples_per_user=5),
            )  # fmt: skip
            found.append(error(step(trainer), clipped_sum(gradients, norm)))
    return max(found)


@pytest.mark.parametrize("build", [bert, gpt2])
def test_one_step_equals_a_float64_loop_over_the_users(build: Callable, tmp_path: Path) -> None:
    assert worst_error(tmp_path, build) < 1e-4


def rows_clipped(self: Units, gradient: Any) -> Any:
    return gradient


def test_mutant_rows_clipped_instead_of_users_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Units, "mean", lambda self, losses: losses)
    monkeypatch.setattr(Units, "gathered", rows_clipped)
    assert worst_error(tmp_path, bert) > 0.1


class SplitUsers(LogicalBatches):
    """Fills micro-batches with rows, whoever's they are."""

    def __getitem__(self, units: Any) -> list[Any]:
        return super().__getitem__([np.array([row]) for unit in units for row in unit])


def test_mutant_users_split_over_micro_batches_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpfa_hf import trainer as trainer_module

    monkeypatch.setattr(trainer_module, "LogicalBatches", SplitUsers)
    assert worst_error(tmp_path, bert) > 0.1


def usual_step(folder: Path, **kwargs: Any) -> torch.Tensor:
    return step(make(folder, privacy_args=privacy(folder, max_examples_per_user=5), **kwargs))


def test_workers_and_privatize_take_the_same_step(tmp_path: Path) -> None:
    expected = usual_step(tmp_path / "usual")
    args = training_args(tmp_path, dataloader_num_workers=1)
    assert error(usual_step(tmp_path / "workers", args=args), expected) < 1e-6
    stock = tf.Trainer(
        model=bert(), args=training_args(tmp_path), train_dataset=data_set(rows_of_users(bert)), data_collator=padding
    )
    trainer: Any = privatize(stock, privacy(tmp_path, max_examples_per_user=5))
    assert error(step(trainer), expected) < 1e-6


@pytest.mark.parametrize("clipping", ["automatic", "per_layer", "adaptive"])
def test_every_clipping_keeps_a_user_within_c(clipping: str, tmp_path: Path) -> None:
    """One user alone, of many rows: the longest that a step can be."""
    users = rows_of_users(bert, (30,))
    asked = privacy(
        tmp_path, clipping=clipping, per_example_max_grad_norm=0.01, expected_batch_size=1, max_examples_per_user=40
    )
    moved = float(step(make(tmp_path, bert, users, privacy_args=asked)).norm())
    assert 0.3 * 0.01 < moved <= 0.01 * SLACK


def test_a_step_takes_at_most_k_rows_of_a_user_and_draws_them_afresh(tmp_path: Path) -> None:
    users = rows_of_users(bert, (40,))
    gradients = [user_gradients(bert, [[row]])[0] for row in users[0]]
    found = set()
    for run in range(4):
        folder = tmp_path / str(run)
        asked = privacy(folder, per_example_max_grad_norm=1e6, expected_batch_size=1, max_examples_per_user=1)
        moved = step(make(folder, bert, users, privacy_args=asked))
        errors = [error(moved, gradient) for gradient in gradients]
        assert min(errors) < 1e-4, "the step is no single row's"
        found.add(int(np.argmin(errors)))
    assert len(found) > 1  # four times the same of forty rows: once in 64,000


# ---- one user more or less ------------------------------------------------------------------------------------------


def hostile_users(build: Callable) -> dict[str, list[Row]]:
    generator = np.random.default_rng(7)

    def long(seed: int) -> Row:
        ids = np.random.default_rng(seed).integers(1, VOCABULARY, LENGTH).tolist()
        return text(ids, ids if build is gpt2 else seed % 2)

    same = [5] * LENGTH
    impossible = text([4] * 6, [10**6] * 6 if build is gpt2 else 10**6)
    outside = text([VOCABULARY + 5] * 4, [1] * 4 if build is gpt2 else 1)
    return {
        "many long rows": [long(i) for i in range(60)],
        "one long row": [long(0)],
        "the same row many times": [text(same, same if build is gpt2 else 1)] * 60,
        "impossible labels": [impossible] * 3,
        "an impossible label among others": [impossible, long(1), long(2)],
        "a token outside the table": [long(1), outside],
        "too long for the model": [long(1), text([4] * (LENGTH + 3), [4] * (LENGTH + 3) if build is gpt2 else 1)],
        "a mask of another length": [long(1), {**long(2), "attention_mask": [1] * 5}],
        "raises in collation": [long(1), text([4, 44], [4, 44] if build is gpt2 else 0)],
        "no row": [],
        "unequal rows": [long(3), *[text([int(generator.integers(1, 9))] * 2, [1, 2] if build is gpt2 else 0)] * 20],
    }  # fmt: skip


ADDS_NOTHING = ("impossible labels", "a token outside the table", "too long for the model", "a mask of another length",
                "raises in collation", "no row")  # fmt: skip


def raises_in_collation(rows: list[Row]) -> Any:
    if any(row["input_ids"][-1] == 44 and len(row["input_ids"]) == 2 for row in rows):
        raise RuntimeError("a private value")
    return padding(rows)


def moved_by(folder: Path, build: Callable, users: list[list[Row]], norm: float) -> torch.Tensor:
    """The noiseless update of one step over all users, in units of C / expected batch."""
    trainer = make(
        folder, build, users, data_collator=raises_in_collation,
        privacy_args=privacy(folder, per_example_max_grad_norm=norm, max_examples_per_user=60),
        args=training_args(folder, per_device_train_batch_size=2),
    )  # fmt: skip
    return step(trainer) / norm


def everyone_clipped(build: Callable) -> tuple[list[list[Row]], float]:
    return rows_of_users(build), 0.02


def aligned_below_c(build: Callable) -> tuple[list[list[Row]], float]:
    rows = rows_of_users(build)[0]
    return [rows] * 6, float(user_gradients(build, [rows])[0].norm()) * 1.001


REGIMES = {"everyone clipped": everyone_clipped, "aligned below C": aligned_below_c}


def moves(folder: Path, build: Callable, regime: str, kinds: list[str] | None = None) -> dict[str, float]:
    bystanders, norm = REGIMES[regime](build)
    without = moved_by(folder / "without", build, bystanders, norm)
    newcomers = {**hostile_users(build), "aligned with the others": bystanders[0]}
    return {
        kind: float((moved_by(folder / kind, build, [*bystanders, newcomers[kind]], norm) - without).norm())
        for kind in kinds or newcomers
    }


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("build", [bert, gpt2])
def test_no_user_moves_the_update_by_more_than_c_over_the_expected_batch(
    build: Callable, regime: str, tmp_path: Path
) -> None:
    found = moves(tmp_path, build, regime)
    assert 0.9 < max(found.values()) <= SLACK, found
    assert max(found[kind] for kind in ADDS_NOTHING) < 1e-3, found


def test_mutant_rows_clipped_moves_the_update_by_more_than_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Units, "mean", lambda self, losses: losses)
    monkeypatch.setattr(Units, "gathered", rows_clipped)
    kind = "the same row many times"
    assert moves(tmp_path, bert, "everyone clipped", [kind])[kind] > 10


def test_mutant_a_mean_over_the_micro_batch_moves_the_update_by_more_than_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean(self: Units, losses: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.sum() for part in losses.split(self.rows)]) / len(losses)

    def moved(folder: Path) -> float:
        newcomer = hostile_users(bert)["many long rows"]
        updates = [moved_by(folder / str(len(users)), bert, users, norm) for users in (rows, [*rows, newcomer])]
        return float((updates[1] - updates[0]).norm())

    rows, norm = aligned_below_c(bert)
    norm /= len(rows)
    assert moved(tmp_path / "honest") <= SLACK
    monkeypatch.setattr(Units, "mean", mean)
    assert moved(tmp_path / "mutant") > 3


def rows_given(trainer: Any) -> list[tuple[int, ...]]:
    """Notes the rows of every unit that a micro-batch is made of."""
    given: list[tuple[int, ...]] = []
    read = LogicalBatches._read_unit

    def noted(self: LogicalBatches, unit: Any) -> list[list[Any]]:
        given.append(tuple(np.atleast_1d(unit).tolist()))
        return read(self, unit)

    LogicalBatches._read_unit = noted  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        LogicalBatches._read_unit = read  # type: ignore[method-assign]
    return given


def keeps_its_rows(folder: Path) -> bool:
    """Whether a user who is tried again, because somebody else's row raises, has the rows that were drawn first."""
    bad = hostile_users(bert)["too long for the model"][1:]
    users = [*rows_of_users(bert, (40, 30)), bad]
    trainer = make(folder, bert, users, privacy_args=privacy(folder, max_examples_per_user=3, expected_batch_size=2))
    given = rows_given(trainer)
    assert len(given) == 6, "nobody was tried again, so the test tries nothing"
    return sorted(given[:3]) == sorted(given[3:])


def test_a_user_who_is_tried_again_keeps_the_rows_that_were_drawn(tmp_path: Path) -> None:
    assert keeps_its_rows(tmp_path)


def test_mutant_rows_drawn_again_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = LogicalBatches.__getitem__

    def drawing(self: LogicalBatches, units: Any) -> list[Any]:
        assert self.users is not None
        owner = {int(row): user for user in range(len(self.users)) for row in self.users.draw(user, 10**6)}
        return take(self, [self.users.draw(owner[int(unit[0])], 3) for unit in units])

    monkeypatch.setattr(LogicalBatches, "__getitem__", drawing)
    assert not keeps_its_rows(tmp_path)


# ---- the plan, the ledger and the report ----------------------------------------------------------------------------


def private_run(folder: Path, **kwargs: Any) -> Any:
    args = training_args(folder, max_steps=3, save_strategy="steps", save_steps=1, learning_rate=0.1, logging_steps=1)
    asked = privacy(
        folder, target_epsilon=50.0, noise_multiplier=1.0, target_delta=0.05, accountant="rdp", expected_batch_size=2,
        sampling_probability=None, max_examples_per_user=2, ledger_dataset="mails",
    )  # fmt: skip
    return make(folder, args=args, privacy_args=asked, **kwargs)


def again(folder: Path, trainer: Any, **changes: Any) -> Any:
    return make(
        folder, args=training_args(folder, max_steps=3),
        privacy_args=PrivacyArguments(**{**vars(trainer._privacy_args), **changes}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("finished")
    trainer = private_run(folder)
    trainer.train()
    trainer.save_model()
    return folder, trainer


def units_are_users(trainer: Any) -> bool:
    plan = trainer.privacy_plan
    return plan.num_units == len(COUNTS) and plan.sampling_probability == 2 / len(COUNTS)


def test_n_and_the_sampling_probability_count_users(
    finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert units_are_users(finished[1])
    with pytest.raises(PrivacyError, match="target_delta"):  # 1/n of the 16 rows would be 0.06, but of 6 users
        make(tmp_path, users=rows_of_users(bert)[:3], privacy_args=privacy(
            tmp_path, target_epsilon=9.0, noise_multiplier=1.0, target_delta=0.34, expected_batch_size=1
        ))  # fmt: skip
    monkeypatch.setattr(Users, "__len__", lambda self: len(self._rows))
    assert not units_are_users(private_run(tmp_path)), "the mutant that counts rows as units is not caught"


def test_the_report_says_what_a_user_is_and_what_zero_out_leaves_open(finished: tuple[Path, Any]) -> None:
    folder, trainer = finished
    report = read_report(folder / "out")
    unit = report["unit"]
    assert unit["privacy_unit"] == "user" and "column who" in unit["what"]
    assert "at most 2 of the user's rows" in unit["how_built"]
    assert "one of a user's rows is not covered" in unit["neighbours"]
    assert "n is the number of users and that every row names one" in unit["public"]
    assert report["plan"]["max_examples_per_user"] == 2 and report["mechanism"]["num_units"] == len(COUNTS)
    card = (folder / "out" / "README.md").read_text()
    assert "all rows of the training data set with one value in the column who" in " ".join(card.split())
    replaced = make(folder, privacy_args=privacy(folder, adjacency="replace_one")).privacy_report()
    assert "covered too" in replaced["unit"]["neighbours"]


def test_the_ledger_binds_a_data_set_to_users_by_one_column(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder, trainer = finished
    record = trainer._ledger.runs()[0]
    assert record.privacy_unit == "user by who" and record.steps == 3 and record.plan["privacy_unit_column"] == "who"
    renamed = data_set(rows_of_users(bert)).rename_column("who", "sender")
    asked = PrivacyArguments(**{**vars(trainer._privacy_args), "privacy_unit_column": "sender"})
    other = make(tmp_path, train_dataset=renamed, privacy_args=asked)
    with pytest.raises(PrivacyError, match="privacy_unit|unit"):
        other.train()


OF_EXAMPLES = {"privacy_unit": "example", "privacy_unit_column": None, "max_examples_per_user": None}


@pytest.mark.parametrize("changes", [{"max_examples_per_user": 3}, OF_EXAMPLES], ids=["most", "unit"])
def test_a_resumed_run_keeps_its_unit_and_its_most_examples(finished: tuple[Path, Any], changes: Row) -> None:
    folder, trainer = finished
    with pytest.raises(PrivacyError, match="resuming run .* with another"):
        again(folder, trainer, **changes).train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))


def test_a_killed_run_resumes_with_its_users(tmp_path: Path) -> None:
    class Killed(tf.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = private_run(tmp_path, callbacks=[Killed()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    resumed = again(tmp_path, trainer)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.privacy_spent().steps == 3


def quoted(folder: Path, printed: str) -> list[str]:
    """The files, and what was printed, that hold a user's name."""
    texts = {str(path): path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()}
    texts["printed"] = printed
    return [where for where, content in texts.items() if any(name in content for name in NAMES)]


def test_no_users_name_is_written_logged_or_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trainer = private_run(tmp_path, users=[*rows_of_users(bert), hostile_users(bert)["too long for the model"]])
    trainer.train()
    trainer.save_model()
    printed = "".join(capfd.readouterr())
    assert quoted(tmp_path, printed + json.dumps(trainer.state.log_history)) == []
    (tmp_path / "planted.json").write_text(json.dumps({"worst": NAMES[2]}))
    assert quoted(tmp_path, "") == [str(tmp_path / "planted.json")]


def test_the_users_column_is_never_given_to_the_collator_or_the_model(tmp_path: Path) -> None:
    seen: set[str] = set()

    def collate(rows: list[Row]) -> Any:
        seen.update(*rows)
        return padding(rows)

    args = training_args(tmp_path, remove_unused_columns=False)
    assert torch.isfinite(step(make(tmp_path, args=args, data_collator=collate))).all()
    assert seen == {"input_ids", "attention_mask", "labels"}


# ---- refusals -------------------------------------------------------------------------------------------------------


def replaced(trainer: Any) -> Any:
    trainer.train_dataset = copy.copy(trainer.train_dataset)
    return trainer


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a data set without columns": (lambda f: make(f, train_dataset=rows_of_users(bert)[2]), "from_list"),
    "a column that is not there": (
        lambda f: make(f, privacy_args=privacy(f, privacy_unit_column="sender")),
        "'sender'.*'who'",
    ),
    "rows packed without padding": (
        lambda f: make(f, gpt2, data_collator=tf.DataCollatorWithFlattening()).train(),
        "data_collator turned 3 rows into 1",
    ),
    "other users afterwards": (lambda f: replaced(make(f)).train(), "train_dataset was replaced"),
    "hardened": (
        lambda f: privacy(f, floating_point="hardened", target_epsilon=3.0, noise_multiplier=1.0),
        "floating_point='hardened'.*'snapped'",
    ),
    "clipping row by row": (lambda f: privacy(f, privacy_unit="example"), "one by one and protect no user"),
    "more users expected than there are": (
        lambda f: make(f, privacy_args=privacy(f, sampling_probability=None, expected_batch_size=7)),
        "expected_batch_size=7 is more than the 6 units",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_make_a_users_epsilon_untrue_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make_it, named = REFUSED[name]
    with pytest.raises(PrivacyError, match=named) as raised:
        make_it(tmp_path)
    assert "\n" not in str(raised.value) and not any(each in str(raised.value) for each in NAMES)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_dpfa_plan_plans_for_users() -> None:
    command = [
        "plan",
        "-n",
        "2000",
        "--target-epsilon",
        "3",
        "--expected-batch-size",
        "64",
        "--max-steps",
        "20",
        "--json",
        "--accountant",
        "rdp",
    ]

    def planned(*more: str) -> Any:
        return CliRunner().invoke(cli.app, [*command, *more])

    rows = [json.loads(planned(*more).stdout)[0] for more in ((), ("--privacy-unit", "user"))]
    assert [row.pop("privacy_unit") for row in rows] == ["example", "user"]
    assert rows[0] == rows[1] and rows[0]["refused"] is None
    assert planned("--privacy-unit", "person").exit_code == 2
