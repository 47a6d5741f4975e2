"""What many tests need: a tiny random model that speaks the testbed's language, in a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network; those that must are marked
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and published numbers, which is no part of the project."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2-shaped model with the testbed's tokenizer, as a checkpoint."""
    from mariotte.models.load import quiet_transformers
    from mariotte.testbed import zoo
    from mariotte.testbed.world import World
    from mariotte.testing.tiny import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    model = tiny("qwen2", vocab=len(World().vocabulary), tied=True)
    with quiet_transformers():
        model.hf.save_pretrained(folder)
    zoo.save_tokenizer(folder)
    return folder
