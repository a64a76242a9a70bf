"""Prunes a model with onnxsim, for `benchmarks.prune --peer`; run by an interpreter that has onnxsim.

    python benchmarks/prune_peer.py MODEL.onnx SAMPLES.npz OUT.onnx AMOUNT

AMOUNT is as in `benchmarks.prune`.  Of onnxsim's ways those are taken that did best on the digits networks: SparseGPT
for zeros and patterns; structured Wanda for channels, with the share of channels that comes nearest to the share of the
arithmetic asked for.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import onnx
import onnxsim.pruning as peer

STEPS = 7
"""Of bisection: shares of channels to within one of 128."""


def main(source: str, samples: str, out: str, amount: str) -> None:
    """Writes the pruned model."""
    arrays = dict(np.load(samples))
    count = len(next(iter(arrays.values())))
    feeds = [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(count)]
    model = onnx.load(source)
    if amount.startswith("channels:"):
        share = share_of_channels(model, feeds[0], float(amount.removeprefix("channels:")))
        made = peer.apply_structured_wanda_pruning(model, calibration_data=feeds, sparsity=share)
    elif ":" in amount:
        n, m = (int(part) for part in amount.split(":"))
        made = peer.apply_sparsegpt_pruning(model, calibration_data=feeds, n=n, m=m)
    else:
        made = peer.apply_sparsegpt_pruning(model, calibration_data=feeds, sparsity=float(amount))
    onnx.save(made, out)


def share_of_channels(model: onnx.ModelProto, feed: dict[str, np.ndarray], wanted: float) -> float:
    """The share of channels without which `wanted` of the arithmetic is gone; sought without samples, quickly."""
    dense = arithmetic(model, feed)
    least, most = 0.0, 1.0
    for _ in range(STEPS):
        share = (least + most) / 2
        left = arithmetic(peer.apply_structured_pruning(model, sparsity=share), feed) / dense
        least, most = (share, most) if 1 - left < wanted else (least, share)
    return most if most < 1 else wanted  # where it removes nothing at all, any will do


def arithmetic(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> int:
    """Multiply-adds of convolutions and products with weights."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        if value.name in feed:
            for dim, extent in zip(
                value.type.tensor_type.shape.dim, feed[value.name].shape, strict=True
            ):
                dim.dim_value = extent
    known = onnx.shape_inference.infer_shapes(fixed).graph
    sizes = {each.name: each.dims for each in known.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*known.value_info, *known.output]
    }
    total = 0
    for node in known.node:
        if node.op_type not in {"Conv", "MatMul", "Gemm"} or node.input[1] not in sizes:
            continue
        shape = shapes[node.output[0]]
        at = math.prod(shape[2:]) if node.op_type == "Conv" else math.prod(shape[:-1])
        total += math.prod(sizes[node.input[1]]) * at
    return total


if __name__ == "__main__":
    main(*sys.argv[1:5])
