"""Converting the region hosts' checkpoints: what the files leave open is said, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lexiseg.clip.model import save_clip
from lexiseg.errors import LexisegError
from lexiseg.weights import ConversionReport, convert, load_model
from lexiseg.weights.decoupled_checkpoints import read_parts
from lexiseg.weights.detectron_checkpoint import recognise_detectron
from tests.parity.case import load_case
from tests.towers import small_clip
from tests.weights.test_detectron_checkpoint import authors_state, make, on_meta

GOLDEN = Path(__file__).parents[1] / "golden"


def freeseg() -> dict[str, Tensor]:
    return load_case(GOLDEN / "h_full_freeseg_a.json").params()


def zegformer(embed_dim: int) -> dict[str, Tensor]:
    """A training checkpoint, which has no CLIP in it."""
    generator = make("maskformer", backbone="r50", stem_width=6, class_head="linear", embed_dim=embed_dim)
    predictor = "sem_seg_head.predictor."
    own = {f"{predictor}bg_feature": torch.rand(1, embed_dim), f"{predictor}logit_scale": torch.ones(1)}
    return {**authors_state(generator), **own}


def converted(state: dict[str, Tensor], folder: Path, **arguments: Any) -> ConversionReport:
    torch.save({"model": state}, folder / "model_final.pth")
    return convert(folder / "model_final.pth", folder / "out", heads=4, text_heads=4, **arguments)


@pytest.mark.parametrize("system", ["freeseg", "maft"])
def test_a_file_without_its_interaction_is_damaged(system: str) -> None:
    state = {key: value for key, value in on_meta(system).items() if ".interaction." not in key}
    assert recognise_detectron(state) == system
    with pytest.raises(LexisegError, match=r"lacks sem_seg_head\.interaction\.\*"):
        read_parts(state)


def test_a_file_without_a_query_decoder_is_not_recognised() -> None:
    state = {key: value for key, value in on_meta("zsseg").items() if "transformer.decoder." not in key}
    assert recognise_detectron(state) is None


def test_what_a_file_leaves_open_is_said(tmp_path: Path) -> None:
    report = converted(freeseg(), tmp_path)
    assert report.kind == "freeseg"
    said = " ".join(report.notes)
    for part in ("weight is 0.8", "shorter side is 640", "none counts as seen", "ensemble treats all as unseen"):
        assert part in said
    assert "learned prompts" not in said and "offset" not in said
    assert report.ignored == ()
    bare = {key: value for key, value in freeseg().items() if "prompt_learner" not in key}
    again = converted(
        bare, tmp_path, class_names=["cat"], transductive=True, quick_gelu=True, clip="a name that nothing has"
    )
    said = " ".join(again.notes)
    assert "no learned prompts in the file: words are put into templates" in said and "counts as seen" not in said
    assert again.ignored == ("transductive", "quick_gelu", "clip")


def test_zegformer_has_an_offset_unless_it_trained_itself(tmp_path: Path) -> None:
    clip = small_clip()
    folder = save_clip(clip, tmp_path / "clip")
    state = zegformer(clip.embed_dim)
    with pytest.raises(LexisegError, match="has no CLIP in it; name the one it was trained with, such as --clip "):
        converted(state, tmp_path)
    for transductive, offset in ((False, 0.1), (True, 0.0)):
        report = converted(state, tmp_path, clip=folder, transductive=transductive)
        assert report.kind == "zegformer" and report.ignored == ()
        assert ("no score offset applies" in " ".join(report.notes)) is not transductive
        assert load_model(tmp_path / "out").options.seen_offset == offset  # type: ignore[attr-defined]
