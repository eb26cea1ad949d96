"""What the size of the data set costs: draws, plans and the data path, into benchmarks/results/sampling.json.

    python benchmarks/sampling.py                     # two minutes on one core, 0.5 GB of temporary files
    python benchmarks/sampling.py --rows 100000       # a smaller data set on disk

*Draws* come from `TruncatedPoissonSampler` with n from 10^5 to 10^8, at q = 10^-4, where the batch grows with n, and at
an expected batch of 1,000, where it does not. *Plans* are made for three passes at epsilon 3. The *data path* is a
memory-mapped Arrow file of `--rows` rows of 8 tokens, and the first hundredth of it: opening it, building a `DPTrainer`
on it, drawing, and reading and collating what was drawn, as the trainer's data loader does. Times are medians, in
milliseconds, of one core. Memory is what Python and numpy allocate at most (tracemalloc), in KiB; mapped pages of the
file belong to the system's cache and are not in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pyarrow as pa
import torch
import transformers
from noise import rounded
from sentiment import RESULTS, machine

from dpfa_hf import DPTrainer, PrivacyArguments, batch_selection
from dpfa_hf.accounting import make_plan
from dpfa_hf.batch_selection import TruncatedPoissonSampler

SIZES = (10**5, 10**6, 10**7, 10**8)
PROBABILITY, BATCH = 1e-4, 1000
TOKENS, VOCABULARY, CHUNK = 8, 1000, 10**5
GOAL_MS = 10.0  # for n = 10^7 and q = 10^-4


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def peak_kib(function: Callable[[], object]) -> float:
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**10


def words(function: Callable[[], object]) -> int:
    """64-bit words that `function` takes from the operating system."""
    source, taken = batch_selection._operating_system_words, []
    batch_selection._operating_system_words = lambda count: taken.append(count) or source(count)
    try:
        function()
    finally:
        batch_selection._operating_system_words = source
    return sum(taken)


def measure_draws(num_units: int, probability: float, repeats: int) -> dict:
    mean = num_units * probability
    draws = iter(TruncatedPoissonSampler(num_units, probability, int(mean + 10 * mean**0.5) + 1))

    def draw() -> np.ndarray:
        return next(draws)

    draw()
    return {
        "num_units": num_units,
        "sampling_probability": probability,
        "expected_batch_size": mean,
        "milliseconds": milliseconds(draw, repeats),
        "peak_kib": peak_kib(draw),
        "words": words(draw),
    }


def measure_plan(num_units: int) -> dict:
    steps = 3 * num_units // BATCH
    start = time.perf_counter()
    plan = make_plan(
        PrivacyArguments(target_epsilon=3.0), num_units=num_units, expected_batch_size=BATCH, max_steps=steps,
        loss_scale=1.0,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {
        "num_units": num_units,
        "max_steps": steps,
        "seconds": seconds,
        "noise_multiplier": plan.noise_multiplier,
        "max_batch_size": plan.max_batch_size,
    }


def write_rows(path: Path, rows: int) -> None:
    """An Arrow stream of `rows` rows of tokens and a label, in record batches as `datasets` writes them."""
    schema = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.Value("int64")}
    ).arrow_schema
    generator = np.random.default_rng(0)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            tokens = generator.integers(1, VOCABULARY, count * TOKENS, dtype=np.int32)
            offsets = np.arange(0, (count + 1) * TOKENS, TOKENS, dtype=np.int32)
            columns = [pa.ListArray.from_arrays(offsets, tokens), generator.integers(0, 2, count)]
            stream.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=schema))


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def tiny_model() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    return transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")


def measure_path(folder: Path, rows: int, probability: float, repeats: int) -> dict:
    file = folder / f"{rows}.arrow"
    write_rows(file, rows)
    opening = milliseconds(lambda: datasets.Dataset.from_file(str(file)), 3)
    dataset = datasets.Dataset.from_file(str(file))
    args = transformers.TrainingArguments(
        str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="no",
        per_device_train_batch_size=64, log_level="error",
    )  # fmt: skip
    privacy = PrivacyArguments(
        target_epsilon=float("inf"), noise_multiplier=0.0, expected_batch_size=BATCH, sampling_probability=probability,
        ledger=f"sqlite:///{folder}/ledger.sqlite3",
    )  # fmt: skip
    model = tiny_model()

    def build() -> DPTrainer:
        return DPTrainer(model=model, args=args, train_dataset=dataset, data_collator=collate, privacy_args=privacy)

    building = milliseconds(build, 3)
    building_peak = peak_kib(build)
    trainer = build()
    loader = trainer.get_train_dataloader()
    batches = (batch for _ in itertools.count() for batch in loader)
    _, collated = next(batches)
    assert abs(sum(len(each["labels"]) for each in collated) / (rows * probability) - 1) < 1
    return {
        "num_units": rows,
        "file_mib": file.stat().st_size / 2**20,
        "opening_milliseconds": opening,
        "building_trainer_milliseconds": building,
        "building_trainer_peak_kib": building_peak,
        "expected_batch_size": rows * probability,
        "draw_read_and_collate_milliseconds": milliseconds(lambda: next(batches), repeats),
        "draw_read_and_collate_peak_kib": peak_kib(lambda: next(batches)),
        "whole_training_of_one_step_seconds": milliseconds(trainer.train, 1) / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**7, help="rows of the Arrow file (default 10 million)")
    parser.add_argument("--repeats", type=int, default=101, help="draws of which the median is taken (default 101)")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling.json", help="where the figures are written")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    print(f"{'n':>12}{'q':>10}{'batch':>8}{'ms':>9}{'KiB':>9}{'words':>9}")
    draws = []
    for probabilities in ([PROBABILITY] * len(SIZES), [BATCH / size for size in SIZES]):
        for size, probability in zip(SIZES, probabilities, strict=True):
            found = measure_draws(size, probability, arguments.repeats)
            draws.append(found)
            print("{:>12,}{:>10.2g}{:>8.0f}{:>9.3f}{:>9.0f}{:>9}".format(*found.values()), flush=True)
    plans = []
    for size in SIZES:
        plans.append(measure_plan(size))
        print(f"plan for {size:,}: {plans[-1]['seconds']:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for rows in (arguments.rows // 100, arguments.rows):
            # The same batch from either: what differs is the size alone.
            paths.append(measure_path(Path(folder), rows, BATCH / rows, max(5, arguments.repeats // 5)))
            print(json.dumps(rounded(paths[-1])), flush=True)
    goal = next(d for d in draws if d["num_units"] == 10**7 and d["sampling_probability"] == PROBABILITY)
    found_on = machine()
    found_on["packages"] |= {name: version(name) for name in ("datasets", "pyarrow")}
    document = {
        "benchmark": "sampling",
        "machine": found_on,
        "goal": rounded(
            {"milliseconds": GOAL_MS, "measured": goal["milliseconds"], "met": goal["milliseconds"] <= GOAL_MS}
        ),
        "draws": [rounded(each) for each in draws],
        "plans": [rounded(each) for each in plans],
        "data_path": [rounded(each) for each in paths],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
