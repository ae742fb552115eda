"""The golden cases of the decoupled family's CLIP side: small ones in ``tests/golden``, all where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.runner import run_case

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared" / "golden"
KINDS = {
    "decoupled-deop": ("a_visual_*", "d_text_prompts*", "e_visual_prepending*", "f_stage1_prompt*"),
    "decoupled-maft": ("a_ipclip_*", "b_resnet_*", "c_plain_vit*", "i_text_*"),
}


def paths() -> list[Path]:
    patterns = [pattern for group in KINDS.values() for pattern in group]
    found = {path.stem: path for pattern in patterns for path in sorted(GOLDEN.glob(f"{pattern}.json"))}
    for folder, group in KINDS.items():
        for pattern in group:
            for path in sorted((SHARED / folder).glob(f"{pattern}.json")):
                found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


@pytest.mark.parametrize("path", paths(), ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    case = run_case(path)
    assert case.passed, case.problems
