"""The parts of the package know each other one way only; this reads every import statement, lazy ones included."""

from __future__ import annotations

import ast
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lexiseg.models import SYSTEMS
from lexiseg.models.cascade_on_spt import CascadeOnSPT
from scripts import lines_to_read

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lexiseg"

# A part may import from the parts named here and from itself. `weights` sits above `models`: it builds them from files.
WORDS = {"errors", "label_ids", "files", "words", "colors", "background", "class_forms", "class_list", "vocabulary"}
WORDS |= {"exemplars", "renames"}
PICTURES = {"images", "formats", "fonts", "overlay", "segmentation"}
MODELS = {"devices", "clip", "refine", "scores", "proposals", "regions", "losses", "models", "weights"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "first_and_last": set(),
    "label_ids": set(),
    "matmul": set(),
    "normalisation": set(),
    "smoothing": set(),
    "strict": set(),
    "templates": set(),
    "progress": set(),
    "startup": set(),
    "files": {"errors", "words"},
    "renames": {"errors"},
    "journal": {"errors", "files", "words"},
    "words": {"errors"},
    "colors": {"errors", "words"},
    "background": {"errors", "words"},
    "exemplars": {"errors", "words"},
    "exemplar_vectors": WORDS | {"images", "clip", "models", "windows"},
    "class_forms": {"exemplars", "errors", "words", "colors"},
    "class_list": {"exemplars", "errors", "files", "words", "colors", "class_forms"},
    "vocabulary": WORDS,
    "notes": WORDS,
    "images": {"errors", "files", "words"},
    "formats": {"errors", "files", "label_ids", "words", "segmentation"},  # the last for its types alone
    "fonts": {"errors", "words"},
    "overlay": {"errors", "fonts"},
    "segmentation": WORDS | PICTURES,
    "samples": {"errors"},
    "windows": {"errors"},
    "checking": {"errors", "words", "windows"},
    "processes": {"errors", "words"},
    "devices": {"errors"},
    "hub": {"errors", "words"},
    "catalog": set(),
    "scores": {"errors", "windows"},
    "proposals": {"errors", "files", "hub", "words"},
    "regions": {"errors", "clip"},
    "losses": {"errors", "label_ids", "proposals"},
    "refine": {"errors", "hub", "scores", "proposals", "words"},
    "clip": WORDS | {"catalog", "checking", "hub"},
    "models": WORDS | {"checking", "clip", "scores", "proposals", "regions", "losses", "windows"},
    "weights": WORDS | {"catalog", "hub", "clip", "proposals", "models"},
    "data": WORDS | {"formats", "images", "notes", "windows"},
    "resampling": set(),
    "pictures": WORDS | {"images", "resampling", "scores", "windows"},
    "predictor": WORDS | PICTURES | {"notes", "pictures", "refine", "scores", "windows"},
    "segmenter": WORDS
    | PICTURES
    | MODELS
    | {"devices", "exemplar_vectors", "notes", "pictures", "predictor", "windows"},
    "export": WORDS
    | PICTURES
    | MODELS
    | {"checking", "notes", "pictures", "predictor", "resampling", "segmenter"}
    | {"samples", "windows"},
    "recipes": WORDS | {"checking", "clip", "proposals", "models", "data", "windows"},
    "labelling": WORDS | PICTURES | {"journal", "predictor", "windows"},
    "evaluation": WORDS
    | PICTURES
    | MODELS
    | {"data", "journal", "pictures", "recipes", "segmenter", "processes"}
    | {"windows"},
    "analysis": WORDS | PICTURES | MODELS | {"segmenter"},
    "training": WORDS
    | PICTURES
    | MODELS
    | {"data", "hub", "journal", "recipes", "segmenter", "evaluation"}
    | {"processes"},
}
# What depends on nothing of ours may be used everywhere.
EVERYWHERE = {part for part, below in ALLOWED.items() if not below}
# What faces the user may use everything.
FACES = {"app", "cli", "maps", "video", "__main__", "__init__"}


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _modules(path: Path) -> set[str]:
    """Every module of ours that the file at ``path`` imports, as a dotted name without ``lexiseg.``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the whole name"
            names.add(node.module or "")
            # `from lexiseg import files` names a part as well
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "lexiseg")
    return {name.removeprefix("lexiseg.") for name in names if name.startswith("lexiseg.")}


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_is_in_the_table() -> None:
    assert {_part(path) for path in SOURCES} - FACES <= set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_part_imports_only_what_lies_below_it(part: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports lexiseg.{module}"
        for path in SOURCES
        if _part(path) == part
        for module in _modules(path)
        if module.split(".")[0] not in ALLOWED[part] | EVERYWHERE | {part}
    ]
    assert not wrong


def test_data_and_models_do_not_know_each_other() -> None:
    assert "models" not in ALLOWED["data"]
    assert "data" not in ALLOWED["models"]


def test_no_system_imports_another() -> None:
    # A system whose paper builds on another's is a subclass of it, and may import that one.
    built_on = {
        Path(inspect.getfile(system)).stem: {Path(inspect.getfile(base)).stem for base in system.__mro__[:-1]}
        for system in (*SYSTEMS.values(), CascadeOnSPT)
    }
    systems = set(built_on)
    for name in systems:
        others = {f"models.{other}" for other in systems - built_on[name]}
        assert not _modules(PACKAGE / "models" / f"{name}.py") & others
    # What systems share knows none of them; only the package's __init__ names them all.
    for path in (PACKAGE / "models").glob("*.py"):
        if path.stem not in systems | {"__init__", "spectral_init"}:  # whose import is for types only
            assert not _modules(path) & {f"models.{name}" for name in systems}


def test_import_and_help_do_not_load_torch() -> None:
    code = "import sys, lexiseg, lexiseg.cli; sys.exit(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_module_is_imported_in_a_circle() -> None:
    parts = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in SOURCES}
    names = {path: ".".join(found).removesuffix(".__init__") for path, found in parts.items()}
    known = set(names.values())
    graph: dict[str, set[str]] = {}
    for path, name in names.items():
        asked: set[str] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # those inside functions close no circle
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lexiseg"):
                module = (node.module or "").removeprefix("lexiseg").removeprefix(".")
                inside = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
                asked |= {name if name in known else module for name in inside}
        graph[name] = (asked & known) - {name}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a circle


# A file or function may be longer where the comment or the docstring at its top gives the reason, after these words.
MAX_FILE, MAX_FUNCTION, REASON = 450, 80, "Longer than others because"
MAX_READING = 900  # lines that a system takes to read


def test_files_and_functions_are_short_enough_to_read() -> None:
    long: list[str] = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE and REASON not in text[:2000]:
            long.append(f"{path.relative_to(PACKAGE)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION and REASON not in (ast.get_docstring(node) or ""):
                    long.append(f"{path.relative_to(PACKAGE)}: {node.name} has {lines} lines")
    assert not long


@pytest.mark.parametrize("system", lines_to_read.system_files(PACKAGE), ids=lambda file: file.stem)
def test_a_system_is_short_enough_to_read(system: Path) -> None:
    needed = lines_to_read.reading_list(PACKAGE, system)
    assert sum(needed.values()) <= MAX_READING, needed


TESTS = Path(__file__).parent
OUTSIDE = {"benchmarks", "browser", "fuzz", "parity"}  # of tests whose subject is no folder of the package


def test_tests_mirror_the_package() -> None:
    parts = {path.parent.relative_to(PACKAGE) for path in SOURCES if path.name != "__init__.py"}
    mirrored = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert {part for part in mirrored if not OUTSIDE & set(part.parts)} == parts


@pytest.mark.parametrize("folder", ["benchmarks", "scripts"])
def test_what_scripts_import_is_there(folder: str) -> None:
    for path in sorted(ROOT.glob(f"{folder}/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lexiseg"):
                exec(compile(ast.Module([node], []), str(path), "exec"), {})


def test_tests_name_nothing_private_of_the_package() -> None:
    private: list[str] = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr") and len(node.args) > 2:
                place, name = (ast.unparse(argument) for argument in node.args[:2])
                names = [] if place.startswith("torch.") else [f"lexiseg.{name[1:-1]}"]
            else:
                names = [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            private += [
                f"{path.relative_to(TESTS)}: {name}"
                for name in names
                if re.fullmatch(r"(lexiseg|benchmarks|scripts|tests)(\.\w+)*\._[a-z]\w*(\.\w+)*", name, re.IGNORECASE)
            ]
    assert not private
