"""Prunes a model with onnxsim, for `benchmarks.prune --peer`; run by an interpreter that has onnxsim.

    python benchmarks/prune_peer.py MODEL.onnx SAMPLES.npz OUT.onnx AMOUNT

AMOUNT is as in `benchmarks.prune`.  Of onnxsim's ways those are taken that did best on the digits networks: SparseGPT
for zeros and patterns, structured Wanda for channels, with the share of channels that leaves the wanted share of the
arithmetic where every layer loses as much on both sides.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxsim.pruning as peer


def main(source: str, samples: str, out: str, amount: str) -> None:
    """Writes the pruned model."""
    arrays = dict(np.load(samples))
    count = len(next(iter(arrays.values())))
    feeds = [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(count)]
    model = onnx.load(source)
    if amount.startswith("channels:"):
        share = 1 - (1 - float(amount.removeprefix("channels:"))) ** 0.5
        made = peer.apply_structured_wanda_pruning(model, calibration_data=feeds, sparsity=share)
    elif ":" in amount:
        n, m = (int(part) for part in amount.split(":"))
        made = peer.apply_sparsegpt_pruning(model, calibration_data=feeds, n=n, m=m)
    else:
        made = peer.apply_sparsegpt_pruning(model, calibration_data=feeds, sparsity=float(amount))
    onnx.save(made, out)


if __name__ == "__main__":
    main(*sys.argv[1:5])
