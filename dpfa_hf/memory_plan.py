"""How many rows fit into memory: private micro-steps on invented rows, each size in a process of its own.

For `per_device_train_batch_size`, which is a knob of memory and speed and changes nothing else. Meant for the time
before training (`dpfa plan --measure`): a process that dies for want of memory is a result here, and would be the end
of a run there.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpfa_hf.errors import PrivacyError
from dpfa_hf.host_memory import freed_memory_kept

LARGEST_MICRO_BATCH = 1024
# What is left to the rest of the machine, or to the allocator's fragments, of what is free now.
_MARGIN = 0.1
# A size that is faster by less than this is not worth its memory; two such doublings in a row end the search.
_WORTHWHILE = 0.05
_WATCH_SECONDS = 0.02
_OUT_OF_MEMORY = 77  # exit status of a child whose allocation was refused
_SIGKILL = 9


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes:
        model: a directory with a configuration, with or without weights, or the Hub id of a downloaded model.
        tokens: T, tokens in every row.
        task: one of `per_example.losses.TASKS`, or "auto" for the head that the configuration names.
        lora: rank of an adapter on all linear layers, or None for training all weights.
        attn_implementation: as for `from_pretrained`.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        device: "cpu", or "cuda"; by default the one that training would take.
    """

    model: str
    tokens: int
    task: str = "auto"
    lora: int | None = None
    attn_implementation: str = "dp_flash"
    gradient_checkpointing: bool = False
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Measurement:
    """What came of one size; `outcome` is "fits", "over the limit" or "out of memory".

    Attributes:
        micro_batch_size: rows.
        outcome: see above.
        peak_bytes: highest resident size of the process, or highest reserved size on a GPU; None if the process died.
        rows_per_second: rows over the time of forward, backward, norms and clipped sum; None if the process died.
    """

    micro_batch_size: int
    outcome: str
    peak_bytes: int | None = None
    rows_per_second: float | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """All measurements, smallest size first, and the recommended size; None where not even one row fits."""

    limit_bytes: int
    measurements: tuple[Measurement, ...]
    recommended: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def measure(
    request: Request,
    *,
    limit_bytes: int | None = None,
    run: Callable[[Request, int, int], Measurement] | None = None,
) -> MemoryPlan:
    """Tries micro-batches of 1, 2, 4, ... rows until the next one would not fit or is not worth trying.

    Args:
        request: what is measured.
        limit_bytes: most memory that a process may take; by default what is free now, less a tenth.
        run: runs one size; by default in a child process.

    Returns:
        The plan. Recommended is the smallest size that is within 5 % of the fastest that fits.

    Raises:
        PrivacyError: the model cannot be built or trained privately, the limit is not positive, or this system does not
            tell how much memory is free.

    Guarantee:
        The calling process neither builds the model nor allocates for it. A child that holds more than the limit is
        ended within hundredths of a second (on Linux, and by torch on a GPU), and asks to be the first that the system
        ends; its death is a measurement. No private row is read.
    """
    limit = available_memory(request.device) if limit_bytes is None else limit_bytes
    if limit <= 0:
        raise PrivacyError(f"memory limit of {limit} bytes leaves nothing to measure in; give more with --memory-limit")
    run = run or _run_child
    found: list[Measurement] = []
    size = 1
    while size <= LARGEST_MICRO_BATCH:
        found.append(run(request, size, limit))
        if found[-1].outcome != "fits" or _expected_peak(found) > limit or _saturated(found):
            break
        size *= 2
    return MemoryPlan(limit, tuple(found), _recommended(found))


def _expected_peak(found: list[Measurement]) -> float:
    """Of twice the last size, on the straight line through the last two peaks; the last peak where there is but one."""
    last = found[-1].peak_bytes or 0
    before = found[-2].peak_bytes or 0 if len(found) > 1 else last
    return last + 2 * max(last - before, 0)


def _saturated(found: list[Measurement]) -> bool:
    speeds = [each.rows_per_second or 0.0 for each in found[-3:]]
    return len(speeds) == 3 and max(speeds[1:]) <= speeds[0] * (1 + _WORTHWHILE)


def _recommended(found: list[Measurement]) -> int | None:
    fitting = [each for each in found if each.outcome == "fits"]
    fastest = max((each.rows_per_second or 0.0 for each in fitting), default=0.0)
    enough = (each for each in fitting if (each.rows_per_second or 0.0) >= fastest * (1 - _WORTHWHILE))
    return next((each.micro_batch_size for each in enough), None)


# ---- memory ---------------------------------------------------------------------------------------------------------


def available_memory(device: str) -> int:
    """Bytes that a new process may take: what is free now, on the device or within the control group, less a tenth.

    Raises:
        PrivacyError: this system does not tell; the way out is an explicit limit.
    """
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * (1 - _MARGIN))
    free = _field("/proc/meminfo", "MemAvailable:")
    if free is None:
        raise PrivacyError("this system does not tell how much memory is free; give a limit with --memory-limit")
    group = Path("/sys/fs/cgroup")
    with_limit = (group / "memory.max", group / "memory.current")
    if all(path.is_file() for path in with_limit):
        most, used = (path.read_text().strip() for path in with_limit)
        if most != "max":
            free = min(free, int(most) - int(used))
    return int(free * (1 - _MARGIN))


def peak_memory(device: torch.device) -> int:
    """Bytes at this process's peak: resident on the CPU, reserved by torch on a GPU.

    Raises:
        PrivacyError: on Windows, which does not tell a process its own peak in a standard way.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    # Not getrusage: there, a child of a large parent begins at the parent's size.
    peak = _field("/proc/self/status", "VmHWM:")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        raise PrivacyError("memory cannot be measured on Windows; use WSL, or a GPU") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _field(path: str, name: str) -> int | None:
    """A line of the form "name number kB", in bytes; None where the file or the line is missing."""
    if not Path(path).is_file():
        return None
    values = [line.split()[1] for line in Path(path).read_text().splitlines() if line.startswith(name)]
    return 1024 * int(values[0]) if values else None


# ---- the child ------------------------------------------------------------------------------------------------------


def _run_child(request: Request, micro_batch_size: int, limit: int) -> Measurement:
    """Runs one size in a process, which is ended as soon as it holds more than the limit."""
    command = [sys.executable, "-m", "dpfa_hf.memory_plan", json.dumps(asdict(request)), str(micro_batch_size)]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = subprocess.Popen([*command, str(limit)], stdout=stdout, stderr=stderr)
        try:
            while child.poll() is None:
                # On a GPU the limit is the device's, and torch keeps it.
                if request.device == "cpu" and (_field(f"/proc/{child.pid}/status", "VmRSS:") or 0) > limit:
                    child.kill()
                time.sleep(_WATCH_SECONDS)
        finally:
            child.kill()
            child.wait()
        stdout.seek(0)
        stderr.seek(0)
        return _judge(child.returncode, stdout.read(), stderr.read(), micro_batch_size, limit)


def _judge(status: int, stdout: str, stderr: str, micro_batch_size: int, limit: int) -> Measurement:
    """What an ended child means.

    Raises:
        PrivacyError: it failed for a reason other than memory, with that reason.
    """
    if status in (_OUT_OF_MEMORY, -_SIGKILL, 128 + _SIGKILL):
        return Measurement(micro_batch_size, "out of memory")
    if status != 0 or not stdout.strip():
        reason = (stderr.strip().splitlines() or [f"exit status {status}"])[-1]
        raise PrivacyError(reason.removeprefix("dpfa: "))
    peak, speed = json.loads(stdout.splitlines()[-1])
    return Measurement(micro_batch_size, "fits" if peak <= limit else "over the limit", peak, speed)


def _micro_steps(request: Request, micro_batch_size: int) -> tuple[int, float]:
    """(peak in bytes, rows a second) of private steps on invented rows: as training makes them, with AdamW's state."""
    from dpfa_hf import models
    from dpfa_hf.noise import GaussianNoise
    from dpfa_hf.per_example import losses, preflight
    from dpfa_hf.per_example.gradients import PerExampleGradients

    model: Any
    configuration = models.read_configuration(request.model)
    model, task, _ = models.build(request.model, configuration, request.task, request.attn_implementation)
    if request.lora is not None:
        model = models.with_lora(model, request.lora, task)
    if request.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    device = torch.device(request.device)
    model = model.to(device).train()
    loss, columns = losses.per_example_loss(model, task), preflight.default_columns(model, task)
    engine = PerExampleGradients(model, loss, clipping_norm=1.0)
    preflight.check(engine, _on(device, preflight.synthetic_batch(model, task, columns)))
    rows = preflight.synthetic_rows(model, task, columns, [request.tokens] * micro_batch_size)
    batch = _on(device, preflight.pad_rows(model, rows))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])

    engine.accumulate(batch)
    sums = GaussianNoise(1.0).add_noise(engine.take())
    for name, parameter in model.named_parameters():
        if name in sums:
            parameter.grad = sums[name].to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        engine.accumulate(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return peak_memory(device), micro_batch_size / min(times)


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}


def _prepare_to_die(limit: int, device: str) -> None:
    """Makes this process the one that the system ends first, and keeps torch within the limit on a GPU."""
    with contextlib.suppress(OSError):  # no such file but on Linux, and read-only in some containers
        Path("/proc/self/oom_score_adj").write_text("1000")
    if device != "cpu":
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or what it came from, is a refused allocation."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def main(arguments: list[str]) -> int:
    """The child: request as JSON, rows, limit in bytes. Prints [peak bytes, rows a second]; returns the exit status."""
    request, size, limit = Request(**json.loads(arguments[0])), int(arguments[1]), int(arguments[2])
    try:
        _prepare_to_die(limit, request.device)
        with freed_memory_kept():  # as training does
            print(json.dumps(_micro_steps(request, size)))
    except Exception as error:  # a model may raise anything; the parent tells memory from the rest
        if _is_out_of_memory(error):
            return _OUT_OF_MEMORY
        print(f"{error}" if isinstance(error, PrivacyError) else f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
