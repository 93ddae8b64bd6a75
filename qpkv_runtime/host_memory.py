"""Main memory that a CPU's tensors come from."""

from __future__ import annotations

import ctypes
import sys

LARGEST_KEPT_BYTES = 2**28  # a larger block goes back to the system when it is freed
KEPT_BYTES = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_blocks() -> None:
    """Let glibc keep freed blocks for the next tensor; elsewhere nothing is done.

    By itself it maps every block above 32 MB (at first 128 kB) from the system and gives it back when it is freed. Each
    operation on a tensor of some megabytes then waits for page faults and, with several threads, for the other cores to
    forget the pages, which in a virtual machine takes longer than the operation. One arena for all threads: with one
    each, every thread fills memory of its own that no cache holds.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another libc
        return
    mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_M_ARENA_MAX, 1)
