"""What a model computes on: its name, and how much memory is left there."""

from __future__ import annotations

import functools
import platform
import resource
from contextlib import suppress
from pathlib import Path

import torch


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware(device: torch.device | str = "cpu") -> str:
    """Name of the processor or of the accelerator."""
    where = torch.device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else _processor()


def stated_bytes(file: str, key: str) -> int | None:
    """Bytes that a file of Linux states in kilobytes under a key, such as ``VmHWM`` in ``/proc/self/status``."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(file).read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def resident_bytes() -> int:
    """Memory of this process that is in use just now."""
    return stated_bytes("/proc/self/status", "VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that a process may still take: of the accelerator, or of this machine and within this process' limits.

    None where nobody says. Limits are those of the process (``ulimit -v``, ``-d``) and of its control group.
    """
    where = torch.device(device)
    if where.type == "cuda":
        return int(torch.cuda.mem_get_info(where)[0])
    found = [stated_bytes("/proc/meminfo", "MemAvailable")]
    for limit, key in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        allowed, used = resource.getrlimit(limit)[0], stated_bytes("/proc/self/status", key)
        if allowed != resource.RLIM_INFINITY and used is not None:
            found.append(allowed - used)
    for most in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            found.append(int((Path("/sys/fs/cgroup") / most).read_text(encoding="ascii")) - resident_bytes())
    known = [bytes_left for bytes_left in found if bytes_left is not None]
    return max(0, min(known)) if known else None
