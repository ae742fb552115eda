"""Model cards, and the hub: a stand-in on loopback that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import lexiseg
from lexiseg.cli import main
from lexiseg.errors import LexisegError
from lexiseg.evaluation import evaluate
from lexiseg.evaluation.protocols import find_protocol
from lexiseg.weights.folder import packaged_models
from lexiseg.weights.publish import model_card, push_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(packaged_models()["zegclip-emoji"], tmp_path / "model")
    protocol = {"dataset": "voc2012", "split": "val", **find_protocol("gzs-voc").card(synonyms=None)}
    report = {"format": 1, "metrics": {"miou": 61.5, "hiou": None}, "protocol": protocol}
    (tmp_path / "model" / "report.json").write_text(json.dumps(report))
    return tmp_path / "model"


class Hub(BaseHTTPRequestHandler):
    """The four questions that an upload asks the hub."""

    kept: dict[str, bytes]
    tokens: list[str]
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.tokens.append(self.headers.get("authorization", ""))
        status, answer = 200, {}
        if self.refuse:
            status, answer = 403, {"error": "You may not do this"}
        elif self.path.endswith("/repos/create"):
            answer = {"url": f"http://{self.headers['host']}/owner/name"}
        elif "/preupload/" in self.path:
            names = [one["path"] for one in json.loads(body)["files"]]
            answer = {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]}
        elif "/commit/" in self.path:
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.kept[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            answer = {
                "commitUrl": f"http://{self.headers['host']}/owner/name/commit/1",
                "commitOid": "1",
                "pullRequestUrl": None,
            }
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Fresh", (Hub,), {"kept": {}, "tokens": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield handler
    server.shutdown()


def test_the_card_says_what_the_run_says(folder: Path) -> None:
    card = model_card(folder, "owner/name")
    assert card.startswith("---\nlibrary_name: lexiseg")
    for words in ('lexiseg.load("owner/name")', "data: picture-world", "steps: 600", "| miou | 61.5 |", "SIL OFL"):
        assert words in card, words
    assert "hiou" not in card and "On `voc2012`, val, by the protocol `gzs-voc`:" in card
    (folder / "report.json").unlink()
    assert "There is no evaluation in this folder" in model_card(folder)
    assert model_card(folder.parent) == model_card(folder)  # the run that made it
    with pytest.raises(LexisegError, match="not a lexiseg model"):
        model_card(folder / "nothing")


def test_the_card_of_a_folder_edited_by_hand(folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps({"metrics": [1], "protocol": {"protocol": "gzs-voc"}}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "metadata": {"data": "mine"}}))
    assert "| metric | value |" in model_card(folder)
    (folder / "config.json").write_text(json.dumps({**config, "clip": "ViT-B-16"}))
    with pytest.raises(LexisegError, match="its clip must be a mapping"):
        model_card(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()  # what would arrive could not be loaded
    with pytest.raises(LexisegError, match=r"has no model\.safetensors"):
        push_folder(folder, "owner/name")


def test_a_report_in_the_folder_of_the_run_counts(folder: Path) -> None:
    (folder / "report.json").rename(folder.parent / "report.json")
    assert "| miou | 61.5 |" in model_card(folder.parent)
    assert "There is no evaluation" in model_card(folder)


def test_the_card_is_printed_as_it_would_be_uploaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(folder), "owner/name", "--card"]) == 0
    assert capsys.readouterr().out == model_card(folder, "owner/name").rstrip("\n") + "\n"


def test_the_card_of_a_report_and_of_a_conversion_as_they_are_written(folder: Path, tmp_path: Path) -> None:
    evaluate("picture-world", folder, output=folder, size=32, limit=1, progress=False)
    config = json.loads((folder / "config.json").read_text())
    config["metadata"] = {"description": "ZegCLIP converted from the authors' checkpoint", "source": "zegclip.pth"}
    (folder / "config.json").write_text(json.dumps(config))
    card = model_card(folder)
    assert "On `picture-world`, val:" in card and "- converted from: zegclip.pth" in card


def test_a_folder_arrives_whole(folder: Path, hub: type[Hub]) -> None:
    address = push_folder(folder, "owner/name")
    assert address.endswith("/owner/name")
    assert set(hub.kept) == {"config.json", "model.safetensors", "README.md", "report.json"}
    for name, data in hub.kept.items():
        assert data == (folder / name).read_bytes()
    assert set(hub.tokens) == {"Bearer hf_test"}


def test_a_segmenter_goes_there_and_back(hub: type[Hub], tmp_path: Path) -> None:
    segmenter = lexiseg.load("zegclip-emoji", device="cpu")
    segmenter.push_to_hub("owner/name")
    for name, data in hub.kept.items():
        (tmp_path / name).write_bytes(data)
    saved = segmenter.save_pretrained(tmp_path / "saved")
    for place in (tmp_path, saved):
        again = lexiseg.Segmenter.from_pretrained(place, device="cpu")
        pairs = zip(again.model.state_dict().values(), segmenter.model.state_dict().values(), strict=True)
        assert all(bool((one == other).all()) for one, other in pairs)


def test_what_the_hub_refuses_is_a_sentence(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "refuse", True)
    assert main(["push", str(folder), "owner/name"]) == 2
    assert "'owner/name' cannot be uploaded" in capsys.readouterr().err
    assert main(["push", str(folder), "no name at all"]) == 2
    assert "OWNER/NAME" in capsys.readouterr().err
    assert main(["push", str(folder.parent), "owner/name"]) == 2
    assert main(["push", str(folder), "owner/name", "--card"]) == 0


def test_a_hub_out_of_reach_is_a_sentence(
    folder: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client raises what its HTTP library raises, which is no OSError: it was a traceback."""
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:1")
    assert main(["push", str(folder), "owner/name"]) == 2
    said = capsys.readouterr().err
    assert "'owner/name' cannot be uploaded" in said and "check the connection" in said
