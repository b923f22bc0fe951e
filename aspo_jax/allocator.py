"""Freed memory goes back to the system; with another C library than glibc nothing is done."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD, _BLOCK = -3, 1 << 20  # of malloc.h; bytes


def return_large_blocks() -> None:
    """From now on give every freed block of a mebibyte or more back at once.

    glibc raises its limit for that to 32 MiB as blocks are freed: the sampler's copy of the layers
    of a 0.5B model, released before the update, would stay resident beside it.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _BLOCK)


def return_small_blocks() -> None:
    """Give back the small blocks that are free now: writing a checkpoint of 2 GiB leaves 1 GiB."""
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
