"""One model quantised by a peer that lives in an environment of its own: run by that environment's Python.

    PYTHON benchmarks/quantize_peers.py inc|modelopt MODEL SAMPLES.npz OUT

SAMPLES.npz: one array an input, one row a sample.  Each peer as its documentation calls it, static int8.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def inc(model: str, samples: dict[str, Any], out: str) -> None:
    """neural-compressor's ONNX package, defaults."""
    from onnx_neural_compressor.quantization import config, quantize  # noqa: PLC0415

    class Reader:
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            count = len(next(iter(samples.values())))
            self.rows = iter([{n: a[i] for n, a in samples.items()} for i in range(count)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    quantize(model, out, config.StaticQuantConfig(calibration_data_reader=Reader()))


def modelopt(model: str, samples: dict[str, Any], out: str) -> None:
    """NVIDIA ModelOpt, int8 on the CPU."""
    from modelopt.onnx.quantization import quantize  # noqa: PLC0415

    joined = {name: np.concatenate(list(array)) for name, array in samples.items()}
    quantize(
        model,
        quantize_mode="int8",
        calibration_data=joined,
        calibration_eps=["cpu"],
        output_path=out,
    )


if __name__ == "__main__":
    tool, source, rows, target = sys.argv[1:5]
    sys.path.extend(sys.argv[5:])  # where torch is, which ModelOpt imports
    with np.load(rows) as archive:
        {"inc": inc, "modelopt": modelopt}[tool](source, dict(archive), target)
