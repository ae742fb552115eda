"""Which device and which floating-point type a model runs in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lexiseg.errors import LexisegError

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def pick_device(device: str | torch.device) -> torch.device:
    """Turn a name into a device that is there.

    ``device``: torch's names, or "auto" for CUDA, Apple's MPS or the CPU, whichever comes first. Raises LexisegError if
    the name is unknown or the machine has no such device.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise LexisegError(f"There is no device '{device}' on this machine; use cpu, or auto to pick one.") from error
    if found.type == "meta":
        raise LexisegError("The device 'meta' holds no values; use cpu, cuda or auto.")
    return found


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Turn a name into a floating-point type that models run in; None stays None.

    Raises LexisegError if it is none of fp32, bf16 and fp16 (or torch's names for them).
    """
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise LexisegError(f"Unknown dtype '{dtype}'; use fp32, bf16 or fp16.")
    return found


_lock = threading.Lock()
_inside = 0
_outside = torch.float32


@contextmanager
def float32_default() -> Iterator[None]:
    """Run the body under torch's own default of float32, whatever the program around it has set.

    Models are built from tensors made without a type. The default is one of the whole process, so it is given back when
    the last thread has left.
    """
    global _inside, _outside
    with _lock:
        if not _inside:
            _outside = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_default_dtype(_outside)


class EvaluationMode:
    """Evaluation mode, no gradients and the chosen precision, for every thread that runs a model at a time."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, torch.float32 if dtype is None else dtype
        self._lock, self._running, self._were_training = threading.Lock(), 0, list[torch.nn.Module]()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the body so; the modules' modes come back when the last thread has left."""
        with self._lock:
            if not self._running:
                self._were_training = [module for module in self._model.modules() if module.training]
                for module in self._were_training:
                    module.training = False
            self._running += 1
        half = self._dtype != torch.float32
        device = next(self._model.parameters()).device.type
        try:
            with float32_default(), torch.no_grad(), torch.autocast(device, self._dtype, enabled=half):
                yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    for module in self._were_training:
                        module.training = True
