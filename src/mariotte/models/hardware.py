"""What a model computes on, by name."""

from __future__ import annotations

import functools
import platform
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
