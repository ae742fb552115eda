"""Starting quickly: open_clip imported without the libraries that most of its models do not need.

``import open_clip`` takes timm, transformers, the hub's client and, through torchvision, torch's compiler with it: more
than three seconds of processor time, for a command that may only segment one picture. `start_quickly` has the command
line's own process leave them out; whoever needs them imports them as ever. open_clip's own towers of timm and
transformers, which `lexiseg.clip.model.build_clip` refuses, cannot be built in such a process.
"""

import atexit
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# open_clip asks for these and goes on without them; what lexiseg needs of the hub, `lexiseg.hub` imports itself.
_OPTIONAL = ("timm", "transformers", "huggingface_hub", "torch.distributed.nn")
_COMPILER = "torch._dynamo"  # torchvision wants one function of it, which says whether a compiler is there


class _Loader(importlib.machinery.SourceFileLoader):
    """Runs a module with what it does not need out of its reach."""

    def exec_module(self, module: ModuleType) -> None:
        stubs: dict[str, Any] = dict.fromkeys(name for name in _OPTIONAL if name not in sys.modules)
        if _COMPILER not in sys.modules:
            utils = ModuleType(f"{_COMPILER}.utils")
            utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
            stubs |= {_COMPILER: ModuleType(_COMPILER), f"{_COMPILER}.utils": utils}
        sys.modules.update(stubs)
        try:
            super().exec_module(module)
        finally:
            for name in stubs:
                sys.modules.pop(name, None)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "open_clip":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def _is_compile_supported(device_type: str) -> bool:
    return bool(importlib.import_module(f"{_COMPILER}.utils").is_compile_supported(device_type))


def start_quickly() -> None:
    """Have this process import and end quickly: the first ``import open_clip`` leaves out what it can.

    For a process of lexiseg's own.
    """
    # Importing makes many objects that stay: to look through them after every 700 takes a tenth of a short command.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    # An ending process would look through them several times; what they hold, the system takes back by itself.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    if "open_clip" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
