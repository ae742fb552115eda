"""How many lines a reader needs for each system, imports followed from the system's file within lexiseg.

``python -m scripts.lines_to_read [--root FOLDER] [--files SYSTEM]`` prints for each system the lines of its own file,
the lines that must be read, that file included, and all lines that any import leads to. What must be read stops at
`INTERFACES`, rooms of which a reader needs the names and the docstrings where they are called, not the inside. Lines
are those of the files, with docstrings, comments and blank lines.
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

INTERFACES = {
    "errors": "one exception class",
    "words": "text and names",
    "vocabulary": "classes, words and templates",
    "class_list": "reads files of classes",
    "label_ids": "the label of pixels without a class",
    "windows": "how a picture is cut into windows",
    "checking": "pydantic's findings as one sentence",
    "hub": "downloads",
    "files": "writes files",
    "smoothing": "filters of maps: PAMR, another paper's, and edge-avoiding smoothing",
    "strict": "a pydantic model that cannot be changed",
    "normalisation": "a mean and a standard deviation of colours, taken off and put back",
    "matmul": "torch's linear layers and convolutions, by faster code",
    "scores": "what a model gives back: logits on a grid or a region, made into pixels",
    "models.base": "what every system is: images and text in, scores out",
    "models.options": "options as pydantic models",
    "clip.model": "an open_clip model, its text tower and its files",
    "clip.text": "a cache of text embeddings",
    "clip.foreign": "the CLIPs of other libraries behind the face of clip.model",
    "clip.library_towers": "the towers of open_clip, timm and transformers, which are what clip.patch_tower says",
    "clip.load": "finds a CLIP by name",
    "templates": "lists of sentences",
    "clip.positions": "resizes a position table",
    "clip.embeddings": "CLIP as it is: a picture in, the embedding of the whole or of its patches out",
    "clip.prompt_learner": "CoOp, another paper's: vectors around a name where a template has words",
    "proposals.options": "MaskFormer, Mask2Former, SAM: other papers' systems, which are to a model what "
    "proposals.base says, and which its option `proposals` names and builds",
    "proposals.base": "what every generator of masks is: images in, regions out",
    "proposals.leftover": "proposals of our own, which no paper has and which are off by default",
    "models.deop_ablations": "what DeOP is compared with in its Tables 4, 5 and 7, and forms that only the released "
    "code has; the paper's system has none of it",
    "models.maft": "MAFT, which plugs into the region models by their option of this name; read it as a system",
    "regions.duplicates": "an option of our own, which no paper has and which is off by default",
    "losses": "formulas, which the systems' docstrings repeat, computed with little memory and over processes",
    "models.decoupled_init": "what a training may take over from another system's model",
    "models.similarity_init": "an initial state of our own, which no paper has",
    "models.spectral_init": "the same for SPT-SEG",
}
"""Rooms, or parts of rooms, that a reader need not enter unless they are the system asked for, and what is in them."""


def system_files(package: Path) -> list[Path]:
    """The files of systems, those of `lexiseg.models` that name one, and MAFT's, which plugs into others."""
    named = re.compile(r'^    system\b.* = "', re.MULTILINE)
    files = sorted(package.glob("models/*.py"))
    return [file for file in files if file.stem == "maft" or named.search(file.read_text(encoding="utf-8"))]


def module_file(package: Path, module: str) -> Path | None:
    """The file of a dotted module without ``lexiseg.``, or None where there is none."""
    path = package.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(package: Path, file: Path) -> set[Path]:
    """The files of lexiseg that a file names in its imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    inside = {name.removeprefix("lexiseg.") for name in found if name.startswith("lexiseg.")}
    files = (module_file(package, name) for name in inside)
    return {path for path in files if path is not None and path.stat().st_size}


def is_interface(package: Path, file: Path) -> bool:
    """Whether a file is inside one of the `INTERFACES`."""
    name = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
    return any(name == room or name.startswith(f"{room}.") for room in INTERFACES)


def reading_list(package: Path, start: Path, *, everything: bool = False) -> dict[Path, int]:
    """Files to read from ``start`` on, with their lines; stops at the `INTERFACES` unless ``everything`` is wanted."""
    found: dict[Path, int] = {}
    ahead = [start]
    while ahead:
        file = ahead.pop()
        if file not in found and (everything or file == start or not is_interface(package, file)):
            found[file] = len(file.read_text(encoding="utf-8").splitlines())
            ahead += imports(package, file)
    return found


def main() -> None:
    """Print the table, or the files that one system needs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="a checkout of lexiseg")
    parser.add_argument("--files", metavar="SYSTEM", help="list the files that a reader of this system needs")
    options = parser.parse_args()
    package = options.root / "lexiseg"
    if options.files:
        for file, lines in reading_list(package, package / "models" / f"{options.files}.py").items():
            print(f"{lines:6d}  {file.relative_to(package)}")
        return
    print(f"{'system':14s}{'own file':>10s}{'to read':>10s}{'all':>10s}")
    for file in system_files(package):
        needed, strict = (reading_list(package, file, everything=every) for every in (False, True))
        print(f"{file.stem:14s}{needed[file]:10d}{sum(needed.values()):10d}{sum(strict.values()):10d}")


if __name__ == "__main__":
    main()
