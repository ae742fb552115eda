"""``lexiseg serve`` as a process: it says where it listens, answers, and ends when it is told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import lexiseg
from lexiseg.app.service import ServiceSettings
from lexiseg.cli import main
from lexiseg.errors import LexisegError


def test_the_command_serves_until_sigterm(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(lexiseg.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "lexiseg", "serve", "--model", "zegclip-emoji", "--port", "0", "--device", "cpu"]
    command += ["--seconds", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert address, line
        assert httpx.get(f"{address[0]}health", timeout=30).json()["status"] == "UP"
        assert httpx.get(f"{address[0]}health", timeout=30, headers={"host": "rebound.example"}).status_code == 403
        for sent in (b"", b"GET /health HTTP/1.1\r\nHost: "):  # a request that does not come, and one that stops
            with socket.create_connection(("127.0.0.1", int(address[1])), timeout=30) as connection:
                connection.sendall(sent)
                assert connection.recv(1) == b""
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "Traceback" not in errors, errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--files", "nowhere"], "not a folder"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--port", "99999"], "port"),
        (["--model", "zegclip-emoji", "--port", "{taken}"], "Cannot listen on 127.0.0.1"),
        (["--model", "zegclip-emoji", "--classes", ";"], "Class 1 in ';' is empty"),
    ],
)
def test_mistakes_are_sentences(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", *(word.replace("{taken}", port) for word in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and len(error.splitlines()) == 1, error


def test_options_of_the_command_reach_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def config(app: Any, **how: Any) -> None:
        asked.update(how, app=app)
        raise LexisegError("This is enough.")

    monkeypatch.setenv("LEXISEG_TOKEN", "secret")
    monkeypatch.setattr("lexiseg.load", lambda name, **how: (name, how))
    monkeypatch.setattr("lexiseg.app.service.create_app", lambda models, settings: (models, settings))
    monkeypatch.setattr("uvicorn.Config", config)
    given: dict[str, Any] = {"device": "cuda", "dtype": "bf16", "host": "0.0.0.0", "classes": "cat; sky"}
    given |= {"files": tmp_path, "max-megabytes": 3, "max-megapixels": 0.5, "max-classes": 7, "seconds": 9.5}
    given |= {"queue": 5, "batch": 2}
    words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    assert main(["serve", "-m", "one", "-m", "two", *words]) == 2
    limits: dict[str, Any] = {
        "max_bytes": 3 * 2**20,
        "max_pixels": 500_000,
        "max_classes": 7,
        "seconds": 9.5,
        "queue": 5,
        "batch": 2,
    }
    settings = ServiceSettings(token="secret", classes="cat; sky", files=tmp_path, **limits)
    how = {"device": "cuda", "dtype": "bf16", "max_pixels": 500_000}
    assert asked["app"] == ({"one": ("one", how), "two": ("two", how)}, settings)
    assert asked["timeout_graceful_shutdown"] == 10
