"""Per-example norms of linear layers by three routes, against their operation counts; benchmarks/results/norms.json.

    python benchmarks/norms.py            # on a GPU, some minutes
    python benchmarks/norms.py --count    # the operation counts alone, which is all that there is without a GPU

It needs torch and triton alone, and takes the kernel package from this checkout whatever is installed.

Routes: `gram`, through pairs of positions; `tile`, through tiles of the gradient that are never written; `materialise`,
PyTorch's batched product in the inputs' dtype and the squares of what it wrote. `layer` is what a plain step spends on
the layer: three products, forward and for both gradients. Routes take turns, each time with a cold cache; medians.

Checked first: every norm is within its bound of the gradient written out in float64. What fails is not timed, and the
exit status says so. Where the forms really meet says what an operation of the Gram form costs in operations of the tile
form: `gram_cost`, for `tiles.GRAM_COST`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "norms.json"
# Rows and columns: an encoder's square and wide layers, a 1B and an 8B decoder's, and adapters of rank 16 and 8.
SHAPES = ((768, 768), (3072, 768), (2048, 2048), (8192, 2048), (4096, 4096), (4096, 16), (768, 8))
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
TOKENS = 2**14  # of a micro-batch, so that the layer's own work is the same in all cases
LARGEST_GRADIENTS = 2**33  # bytes that materialised gradients may take


def kernel() -> ModuleType:
    """The kernel package of this checkout, under a name of its own."""
    folder = ROOT / "kernels" / "dp-flash-attn" / "torch-ext" / "dp_flash_attn"
    spec = importlib.util.spec_from_file_location("dp_flash_attn_of_checkout", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def meeting_length(rows: int, columns: int) -> int:
    """T at which T^2 (d + p) / 2 multiplications (the lower triangle) are as many as T d p."""
    return 2 * rows * columns // (rows + columns)


def count(norms: ModuleType, architecture: str, half: bool) -> None:
    """Prints multiplications of one example, the padding of tiles included, as parts of the layer's three products."""
    print(f"operations of the norms, of the layer's own ({architecture}, {'16' if half else '32'} bits)")
    print(f"{'rows x columns':>16}{'T*':>7}" + "".join(f"{length:>14}" for length in LENGTHS))
    for rows, columns in SHAPES:
        cells = []
        for length in LENGTHS:
            gram, tile = (norms.operations(form, length, rows, columns, architecture, half) for form in norms.FORMS)
            layer = 3 * length * rows * columns
            cells.append(f"{gram / layer:>7.0%}{tile / layer:>7.0%}")
        print(f"{rows:>8} x {columns:<5}{meeting_length(rows, columns):>7}" + "".join(cells))
    print(f"{'':>23}" + "".join(f"{'gram':>7}{'tile':>7}" for _ in LENGTHS))


def inputs(rows: int, columns: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + columns + length)
    batch = max(1, TOKENS // length)
    left, right = (
        torch.randn(batch, length, width, device="cuda", generator=generator, dtype=dtype) for width in (rows, columns)
    )
    return left, right


def materialised(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left.mT, right).float().square().sum((1, 2))


def layer_products(left: Tensor, right: Tensor) -> None:
    """A plain step's: x W^T, g W and g^T x."""
    grad, x = left.flatten(0, 1), right.flatten(0, 1)
    weight = x.new_ones(grad.shape[1], x.shape[1])
    torch.mm(x, weight.t())
    torch.mm(grad, weight)
    torch.mm(grad.t(), x)


def faults(norms: ModuleType, left: Tensor, right: Tensor) -> list[str]:
    """Forms whose value is farther from the first two examples' norms in float64 than their bound says."""
    exact = torch.stack(
        [(one.double().mT @ two.double()).square().sum() for one, two in zip(left[:2], right[:2], strict=True)]
    )
    found = []
    for form in norms.FORMS:
        norm = norms.outer_squared_norm(left, right, form=form)
        again = norms.outer_squared_norm(left, right, form=form)
        if not ((norm.value[:2] - exact).abs() <= norm.error[:2]).all():
            found.append(f"{form}: {norm.value[:2].tolist()} for {exact.tolist()}, bounds {norm.error[:2].tolist()}")
        if not all(torch.equal(one, two) for one, two in zip(norm, again, strict=True)):
            found.append(f"{form}: other bits the second time")
    return found


def medians(routes: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of each route: they take turns, and find nothing of their inputs in the cache."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in routes}
    for route in routes.values():
        route()
    for _ in range(repeats):
        for name, route in routes.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Work that hides the launches.
            torch.cuda._sleep(1_000_000)
            begin.record()
            route()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(norms: ModuleType, dtype: torch.dtype, architecture: str, repeats: int) -> tuple[list[dict], list[str]]:
    cases, wrong = [], []
    half = dtype != torch.float32
    for rows, columns in SHAPES:
        for length in LENGTHS:
            left, right = inputs(rows, columns, length, dtype)
            name = f"{dtype} {rows} x {columns}, T = {length}"
            found = faults(norms, left, right)
            wrong += [f"{name}: {fault}" for fault in found]
            if found:
                continue
            routes: dict[str, Callable[[], object]] = {
                form: lambda form=form, pair=(left, right): norms.outer_squared_norm(*pair, form=form)
                for form in norms.FORMS
            }
            if len(left) * rows * columns * (4 + left.element_size()) <= LARGEST_GRADIENTS:
                routes["materialise"] = lambda pair=(left, right): materialised(*pair)
            routes["layer"] = lambda pair=(left, right): layer_products(*pair)
            times = medians(routes, repeats)
            operations = {
                form: len(left) * norms.operations(form, length, rows, columns, architecture, half)
                for form in norms.FORMS
            }
            cost = times["gram"] / operations["gram"] / (times["tile"] / operations["tile"])
            chosen = norms.choose_form(length, rows, columns, dtype=dtype, device=left.device)
            best = min(norms.FORMS, key=times.__getitem__)
            cases.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "rows": rows,
                    "columns": columns,
                    "length": length,
                    "batch": len(left),
                    "milliseconds": {route: float(f"{time:.4g}") for route, time in times.items()},
                    "tflops": {form: float(f"{2e-9 * operations[form] / times[form]:.4g}") for form in norms.FORMS},
                    "gram_cost": float(f"{cost:.3g}"),
                    "chosen": chosen,
                    "faster": best,
                }
            )
            shown = "  ".join(f"{route} {time:8.3f}" for route, time in times.items())
            print(
                f"{name:<42}{shown}  chosen {chosen}{'' if chosen == best else f', but {best} is faster'}", flush=True
            )
    return cases, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="print the operation counts and time nothing")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    package = kernel()
    norms = package.norms
    if options.count or not torch.cuda.is_available():
        if not options.count:
            print("There is no GPU here: nothing is timed and nothing is written. These are operations, not times.")
        count(norms, "sm_90", half=True)
        return
    architecture = importlib.import_module(f"{package.__name__}.flash").architecture(torch.device("cuda"))
    cases, wrong = [], []
    for dtype in (torch.bfloat16, torch.float32):
        count(norms, architecture, dtype != torch.float32)
        found, faulty = measure(norms, dtype, architecture, options.repeats)
        cases += found
        wrong += faulty
    document = {
        "benchmark": "norms",
        "machine": {
            "gpu": torch.cuda.get_device_name(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("torch", "triton")},
        },
        "architecture": architecture,
        "gram_cost": {
            dtype: statistics.median([case["gram_cost"] for case in cases if case["dtype"] == dtype])
            for dtype in dict.fromkeys(case["dtype"] for case in cases)
        },
        "cases": cases,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n")
    if wrong:
        sys.exit("\n".join(["", *wrong]))


if __name__ == "__main__":
    main()
