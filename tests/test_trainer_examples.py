"""The examples of TRL's trainers, Seq2SeqTrainer and the bare loop run at a tiny size without a network.

Where the example loads SmolLM2, a random Llama stands in for its weights: its tokenizer and the reviews are real.
"""

from __future__ import annotations

import functools
import importlib
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import dpfa_hf

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# A given noise_multiplier saves most of the planning.
TINY = ("--max_steps", "1", "--expected_batch_size", "4", "--held_out", "4", "--target_delta", "1e-3",
        "--noise_multiplier", "2")  # fmt: skip


@pytest.fixture(scope="module")
def offline() -> Iterator[pytest.MonkeyPatch]:
    def refuse(*args: object) -> None:
        raise AssertionError(f"an example tried to reach {args[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setenv("CI", "1")  # TRL tells its makers of every trainer that is built elsewhere
        patch.syspath_prepend(str(EXAMPLES))
        # benchmarks/ and examples/ both have a module of this name.
        patch.delitem(sys.modules, "sentiment", raising=False)
        # Converting SmolLM2's tokenizer takes as long as all the rest of an example here.
        patch.setattr(tf.AutoTokenizer, "from_pretrained", functools.cache(tf.AutoTokenizer.from_pretrained))
        yield patch
        sys.modules.pop("sentiment", None)


def tiny_llama() -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        vocab_size=49152, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash")


def tiny_adapter(rank: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def run(name: str, folder: Path, *options: str) -> SimpleNamespace:
    """What one run printed, wrote and left in memory; the first 60 reviews are all that there are."""
    example: ModuleType = importlib.import_module(name)
    printed: list[str] = []
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for attribute, stand_in in (("load_model", tiny_llama), ("adapter", tiny_adapter)):
            if hasattr(example, attribute):
                patch.setattr(example, attribute, stand_in)
        few = [part.select(range(60)) for part in importlib.import_module("sentiment").load_reviews()]
        patch.setattr(example, "load_reviews", lambda: few)
        for entry in ("privatize", "PrivateLoop"):
            honest = getattr(dpfa_hf, entry)
            patch.setattr(dpfa_hf, entry, lambda *a, honest=honest, **k: made.append(honest(*a, **k)) or made[0])
        patch.setattr(example, "print", printed.append, raising=False)
        patch.setattr(sys, "argv", [str(example.__file__), "--output_dir", str(folder / "model"), *options])
        patch.setenv("DPFA_LEDGER", f"sqlite:///{folder / 'ledger.db'}")
        example.main()
    return SimpleNamespace(printed="\n".join(printed), trainer=made[0], folder=folder / "model")


@pytest.mark.parametrize(
    ("name", "options", "measured"),
    [
        ("sft", (), r"^loss after +: \d+\.\d+$"),
        ("dpo", ("--max_tokens", "12"), r"^good preferred to bad +: [01]\.\d{4} of 4"),
        ("reward", (), r"^good preferred to bad +: [01]\.\d{4} of 4"),
        ("seq2seq", ("--width", "8"), r"^generated tokens right +: [01]\.\d{4}$"),
        ("bare_loop", (), r"^accuracy with privacy +: [01]\.\d{4} on 4"),
    ],
)
def test_an_example_trains_measures_and_states_its_epsilon(
    name: str, options: tuple[str, ...], measured: str, offline: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = run(name, tmp_path, *TINY, *options)
    spent = done.trainer.privacy_spent()
    stated = float(re.search(r"^epsilon +: ([\d.]+)", done.printed, re.MULTILINE)[1])
    assert re.search(measured, done.printed.replace("\n\n", "\n"), re.MULTILINE)
    assert stated == pytest.approx(spent.epsilon, abs=5e-4) and spent.steps == 1
    assert {"privacy.json", "README.md"} <= {file.name for file in done.folder.iterdir()}
    assert any(file.suffix == ".safetensors" for file in done.folder.iterdir())
    assert str(spent.epsilon) in (done.folder / "privacy.json").read_text()


def test_no_review_is_in_two_pairs(offline: pytest.MonkeyPatch) -> None:
    """What is protected is the pair, so a review in two of them would have half the protection."""
    preferences = importlib.import_module("reward").preferences
    train, _ = importlib.import_module("sentiment").load_reviews()
    pairs = preferences(train.select(range(200)), "A critic writes: ")
    good = [row["text"][:200] for row in train.select(range(200)) if row["label"] == 1]
    assert pairs["chosen"] == good[: len(pairs)] and len(pairs) > 60
    assert set(pairs["prompt"]) == {"A critic writes: "}


def test_a_sequence_is_generated_and_compared_token_by_token(offline: pytest.MonkeyPatch) -> None:
    example = importlib.import_module("seq2seq")
    wanted = torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100]])
    found = torch.tensor([[0, 5, 9, 7, 2], [0, 8, 2, 1, 1]])
    score = example.share_of_tokens_right(SimpleNamespace(predictions=found.numpy(), label_ids=wanted.numpy()))
    assert score == {"tokens_right": pytest.approx(5 / 6)}
