"""``lexiseg serve`` as a process: it says where it listens, answers, and ends when it is told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import lexiseg
from lexiseg.cli import main


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
