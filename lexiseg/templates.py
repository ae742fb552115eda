"""Sets of templates by the names that options and users give them; ``templates.yaml`` has them."""

from pathlib import Path

import yaml

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    name: tuple(templates)
    for name, templates in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8")).items()
}
_SETS = tuple(TEMPLATE_SETS.values())
SINGLE_TEMPLATE, PAPER_TEMPLATES = _SETS[:2]
SCULPTURE, IN_THE_SCENE, VILD_14, IMAGENET_SELECT, ZEGFORMER_32, IMAGENET_80 = _SETS[2:]
