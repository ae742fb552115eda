"""What every test starts from: two threads at most, fixed seeds, and a cache folder of its own."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.miniatures import MINIATURES

# Failed assertions of these show what they compared, as those of test files do.
pytest.register_assert_rewrite("tests.system_tester", "tests.launching", "tests.patchwork", "tests.cli.calling")
# A shell that starts the tests in the background has them, and the commands they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(max(1, min(2, int(os.environ.get("OMP_NUM_THREADS", "2")))))


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Text embeddings are cached in a folder that lives as long as the run, not in the user's."""
    folder = tmp_path_factory.mktemp("lexiseg-cache")
    before = os.environ.get("LEXISEG_CACHE")
    os.environ["LEXISEG_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LEXISEG_CACHE"]
    else:
        os.environ["LEXISEG_CACHE"] = before


@pytest.fixture(scope="module")
def clip() -> Any:
    """A small CLIP of random weights; a module's tests share it."""
    from tests.towers import small_clip  # open_clip takes seconds to import

    return small_clip()


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A clean miniature of each kind of dataset, written once; tests that change one copy it or write their own."""

    @cache
    def of(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        MINIATURES[name][1](root)
        return root

    return of
