"""Threads of this process and of those started from it. Imports nothing that imports torch."""

import os


def quiet_thread_pools() -> None:
    """Let torch's idle OpenMP threads sleep after tens of microseconds of spinning: longer, and they hold the cores
    that numba's threads want; shorter, and every small operation pays for waking them. Has an effect only before torch
    is imported, here and in processes started from here."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
