"""The graphs of an exported model, in whatever runs them: ONNX Runtime, OpenVINO or PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from lexiseg.errors import LexisegError
from lexiseg.export.spec import ExportSpec
from lexiseg.words import first_line, shorten

Graph = Callable[..., np.ndarray]
"""Takes the inputs as arrays, in their order, and gives the output."""


def open_graph(path: Path, spec: ExportSpec, device: str) -> Graph:
    """A graph, ready to run.

    ``device``: "cpu", "cuda" or "auto"; OpenVINO's own names too. Raises LexisegError if the library is not installed
    or has no such device, or the file is damaged.
    """
    openers = {"onnx": _onnx, "openvino": _openvino, "torch": _torch}
    try:
        return openers[spec.kind](path, spec, device)
    except ImportError as error:
        package = {"onnx": "onnxruntime", "openvino": "openvino"}.get(spec.kind, "torch")
        raise LexisegError(
            f"An exported model of this format needs {package}; install it with pip install {package}."
        ) from error
    except LexisegError:
        raise
    except Exception as error:  # each library has errors of its own
        raise LexisegError(
            f"The graph '{path}' cannot be loaded ({first_line(error)}); export the model again."
        ) from error


def _threads() -> int:
    """What ``OMP_NUM_THREADS`` says, which torch heeds and ONNX Runtime does not; 0 leaves it to the library."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() else 0


def _onnx(path: Path, spec: ExportSpec, device: str) -> Graph:
    import onnxruntime

    kind = device.partition(":")[0]
    providers = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    there = onnxruntime.get_available_providers()
    if kind == "auto":
        kind = "cuda" if "CUDAExecutionProvider" in there else "cpu"
    if kind not in providers or providers[kind][0] not in there:
        raise LexisegError(f"ONNX Runtime has no device '{shorten(device)}' here; use cpu.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = _threads(), 1
    # Threads that wait must not keep a processor busy: others want it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=providers[kind])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: np.ndarray) -> np.ndarray:
        return session.run(None, dict(zip(names, inputs, strict=True)))[0]

    return run


def _openvino(path: Path, spec: ExportSpec, device: str) -> Graph:
    import openvino

    place = "CPU" if device in ("auto", "cpu") else device.upper()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} if place == "CPU" else {}
    if _threads():
        settings["INFERENCE_NUM_THREADS"] = _threads()
    compiled = openvino.Core().compile_model(str(path), place, settings)

    def run(*inputs: np.ndarray) -> np.ndarray:
        return np.array(compiled(list(inputs))[0])  # its own memory is written over by the next run

    return run


def _torch(path: Path, spec: ExportSpec, device: str) -> Graph:
    import torch

    if device not in ("auto", "cpu"):
        raise LexisegError("An exported model in torch's format runs where it was exported, on the cpu.")
    call: Any
    if spec.compiled:
        call = torch._inductor.aoti_load_package(str(path))
    else:
        # Sizes at which the model takes a shorter way to the same numbers are ruled out by guards that nobody needs.
        known = signature(torch.export.ExportedProgram.module).parameters
        loose = {"check_guards": False} if "check_guards" in known else {}
        call = torch.export.load(path).module(**loose)

    def run(*inputs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return call(*(torch.from_numpy(np.ascontiguousarray(one)) for one in inputs)).numpy()

    return run
