"""Compiles every kernel for every chip, and records what each build needs in benchmarks/results/kernels.json.

    python benchmarks/compile_all.py                     # half an hour on two cores; no GPU
    python benchmarks/compile_all.py --representatives   # only what the tests repeat; the rest of the record stays

Fails, and records nothing, if a build spills, needs more shared memory than its chip has, has no matrix instructions,
or needs more registers than before by a tenth (with --accept it may).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Before Triton is imported, which decides by it what a kernel is.
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))

import ahead_of_time as aot  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--representatives", action="store_true")
    parser.add_argument("--accept", action="store_true", help="let builds need more registers than before")
    options = parser.parse_args()

    variants = list(aot.representatives() if options.representatives else aot.table())
    recorded = aot.read_results()
    builds = dict(recorded) if options.representatives else {}
    faults: list[str] = []
    # Not by fork, which copies PyTorch's threads in whatever state they are.
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for done, (variant, resources) in enumerate(zip(variants, pool.map(aot.build, variants), strict=True), 1):
            name = str(variant)
            found = aot.faults(variant, resources, None if options.accept else recorded.get(name))
            faults += found
            builds[name] = resources
            print(f"{done}/{len(variants)} {name}: {'; '.join(found) or resources.registers}", flush=True)
    if faults:
        sys.exit("\n".join(["", *faults]))
    aot.write_results(builds)


if __name__ == "__main__":
    main()
