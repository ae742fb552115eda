"""The processes of a run that a launcher started."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch

from lexiseg import processes


@pytest.mark.parametrize("device", [None, "auto", "cpu"])
@pytest.mark.parametrize("accelerator", [False, True])
def test_processes_without_an_accelerator_meet_on_the_cpu(
    device: str | None, accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate lets each of them run alone otherwise."""
    said: list[dict[str, Any]] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", lambda **settings: said.append(settings))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    processes.init(device)
    assert [one["cpu"] for one in said] == [device == "cpu" or not accelerator]
