"""Compare lexiseg with golden cases made by the authors' code: ``python -m tests.parity DIR [--only GLOB]``.

Each case is ``NAME.json`` with its configuration and, mostly, ``NAME.safetensors`` with ``param/``, ``input/`` and
``expected/`` tensors. Every size is read from the case. A case fails if a tensor differs by more than 1e-4 of its
largest magnitude (gradients 1e-3; indices and label maps exactly, but for ties), if an expected tensor was compared
with nothing and is not one of the known exceptions, or if nothing in it was compared. What the JSON says is used to
build the model, or compared with it; the rest is listed as "JSON not compared". The exit code is 1 if any case fails,
and the last line is the tally.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path

from tests.parity.case import Case, UnsupportedError, load_case
from tests.parity.cases import compare


def run_case(path: Path) -> Case:
    """Compare one case; every failure ends up in the result, none is raised."""
    case = Case(path.stem, {}, {})
    try:
        case = load_case(path)
        compare(case)
    except UnsupportedError as error:
        case.problems.append(str(error))
    except Exception as error:  # a broken case must not hide the ones behind it
        case.problems.append(f"{type(error).__name__}: {error}")
    if not case.problems:
        case.settle()
    if not case.compared and not case.problems:
        case.problems.append("nothing in it was compared")
    return case


def report(case: Case, *, verbose: bool = False) -> str:
    """The lines printed for a case."""
    if case.compared:
        worst_absolute = max(case.compared, key=lambda item: item[1])
        worst = max(case.compared, key=lambda item: item[2])
        numbers = (
            f"{len(case.compared)} compared, largest error {worst_absolute[1]:.1e} absolute ({worst_absolute[0]}), "
            f"{worst[2]:.1e} relative ({worst[0]})"
        )
    else:
        numbers = "0 compared"
    lines = [f"{'PASS' if case.passed else 'FAIL'}  {case.name}: {numbers}"]
    if verbose:
        lines += [f"        {name}: {error:.1e} absolute, {share:.1e} relative" for name, error, share in case.compared]
    else:
        lines.append(f"      compared: {', '.join(_group([name for name, _, _ in case.compared])) or 'nothing'}")
    lines += [f"      problem: {sentence}" for sentence in case.problems]
    reasons: dict[str, list[str]] = {}
    for name, reason in case.skipped.items():
        reasons.setdefault(reason, []).append(name)
    if not (case.problems and not case.compared):
        lines += [f"      not compared: {', '.join(_group(names))} ({reason})" for reason, names in reasons.items()]
    unread = case.unread()
    if unread and case.compared:
        lines.append(f"      JSON not compared: {', '.join(unread)}")
    lines += [f"      note: {note}" for note in case.notes]
    return "\n".join(lines)


def _group(names: list[str]) -> list[str]:
    """Shorten long lists of names: ``grad/...`` becomes one entry with a count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head = name.split("/", 1)[0] if "/" in name else "block" if name.startswith("block_") else name
        groups.setdefault(head, []).append(name)
    return [items[0] if len(items) == 1 else f"{head} ({len(items)})" for head, items in groups.items()]


def main(arguments: list[str] | None = None) -> int:
    """Run the cases of a folder; 0 if all pass."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of golden cases")
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of cases, for example 'zegclip_*'")
    parser.add_argument("--verbose", action="store_true", help="print every tensor's error")
    options = parser.parse_args(arguments)
    paths = [path for path in sorted(options.folder.glob("*.json")) if path.stem != "INDEX"]
    paths = [path for path in paths if fnmatch(path.stem, options.only)]
    results = []
    for path in paths:
        case = run_case(path)
        print(report(case, verbose=options.verbose), flush=True)
        results.append(case.passed)
    if not results:
        print(f"no case in {options.folder} is called {options.only}")
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if results and all(results) else 1
