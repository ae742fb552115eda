"""``python -m tests.fuzz [TARGET ...] [--count N] [--seed N]``: more inputs than the tests try; `make fuzz`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.runner import run
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Try the inputs and print what went wrong, with the seed that repeats it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--count", type=int, default=20_000, help="inputs in all, divided as in the tests")
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    given = parser.parse_args()
    chosen = given.targets or list(TARGETS)
    whole = sum(TARGETS[name][1] for name in chosen)
    failed = 0
    for name in chosen:
        make, weight = TARGETS[name]
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            report = run(make, max(given.count * weight // whole, 1), given.seed, Path(folder))
        failed += len(report.failures)
        took = time.monotonic() - start
        print(f"{name}: {report.read} read, {report.refused} refused, {len(report.failures)} failed, {took:.0f} s")
        print("".join(f"  {failure}\n" for failure in report.failures), end="", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
