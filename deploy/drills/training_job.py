"""A small private training job: a language model of a few thousand parameters, with a checkpoint at every step.

    DPFA_LEDGER=sqlite:////tmp/ledger.db python deploy/drills/training_job.py --output_dir /tmp/model \\
        --ledger_dataset notes --target_epsilon 3

It prints "step N" after every step, and saves a model that `transformers serve` can serve. All of `PrivacyArguments`
can be given. Drills kill it and start it again with --resume.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import dpfa_hf

NOTES = 64
# With the noise given, planning takes no search.
DEFAULTS = ["--target_epsilon=3", "--target_delta=1e-3", "--noise_multiplier=1", "--accountant=rdp"]


@dataclass
class JobArguments:
    output_dir: str = field(metadata={"help": "Where checkpoints and the model are written."})
    max_steps: int = field(default=8, metadata={"help": "Steps of training."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    seconds_a_step: float = field(default=0.0, metadata={"help": "Sleep so long after every step."})


class Progress(tf.TrainerCallback):
    def __init__(self, seconds_a_step: float) -> None:
        self._pause = seconds_a_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"step {state.global_step}", flush=True)
        time.sleep(self._pause)


def build_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    return fast


def main() -> None:
    parser = tf.HfArgumentParser((JobArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    job, privacy = parser.parse_args_into_dataclasses([*DEFAULTS, *sys.argv[1:]])
    torch.set_num_threads(1)
    tf.set_seed(0)  # of the weights before training; never of the noise
    tokenizer = build_tokenizer()
    notes = [f"note {number}: patient {number * 7 % 64} was seen on day {number % 30}" for number in range(NOTES)]
    rows = Dataset.from_dict({"text": notes}).map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=32), remove_columns="text"
    )
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    trainer = dpfa_hf.DPTrainer(
        model=tf.AutoModelForCausalLM.from_config(config, attn_implementation="dp_flash"),
        args=tf.TrainingArguments(
            job.output_dir,
            use_cpu=True,
            max_steps=job.max_steps,
            per_device_train_batch_size=8,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=tf.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        privacy_args=privacy,
        callbacks=[Progress(job.seconds_a_step)],
    )
    trainer.train(resume_from_checkpoint=job.resume or None)
    trainer.save_model()
    print(trainer.privacy_spent())


if __name__ == "__main__":
    main()
