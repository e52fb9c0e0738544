"""How many bytes of heap the process uses, by the best means that the platform has."""

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Callable


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2`` (malloc.h, glibc 2.33 and later)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        ).split()
    ]


class _MallocStatistics(ctypes.Structure):
    """macOS's ``malloc_statistics_t`` (malloc/malloc.h)."""

    _fields_ = [
        ("blocks_in_use", ctypes.c_uint),
        ("size_in_use", ctypes.c_size_t),
        ("max_size_in_use", ctypes.c_size_t),
        ("size_allocated", ctypes.c_size_t),
    ]


def _glibc() -> Callable[[], int]:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2

    def in_use() -> int:
        info = mallinfo2()
        return info.uordblks + info.hblkhd  # small blocks, and large ones that are mapped

    return in_use


def _macos() -> Callable[[], int]:
    statistics = ctypes.CDLL(None).malloc_zone_statistics

    def in_use() -> int:
        found = _MallocStatistics()
        statistics(None, ctypes.byref(found))  # None: all zones
        return found.size_in_use

    return in_use


def _resident() -> Callable[[], int]:
    import psutil  # comes with ipykernel; only platforms without a better means need it

    process = psutil.Process(os.getpid())
    return lambda: process.memory_info().rss


def _best() -> tuple[str, Callable[[], int]]:
    exact = _macos if sys.platform == "darwin" else _glibc
    try:
        return "malloc", exact()
    except (AttributeError, OSError, TypeError):  # Windows, musl, an old glibc
        return "resident", _resident()


#: ``kind`` is "malloc" where bytes in use are known, "resident" (rough) where they are not;
#: ``in_use()`` gives them. Objects that Python keeps in its own arenas do not show in "malloc".
kind, in_use = _best()
