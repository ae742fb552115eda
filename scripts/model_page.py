"""Write docs/models.md, the page of every packaged and convertible model: ``python -m scripts.model_page``.

What was measured comes from docs/results/picture-world.json, hashes and training from the packaged folders, weights of
others from ``lexiseg/weights/known_weights.yaml``.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from pathlib import Path

from lexiseg.weights.auto import KnownWeights, known_weights
from lexiseg.weights.publish import REPORT

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
PACKAGED = ROOT / "lexiseg" / "pretrained"

ROWS = {
    "clip-emoji": "dense-clip (value path)",
    "zegclip-emoji": "zegclip",
    "cascade-clip-emoji": "cascade-clip",
    "second-look-emoji": "second-look",
    "deop-emoji": "deop with leftover proposals",
}
"""The row of the results that a packaged model belongs to."""

GATES = "[gates](picture-world.md#the-clip-of-the-second-world)"
"""In the place of a score: of the second world's CLIP."""

CONVERTIBLE = (
    ("ZegCLIP", "`zegclip`", "CVPR 2023, mmsegmentation's layout; VOC 2012, Context, COCO-Stuff"),
    ("SPT-SEG", "`spt-seg`", "AAAI 2024, mmsegmentation's layout"),
    ("Cascade-CLIP", "`cascade-clip`", "ICML 2024, mmsegmentation's layout"),
    ("CAT-Seg, base and large", "`cat-seg`", "CVPR 2024, detectron2's layout; MIT licence"),
    ("ZSSeg, SimBaseline", "`zsseg`", "ECCV 2022 and DeOP's first stage, detectron2's layout"),
    ("ZegFormer", "`zegformer`", "CVPR 2022, detectron2's layout; holds no CLIP, `--clip` names it"),
    ("FreeSeg", "`freeseg`", "CVPR 2023, detectron2's layout"),
    ("MAFT on the three above", "`zsseg`, `zegformer`, `freeseg` with `maft`", "NeurIPS 2023, detectron2's layout"),
    ("DeOP", "`deop`", "ICCV 2023, detectron2's layout"),
    (
        "OpenAI's CLIP and open_clip's, vision transformers",
        "a CLIP",
        "state dicts; transformers' CLIP folders and files",
    ),
    ("Segment Anything (ViT-B, L, H)", "proposals", "the authors' files, to the format of transformers"),
)

LICENCE = (
    "All packaged weights are under the Apache License 2.0 like the code; the glyphs they were trained on come from "
    "the font Noto Color Emoji, SIL Open Font License 1.1, and those of `clip-world2` and `cat-seg-world2` from Noto "
    "Emoji (Apache 2.0) and Fluent Emoji (MIT). Weights you convert or download keep their authors' "
    "licences, which lexiseg does not change; read them before you use them."
)


def sha256(path: Path) -> str:
    """The file's hash in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _packaged_row(folder: Path, results: list[dict[str, object]]) -> str:
    weights = next(folder.glob("*.safetensors"))
    config = folder / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        about = content["metadata"]
        trained = f"`{content['system']}`, {about['steps'] or about['initial']['steps']} steps, seed {about['seed']}"
    else:
        trained = f"a CLIP; scenes and captions alone, `lexiseg train {folder.name}`"
    scores: list[object] = [row["test_hiou"] for row in results if row["system"] == ROWS.get(folder.name)]
    if (report := folder / REPORT).is_file():
        scores = [json.loads(report.read_text(encoding="utf-8"))["metrics"]["hiou"]]
    measured = f"{statistics.mean(float(str(score)) for score in scores):.1f} ({len(scores)})" if scores else GATES
    size = f"{weights.stat().st_size / 1e6:.1f} MB"
    return f"| `{folder.name}` | {trained} | {measured} | {size} | `{sha256(weights)}` |"


def _known_row(one: KnownWeights) -> str:
    order = "-" if one.auto is None else str(one.auto)
    return (
        f"| `{one.name}` | {one.licence} | {'yes' if one.permissive else '**no**'} | {one.size:,} MB | {one.source} "
        f"| `{one.best}` | {order} |"
    )


def page() -> str:
    """The page as Markdown."""
    results = json.loads((ROOT / "docs" / "results" / "picture-world.json").read_text(encoding="utf-8"))["rows"]
    folders = sorted(path for path in PACKAGED.iterdir() if any(path.glob("*.safetensors")))
    lines = [
        "# Models",
        "",
        "Made by `python -m scripts.model_page`; do not edit by hand.",
        "",
        "## In the package",
        "",
        "Trained in [the picture world](picture-world.md) by `make weights`; they know its words and drawings, not "
        "photographs. *hIoU* is the recipe's on 200 test scenes, averaged over the number of seeds in brackets "
        "([all results](results/picture-world.md)); that of `cat-seg-world2` is on the 500 of "
        "[the second world](picture-world.md#the-second-world), whose words are twice as many and look alike. The hash "
        "is the SHA-256 of the safetensors file.",
        "",
        "| name | how trained | hIoU | size | hash |",
        "|---|---|---|---|---|",
        *(_packaged_row(folder, results) for folder in folders),
        "",
        LICENCE,
        "",
        "## Published weights",
        "",
        "For your own pictures: `METHOD/NAME`, such as `naclip/ViT-B-16/openai`, loads them; no training is needed "
        "([Your own photographs](photographs.md)). *Permissive*: the licence allows any use. *Best*: the best method "
        "by published results. *Auto*: the order in which `--model auto` tries them. Sizes are estimated from the "
        "numbers of parameters. `lexiseg models --weights` shows which of them are on this machine.",
        "",
        "| name | licence | permissive | size | where from | best | auto |",
        "|---|---|---|---|---|---|---|",
        *map(_known_row, known_weights()),
        "",
        "## Convertible",
        "",
        "`lexiseg convert FILE -o FOLDER` reads these ([details](weights.md#converting)). The authors' files were not "
        "available: the converter is tested on full-size files with random weights in their layout, and the systems "
        "are compared with the output of the authors' code ([parity](weights.md#parity-with-the-authors-code)).",
        "",
        "| checkpoint | becomes | layout |",
        "|---|---|---|",
        *(f"| {name} | {system} | {layout} |" for name, system, layout in CONVERTIBLE),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
