"""Time and memory of the noise against `torch.randn`, into benchmarks/results/noise.json.

    python benchmarks/noise.py                      # a minute on two cores
    python benchmarks/noise.py --normals 1000000 --repeats 3

On the CPU: nanoseconds for one element, with one thread and with as many as PyTorch takes, of `GaussianNoise.add_noise`
(cipher, Box-Muller, addition, grid and the look for what is not finite) and of its hardened mode, in turn with
`torch.randn` of as many float32 normals, which only draws. Processor time, of all threads together, is shown beside
the wall clock's: it tells what other work on the machine took. On a GPU: gigabytes a second of the Triton kernel, which
reads and writes every sum once, and their share of what copying a tensor reaches there. Without a GPU that is left out,
and the file says so. Noise that is not the same bits for one thread and for several, or has the wrong spread, is not
timed; neither is a kernel that differs from the CPU.

Memory: the highest resident size of a process of its own that noises 256 MiB of sums, less that of one that does not.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sentiment import RESULTS, machine

from dpfa_hf import hardened_noise
from dpfa_hf.noise import GaussianNoise

STANDARD_DEVIATION = 0.7
MEMORY_ELEMENTS = 2**26  # 256 MiB of float32
MODES = ("snapped", "hardened")
WITHOUT_GPU = "no GPU here: bandwidth of the Triton kernel not measured"


def noised(mode: str, elements: int, threads: int, device: str = "cpu") -> torch.Tensor:
    """Noise alone, from a key that is the same in every call."""
    torch.set_num_threads(threads)
    mechanism = GaussianNoise(STANDARD_DEVIATION, floating_point=mode, _key_source=bytes)
    return mechanism.add_noise([torch.zeros(elements, device=device)])[0].cpu()


def refuse_if_wrong(threads: int) -> None:
    elements = 2**20 + 77
    snapped = noised("snapped", elements, 1)
    grid = GaussianNoise(STANDARD_DEVIATION).grid
    for mode in MODES:
        one, several = noised(mode, elements, 1), noised(mode, elements, threads)
        if not torch.equal(one, several):
            sys.exit(f"{mode}: {threads} threads draw another noise than one: not timed")
        if abs(float(one.std()) / STANDARD_DEVIATION - 1) > 5 / math.sqrt(2 * elements):
            sys.exit(f"{mode}: the standard deviation is {float(one.std())}, not {STANDARD_DEVIATION}: not timed")
        if float((one - snapped).abs().max()) > grid:
            sys.exit(f"{mode}: further than the grid from the snapped noise: not timed")
    if torch.cuda.is_available() and float((noised("snapped", elements, 1, "cuda") - snapped).abs().max()) > grid:
        sys.exit("the kernel is further than the grid from the CPU's noise: not timed")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_time(elements: int, warm_up: int, repeats: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    sums = [torch.zeros(elements)]
    draws: dict[str, Callable[[], object]] = {"torch_randn": lambda: torch.randn(elements)}
    for mode in MODES:
        mechanism = GaussianNoise(STANDARD_DEVIATION, floating_point=mode)
        draws[mode] = lambda mechanism=mechanism: mechanism.add_noise(sums)

    def both_clocks(draw: Callable[[], object]) -> tuple[float, float]:
        start = time.process_time()
        wall = seconds(draw)
        return wall, time.process_time() - start

    rounds = [{name: both_clocks(draw) for name, draw in draws.items()} for _ in range(warm_up + repeats)][warm_up:]

    def nanoseconds(clock: int) -> dict:
        return {name: 1e9 / elements * statistics.median(r[name][clock] for r in rounds) for name in draws}

    return {
        "nanoseconds": nanoseconds(0),
        "processor_nanoseconds": nanoseconds(1),
        "ratio_to_torch_randn": {
            name: statistics.median(r[name][0] / r["torch_randn"][0] for r in rounds) for name in MODES
        },
    }


def measure_refinement(elements: int = 2000) -> dict:
    """What one refined element costs, and how many there are of the elements that need it for want of a bound."""
    mechanism = hardened_noise.RoundedGaussian(bytes(32), STANDARD_DEVIATION, GaussianNoise(STANDARD_DEVIATION).grid, 1)
    took = seconds(lambda: [mechanism._refined(0, element, 0.25) for element in range(elements)])
    # Both sides of the middle, at either end of the uniform numbers.
    share = 2 * hardened_noise._ERROR + 2 * hardened_noise._EXTREME
    return {"microseconds": 1e6 * took / elements, "expected_share_of_elements": share}


def measure_gpu(warm_up: int, repeats: int, elements: int = 2**28) -> dict:
    sums, other = torch.zeros(elements, device="cuda"), torch.empty(elements, device="cuda")
    mechanism = GaussianNoise(STANDARD_DEVIATION)
    draws = {
        "copy": lambda: other.copy_(sums),
        "torch_randn": lambda: torch.randn(elements, device="cuda"),
        "snapped": lambda: mechanism.add_noise([sums]),
    }

    def timed(draw: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        return seconds(lambda: (draw(), torch.cuda.synchronize()))

    rounds = [{name: timed(draw) for name, draw in draws.items()} for _ in range(warm_up + repeats)][warm_up:]
    # Copying and noise read and write four bytes for an element.
    return {
        "device": torch.cuda.get_device_name(),
        "elements": elements,
        "copy_gb_per_second": 8e-9 * elements / statistics.median(r["copy"] for r in rounds),
        "snapped_gb_per_second": 8e-9 * elements / statistics.median(r["snapped"] for r in rounds),
        "snapped_share_of_copy": statistics.median(r["copy"] / r["snapped"] for r in rounds),
        "snapped_ratio_to_torch_randn": statistics.median(r["snapped"] / r["torch_randn"] for r in rounds),
    }


def occupy_memory(kind: str) -> None:
    """Runs in a process of its own; "sums" only makes the sums."""
    torch.set_num_threads(max(2, torch.get_num_threads()))
    sums = [torch.ones(MEMORY_ELEMENTS)]
    if kind != "sums":
        GaussianNoise(STANDARD_DEVIATION, floating_point=kind).add_noise(sums)


def peak_mib(kind: str) -> float:
    command = [sys.executable, __file__, "--peak", kind]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return int(output.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)


def rounded(found: dict) -> dict:
    """Four digits of every figure."""
    return {
        key: rounded(value) if isinstance(value, dict) else float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normals", type=int, default=2**23, help="elements of the tensor that is timed")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that are not counted (default 2)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds that are counted (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="beside one (default PyTorch's)")
    parser.add_argument("--output", type=Path, default=RESULTS / "noise.json", help="where the figures are written")
    parser.add_argument("--peak", choices=("sums", *MODES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        occupy_memory(arguments.peak)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return

    # Before anything is timed: Linux starts a child's highest resident size at its parent's.
    before = peak_mib("sums")
    memory = {mode: peak_mib(mode) - before for mode in MODES}
    refuse_if_wrong(arguments.threads)
    times = {}
    print(f"{'threads':<9}{'randn ns':>9}" + "".join(f"{mode + ' ns':>13}{'of randn':>10}" for mode in MODES))
    for threads in sorted({1, arguments.threads}):
        found = measure_time(arguments.normals, arguments.warm_up, arguments.repeats, threads)
        times[str(threads)] = found
        figures = "".join(
            f"{found['nanoseconds'][mode]:>13.1f}{found['ratio_to_torch_randn'][mode]:>9.2f}x" for mode in MODES
        )
        print(f"{threads:<9}{found['nanoseconds']['torch_randn']:>9.1f}{figures}", flush=True)
    gpu = measure_gpu(arguments.warm_up, arguments.repeats) if torch.cuda.is_available() else WITHOUT_GPU
    print(f"extra memory {memory['snapped']:.0f} MiB, hardened {memory['hardened']:.0f} MiB\ngpu: {gpu}")
    document = {
        "benchmark": "noise",
        "rounds": {"warm_up": arguments.warm_up, "counted": arguments.repeats, "elements": arguments.normals},
        "machine": machine(),
        "cpu_by_threads": times,
        "refinement": measure_refinement(),
        "extra_memory_mib": memory,
        "gpu": gpu,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rounded(document), indent=2) + "\n")


if __name__ == "__main__":
    main()
