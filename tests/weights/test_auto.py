"""``auto``: which weights it takes, what it says, and that it never takes a toy."""

from __future__ import annotations

from pathlib import Path

import pytest

import lexiseg
from lexiseg.catalog import packaged_models
from lexiseg.errors import LexisegError
from lexiseg.weights import auto
from lexiseg.weights.training_free import METHODS


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A hub whose cache holds what ``cached`` says, and that is reachable where ``reason`` is None."""
    state: dict[str, object] = {"cached": set(), "reason": "no route"}
    monkeypatch.setattr(
        auto,
        "cached",
        lambda repository, files: Path("x") if repository in state["cached"] else None,  # type: ignore[operator]
    )
    monkeypatch.setattr(auto, "unreachable", lambda: state["reason"])
    return state


def test_the_cache_comes_before_the_hub(hub: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    hub["reason"] = None
    assert auto.pick_auto() == "maskclip/transformers:google/tipsv2-l14"
    assert "to be downloaded once" in capsys.readouterr().err
    hub["cached"] = {"timm/vit_base_patch16_clip_224.openai"}
    assert auto.pick_auto() == "naclip/ViT-B-16/openai"
    said = capsys.readouterr()
    assert "auto: naclip/ViT-B-16/openai (MIT)" in said.err and not said.out
    hub["cached"] = {"timm/vit_base_patch16_clip_224.openai", "timm/vit_base_patch8_224.dino"}
    assert auto.pick_auto().startswith("proxyclip/")


def test_without_both_it_is_one_sentence_with_both_ways_out(hub: dict[str, object]) -> None:
    with pytest.raises(LexisegError, match=r"no route.*--model.*zegclip-emoji") as caught:
        lexiseg.load()
    assert str(caught.value).count(". ") == 0


def test_it_takes_permissive_weights_only_and_no_toy() -> None:
    order = auto.auto_order()
    assert [one.auto for one in order] == list(range(1, len(order) + 1))
    assert all(one.permissive and one.best in METHODS for one in order)
    assert not {one.model for one in auto.known_weights()} & set(packaged_models())
