"""A model's config is found by name, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mariotte import locate
from mariotte.errors import ModelError, UnknownNameError
from mariotte.locate import config_of, folder_of, peek_config

CONFIG = {"model_type": "llama", "hidden_size": 8}
TOKEN = "hf_theirs"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(locate, "_UNREACHABLE", set())
    return tmp_path / "hub"


class _Hub(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        told = self.headers.get("authorization") == f"Bearer {TOKEN}"
        found = "/org/open/" in self.path or ("/org/gated/" in self.path and told)
        self.send_response(200 if found else 401 if "/org/gated/" in self.path else 404)
        self.end_headers()
        if found:
            self.wfile.write(json.dumps(CONFIG).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[list[str]]:
    """A hub on this machine with an open and a gated model; what it was asked for."""
    asked: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_testbed_comes_with_the_package() -> None:
    assert config_of("testbed/qwen2-46k")["model_type"] == "qwen2"
    assert folder_of("testbed/qwen2-46k") == locate.TESTBED / "qwen2-46k"
    with pytest.raises(UnknownNameError, match="qwen2-46k"):
        config_of("testbed/qwen2-47k")


def test_a_folder_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no config"):
        config_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert config_of(str(tmp_path)) == peek_config(str(tmp_path)) == CONFIG
    assert folder_of(str(tmp_path)) == tmp_path
    for text in ("[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="must be a JSON object"):
            peek_config(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where/at/all", "a model", "a/b/c", ""])
def test_what_is_no_folder_and_no_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no model folder at"):
        peek_config(name)


@pytest.mark.parametrize("name", ["qwen2-345k", "testbed:qwen2-345k", "Testbed/qwen2-345k", "./qwen2-345k"])
def test_a_model_of_the_testbed_is_told_by_its_whole_name(name: str) -> None:
    with pytest.raises(ModelError, match="the model that comes with the package is called testbed/qwen2-345k"):
        folder_of(name)


def test_the_cache_is_read_offline(cache: Path) -> None:
    folder = cache / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(CONFIG))
    assert config_of("org/name") == peek_config("org/name") == CONFIG
    assert folder_of("org/name") is None


def test_offline_without_a_copy_is_one_sentence(cache: Path) -> None:
    assert peek_config("org/name") is None
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE") as raised:
        config_of("org/name")
    assert "\n" not in str(raised.value)


def test_the_hub_is_asked_for_the_config_alone(hub: list[str]) -> None:
    assert config_of("org/open") == CONFIG
    assert hub == ["/org/open/resolve/main/config.json"]
    assert peek_config("org/none") is None
    with pytest.raises(ModelError, match="404"):
        config_of("org/none")


def test_a_gated_model_is_asked_for_with_the_users_token(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert peek_config("org/gated") is None
    with pytest.raises(ModelError, match="it is gated: ask for access"):
        config_of("org/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert config_of("org/gated") == peek_config("org/gated") == CONFIG
    assert len(hub) == 4


def test_a_host_that_does_not_answer_is_asked_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"127\.0\.0\.1:9 did not answer"):
            config_of("org/name")
    assert {"127.0.0.1:9"} == locate._UNREACHABLE


def test_without_huggingface_hub_ids_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "find_spec", lambda name: None)
    assert peek_config("org/name") is None
    with pytest.raises(ModelError, match=r"install mariotte\[bench\]"):
        config_of("org/name")


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, mariotte.locate as l\n"
        "l.config_of('testbed/qwen2-46k'), l.peek_config('org/none')\n"
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
