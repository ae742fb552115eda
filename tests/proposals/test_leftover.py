"""What no proposal claims becomes proposals of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lexiseg.errors import LexisegError
from lexiseg.models import SYSTEMS
from lexiseg.models.decoupled import DecoupledModel
from lexiseg.proposals.base import HARD_LOGIT, Proposals
from lexiseg.proposals.leftover import LeftoverOptions, add_leftover
from tests.models.test_region_models import ATTENTION, MASKFORMER
from tests.system_tester import DIM
from tests.towers import small_clip, unit_rows

TWO = LeftoverOptions(count=2, min_fraction=0.0)


def left_half(batch: int = 1) -> Proposals:
    """One mask over the left half of 8 x 8 places."""
    masks = torch.zeros(batch, 1, 8, 8)
    masks[..., :4] = 1
    return Proposals(HARD_LOGIT * (2 * masks - 1), torch.ones(batch, 1, DIM))


def test_the_other_half_is_left_over() -> None:
    found = add_leftover(left_half(), TWO)
    assert found.mask_logits.shape == (1, 3, 8, 8) and found.valid is not None and found.embeddings is not None
    assert found.valid.tolist() == [[True, True, False]]
    assert ((found.mask_logits[0, 1] > 0) == (torch.arange(8) >= 4)).all()
    assert (found.mask_logits[0, 2] == -HARD_LOGIT).all()
    assert not found.embeddings[:, 1:].any() and found.embeddings[:, 0].all() and found.aux == ()


def test_none_are_added_unless_asked_for_and_where_nothing_is_left() -> None:
    given = left_half()
    assert add_leftover(given, LeftoverOptions()) is given
    full = Proposals(torch.full((2, 1, 8, 8), HARD_LOGIT))
    found = add_leftover(full, TWO)
    assert found.valid is not None and found.valid.tolist() == [[True, False, False]] * 2 and found.embeddings is None
    assert torch.equal(found.mask_logits[:, :1], full.mask_logits)


def test_parts_are_apart_largest_first_and_small_ones_dropped() -> None:
    masks = torch.ones(1, 1, 16, 16)
    masks[..., 1:3, 1:3] = 0
    masks[..., 8:12, 8:14] = 0
    masks[..., 0, 15] = 0
    given = Proposals(HARD_LOGIT * (2 * masks - 1))
    found = add_leftover(given, LeftoverOptions(count=4, min_fraction=2 / 256))
    assert found.valid is not None and found.valid[0].tolist() == [True, True, True, False, False]
    inside = found.mask_logits[0, 1:3] > 0
    assert inside.sum(dim=(1, 2)).tolist() == [24, 4]
    assert inside[0, 8:12, 8:14].all() and inside[1, 1:3, 1:3].all()
    assert int((add_leftover(given, LeftoverOptions(count=1)).mask_logits > 0)[0, 1].sum()) == 24


def test_borders_lie_where_the_threshold_is() -> None:
    logits = torch.linspace(-4, 4, 8).expand(1, 1, 8, 8)
    found = add_leftover(Proposals(logits), LeftoverOptions(count=1, threshold=0.5, min_fraction=0.0))
    torch.testing.assert_close(found.mask_logits[0, 1, :, :5], -logits[0, 0, :, :5])
    assert (found.mask_logits[0, 1, :, 5:] == -HARD_LOGIT).all()


def test_invalid_slots_claim_nothing_and_padding_is_not_left_over() -> None:
    given = left_half()
    hidden = Proposals(given.mask_logits, valid=torch.tensor([[False]]))
    found = add_leftover(hidden, TWO, (16, 8), (8, 8))
    assert found.valid is not None and found.valid.tolist() == [[False, True, False]]
    assert (found.mask_logits[0, 1, :4] > 0).all() and (found.mask_logits[0, 1, 4:] < 0).all()
    nothing = add_leftover(Proposals(torch.zeros(2, 0, 8, 8)), TWO)
    assert nothing.mask_logits.shape == (2, 2, 8, 8) and (nothing.mask_logits[:, 0] == HARD_LOGIT).all()


def test_images_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 16, 16) * 3
    together = add_leftover(Proposals(logits), TWO)
    alone = add_leftover(Proposals(logits[1:2]), TWO)
    assert torch.equal(together.mask_logits[1:2], alone.mask_logits)


@pytest.mark.parametrize(
    ("system", "more"),
    [
        ("zsseg", {"regions": "mask-attention"}),
        ("zegformer", {"regions": "crops"}),
        ("deop", {"text_prompts": "templates", "table_side": 2}),
    ],
)
def test_systems_take_it_at_prediction_only(system: str, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attention = {} if system == "deop" else {"attention": ATTENTION}
    options = {"proposals": MASKFORMER, "leftover": {"count": 3, "threshold": 0.9}, **attention, **more}
    model = SYSTEMS[system].build(small_clip(), options, seen_names=("cat",)).eval()
    assert isinstance(model, DecoupledModel)
    images, text = torch.randn(2, 3, 64, 80), unit_rows(5, DIM)
    features = model.encode_images(images)
    assert features.values["mask_logits"].shape[1] == 8 and features.values["valid"].shape == (2, 8)
    seen = torch.tensor([True, False, False, True, False])
    dense = model.score(features, text, seen=seen).dense((64, 80))
    assert dense.shape == (2, 5, 64, 80) and torch.isfinite(dense).all()
    plain = SYSTEMS[system].build(small_clip(), {**options, "leftover": {}}, seen_names=("cat",)).eval()
    assert isinstance(plain, DecoupledModel)
    plain.load_state_dict(model.state_dict())
    assert plain.encode_images(images).values["mask_logits"].shape[1] == 5
    with torch.no_grad():
        model.train()
        assert model.propose(model.pad(images)).mask_logits.shape[1] == 5


def test_wrong_options_are_one_sentence() -> None:
    with pytest.raises(LexisegError, match="leftover"):
        SYSTEMS["zsseg"].parse_options({"leftover": {"cuont": 3}})
