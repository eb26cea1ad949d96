"""Fine-tune a language model on a file of texts under differential privacy, in a job that may be killed at any time.

    torchrun deploy/train.py --model BASE --train_file letters.jsonl --output_dir runs/1 --max_steps 100 \
        --target_epsilon 3 --expected_batch_size 256 --ledger_dataset letters

BASE is a folder with a causal language model and its tokenizer; the file has one JSON object a line, with a `text`.
Started again with the same arguments, it goes on from the last checkpoint: steps that were charged stay charged. The
model is written to `output_dir/model`, without the checkpoints, to be signed and served. All of `TrainingArguments` and
`PrivacyArguments` can be given. The Helm chart runs this script, or one of yours in its place.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import dpfa_hf

OPENED = "run.opened"
DEFAULTS = ["--report_to=none", "--save_strategy=steps", "--save_steps=25", "--save_total_limit=2"]


@dataclass
class JobArguments:
    model: str = field(metadata={"help": "Folder of the base model and its tokenizer."})
    train_file: str = field(metadata={"help": "JSON lines with a field text: the private records, one a line."})
    # Fixed without looking at the texts: a length taken from them would be a release.
    max_tokens: int = field(default=256, metadata={"help": "Tokens of a text that are read."})
    metrics_port: int | None = field(default=None, metadata={"help": "Port for Prometheus. Default: no metrics."})
    metrics_address: str = field(default="127.0.0.1", metadata={"help": "Address that Prometheus reaches."})
    pushgateway: str | None = field(default=None, metadata={"help": "host:port that keeps the last values."})


class Opened(TrainerCallback):
    """Leaves a mark once the ledger has reserved the run's budget, and a checkpoint as soon as there is a step.

    A run that is killed before its first checkpoint cannot be resumed, and what it reserved is not refunded. Without
    the mark every restart would reserve the whole of it again.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir, OPENED).touch()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_save = control.should_save or state.global_step == 1
        return control


def resumable(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from.

    Raises:
        PrivacyError: a run was opened here and left none; only a person can decide to spend its budget again.
    """
    if not folder.is_dir():
        return False
    if get_last_checkpoint(str(folder)) is not None:
        return True
    if (folder / OPENED).exists():
        raise dpfa_hf.PrivacyError(
            f"output_dir {folder} is of a run that ended before its first checkpoint; what it reserved stays reserved, "
            "so starting again is for you to decide: give another output_dir (the chart: training.run)"
        )
    return False


def main() -> None:
    parser = HfArgumentParser((JobArguments, TrainingArguments, dpfa_hf.PrivacyArguments))
    job, args, privacy = parser.parse_args_into_dataclasses([*DEFAULTS, *cpu_arguments(), *sys.argv[1:]])
    folder = Path(args.output_dir)
    model_folder = folder / "model"
    if (model_folder / "privacy.json").exists():
        print(f"{model_folder} holds the finished model: nothing to do")
        return
    resume = resumable(folder)

    for path in (job.model, job.train_file):
        if not Path(path).exists():
            sys.exit(f"train.py: there is no {path}: is its volume mounted?")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = load_dataset("json", data_files=job.train_file, split="train")
    if "text" not in texts.column_names:
        sys.exit(f"train.py: the rows of {job.train_file} have no field text")
    train = texts.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=job.max_tokens),
        batched=True,
        remove_columns=texts.column_names,
    )
    callbacks: list[TrainerCallback] = [Opened()]
    if job.metrics_port is not None or job.pushgateway is not None:
        callbacks.append(
            dpfa_hf.PrometheusCallback(port=job.metrics_port, address=job.metrics_address, pushgateway=job.pushgateway)
        )
    trainer = dpfa_hf.DPTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, attn_implementation="dp_flash"),
        args=args,
        train_dataset=train,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=callbacks,
        privacy_args=privacy,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(model_folder))
    if trainer.is_world_process_zero():
        spent = trainer.privacy_spent()
        print(f"{model_folder}: {spent.steps} steps charged, epsilon {spent.epsilon:.3f} at delta {spent.delta:g}")


def cpu_arguments() -> list[str]:
    """What Trainer has to be told on a machine without GPUs."""
    if torch.cuda.is_available():
        return []
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return ["--use_cpu=True", *(["--ddp_backend=gloo"] if several else [])]


if __name__ == "__main__":
    try:
        main()
    except dpfa_hf.PrivacyError as error:
        sys.exit(f"train.py: {error}")
