"""Trains the weights that stay to compute what the original computes: whole model, no labels, NumPy alone.

Least squares fits each layer to its own outputs; at high ratios what all layers lose together is more than that tells.
ONNX Runtime runs the model forward, the rules of `slopes` go back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.distill.batches import Feed, join, mixed, noisy, spreads, unseen
from graphopt.distill.losses import as_logits, distance, log_softmax, logit_outputs
from graphopt.ir import operators, values
from graphopt.ir.model_file import model_to_bytes
from graphopt.ir.sparse import thin
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.runtime.specs import input_specs
from graphopt_passes.prune.gradients import backward, key
from graphopt_passes.prune.layers import FLOATS, Array
from graphopt_passes.prune.samples import joinable
from graphopt_passes.prune.slopes import RULES
from graphopt_passes.prune.streams import Piece, ancestors, piece_model
from graphopt_passes.prune.tables import PrunedTable
from graphopt_passes.prune.weights import Pruned

BATCH = 64
STEPS, LEAST_STEPS = 160, 64
WORK = 6.5e10
"""Multiply-adds that may be spent unasked, three for each of a forward run; where that is fewer than the least steps,
training is not begun."""

FAR, FAR_STEPS, FAR_WORK = 0.05, 640, 1.3e11
"""Outputs that differ by more, in nats or as a share of their variance, are trained for longer."""

RATE, LAST = 0.02, 0.05
"""Of a step, over the root mean square of the weights of its layer; and what is left of it at the end."""

NOISE, MIX = 0.2, 0.1
HELD_OUT_OF, LEAST_HELD_OUT, MOST_HELD_OUT = 5, 8, 128
JUDGED = 16
FORGOTTEN = 1.5
"""Growth of the distance on the samples themselves that no gain on mixtures makes up for.

A network of photographs that learns to bear noise may forget photographs (resnet20 at 0.9: 1.8 times,
and a third of its accuracy); some growth is none, since least squares has seen every sample (the transformer of the
digits: 1.3 times, and better).
"""

PATIENCE = 0.6
"""Of the steps, without a gain."""

TOO_FAR, BACK = 1.5, 0.25
_AVERAGE = 0.9
_FIRST, _SECOND, _EPSILON = 0.9, 0.99, 1e-12


SLOW = "it would take minutes: tune=yes does it all the same"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training brought.

    Attributes:
        done: the layers with their weights as they are now.
        before: distance of the outputs on samples held out.
        after: the same at the end; not larger.
        steps: how many were made.
        tables: pruned tables as they are now.
    """

    done: list[Pruned]
    before: float
    after: float
    steps: int
    tables: Sequence[PrunedTable] = ()


class Network:
    """A model whose weights are fed: what it makes, and the gradients of its outputs.

    Attributes:
        outputs: names of the float outputs.
        stopped: what no rule is known for, or "".
    """

    def __init__(self, model: ir.Model, trained: Sequence[str], feed: Feed) -> None:
        ends = [v for v in model.graph.outputs if v.dtype in (ir.DataType.FLOAT, None)]
        needed = ancestors(model.graph.outputs)
        nodes = [node for node in model.graph if node in needed]
        opset = model.opset_imports.get("", 0)
        self._through = _through(nodes, set(trained), ends)
        self.stopped = next(
            (f"{key(n)} '{n.name}'" for n in self._through if not _has_rule(n, opset)), ""
        )
        self.outputs = [v.name or "" for v in ends]
        self.tails = {v.name or "": p.op_type for v in ends if (p := v.producer()) is not None}
        made = {v.name for node in nodes for v in node.outputs if v.name}
        around = [v for n in self._through for v in (*n.inputs, *n.outputs) if v is not None]
        seen = {v.name for v in around if v.name}
        constant = {
            v.name or "": t.numpy() for v in around if (t := values.constant(v)) is not None
        }
        self._names = set(trained) & set(constant)
        self._constants = {n: array for n, array in constant.items() if n not in self._names}
        self._read = sorted((seen - set(constant)) | set(self.outputs))
        self._fed = [name for name in feed if name in self._read]
        known = dict(feed) | {name: constant[name] for name in self._names}
        makes = tuple(name for name in self._read if name in made)
        piece = Piece(tuple(nodes), tuple(known), makes)
        data = piece_model(model, piece, known).SerializeToString()
        self._session = Session(data, options=SessionOptions(threads=2))
        self._takes = {spec.name for spec in self._session.inputs}
        self._original = Session(
            model_to_bytes(model),
            level=OptimizationLevel.ALL,
            options=SessionOptions(threads=2),
        )

    def taught(self, feed: Feed) -> dict[str, Array]:
        """The float outputs with the weights as they were."""
        return self._original.run(feed, self.outputs)

    def run(self, feed: Feed, weights: Mapping[str, Array]) -> dict[str, Array]:
        """All values that gradients need, and the outputs."""
        given = {name: a for name, a in (dict(feed) | dict(weights)).items() if name in self._takes}
        return self._session.run(given) | {name: feed[name] for name in self._fed}

    def gradients(
        self, made: Mapping[str, Array], weights: Mapping[str, Array], wanted: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Of the weights, by name."""
        held = self._constants | dict(weights) | dict(made)
        found = backward(self._through, held, wanted, RULES)
        return {name: found[name] for name in self._names if name in found}


_SIZES = ("Shape", "Size")


def _through(nodes: Sequence[ir.Node], names: set[str], ends: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes between weights and outputs, in the order of the graph."""
    before = ancestors(ends)
    moved: set[ir.Value] = set()
    found = []
    for node in nodes:
        if (
            node in before
            and node.op_type not in _SIZES
            and any(v is not None and (v in moved or v.name in names) for v in node.inputs)
        ):
            found.append(node)
            moved.update(v for v in node.outputs if v.dtype is None or v.dtype in FLOATS)
    return found


SOFTMAX_BY_AXIS = 13
"""Opset from which on Softmax acts along one axis; before, along that and all behind it together."""


def _is_of_last_axis(node: ir.Node) -> bool:
    """Whether an old Softmax, whose axis is 1 unless it says, acts along the last axis alone, as new ones do."""
    shape = next((v.shape for v in (node.inputs[0], node.outputs[0]) if v and v.shape), None)
    return shape is not None and operators.attribute(node, "axis", 1) in (-1, len(shape) - 1)


def _has_rule(node: ir.Node, opset: int) -> bool:
    if key(node) not in RULES:
        return False
    if node.op_type == "Attention":
        plain = all(v is None for v in node.inputs[4:]) and len(node.outputs) == 1
        return plain and not node.attributes.get("softcap")
    if node.op_type in ("Softmax", "LogSoftmax"):
        return opset >= SOFTMAX_BY_AXIS or _is_of_last_axis(node)
    if node.op_type == "Slice":
        return len(node.inputs) > 2
    if node.op_type == "BatchNormalization":
        return len(node.outputs) == 1
    if node.op_type == "AveragePool":
        both = ("ceil_mode", "count_include_pad")
        return not all(name in node.attributes and node.attributes[name].as_int() for name in both)
    return True


def tuned(
    model: ir.Model,
    done: Sequence[Pruned],
    samples: Sequence[Feed],
    seed: int,
    *,
    long: bool,
    tables: Sequence[PrunedTable] = (),
) -> Trained | str:
    """The layers after training; why there was none, where there was none.

    Args:
        model: with the weights as they were.
        done: the layers as they are to be.
        samples: without labels, one by one.
        seed: of what is drawn.
        long: whether it may take as long as it takes.
        tables: of embeddings, pruned: trained with the layers.
    """
    least = 3 * BATCH * LEAST_STEPS
    if not long and least * sum(each.layer.size for each in done) > WORK:
        return SLOW
    held = [each for i, each in enumerate(samples) if i % HELD_OUT_OF == HELD_OUT_OF - 1]
    if len(held) < LEAST_HELD_OUT:
        return f"{len(samples)} samples are too few: {HELD_OUT_OF * LEAST_HELD_OUT} are needed"
    if not joinable(samples, input_specs(model)):
        return "samples differ in shape, or the model takes a fixed number of them"
    start, masks = _start(done, tables)
    network = Network(model, list(start), samples[0])
    if network.stopped:
        return f"no gradient is known of {network.stopped}"
    if not network.outputs or any(a.dtype != np.float32 for a in start.values()):
        return "only float32 is trained"
    work = 0 if long else _work(done, network, samples[0], start)
    if 3 * BATCH * LEAST_STEPS * work > WORK:
        return SLOW
    taught = [each for i, each in enumerate(samples) if i % HELD_OUT_OF != HELD_OUT_OF - 1]
    training = _Training(network, start, masks, seed)
    with np.errstate(all="ignore"):  # what overflows is far off, and so not kept
        before, after, steps, best = training.run(taught, held, work)
    return Trained(
        [_with(each, best) for each in done],
        before,
        after,
        steps,
        [_table_with(each, best) for each in tables],
    )


def _start(
    done: Sequence[Pruned], tables: Sequence[PrunedTable] = ()
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Weights, biases and tables by name, and where they may be other than zero."""
    start: dict[str, Array] = {}
    masks: dict[str, Array] = {}
    for table in tables:
        name, array = table.value.name or "", table.tensor.numpy()
        start[name], masks[name] = array, array != 0
    for each in done:
        weight = each.weight.numpy()
        start[each.layer.name], masks[each.layer.name] = weight, weight != 0
        if each.bias is not None and each.layer.bias is not None:
            name = each.layer.bias.name or ""
            start[name], masks[name] = each.bias, np.ones(each.bias.shape, bool)
    return start, masks


def _steps(work: int, *, far: bool) -> int:
    """How many steps of so many multiply-adds a sample there may be; the last is judged, too."""
    most, budget = (FAR_STEPS, FAR_WORK) if far else (STEPS, WORK)
    steps = min(int(budget / (3 * BATCH * max(work, 1))), most)
    return steps - steps % JUDGED


def _work(
    done: Sequence[Pruned], network: Network, sample: Feed, start: Mapping[str, Array]
) -> int:
    """Multiply-adds of the layers for one sample."""
    made = network.run(sample, start)
    total = 0
    for each in done:
        output = made.get(each.layer.node.outputs[0].name or "")
        total += 0 if output is None else output.size * each.layer.size // each.layer.rows
    return total


class _Training:
    """Adam on what stays, with steps in proportion to the weights; what is judged and kept is a running mean."""

    def __init__(
        self,
        network: Network,
        start: Mapping[str, Array],
        masks: Mapping[str, Array],
        seed: int,
    ) -> None:
        self._network, self._masks = network, masks
        self._random = np.random.default_rng(seed)
        self._now = {name: array.copy() for name, array in start.items()}
        self._mean = {name: array.copy() for name, array in start.items()}
        self._size = {name: _size(start[name]) for name in start}
        self._moments: dict[str, tuple[Array, Array]] = {}
        self._logits: dict[str, str] = {}

    def run(
        self, taught: Sequence[Feed], held: Sequence[Feed], work: int
    ) -> tuple[float, float, int, dict[str, Array]]:
        """Distance before and after on mixtures of samples held out, steps, and the weights that were nearest there.

        Those of before, where the nearest are much farther off on the samples themselves than before.

        Args:
            taught: samples to train on.
            held: samples to judge by.
            work: multiply-adds that one takes; 0 where steps shall not be spared.
        """
        noise = spreads(taught, NOISE)
        judged, wanted = self._examination(held, noise)
        few = -(-(len(taught) + len(held)) // MOST_HELD_OUT)
        plain = join([*taught[::few], *held[::few]])
        known = self._network.taught(plain)
        before = least = self._judge(judged, wanted, self._now)
        most = self._judge(plain, known, self._now)
        steps = _steps(work, far=before > FAR)
        start = best = dict(self._now)
        rate, idle, count = RATE, 0, 0
        for step in range(1, steps + 1):
            count = step
            ease = LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * step / steps))
            self._step(self._batch(taught, noise), rate * ease, step)
            if step % JUDGED:
                continue
            loss = self._judge(judged, wanted, self._mean)
            if loss < least:
                least, idle, best = loss, 0, {n: a.copy() for n, a in self._mean.items()}
                continue
            idle += 1
            if idle * JUDGED >= PATIENCE * steps:
                break
            if loss > TOO_FAR * least:
                rate *= BACK
                self._go_back(best)
        if self._judge(plain, known, best) > FORGOTTEN * most:
            return before, before, count, start
        return before, least, count, best

    def _go_back(self, weights: Mapping[str, Array]) -> None:
        self._now = {n: a.copy() for n, a in weights.items()}
        self._mean = {n: a.copy() for n, a in weights.items()}
        self._moments = {}

    def _examination(
        self, held: Sequence[Feed], noise: Mapping[str, float]
    ) -> tuple[Feed, dict[str, Array]]:
        """What is judged by, and what the original makes of it."""
        judged = join(unseen(held[:MOST_HELD_OUT], noise, self._random))
        wanted, tails = self._network.taught(judged), self._network.tails
        self._logits = {name: tails.get(name, "") for name in logit_outputs(wanted, tails)}
        return judged, wanted

    def _judge(
        self, feed: Feed, wanted: Mapping[str, Array], weights: Mapping[str, Array]
    ) -> float:
        made = self._network.run(feed, weights)
        return distance([wanted], [{name: made[name] for name in wanted}], self._logits, 1.0)

    def _batch(self, taught: Sequence[Feed], noise: Mapping[str, float]) -> Feed:
        chosen = self._random.choice(len(taught), min(BATCH, len(taught)), replace=False)
        return noisy(
            mixed(join([taught[i] for i in chosen]), MIX, self._random), noise, self._random
        )

    def _step(self, feed: Feed, rate: float, step: int) -> None:
        wanted = self._network.taught(feed)
        made = self._network.run(feed, self._now)
        slopes = {name: self._slope(name, wanted[name], made[name]) for name in wanted}
        for name, grad in self._network.gradients(made, self._now, slopes).items():
            self._move(name, np.where(self._masks[name], grad, 0), rate, step)

    def _move(self, name: str, grad: Array, rate: float, step: int) -> None:
        """One step of Adam."""
        first, second = self._moments.get(name, (np.zeros_like(grad), np.zeros_like(grad)))
        first = _FIRST * first + (1 - _FIRST) * grad
        second = _SECOND * second + (1 - _SECOND) * grad * grad
        self._moments[name] = first, second
        even = first / (1 - _FIRST**step)
        spread = np.sqrt(second / (1 - _SECOND**step)) + _EPSILON
        moved = self._now[name] - np.float32(rate * self._size[name]) * even / spread
        now = np.where(self._masks[name], moved, 0)
        mean = _AVERAGE * self._mean[name] + (1 - _AVERAGE) * now
        self._now[name], self._mean[name] = now.astype(np.float32), mean.astype(np.float32)

    def _slope(self, name: str, wanted: Array, made: Array) -> Array:
        """The gradient of the distance of one output."""
        if name not in self._logits:
            wide = wanted.astype(np.float64)
            scale = max(float(np.square(wide - wide.mean()).sum()), 1e-12)
            return np.asarray(2 * (made - wide) / scale, made.dtype)
        tail = self._logits[name]
        want, got = (np.exp(log_softmax(as_logits(a, tail))) for a in (wanted, made))
        slope = (got - want) / math.prod(made.shape[:-1])
        if tail == "Softmax":
            slope /= np.maximum(made, 1e-6)
        return np.asarray(slope, made.dtype)


def _size(array: Array) -> float:
    """The root mean square of what is not zero."""
    kept = array[array != 0]
    return float(np.sqrt(np.mean(np.square(kept, dtype=np.float64)))) if kept.size else 0.0


def _table_with(table: PrunedTable, weights: Mapping[str, Array]) -> PrunedTable:
    array = weights[table.value.name or ""]
    zeros = int(array.size - np.count_nonzero(array))
    tensor = thin(array, table.tensor.dtype, table.value.name)
    return dataclasses.replace(table, tensor=tensor, zeros=zeros)


def _with(done: Pruned, weights: Mapping[str, Array]) -> Pruned:
    layer = done.layer
    weight = weights[layer.name]
    bias = None if layer.bias is None else weights.get(layer.bias.name or "")
    return dataclasses.replace(
        done,
        weight=thin(weight, layer.tensor.dtype, layer.name),
        bias=done.bias if bias is None else bias,
        zeros=float(np.mean(weight == 0)),
    )
