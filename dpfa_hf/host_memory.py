"""Keeping the C library from handing memory back to the system between the micro-batches of training on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_KEPT = 2**31 - 1
_TUNED_BY_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, up to 2 GiB of freed memory stay with the process, for its next allocations.

    Clipping needs all norms before the first sum, so every layer's gradient is held and then freed with the others.
    glibc would give so much back, and the system would clear it page by page for the next micro-batch: a tenth of a
    step, on a BERT-size encoder. Peak memory stays what it was.

    At the end free memory goes back, and glibc's two thresholds are where its own adjustment would have taken them.
    Under another C library, or where the user has set glibc's variables, nothing is done.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _TUNED_BY_USER):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(ctypes.c_size_t(0))
