"""``lexiseg doctor``: check the machine and the installation."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import lexiseg
from lexiseg.cli.console import say, say_json, say_note, say_table, waiting
from lexiseg.cli.options import Json
from lexiseg.errors import LexisegError
from lexiseg.journal import flat

SELF_TEST_SECONDS = 5.0
SELF_TEST_MODEL = "zegclip-emoji"
SELF_TEST_SAMPLE = "demo"

_DEVELOPMENT = "dev"


class _Requirement(NamedTuple):
    """A package that lexiseg asks for."""

    name: str
    text: str  # what to give pip
    extra: str | None  # that asks for it; None for all


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Skip what needs torch: accelerators and the self-test.")
    ] = False,
    json: Json = False,
) -> None:
    """Check the installation and segment a sample picture with packaged weights.

    Exit code 1 if there is a problem.
    """
    with waiting("checking the machine"):
        requirements = _requirements()
        report: dict[str, Any] = {
            "lexiseg": {"version": lexiseg.__version__, "path": str(Path(lexiseg.__file__).parent)},
            "machine": _machine(),
            "torch": None if quick else _torch(),
            "packages": {asked.name: _version(asked.name) for asked in requirements},
            "folders": _folders(),
            "models": [entry.name for entry in lexiseg.list_models()],
        }
    with waiting("segmenting a sample"):
        report["self_test"] = self_test = None if quick else _self_test()
    report["problems"] = problems = [
        f"The package '{asked.name}' is not installed; run: pip install '{asked.text}'"
        for asked in requirements
        if asked.extra is None and report["packages"][asked.name] is None
    ]
    for name, facts in report["folders"].items():
        if not facts["writable"]:
            problems.append(f"The {name} '{facts['path']}' is not writable.")
    if self_test is not None and not self_test["ok"]:
        problems.append(f"The self-test failed: {self_test['problem']}")
    if json:
        say_json(report)
    else:
        _print(report, requirements)
    if problems:
        raise typer.Exit(1)


def _machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }
    if sys.platform != "win32":
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return facts


def _requirements() -> list[_Requirement]:
    """The packages that lexiseg's metadata require; empty if lexiseg is not installed."""
    try:
        lines = importlib.metadata.requires("lexiseg") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[_Requirement] = []
    for line in lines:
        text, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", text)
        extra = re.search(r"""extra\s*==\s*["']([^"']+)""", marker)
        if name is not None and (extra is None or extra[1] != _DEVELOPMENT):
            found.append(_Requirement(name[0], text.strip(), extra and extra[1]))
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    import torch

    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda_build": torch.version.cuda,
        "cuda_devices": [{"name": one.name, "memory_gib": round(one.total_memory / 2**30, 1)} for one in devices],
        "mps": torch.backends.mps.is_available(),
    }


def _folders() -> dict[str, dict[str, Any]]:
    from huggingface_hub import constants

    from lexiseg.files import default_cache_folder

    hub = {**_folder(Path(constants.HF_HUB_CACHE)), "offline": bool(constants.HF_HUB_OFFLINE)}
    return {"hub cache": hub, "text cache": _folder(default_cache_folder())}


def _folder(path: Path) -> dict[str, Any]:
    """Whether ``path``, or the nearest folder above it that exists, can be written; leaves nothing behind."""
    # Not by pathlib's own questions: they raise where this user may not even look.
    standing = next(parent for parent in (path, *path.parents) if os.path.exists(parent))  # noqa: PTH110
    try:
        with tempfile.TemporaryFile(dir=standing):
            writable = True
    except OSError:
        writable = False
    free = round(shutil.disk_usage(standing).free / 2**30, 1)
    return {"path": str(path), "exists": standing == path, "writable": writable, "free_gib": free}


def _self_test() -> dict[str, Any]:
    """Segment a sample picture with packaged weights and check that its classes are found."""
    from lexiseg.samples import sample_classes, sample_path

    facts: dict[str, Any] = {"model": SELF_TEST_MODEL, "sample": SELF_TEST_SAMPLE}
    start = time.perf_counter()
    try:
        segmenter = lexiseg.load(SELF_TEST_MODEL, device="cpu")
        result = segmenter.predict(sample_path(SELF_TEST_SAMPLE), sample_classes(SELF_TEST_SAMPLE))
    except LexisegError as error:
        return {**facts, "ok": False, "problem": str(error)}
    seconds = time.perf_counter() - start
    found = [row.name for row in result.table() if row.fraction >= 0.01]
    facts |= {"seconds": round(seconds, 2), "found": found, "ok": len(found) > 1}
    if not facts["ok"]:
        facts["problem"] = (
            f"only {found or 'nothing'} was found in the sample; the weights or this build of torch are broken."
        )
    elif seconds > SELF_TEST_SECONDS:
        facts["note"] = f"it took longer than {SELF_TEST_SECONDS:g} seconds; the machine is slow or busy"
    return facts


def _told(fact: Any) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return ", ".join(map(str, fact)) or "none" if isinstance(fact, list) else str(fact)


def _print(report: dict[str, Any], requirements: list[_Requirement]) -> None:
    facts = flat({key: report[key] for key in ("lexiseg", "machine", "torch", "folders", "models")})
    rows = [[key.replace("_", " "), _told(value)] for key, value in facts.items() if value is not None]
    say_table(None, ["what", "found"], rows)
    say()
    absent = {
        asked.name: "absent" if asked.extra is None else f"absent, for '{asked.extra}'; pip install '{asked.text}'"
        for asked in requirements
    }
    packages = [[name, version or absent[name]] for name, version in report["packages"].items()]
    say_table(None, ["package", "version"], packages)
    if not requirements:
        say_note("lexiseg is not installed, so its dependencies are not known; run: pip install -e .")
    say()
    self_test = report["self_test"]
    if self_test is not None and self_test["ok"]:
        names = ", ".join(self_test["found"])
        say(f"self-test: ok, {self_test['seconds']} s with {self_test['model']}; found {names}")
        if "note" in self_test:
            say_note(f"self-test: {self_test['note']}")
    for problem in report["problems"]:
        say_note(problem)
