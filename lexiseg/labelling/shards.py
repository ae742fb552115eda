"""Making the results of shards of pictures, with one model that is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lexiseg.errors import LexisegError
from lexiseg.labelling.record import FOLDER, Attempt, Entry, Picture, Record, file_state

if TYPE_CHECKING:
    from lexiseg.background import BackgroundSource
    from lexiseg.predictor import Predictor
    from lexiseg.vocabulary import Vocabulary
    from lexiseg.windows import WindowPolicy

TRIES = 2
"""How often a picture may take its worker down before it is left out."""


SHARD_SIZE = 64


def shards_of(record: Record, pictures: Sequence[Picture], size: int | None = None) -> dict[int, Sequence[Picture]]:
    """Pictures in shards of ``size`` (None: 64), by a number that ``record`` does not have yet."""
    size, first = size or SHARD_SIZE, record.next_shard()
    return {first + index: pictures[start : start + size] for index, start in enumerate(range(0, len(pictures), size))}


@dataclass(frozen=True)
class Wanted:
    """What is to be made of every picture."""

    vocabulary: Vocabulary  # the classes
    kinds: tuple[str, ...]  # the files to write, as `lexiseg.segmentation.Segmentation.save` takes them
    window: WindowPolicy | None = None  # as in `lexiseg.segmenter.Segmenter.predict`
    batch_size: int = 4  # likewise
    background: BackgroundSource = None  # likewise
    instances: tuple[str, ...] = ()  # as in `lexiseg.segmentation.Segmentation.save`
    font: str | None = None  # likewise


class Labeller:
    """Segments pictures and writes their results.

    ``segmenter``: the model, with its cache of text embeddings. ``output``: the folder for the results; it must be
    there.
    """

    def __init__(self, segmenter: Predictor, wanted: Wanted, output: str | Path) -> None:
        self.segmenter = segmenter
        self.wanted = wanted
        self.output = Path(output)

    def label(self, pictures: Sequence[Picture]) -> Iterator[Entry]:
        """Make the results of ``pictures``, in their order; a picture that cannot be read is an entry with an error.

        Raises LexisegError if something is wrong that is not one picture's fault: the classes, the disk, the memory.
        """
        wanted = self.wanted
        if not pictures:
            return
        # Read before the pixels are: a file that changes meanwhile is then taken for changed.
        states = {picture.image: file_state(picture.path) for picture in pictures}
        stems = {Path(picture.path): picture for picture in pictures}
        results = self.segmenter.predict_folder(
            list(stems),
            wanted.vocabulary,
            window=wanted.window,
            batch_size=wanted.batch_size,
            background=wanted.background,
        )
        for path, result in results:
            picture, state = stems[path], states[stems[path].image]
            if isinstance(result, LexisegError):
                yield Entry(picture.image, picture.stem, error=str(result), state=state)
                continue
            if result.name != picture.name:
                result = replace(result, name=picture.name)
            files: dict[str, Path] = {}
            for kind in wanted.kinds:
                folder = self.output / FOLDER / "coco" if kind == "coco" else self.output
                files |= result.save(folder, picture.stem, (kind,), instances=wanted.instances, font=wanted.font)
            names = {kind: file.relative_to(self.output).as_posix() for kind, file in files.items()}
            ignored = result.num_ignored / (result.size[0] * result.size[1])
            rows = [
                {"class": row.name, "seen": row.seen, "fraction": row.fraction, "score": row.score}
                for row in result.table()
            ]
            image, stem, size = picture.image, picture.stem, result.size
            yield Entry(image, stem, files=names, size=size, ignored=ignored, classes=rows, state=state)

    def label_shard(self, record: Record, number: int, pictures: Sequence[Picture]) -> Iterator[Entry]:
        """Make the results of a shard and record them; where an earlier attempt was stopped, only the rest.

        A worker that was killed may have been killed by a picture (one that needs more memory than there is). From the
        second attempt on, pictures are therefore run one by one and each is announced first, and one that has taken two
        announcing attempts with it is reported and left out; the others are not lost with it. Raises LexisegError as
        :meth:`label`.
        """
        attempt = Attempt(record, number)
        try:
            before = dict(attempt.done)
            yield from (before[picture.image] for picture in pictures if picture.image in before)
            rest = [picture for picture in pictures if picture.image not in before]
            made = self.label(rest) if attempt.number == 1 else (self._one(attempt, picture) for picture in rest)
            for entry in made:
                attempt.finish(entry)
                yield entry
        finally:
            attempt.close()

    def _one(self, attempt: Attempt, picture: Picture) -> Entry:
        if attempt.begun[picture.image] >= TRIES:
            problem = (
                f"The worker was killed each time it reached '{picture.path}', probably for lack of memory; lower "
                "--max-pixels or give workers more memory."
            )
            return Entry(picture.image, picture.stem, error=problem, state=file_state(picture.path))
        attempt.begin(picture.image)
        return next(iter(self.label([picture])))
