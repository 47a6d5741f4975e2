"""Where a number was measured: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from mariotte import __version__
from mariotte.models.hardware import hardware

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "scipy")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions and hardware, as plain JSON; no host name, no user, no path."""
    where = torch.device(device)
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "mariotte": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": where.type,
        "hardware": hardware(where),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **found,
    }
