"""Weights of the hub that are gated, not there, or half downloaded: one sentence each, and nothing left behind."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

import lexiseg
from lexiseg.clip.load import load_clip
from lexiseg.clip.proxy import load_proxy
from lexiseg.errors import LexisegError
from lexiseg.refine import sam


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub within reach, with nothing in the cache."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *given: None)
    monkeypatch.setattr("urllib.request.urlopen", lambda *given, **named: nullcontext())
    monkeypatch.setattr("lexiseg.hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path


def refuse(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], status: int) -> None:
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))

    def fetch(*given: Any, **named: Any) -> str:
        raise kind("Access is restricted.\nMore lines.", response=response)  # type: ignore[call-arg]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)


@pytest.mark.parametrize(
    "name", ["sam3", "sam3/owner/name", "maskclip/transformers:owner/name", "naclip/hf-hub:owner/name"]
)
@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        (GatedRepoError, 403, "is gated: accept its licence at"),
        (RepositoryNotFoundError, 404, "that you may read; check the name"),
    ],
)
def test_gated_and_unknown_repositories(
    hub: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Exception], status: int, says: str
) -> None:
    refuse(monkeypatch, kind, status)
    with pytest.raises(LexisegError, match=says) as error:
        lexiseg.load(name)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("name", ["sam3", "maskclip/transformers:google/tipsv2-b14"])
def test_half_of_a_repository_is_here(hub: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (hub / "config.json").write_text("{}")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda _, filename: str(hub / filename) if (hub / filename).exists() else None,
    )
    monkeypatch.setattr("lexiseg.hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LexisegError, match=r"Only a part of .* is on this machine") as error:
        lexiseg.load(name)
    assert "\n" not in str(error.value)
    assert [path.name for path in hub.iterdir()] == ["config.json"]


def test_what_to_do_with_files_fetched_elsewhere(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lexiseg.hub.constants.HF_HUB_OFFLINE", True)
    sam.cache_clear()
    for load, advice in (
        (sam, "copy it here and put the whole repository into the hub's cache folder."),
        (lambda: load_proxy("vit_base_patch8_224.dino"), "put the whole repository into the hub's cache folder."),
        (lambda: lexiseg.load("sam3"), "copy it here and give the folder with all its files instead of the name."),
    ):
        with pytest.raises(LexisegError, match=re.escape(advice) + "$"):
            load()


def test_weights_that_broke_off(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = hub / "model.safetensors"
    broken.write_bytes(b"\x10" * 300)
    monkeypatch.setattr("lexiseg.clip.foreign.download", lambda *given, **named: broken)
    with pytest.raises(LexisegError, match=r"cannot be read .*; delete the file and download it again") as error:
        load_proxy("vit_base_patch8_224.dino")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", HfHubHTTPError.__bases__)
def test_a_download_that_fails(hub: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def broken(*given: Any, **named: Any) -> str:
        raise kind("connection reset\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(LexisegError, match=r"failed \(connection reset\); try again later") as error:
        load_clip("hf-hub:owner/name")
    assert "\n" not in str(error.value)
