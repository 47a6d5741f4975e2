"""What every recovery is tried on: text that is easy to learn, and a tiny model that reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mariotte.models.model import Model
from mariotte.testing.recoveries import counting_corpus, tiny_reader


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return counting_corpus(tmp_path)


@pytest.fixture
def model() -> Model:
    return tiny_reader("llama")
