"""Kills a training job of two processes at random moments, resumes it, and looks for lost budget, deadlocks and NaN.

    python benchmarks/drill.py --kills 50        # make drill: half an hour on two cores

A job is two ranks under torchrun, on gloo, with a checkpoint at every other step and its ledger in PostgreSQL. The
victim is a rank or the launcher, by SIGKILL or SIGTERM, or the ledger's server, by SIGKILL or by a shutdown that drops
its connections, before the first step, in one, or between two. When the launcher is killed its ranks live on: the job
that resumes must take the ledger over from them. A server that was killed is started again when the job has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from sentiment import RESULTS, ROOT, machine

from dpfa_hf.ledger import Ledger

OUTPUT = RESULTS / "drill.json"
PATIENCE_S = 60.0  # after a kill, until every process of the job must have ended
STEPS = 80
VICTIMS = ("rank 0", "rank 1", "launcher", "ledger server")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)


class Job:
    """One folder with a run in it, which is started again and again until its budget is used up."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url, self.starts = folder, url, 0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> subprocess.Popen:
        self.starts += 1
        for old in self.folder.glob("pid*"):
            old.unlink()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        with (self.folder / f"log{self.starts}").open("w") as log:
            return subprocess.Popen(
                [*command, str(ROOT / "tests" / "processes_worker.py"), str(self.folder), "long"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DRILL_LEDGER": self.url},
            )

    def rank_pid(self, rank: int) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / f"pid{rank}").read_text())
        return None

    def charged(self) -> dict[str, int]:
        """Steps charged, by run."""
        with self.ledger() as ledger:
            return {run.run: run.steps for run in ledger.runs()}

    def ledger(self) -> Ledger:
        return Ledger(self.url)

    def finished(self) -> bool:
        return (self.folder / "rank0.pt").exists()


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int | None) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    if pid is None:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def strike(job: Job, server: Any, victim: str, how: signal.Signals, chance: random.Random) -> dict[str, Any]:
    """Starts the job, kills the victim at a random moment, and says what became of it; an empty "broken" is good."""
    before = job.charged()
    launcher = job.start()
    more = chance.randrange(6)
    started = wait(lambda: job.rank_pid(1) is not None or launcher.poll() is not None, 120)
    wait(lambda: sum(job.charged().values()) >= sum(before.values()) + more or launcher.poll() is not None, 120)
    time.sleep(chance.uniform(0, 0.3))
    ranks = [job.rank_pid(0), job.rank_pid(1)]
    at = job.charged()
    if victim == "ledger server":
        server.kill(how)
    else:
        target = launcher.pid if victim == "launcher" else ranks[int(victim[-1])]
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, how) if target is not None else None
    struck = time.monotonic()
    ended = wait(lambda: launcher.poll() is not None, PATIENCE_S)
    if victim != "launcher" or how != signal.SIGKILL:
        ended &= wait(lambda: not any(map(alive, ranks)), PATIENCE_S - (time.monotonic() - struck))
    if victim == "ledger server":
        server.start()
    after = job.charged()
    broken = []
    if not started:
        broken.append("the job did not start")
    if not ended:
        broken.append(f"processes were left after {PATIENCE_S:.0f} s")
    for run, steps in at.items():
        if after.get(run, -1) < max(steps, before.get(run, 0)):
            broken.append(f"budget was refunded: {steps} steps, then {after.get(run)}")
    return {
        "victim": victim, "signal": how.name, "charged": sum(at.values()), "seconds": time.monotonic() - struck,
        "broken": broken + problems(job),
    }  # fmt: skip


def problems(job: Job) -> list[str]:
    """What is wrong with the ledger, and with the weights of the checkpoints that are whole."""
    found: list[str] = []
    steps: list[tuple[str, int]] = []
    for state in (job.folder / "long" / "out").glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError, OSError):  # ranks that outlive their launcher may write or delete it
            step = json.loads(state.read_text())["global_step"]
            steps.append((json.loads((state.parent / "privacy.json").read_text())["run"], step))
            if not all(t.isfinite().all() for t in load_file(state.parent / "model.safetensors").values()):
                found.append(f"checkpoint {step} is not finite")
    # Only now, for the same reason: a step is charged before it is in a checkpoint.
    with job.ledger() as ledger:
        found += ledger.verify()
        charged = {run.run: run.steps for run in ledger.runs()}
        if any(run.steps > run.max_steps for run in ledger.runs()):
            found.append("more steps than the plan has")
    return found + [
        f"checkpoint {step} is of more steps than the ledger has charged" for run, step in steps if step > charged[run]
    ]


def complete(job: Job) -> list[str]:
    """Lets the job run to its end; every step of its plan must be charged by then."""
    launcher = job.start()
    if not wait(lambda: launcher.poll() is not None, 240):
        launcher.kill()
        return ["the last start did not end"]
    charged = job.charged()
    # Ranks that outlived their launcher may have finished the run first; then this start was rightly refused.
    if not job.finished() or STEPS not in charged.values():
        return [f"the run did not complete: exit {launcher.returncode}, charged {charged}"]
    return problems(job)


def drill(kills: int, seed: int, folder: Path, server: Any) -> Iterator[dict[str, Any]]:
    """One record for each kill, and one for each job that was let run to its end; `server` is a `PostgreSQL`."""
    chance = random.Random(seed)
    job = Job(folder / "0", server.url(server.new_database()))
    for number in range(kills):
        victim = VICTIMS[number % len(VICTIMS)]
        how = SIGNALS[number // len(VICTIMS) % len(SIGNALS)]
        if victim == "ledger server" and how == signal.SIGTERM:
            how = signal.SIGINT  # to PostgreSQL, SIGTERM means to wait until the job has ended
        yield strike(job, server, victim, how, chance)
        if number == kills - 1 or sum(job.charged().values()) > STEPS // 2:
            broken = complete(job)
            charged = sum(job.charged().values())
            yield {"victim": None, "broken": broken, "starts": job.starts, "charged": charged, "job": job}
            job = Job(folder / str(number + 1), server.url(server.new_database()))


def postgresql(folder: Path) -> Any:
    """The tests' server, which they keep where pytest looks for it."""
    spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PostgreSQL(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of victims' moments (default: 0)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the log is written")
    options = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(prefix="dpfa-") as short:
        server = postgresql(Path(short))
        for record in drill(options.kills, options.seed, Path(folder), server):
            record.pop("job", None)
            records.append(record)
            print(json.dumps(record), flush=True)
        server.kill()
    broken = [record for record in records if record["broken"]]
    result = {"kills": options.kills, "broken": len(broken), "machine": machine(), "records": records}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(f"{len(broken)} of {len(records)} broke" if broken else 0)


if __name__ == "__main__":
    main()
