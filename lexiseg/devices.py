"""Which device and which floating-point type a model runs in, and how it is compiled."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lexiseg.errors import LexisegError
from lexiseg.first_and_last import SharedContext

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}


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


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """Turn a name into a floating-point type that models run in; None stays None.

    "auto" is bf16 where the device is a processor that multiplies such numbers (AMX or AVX512-BF16), else float32.

    Raises LexisegError if it is none of auto, fp32, bf16 and fp16 (or torch's names for them).
    """
    if dtype == "auto":
        # Where the processor has no instructions for products of bf16, it is slower than float32.
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if device.type == "cpu" and fast else torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise LexisegError(f"Unknown dtype '{dtype}'; use fp32, bf16, fp16 or auto.")
    return found


class Compiled:
    """A segmentation model, compiled once for any number of windows, and of words from two on."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._run = model, torch.compile(model)

    def __call__(self, images: Tensor, text: Tensor, **words: Tensor | None) -> Any:
        """The model's scores."""
        for tensor in (images, text, *words.values()):
            if tensor is not None and len(tensor) > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self._run(images, text, **words)

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self._model,)  # a copy compiles its own


def use_threads(count: int) -> None:
    """Set how many threads torch uses for the calling thread's work."""
    torch.get_num_threads()  # the first question in a thread gives it the process's number, whatever was set before
    torch.set_num_threads(count)


@contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_float32_default = SharedContext(_float32)  # a default of the whole process


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Torch's own defaults, float32 and the CPU, whatever the program around has set: for tensors made without them."""
    # Such a context takes time at every call into torch, so there is none without need.
    elsewhere = torch.get_default_device().type != "cpu"
    with _float32_default(), torch.device("cpu") if elsewhere else nullcontext():
        yield


class EvaluationMode:
    """Evaluation mode, no gradients and the chosen precision, for every thread that runs a model at a time."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype | None) -> None:
        self._model, self._dtype = model, torch.float32 if dtype is None else dtype
        self._evaluating = SharedContext(self._evaluation)

    def __reduce__(self) -> tuple[Any, ...]:
        return EvaluationMode, (self._model, self._dtype)  # nobody is inside a copy

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        training = [module for module in self._model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Run the body so; the modules' modes come back when the last thread has left."""
        half = self._dtype != torch.float32
        device = next(self._model.parameters()).device.type
        autocast = torch.autocast(device, self._dtype, enabled=half)
        with self._evaluating(), torch_defaults(), torch.no_grad(), autocast:
            yield
