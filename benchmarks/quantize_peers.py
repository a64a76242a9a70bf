"""One model quantised by a peer that lives in an environment of its own: run by that environment's Python.

    PYTHON benchmarks/quantize_peers.py inc|modelopt MODEL SAMPLES.npz OUT

SAMPLES.npz: arrays INDEX/INPUT.  Each peer as its documentation calls it, static int8.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Feeds = list[dict[str, Any]]


def inc(model: str, feeds: Feeds, out: str) -> None:
    """neural-compressor's ONNX package, defaults; where that fails, what it can do of products."""
    import onnxruntime  # noqa: PLC0415
    from onnx_neural_compressor import quantization  # noqa: PLC0415
    from onnx_neural_compressor.quantization import config, quantize  # noqa: PLC0415

    class Reader:
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self.rows = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    products = {
        "op_types_to_quantize": ["Conv", "MatMul", "Gemm", "Relu"],
        "quant_format": quantization.QuantFormat.QDQ,
        "per_channel": True,
    }
    fault: Exception = RuntimeError("nothing tried")
    for options in ({}, products):
        try:
            quantize(model, out, config.StaticQuantConfig(Reader(), **options))
            onnxruntime.InferenceSession(out)
        except Exception as error:  # noqa: BLE001  it may fail in any way, and write what nothing loads
            fault = error
        else:
            return
    raise fault


def modelopt(model: str, feeds: Feeds, out: str) -> None:
    """NVIDIA ModelOpt, int8 on the CPU."""
    from modelopt.onnx.quantization import quantize  # noqa: PLC0415

    joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    quantize(
        model,
        quantize_mode="int8",
        calibration_data=joined,
        calibration_eps=["cpu"],
        output_path=out,
    )


def read(path: str) -> Feeds:
    """The feeds in the order of their numbers."""
    feeds: dict[int, dict[str, Any]] = {}
    with np.load(path) as archive:
        for key in archive.files:
            index, _, name = key.partition("/")
            feeds.setdefault(int(index), {})[name] = archive[key]
    return [feeds[index] for index in sorted(feeds)]


if __name__ == "__main__":
    tool, source, rows, target = sys.argv[1:5]
    {"inc": inc, "modelopt": modelopt}[tool](source, read(rows), target)
