"""The template sets of the decoupled systems, by the names that options use; ``templates.yaml`` has them."""

from __future__ import annotations

from pathlib import Path

import yaml

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    name: tuple(templates)
    for name, templates in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
}
SCULPTURE, IN_THE_SCENE, VILD_14, IMAGENET_SELECT, ZEGFORMER_32, IMAGENET_80 = TEMPLATE_SETS.values()
