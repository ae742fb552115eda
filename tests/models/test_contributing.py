"""The system that CONTRIBUTING.md walks through is one: it passes the tester."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lexiseg.models import SYSTEMS
from tests.system_tester import SystemTester

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


class TestLinearProbe(SystemTester):
    system = "linear-probe"
    options: ClassVar = {"scale": 5.0}

    @pytest.fixture(autouse=True)
    def _known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        example = re.search(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
        assert example is not None
        names: dict[str, Any] = {"__name__": "lexiseg.models.linear_probe"}
        exec(compile(example[1], "CONTRIBUTING.md", "exec"), names)
        monkeypatch.setitem(SYSTEMS, "linear-probe", names["LinearProbe"])
