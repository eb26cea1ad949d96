"""Memory that stays with the process, seen by the system: pages that it had to supply, and resident size."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")

# Prints the pages supplied in a second round of the same allocations, and what stays in MiB when all is freed.
SCRIPT = """
import resource
import torch
from dpfa_hf.host_memory import freed_memory_kept

def round_of_allocations():
    return len([torch.ones(5_000_000) for _ in range(20)])

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

round_of_allocations()
before = resident()
with freed_memory_kept():
    round_of_allocations()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    round_of_allocations()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages)
print(resident() - before)
"""
PAGES_OF_A_ROUND = 20 * 20_000_000 / 4096


def pages_and_rest(**environment: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PATH": ""},
    )
    pages, rest = done.stdout.split()
    return float(pages), float(rest)


def test_memory_freed_within_is_used_again_and_goes_back_at_the_end() -> None:
    pages, rest = pages_and_rest()
    assert pages < 0.5 * PAGES_OF_A_ROUND  # a system that looks for idle pages may have taken some
    assert rest < 100


def test_what_the_user_has_set_is_left_alone_and_the_test_above_notices_memory_that_is_given_back() -> None:
    pages, _ = pages_and_rest(MALLOC_TRIM_THRESHOLD_="1000000")
    assert pages > 0.9 * PAGES_OF_A_ROUND
