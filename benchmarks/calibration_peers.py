"""What the same costs in a peer's own environment: CPU seconds and peak memory of one process, as JSON.

    PYTHON benchmarks/calibration_peers.py KIND MODEL SAMPLES.npz

KIND: plain (the optimised model on the samples), minmax, percentile, entropy (onnxruntime.quantization's calibrators on
the samples), static (the same with min-max, load to save), dynamic, int4 (onnxruntime.quantization, load to save),
inc-static, inc-dynamic, inc-int4 (neural-compressor's ONNX package, load to save).  SAMPLES.npz: one array an
input, one row a sample.  One thread where the tool lets one choose; imports are in the peak, not in the seconds.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Reader:
    """The samples, one a call, as both tools want them."""

    def __init__(self, samples: dict[str, Any]) -> None:
        self.samples = samples
        self.rewind()

    def rewind(self) -> None:
        count = len(next(iter(self.samples.values())))
        self.rows = iter([{n: a[i] for n, a in self.samples.items()} for i in range(count)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.rows, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows


def plain(model: str, reader: Reader, _folder: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for feed in reader:
        session.run(None, feed)


def _calibrated(method: str) -> Callable[[str, Reader, Path], None]:
    def run(model: str, reader: Reader, folder: Path) -> None:
        from onnxruntime.quantization import calibrate  # noqa: PLC0415

        found = calibrate.create_calibrator(
            Path(model),
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=calibrate.CalibrationMethod[method],
        )
        found.collect_data(reader)
        found.compute_data()

    return run


def static(model: str, reader: Reader, folder: Path) -> None:
    from onnxruntime.quantization import quantize_static  # noqa: PLC0415

    quantize_static(model, str(folder / "out.onnx"), reader)


def dynamic(model: str, _reader: Reader, folder: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic  # noqa: PLC0415

    quantize_dynamic(model, str(folder / "out.onnx"))


def int4(model: str, _reader: Reader, folder: Path) -> None:
    import onnx  # noqa: PLC0415
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits  # noqa: PLC0415

    made = nbits.MatMulNBitsQuantizer(onnx.load(model), block_size=32, is_symmetric=True)
    made.process()
    made.model.save_model_to_file(str(folder / "out.onnx"))


def inc_int4(model: str, _reader: Reader, folder: Path) -> None:
    import onnx  # noqa: PLC0415
    from onnx_neural_compressor.quantization import matmul_nbits_quantizer as nbits  # noqa: PLC0415

    how = nbits.RTNWeightOnlyQuantConfig()
    made = nbits.MatMulNBitsQuantizer(
        model, n_bits=4, block_size=32, is_symmetric=True, algo_config=how
    )
    made.process()
    found = made.model
    onnx.save(getattr(found, "model", found), str(folder / "out.onnx"))


def _inc(name: str) -> Callable[[str, Reader, Path], None]:
    def run(model: str, reader: Reader, folder: Path) -> None:
        from onnx_neural_compressor.quantization import config, quantize  # noqa: PLC0415

        chosen = {
            "static": lambda: config.StaticQuantConfig(calibration_data_reader=reader),
            "dynamic": config.DynamicQuantConfig,
        }[name]()
        quantize(model, str(folder / "out.onnx"), chosen)

    return run


KINDS: dict[str, Callable[[str, Reader, Path], None]] = {
    "plain": plain,
    "minmax": _calibrated("MinMax"),
    "percentile": _calibrated("Percentile"),
    "entropy": _calibrated("Entropy"),
    "static": static,
    "dynamic": dynamic,
    "int4": int4,
    "inc-static": _inc("static"),
    "inc-dynamic": _inc("dynamic"),
    "inc-int4": inc_int4,
}


def main() -> None:
    kind, model, rows = sys.argv[1:4]
    with np.load(rows) as archive:
        reader = Reader(dict(archive))
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        KINDS[kind](model, reader, Path(folder))
        spent = time.process_time() - started
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"cpu": spent, "peak": float(peak) / 1e3}))


if __name__ == "__main__":
    main()
