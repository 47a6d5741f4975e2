"""Where a number was measured: versions, processor, threads."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from mariotte import __version__

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "scipy")


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions and hardware, as plain JSON; no host name, no user, no path."""
    where = torch.device(device)
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else _processor()
    return {
        "mariotte": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": where.type,
        "hardware": hardware,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **found,
    }
