"""What several processes cost a step: the draw, the meeting before the sum, the sum and its way back, and the noise, by
the first process on everything or, of a model that FSDP2 spreads, by each on its own rows.

    python benchmarks/processes.py               # into benchmarks/results/processes.json; two minutes on two cores

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
from sentiment import RESULTS, machine

from dpfa_hf.noise import GaussianNoise
from dpfa_hf.per_example.shards import reduce_scatter
from dpfa_hf.processes import Processes

COUNTS = (1, 2, 4, 8)
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
    options = parser.parse_args()
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
    options.output.write_text(json.dumps({"machine": machine(), **sizes, "processes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
