"""How far an exported model departs from the original model, on the package's sample pictures."""

from __future__ import annotations

import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import lexiseg
from lexiseg.export.runtime import ExportedPredictor
from lexiseg.export.spec import ExportSpec
from lexiseg.files import write_json
from lexiseg.samples import list_samples, sample_classes, sample_path
from lexiseg.segmenter import Segmenter
from lexiseg.vocabulary import Vocabulary

REPORT = "report.json"
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy", "Pillow")


def measure(segmenter: Segmenter, folder: Path, spec: ExportSpec, limit: int = 2) -> dict[str, Any]:
    """Compare labels with those of the model in float32, and write ``report.json`` into the folder.

    Returns what was written: one row per picture with the fraction of equal labels, the largest difference of a winning
    score, and processor seconds of both; ``equal``, the fraction over all pixels; and the size of the files.
    """
    exported = ExportedPredictor(folder, device="cpu", templates=segmenter.templates)
    rows, total, same = [], 0, 0
    for name in list_samples()[:limit]:
        classes, seconds, results = Vocabulary.load(sample_classes(name)), [], []
        for predictor in (segmenter, exported):
            start = time.process_time()
            results.append(predictor.predict(sample_path(name), classes, window=spec.window))
            seconds.append(round(time.process_time() - start, 3))
        labels, scores = (
            [np.asarray(part) for part in kind]
            for kind in zip(*((one.label_map, one.scores) for one in results), strict=True)
        )
        equal = labels[0] == labels[1]
        total, same = total + equal.size, same + int(equal.sum())
        rows.append(
            {
                "picture": name,
                "classes": len(classes),
                "size": list(equal.shape),
                "equal": float(equal.mean()),
                "largest_score_difference": float(np.abs(scores[0] - scores[1]).max()),
                "seconds": {"torch": seconds[0], "exported": seconds[1]},
            }
        )
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != REPORT}
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    report = {
        "lexiseg": lexiseg.__version__,
        "format": spec.kind,
        "precision": spec.precision,
        "compiled": spec.compiled,
        "equal": same / total,
        "pictures": rows,
        "bytes": files,
        "versions": versions,
    }
    write_json(folder / REPORT, report)
    return report
