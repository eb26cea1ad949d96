"""Runs the whole test suite, as `make test` does, in two processes of pytest, and adds up their summaries.

Triton reads whether to interpret when it is imported, so kernels are interpreted in a process of their own; all other
tests, and the builds for chips that are not here, are in the other one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter

SUITES = {
    "package, and kernels compiled": ("not interpreter", {}),
    "kernels, interpreted": ("interpreter", {"TRITON_INTERPRET": "1"}),
}
# The last line of pytest, such as "=== 1 failed, 12 passed, 3 deselected, 2 warnings in 4.56s (0:00:04) ===".
SUMMARY = re.compile(r"^=* ?((?:\d+ [a-z]+,? ?)+) in [\d.]+s.*$")


def counts(lines: list[str]) -> Counter[str]:
    """Outcomes in pytest's summary line, by name; empty if there is none."""
    for line in reversed(lines):
        if found := SUMMARY.match(line.strip()):
            return Counter({name: int(number) for number, name in re.findall(r"(\d+) ([a-z]+)", found[1])})
    return Counter()


def run(name: str, expression: str, environment: dict[str, str], arguments: list[str]) -> Counter[str]:
    """One process of pytest, its output passed on; a process that does not end well has at least one error."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "--durations", "12", "-m", expression]
    print(f"\n##### {name}: pytest -m '{expression}'", flush=True)
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    lines = []
    command += arguments
    with subprocess.Popen(command, env=clean | environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    found = counts(lines)
    if process.returncode != 0 and not found["failed"] + found["error"] + found["errors"]:
        found["errors"] += 1
    return found


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    total: Counter[str] = Counter()
    for name, (expression, environment) in SUITES.items():
        total += run(name, expression, environment, arguments)
    bad = total["failed"] + total["error"] + total["errors"]
    shown = [key for key in ("failed", "errors", "error", "passed", "skipped", "xfailed", "xpassed") if total[key]]
    words = ", ".join(f"{total[key]} {key}" for key in shown)
    print(f"\n===== {words} in {time.monotonic() - start:.0f}s ({len(SUITES)} processes of pytest) =====", flush=True)
    return 1 if bad or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
