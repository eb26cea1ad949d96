"""What several processes cost a step: the draw, the meeting before the sum, the sum and its way back, and the noise, by
the first process on everything or, of a model that FSDP2 spreads, by each on its own rows.

    python benchmarks/processes.py               # into benchmarks/results/processes.json; two minutes on two cores
    python benchmarks/processes.py --render      # docs/processes.md from the stored results, of draws and ledgers too

All processes run on this machine, over gloo, and share its cores: with more of them than cores the figures are upper
bounds. A draw of 2**16 units is that of n = 10^7 at q = 0.0066; its cost does not depend on n.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from sentiment import RESULTS, ROOT, machine

from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example.shards import reduce_scatter
from dpfa_hf.processes import Processes

COUNTS = (1, 2, 4, 8)
SIMULATED = (10, 100, 1000)  # processes of which the first one alone is there, cutting its share
PAGE = ROOT / "docs" / "processes.md"
NAMES = {
    "draw_ms": "2^16 units drawn, to all",
    "charge_ms": "the charge's answer, to all",
    "meeting_ms": "all meet",
    "sum_ms": "4 M sums, to the first",
    "noise_ms": "the first one's noise on 4 M",
    "copy_ms": "4 M noised sums, to all",
    "reduce_scatter_ms": "FSDP2: 4 M sums, each to its owner",
    "own_noise_ms": "FSDP2: noise on own rows",
}
DRAWN = 2**16
PARAMETERS = 2**22
ROUNDS = 11


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def measure(rank: int, count: int, port: int, output: str) -> None:
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    processes = Processes()
    draw = np.arange(DRAWN)
    sums = {"all": torch.zeros(PARAMETERS)}
    nothing = {"all": torch.zeros(1)}
    noise, own = GaussianNoise(1.0), {"own": torch.zeros(PARAMETERS // count)}
    spread = torch.zeros(PARAMETERS), torch.zeros(PARAMETERS // count)
    parts: dict[str, Callable[[], object]] = {
        "draw_ms": lambda: processes.from_first(lambda: draw),
        "charge_ms": lambda: processes.from_first(lambda: 1),
        "meeting_ms": lambda: processes.sum_to_first(nothing),
        "sum_ms": lambda: processes.sum_to_first(sums),
        "copy_ms": lambda: processes.copy_from_first(sums),
        "noise_ms": lambda: processes.from_first(lambda: noise.add_noise(sums) and None),
        "reduce_scatter_ms": lambda: reduce_scatter(spread[1], spread[0]) if count > 1 else None,
        "own_noise_ms": lambda: processes.together(lambda: noise.add_noise(own) and None),
    }
    rounds = [{name: milliseconds(part) for name, part in parts.items()} for _ in range(ROUNDS)]
    if rank == 0:
        figures = {name: round(statistics.median(each[name] for each in rounds), 3) for name in parts}
        Path(output).write_text(json.dumps(figures))
    if count > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "processes.json", help="where the figures are written")
    parser.add_argument("--render", action="store_true", help="write the page from the stored results")
    options = parser.parse_args()
    if options.render:
        PAGE.write_text(rendered(PAGE.read_text()))
        return
    found = {}
    for count in COUNTS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        scratch = options.output.with_suffix(".part")
        multiprocessing.start_processes(measure, (count, port, str(scratch)), nprocs=count, start_method="spawn")
        found[count] = json.loads(scratch.read_text())
        scratch.unlink()
        print(f"{count:3d} processes: {found[count]}", flush=True)
    sizes = {"drawn": DRAWN, "parameters": PARAMETERS, "rounds": ROUNDS}
    draw = np.arange(DRAWN)
    shares = {
        each: round(statistics.median(milliseconds(lambda each=each: draw[0::each].copy()) for _ in range(101)), 4)
        for each in SIMULATED
    }
    result = {"machine": machine(), **sizes, "processes": found, "share_ms": shares}
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def rendered(page: str) -> str:
    """The page, with its tables of costs written anew from the stored results."""
    measured, sampling, ledger = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("processes", "sampling", "ledger")
    )
    by_count = measured["processes"]
    lines = ["| milliseconds, by processes | " + " | ".join(by_count) + " |", "|---" * (1 + len(by_count)) + "|"]
    for part, name in NAMES.items():
        lines.append(f"| {name} | " + " | ".join(f"{figures[part]:.1f}" for figures in by_count.values()) + " |")
    shares = ", ".join(f"{value:.3f} ms of {count}" for count, value in measured["share_ms"].items())
    draws = {f"{each['num_units']:.0e}": each for each in sampling["draws"] if each["sampling_probability"] == 1e-4}
    drawn = ", ".join(
        f"{each['milliseconds']:.2f} ms at n = {int(n[0])} x 10^{int(n[-2:])}" for n, each in draws.items()
    )
    charges = ledger["charge_milliseconds"]
    lines += [
        "",
        f"One core: a process's share of that draw is cut in {shares}. Drawing, at q = 10^-4: {drawn}. A charge: "
        f"{charges['sqlite']['median']:.1f} ms on SQLite, {charges['postgresql']['median']:.1f} ms on PostgreSQL.",
    ]
    start, end = page.index(_START) + len(_START), page.index(_END)
    return page[:start] + "\n" + "\n".join(lines) + "\n" + page[end:]


_START, _END = "<!-- costs -->", "<!-- /costs -->"


if __name__ == "__main__":
    main()
