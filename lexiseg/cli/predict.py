"""``lexiseg predict``: pictures and words in, labels out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

import lexiseg
from lexiseg.cli import options as shared
from lexiseg.cli.console import waiting
from lexiseg.errors import LexisegError, warn
from lexiseg.exemplars import PREFIX
from lexiseg.words import counted, word_key

if TYPE_CHECKING:
    from lexiseg.vocabulary import Vocabulary

_ALIASES = {"png": "labels", "rle": "coco"}
_OBJECT_KINDS = ("coco", "geojson", "yolo", "labelme", "cvat")


Words = Annotated[
    list[str],
    Argument(
        metavar="IMAGE... CLASSES",
        help="Pictures, folders or patterns, followed by the classes: 'giraffe; tree, bush; sky' (a semicolon "
        "separates classes, a comma joins synonyms) or a file of them.",
    ),
]
ClassesFile = Annotated[
    Path | None, Option("--classes-file", "-c", help="File of classes; all arguments are then pictures.")
]
Model = Annotated[str, Option("--model", "-m", help="A name that `lexiseg models` lists, a folder, or auto.")]
Output = Annotated[Path, shared.output_option("Folder to write into.")]
Save = Annotated[
    str,
    Option(
        "--save",
        help="What to write, separated by commas: overlay, labels (png), json; coco (one annotations.json per run); "
        "geojson, yolo, labelme, cvat; masks (one PNG per class).",
    ),
]
Instances = Annotated[
    str | None,
    Option(
        "--instances",
        help="Classes, 'giraffe; tree' or all, whose connected regions become separate annotations in coco, geojson, "
        "yolo, labelme and cvat. Objects that touch are one region.",
    ),
]
Font = Annotated[
    Path | None,
    Option("--font", help="TrueType or OpenType file for the legend. Default: installed fonts that have the letters."),
]
Resume = Annotated[bool, Option("--resume", help="Skip pictures that an earlier run into the same folder finished.")]
BatchSize = Annotated[int, Option("--batch-size", "-b", min=1, help="Windows per forward pass.")]
MaxPixels = Annotated[int, Option("--max-pixels", min=1, help="Refuse pictures with more pixels than this.")]
OnCluster = Annotated[
    Literal["ray"] | None,
    Option("--cluster", help="Distribute the pictures over a cluster: ray. Default: run in this process."),
]
Workers = Annotated[
    int | None,
    Option(
        "--workers", min=1, help="Cluster: maximum number of workers. Default: one per GPU, or per CPU without GPUs."
    ),
]
Address = Annotated[
    str | None,
    Option(
        "--address",
        help="Cluster: HOST:PORT; auto: the one this machine is part of; local starts one here. "
        "Default: $RAY_ADDRESS, or local.",
    ),
]
ShardSize = Annotated[
    int | None, Option("--shard-size", min=1, help="Cluster: pictures that a worker gets at a time. Default: 64.")
]
Every = Annotated[int, Option("--every", min=1, help="Video: run the model on every Nth frame.")]
Smooth = Annotated[float, Option("--smooth", help="Video: weight of earlier frames in the scores, 0 to below 1.")]
Bands = Annotated[str | None, Option("--bands", help="Map: bands for red, green and blue, such as 4,3,2.")]
Polygons = Annotated[str, Option("--polygons", help="Map: geojson, gpkg or none.")]
Frames = Annotated[int | None, Option("--frames", min=1, help="Video: stop after this many frames.")]


def predict(
    words: Words,
    classes_file: ClassesFile = None,
    model: Model = shared.DEFAULT_MODEL,
    output: Output = Path("out"),
    save: Save = "overlay,labels,json",
    instances: Instances = None,
    font: Font = None,
    json: shared.Json = False,
    resume: Resume = False,
    window: shared.Window = None,
    stride: shared.Stride = None,
    batch_size: BatchSize = 4,
    device: shared.Device = "auto",
    dtype: shared.Dtype = "fp32",
    compile: shared.Compile = False,
    template: shared.Template = None,
    background: shared.Background = None,
    refine: shared.Refine = "none",
    max_pixels: MaxPixels = shared.DEFAULT_MAX_PIXELS,
    cluster: OnCluster = None,
    workers: Workers = None,
    address: Address = None,
    shard_size: ShardSize = None,
    every: Every = 1,
    smooth: Smooth = 0.0,
    bands: Bands = None,
    polygons: Polygons = "geojson",
    frames: Frames = None,
) -> None:
    """Segment pictures by words.

    A picture that cannot be read is reported and skipped; the exit code is then 1, or 2 if none could be segmented.
    """
    if cluster is None and (workers or address or shard_size):
        raise LexisegError("--workers, --address and --shard-size are for a cluster; add --cluster ray.")
    kinds = _kinds(save, instances, font)
    sources, classes = _split(words, classes_file)
    from lexiseg.cli.streams import predict_map, predict_video, read_bands
    from lexiseg.maps import MapOptions, is_map
    from lexiseg.pictures import window_policy
    from lexiseg.video import VideoOptions, is_video

    moves = any(is_video(source, animations=len(sources) == 1) for source in sources)
    video = VideoOptions(every, smooth, "overlay" in kinds, resume, frames) if moves else None
    chart = MapOptions(read_bands(bands), polygons=polygons) if is_map(sources[0]) else None
    streams = (
        ("--every, --smooth and --frames", every > 1 or smooth or frames, "video", video),
        ("--bands and --polygons", bands or polygons != "geojson", "map with a georeference", chart),
    )
    for names, given, kind, found in streams:
        if given and not found:
            raise LexisegError(f"{names} are for a {kind}, which '{sources[0]}' is not; leave them out.")
    if video or chart:
        _refuse_for_streams(len(sources) > 1 or cluster, font or instances, kinds, chart and resume)
    paths = [] if video or chart else _pictures(sources, output)
    vocabulary = _vocabulary(classes, kinds)
    from lexiseg.files import new_folder

    loading: dict[str, Any] = {"dtype": dtype, "compile": compile, "templates": template or None}
    loading |= {"max_pixels": max_pixels, "refine": refine}
    with new_folder(output):
        with waiting(f"loading {model}"):
            # On a cluster the workers load it where they are; here it is needed to look at the words.
            segmenter = lexiseg.load(model, device=device if cluster is None else "cpu", **loading)
        policy = window_policy(segmenter.model.window, window, stride)
        checked = segmenter.vocabulary(vocabulary, background=background)
        if chart:
            predict_map(segmenter, sources[0], checked, output, chart, json, window=policy, batch_size=batch_size)
        elif video:
            predict_video(segmenter, sources[0], checked, output, video, json, window=policy, batch_size=batch_size)
        else:
            from lexiseg.cli.pictures import Spread, predict_pictures
            from lexiseg.labelling.pictures import Wanted

            regions, face = _instances(instances, checked), None if font is None else str(font)
            wanted = Wanted(vocabulary, tuple(kinds), policy, batch_size, background, regions, face)
            spread = Spread(device, loading, workers, address, shard_size) if cluster else None
            predict_pictures(segmenter, model, paths, checked, wanted, output, json=json, resume=resume, spread=spread)


def _refuse_for_streams(many: object, dressed: object, kinds: Sequence[str], again: object) -> None:
    """Refuse what a video or a map would pass over."""
    if again:
        raise LexisegError("A map is segmented as a whole and cannot be resumed; leave out --resume.")
    if many:
        raise LexisegError("A video or a map must be the only input; give one, without --cluster.")
    if dressed or not {"overlay", "labels", "json"}.issuperset(kinds):
        raise LexisegError(
            "A video gives NAME_frames.jsonl and an overlay, a map labels and polygons; leave out --instances, --font "
            "and other formats of --save, which are for pictures."
        )


def _kinds(save: str, instances: str | None, font: Path | None) -> list[str]:
    from lexiseg.formats import SAVE_FORMATS

    names = [name.strip().lower() for name in save.split(",")]
    kinds = list(dict.fromkeys(_ALIASES.get(name, name) for name in names))
    for kind in kinds:
        if kind not in SAVE_FORMATS:
            raise LexisegError(f"--save has no format '{kind}'; choose from {', '.join(SAVE_FORMATS)}.")
    if font is not None and "overlay" not in kinds:
        raise LexisegError("--font is for the legend of overlays, which --save leaves out; add overlay to it.")
    if instances is not None and not set(_OBJECT_KINDS) & set(kinds):
        raise LexisegError(
            f"--instances has no effect on these formats of --save; add one of {', '.join(_OBJECT_KINDS)}."
        )
    return kinds


def _vocabulary(classes: str | Path, kinds: Sequence[str]) -> Vocabulary:
    from lexiseg.class_list import read_classes
    from lexiseg.notes import numbered

    listed = read_classes(classes)
    if "labels" in kinds or "yolo" in kinds:
        numbered(listed)
    return lexiseg.Vocabulary.parse(listed)


def _instances(text: str | None, vocabulary: Vocabulary) -> tuple[str, ...]:
    """The classes of ``--instances``, as the vocabulary spells them."""
    if text is None:
        return ()
    if text.strip().casefold() == "all":
        return vocabulary.names
    names = {word_key(name): name for name in vocabulary.names}
    wanted = [word for word in text.split(";") if word.strip()]
    unknown = [word for word in wanted if word_key(word) not in names]
    if unknown or not wanted:
        raise LexisegError(
            f"--instances takes class names, or all; '{(unknown or [text])[0]}' is not one of the classes."
        )
    return tuple(names[word_key(word)] for word in wanted)


def _split(words: Sequence[str], classes_file: Path | None) -> tuple[list[str], str | Path]:
    """Tell the pictures from the classes."""
    from lexiseg.files import refuse_url
    from lexiseg.images import IMAGE_SUFFIXES

    for word in words:
        refuse_url(word)
    if classes_file is not None:
        return list(words), classes_file
    if len(words) < 2:
        raise LexisegError(
            f"Only '{words[0]}' was given; write the pictures first and then the classes, for example "
            "lexiseg predict photo.jpg 'giraffe; tree, bush'."
        )
    last = words[-1]
    # A folder's bare name may be a word; os.path because a text of classes may be too long for pathlib.
    is_folder = Path(last).name != last and os.path.isdir(last)  # noqa: PTH112
    if PREFIX not in last and (is_folder or Path(last).suffix.lower() in IMAGE_SUFFIXES):
        raise LexisegError(
            f"The last argument, '{last}', is a {'folder' if is_folder else 'picture'}; write the classes after the "
            "pictures."
        )
    return list(words[:-1]), last


def _pictures(sources: Sequence[str], output: Path) -> list[Path]:
    """The files that the arguments stand for, each once, in order; of a folder not what was written into it."""
    from lexiseg.images import list_images
    from lexiseg.labelling.pictures import FOLDER, absolute

    paths: dict[Path, Path] = {}  # by their real folder: `a/b.png`, `c/../a/b.png` and one behind a link are one
    results = 0
    for source in sources:
        found = list_images(source)
        stems = {path.stem for path in found}
        folders = {path.parent: path.parent.resolve() for path in found}
        written = {one for one in folders if absolute(one) == absolute(output) or (one / FOLDER).is_dir()}
        for path in found:
            name, _, kind = path.stem.rpartition("_")
            if kind in ("overlay", "labels") and name in stems and path.parent in written:
                results += 1
            else:
                paths.setdefault(folders[path.parent] / path.name, path)
    if results:
        warn(f"Skipped: {counted(results, 'picture')} that lexiseg wrote itself.")
    from lexiseg.maps import MAP_SUFFIXES, is_map

    map_like = next((path for path in paths.values() if path.suffix.lower() in MAP_SUFFIXES), None)
    if map_like is not None and is_map(map_like):
        warn(f"'{map_like}' is a map, whose coordinates the labels of pictures lack; give each map by itself.")
    return list(paths.values())
