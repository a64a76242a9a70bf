"""How much faster any choice of channels can make a chain of convolutions: an upper bound for `--sparsity channels:R`.

    python -m benchmarks.prune_bound MODEL.onnx [--share 0.3] [--block 16] [--least 0]

MODEL is a chain such as MobileNetV1: convolutions, depthwise or of one group, each reading what the one before makes.
One row a layer: channels read and made, its time in ONNX Runtime (the least of many profiled runs, one thread), its
share of all, and how many blocks of channels can go. Then, by dynamic programming over the layers: of all ways to
leave each layer a multiple of `--block` channels that remove `--share` of the arithmetic (to within one hundredth),
the one that takes the least time; at least `--least` of the channels of each layer stay. `ideal` has the time of a
layer fall with its blocks, down to nothing, so that no choice whatever is faster; `fixed` leaves each layer what the
table of costs takes for a node of its size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from graphopt_passes.prune.clock import NODE, THOUSAND_ELEMENTS
from onnx import numpy_helper

RUNS = 300
WITHIN = 0.01


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution.

    Attributes:
        read, made: channels.
        places: elements of one plane that it makes.
        taps: elements of its window.
        depthwise: whether each channel is made from one.
        spent: microseconds.
    """

    name: str
    read: int
    made: int
    places: int
    taps: int
    depthwise: bool
    spent: float

    def macs(self, read: int, made: int) -> int:
        """Multiply-adds with other channels."""
        return made * self.places * self.taps * (1 if self.depthwise else read)


Costs = Callable[[Layer, int, int], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the bounds; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--least", type=float, default=0.0)
    given = parser.parse_args(argv)
    times, total = profile(given.model)
    layers = chain(given.model, times)
    sys.stdout.write(f"{'layer':34}{'read':>6}{'made':>6}{'us':>8}{'share':>8}{'blocks':>8}\n")
    for each in layers:
        blocks = 0 if each is layers[-1] else max(each.made - 1, 0) // given.block
        line = f"{each.name[-32:]:34}{each.read:6}{each.made:6}{each.spent:8.1f}"
        sys.stdout.write(f"{line}{each.spent / total:8.1%}{blocks:8}\n")
    rest = total - sum(each.spent for each in layers)
    sys.stdout.write(f"{'all else':46}{rest:8.1f}{rest / total:8.1%}\n")
    choices = {each.name: able(each, given.block, given.least) for each in layers[:-1]}
    for name, costs in (("ideal", ideal(given.block)), ("fixed", fixed(given.block))):
        left, gone, chosen = best(layers, given.share, costs, choices)
        before = sum(costs(each, each.read, each.made) for each in layers)
        faster = total / (total - before + left)
        sys.stdout.write(f"{name}: {faster:.2f}x at -{gone:.1%} of the arithmetic: {chosen}\n")
    return 0


def ideal(block: int) -> Costs:
    """Time falls with the blocks read and made."""

    def takes(layer: Layer, read: int, made: int) -> float:
        share = _blocks(made, block) / _blocks(layer.made, block)
        if not layer.depthwise:
            share *= _blocks(read, block) / _blocks(layer.read, block)
        return layer.spent * share

    return takes


def fixed(block: int) -> Costs:
    """What is beyond the cost of a node and of writing what it makes falls with the blocks read and made."""
    falls = ideal(block)

    def takes(layer: Layer, read: int, made: int) -> float:
        least = min(layer.spent, NODE + THOUSAND_ELEMENTS * layer.made * layer.places / 1e3)
        stays = min(layer.spent, NODE + THOUSAND_ELEMENTS * made * layer.places / 1e3)
        return stays + (layer.spent - least) / layer.spent * falls(layer, read, made)

    return takes


def best(
    layers: Sequence[Layer], share: float, costs: Costs, choices: Mapping[str, Sequence[int]]
) -> tuple[float, float, list[int]]:
    """Least time, share of the arithmetic that is gone, and the channels that each layer makes then.

    After each layer, for each number of channels that it makes and each amount of arithmetic (to `GRAIN`), only the
    fastest choice stays: what follows does not see the rest.
    """
    dense = sum(each.macs(each.read, each.made) for each in layers)
    fronts: dict[int, list[tuple[int, float, tuple[int, ...]]]] = {layers[0].read: [(0, 0.0, ())]}
    for layer in layers:
        grown: dict[int, list[tuple[int, float, tuple[int, ...]]]] = {}
        for read, front in fronts.items():
            for made in [read] if layer.depthwise else choices.get(layer.name, [layer.made]):
                macs, takes = layer.macs(read, made), costs(layer, read, made)
                at = grown.setdefault(made, [])
                at += [(a + macs, t + takes, (*chosen, made)) for a, t, chosen in front]
        fronts = {made: list(_undominated(front)) for made, front in grown.items()}
    found = [each for front in fronts.values() for each in front]
    near = [each for each in found if abs(1 - each[0] / dense - share) <= WITHIN]
    if not near:
        raise SystemExit(
            f"no choice of blocks removes {share:.0%} of the arithmetic to within one hundredth"
        )
    macs, takes, chosen = min(near, key=lambda each: each[1])
    return takes, 1 - macs / dense, list(chosen)


def able(layer: Layer, block: int, least: float) -> list[int]:
    """How many channels may stay: multiples of the block, or all."""
    found = {*range(block, layer.made, block), layer.made}
    return sorted(made for made in found if made >= least * layer.made)


def _undominated(
    front: list[tuple[int, float, tuple[int, ...]]],
) -> Iterator[tuple[int, float, tuple[int, ...]]]:
    """Of choices with as much arithmetic the fastest; those with more stay too: a share is to be met, not passed."""
    fastest: dict[int, tuple[int, float, tuple[int, ...]]] = {}
    for each in front:
        slot = each[0] // GRAIN
        if slot not in fastest or each[1] < fastest[slot][1]:
            fastest[slot] = each
    yield from fastest.values()


GRAIN = 20_000
"""Multiply-adds; what differs by less counts as the same arithmetic."""


def _blocks(channels: int, block: int) -> int:
    return -(-channels // block)


def profile(path: Path) -> tuple[list[float], float]:
    """Microseconds of each convolution in order, the least of all runs, and of all nodes."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "p")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        feed = {
            each.name: rng.random([d if isinstance(d, int) else 1 for d in each.shape], np.float32)
            for each in session.get_inputs()
        }
        for _ in range(RUNS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    least: dict[str, float] = {}
    convolutions: set[str] = set()
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            least[name] = min(least.get(name, np.inf), float(event["dur"]))
            if event["args"]["op_name"] == "Conv":
                convolutions.add(name)
    return [spent for name, spent in least.items() if name in convolutions], sum(least.values())


def chain(path: Path, times: Sequence[float]) -> list[Layer]:
    """The convolutions in order, with their times."""
    model = onnx.load(path)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_value = dim.dim_value or 1
    graph = onnx.shape_inference.infer_shapes(model).graph
    weights = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output]
    }
    found = []
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    for node, spent in zip(convolutions, times, strict=True):
        made, read, *window = weights[node.input[1]].shape
        group = next((each.i for each in node.attribute if each.name == "group"), 1)
        places = int(np.prod(shapes[node.output[0]][2:]))
        alone = group > 1 and read == 1
        read = made if alone else read
        taps = int(np.prod(window))
        found.append(Layer(node.name, read, made, places, taps, alone, spent))
    return found


if __name__ == "__main__":
    sys.exit(main())
