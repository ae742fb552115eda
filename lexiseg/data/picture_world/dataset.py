"""The fixed benchmarks ``picture-world`` and ``picture-world-2``: splits made of scenes, and the same on disk."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from lexiseg.data.base import Sample
from lexiseg.data.picture_world.classes import FIRST, World
from lexiseg.data.picture_world.scene import Scene, render_scene
from lexiseg.errors import LexisegError
from lexiseg.files import atomic_write, make_folder, write_text
from lexiseg.label_ids import IGNORE_INDEX
from lexiseg.notes import mark_drawn

Split = Literal["train", "val", "test"]

# First integer of every scene's seed. The stages of the CLIP training use others, so no val scene is ever trained on.
# (3 is the sample pictures'.) Settings are chosen on val; test is for judging what was chosen.
SPLIT_SEEDS: dict[str, int] = {"train": 1, "val": 2, "test": 4}


class PictureWorld:
    """Scenes with masks, rendered when asked for; the same index gives the same sample in any process.

    The train split hides the unseen classes: their pixels are 255 before a sample leaves this object, so that no stage
    of any training can see a mask of them. The val and test splits have every class.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        world: what the scenes are made of.
        size: pixels per side.
        length: number of scenes; default: the world's.
        unseen: False draws no unseen class at all, so that nothing has to be hidden.
        cache_dir: a folder in which rendered scenes are kept, for runs that share them and processes at the same time;
            to be emptied after a change to how scenes are drawn.

    Raises LexisegError if there is no such split.
    """

    def __init__(
        self,
        split: Split,
        *,
        world: World = FIRST,
        size: int = 256,
        length: int | None = None,
        unseen: bool = True,
        cache_dir: Path | None = None,
    ) -> None:
        if split not in SPLIT_SEEDS:
            raise LexisegError(f"{world.name} has no split '{split}'; choose 'train', 'val' or 'test'.")
        self.split, self.world, self.size = split, world, size
        self.vocabulary = world.vocabulary  # the classes the label ids index, with their seen flags
        self._without = () if unseen else world.unseen
        self._length = dict(zip(SPLIT_SEEDS, world.num_scenes, strict=True))[split] if length is None else length
        self._shown = np.arange(256, dtype=np.int64)  # the label of each class
        if split == "train":
            self._shown[[world.class_ids[name] for name in world.unseen]] = IGNORE_INDEX
        self._kept: Path | None = None
        if cache_dir is not None:
            what = repr((world, split, size, unseen))
            name = f"{world.name}-{split}-{size}-{hashlib.sha256(what.encode()).hexdigest()[:8]}.scenes"
            self._kept = make_folder(cache_dir) / name
            self._kept.touch()

    def __len__(self) -> int:
        return self._length

    def _check(self, index: int) -> None:
        if not 0 <= index < self._length:
            raise IndexError(f"{self.world.name} {self.split} has {self._length} scenes, there is no index {index}")

    def _scene(self, index: int) -> Scene:
        self._check(index)
        seed, held_out = [SPLIT_SEEDS[self.split], index], self.split != "train"
        return render_scene(seed, self.size, world=self.world, held_out=held_out, without=self._without)

    def _pixels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture and label of a scene, rendered, or read if it was kept."""
        if self._kept is None:
            scene = self._scene(index)
            return scene.image, scene.label
        # A place of its own for each scene, whose last byte says that the others are there: processes that render one
        # scene at the same time write the same bytes.
        self._check(index)
        shape = (self.size, self.size, 4)
        length = self.size**2 * 4 + 1
        with self._kept.open("r+b") as file:
            file.seek(index * length)
            found = file.read(length)
            if len(found) < length or not found[-1]:
                scene = self._scene(index)
                joined = np.dstack([scene.image, scene.label])
                file.seek(index * length)
                file.write(joined.tobytes() + b"\1")
            else:
                joined = np.frombuffer(found, np.uint8, length - 1).reshape(shape)
        return joined[..., :3].copy(), joined[..., 3]

    def __getitem__(self, index: int) -> Sample:
        """Return the sample: image (3, S, S) uint8, label (S, S) int64 with 255 where a class is hidden."""
        image, label = self._pixels(index)
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            label=torch.from_numpy(self._shown[label]),
            name=f"{self.world.name}/{self.split}/{index:05d}",
        )

    def captioned(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Return a scene's picture (S, S, 3) and label (S, S) int64, and the sentence that names what is visible."""
        scene = self._scene(index)
        return scene.image, self._shown[scene.label], scene.caption


def write_voc(
    folder: str | Path, *, world: World = FIRST, num_train: int = 200, num_val: int = 50, size: int = 256
) -> Path:
    """Write a picture world to disk in the VOC folder layout and return the folder.

    ``JPEGImages/*.jpg``, ``SegmentationClass/*.png`` (palette, 255 = ignored), the lists
    ``ImageSets/Segmentation/{train,val}.txt``, ``captions.txt`` (name, tab, sentence), ``classes.txt`` and
    ``unseen.txt``. The masks of the train split have 255 where an unseen class is. Files of an earlier run are
    overwritten.

    Raises LexisegError if the folder holds anything else, or cannot be written.
    """
    root = make_folder(folder)
    classes, listed = "".join(f"{name}\n" for name in world.classes), root / "classes.txt"
    shown = any(not entry.name.startswith(".") for entry in root.iterdir())
    if shown and not (listed.is_file() and listed.read_bytes() == classes.encode()):
        raise LexisegError(f"'{root}' holds files that are not part of this world; give a new folder.")
    write_text(listed, classes)  # first, so that a run that was stopped can be repeated
    images, masks = make_folder(root / "JPEGImages"), make_folder(root / "SegmentationClass")
    lists = make_folder(root / "ImageSets" / "Segmentation")
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(world.classes)] = world.vocabulary.palette()
    captions = []
    options: dict[str, Any] = {"quality": 95, "subsampling": 0, **mark_drawn(".jpg")}
    splits: tuple[tuple[Split, int], ...] = (("train", num_train), ("val", num_val))
    for split, length in splits:
        dataset = PictureWorld(split, world=world, size=size, length=length)
        names = []
        for index in range(length):
            name, (image, label, caption) = f"{split}_{index:05d}", dataset.captioned(index)
            with atomic_write(images / f"{name}.jpg") as temporary:
                Image.fromarray(image).save(temporary, **options)
            mask = Image.fromarray(label.astype(np.uint8), "P")
            mask.putpalette(palette.tobytes())
            with atomic_write(masks / f"{name}.png") as temporary:
                mask.save(temporary, optimize=True)
            names.append(name)
            captions.append(f"{name}\t{caption}")
        write_text(lists / f"{split}.txt", "".join(f"{name}\n" for name in names))
    write_text(root / "captions.txt", "".join(f"{line}\n" for line in captions))
    write_text(root / "unseen.txt", "".join(f"{name}\n" for name in world.unseen))
    return root


def contact_sheet(
    split: Split = "val", *, world: World = FIRST, rows: int = 3, columns: int = 5, size: int = 256
) -> Image.Image:
    """Return the first scenes of a split side by side as one picture."""
    gap = 4
    sheet = Image.new("RGB", (columns * (size + gap) - gap, rows * (size + gap) - gap), "white")
    dataset = PictureWorld(split, world=world, size=size)
    for index in range(rows * columns):
        picture = Image.fromarray(dataset[index].image.permute(1, 2, 0).numpy())
        sheet.paste(picture, ((index % columns) * (size + gap), (index // columns) * (size + gap)))
    return sheet
