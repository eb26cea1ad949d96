"""What a step costs in the hardened floating-point mode, beside the same step snapped; prints, writes nothing.

    python benchmarks/hardened.py                  # a minute on two cores

A BERT encoder with random weights. One step is the clipped sum over `--rows` rows, in micro-batches, and the noise, by
the parts of a training step in turn: snapped in micro-batches of 16, snapped one row at a time, hardened (one row at a
time, sums in float64, exactly rounded noise). Medians of rounds in which each has its turn, and of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers

from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example import losses, preflight
from dpfa_hf.per_example.gradients import PerExampleGradients

CASES = {"snapped, 16 rows": ("snapped", 16), "snapped, 1 row": ("snapped", 1), "hardened, 1 row": ("hardened", 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "rows": 32,
        "tokens": 64,
        "width": 256,
        "layers": 2,
        "vocabulary": 30522,
        "repeats": 9,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    config = transformers.BertConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.width,
        num_hidden_layers=asked.layers,
        num_attention_heads=max(1, asked.width // 64),
        intermediate_size=4 * asked.width,
        max_position_embeddings=asked.tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").train()
    rows = {
        "input_ids": torch.randint(1, asked.vocabulary, (asked.rows, asked.tokens)),
        "attention_mask": torch.ones(asked.rows, asked.tokens, dtype=torch.int64),
        "labels": torch.randint(0, 2, (asked.rows,)),
    }
    loss = losses.per_example_loss(model, losses.task_of(model))
    engines = {}
    for mode in ("snapped", "hardened"):
        engines[mode] = PerExampleGradients(model, loss, clipping_norm=1.0, exact_sums=mode == "hardened")
        preflight.check(engines[mode], preflight.synthetic_batch(model, losses.task_of(model), {}))

    def step(mode: str, micro_batch: int) -> tuple[float, float]:
        """Seconds of the clipped sum and of its noise."""
        begin = time.perf_counter()
        for start in range(0, asked.rows, micro_batch):
            engines[mode].accumulate({name: value[start : start + micro_batch] for name, value in rows.items()})
        sums = engines[mode].take()
        summed = time.perf_counter()
        GaussianNoise(1.0, floating_point=mode).add_noise(sums)
        return summed - begin, time.perf_counter() - summed

    for case in CASES.values():
        step(*case)
    rounds = [{name: step(*case) for name, case in CASES.items()} for _ in range(asked.repeats)]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} million parameters, {torch.get_num_threads()} threads")
    print(f"{'':<18}{'sum s':>8}{'noise s':>9}")
    for name in CASES:
        summed, noised = (statistics.median(each[name][part] for each in rounds) for part in (0, 1))
        ratio = statistics.median(sum(each[name]) / sum(each["snapped, 1 row"]) for each in rounds)
        print(f"{name:<18}{summed:>8.3f}{noised:>9.3f}{ratio:>9.2f}x of snapped, 1 row")


if __name__ == "__main__":
    main()
