"""Training a student to compute what a teacher computes; importing this imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch

from graphopt.distill.batches import Array, Division, Feed, grouped, join, mixed, noisy, spreads
from graphopt.distill.interpret import Interpreter
from graphopt.distill.losses import rate_at
from graphopt.distill.operators import Tensor
from graphopt.distill.operators.elementwise import tensor_of
from graphopt.distill.operators.quantized import straight_through
from graphopt.distill.settings import Mode, Settings
from graphopt.distill.teacher import Teacher
from graphopt.distill.weights import Grid, Weight
from graphopt.errors import ModelError

JUDGED = 16
"""How often the held-out samples are looked at."""

AVERAGED = 0.97
"""What is judged and kept is a running mean of the weights, in which each step has this much of the one before."""

WORSE, TRIED, SLOWER = 1.5, 3, 4.0
"""A rate is given up where the held-out loss grows to so many times the least, or where so many judgements have brought
nothing at all yet; training then goes on from the best weights at a fraction of it.  What least squares has fitted
bears far smaller steps than what pruning has left as it was."""

SINGLES = 8
"""Samples a step where they cannot be joined: each is a run of its own."""

PARITY = 1e-4
"""Greatest difference between interpreter and ONNX Runtime, over the RMS of the output."""

SWAY, MOST = 10.0, 0.01
"""... or so many times what the runtime itself moves by when its inputs move by one unit in the last place, at most
this: some models amplify rounding.  Sums in another order are off in every layer, inputs in the first only."""

PARITY_ON_A_GRID = 0.05
"""RMS of the difference over the RMS of the output where numbers are rounded on the way: a tie may go either way."""

Report = Callable[[float], None]
Optimizer: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        numbers: of each weight at the best step, in the order of the weights.
        losses: of the steps.
        judged: of the held-out samples.
        kept: the best step.
        steps: how many were made.
    """

    numbers: tuple[Array, ...]
    losses: tuple[tuple[int, float], ...]
    judged: tuple[tuple[int, float], ...]
    kept: int
    steps: int


def parity(
    student: ir.Model, interpreter: Interpreter, feeds: Sequence[Feed], run: Callable[[Feed], Feed]
) -> float:
    """The greatest relative difference between the interpreter and ONNX Runtime.

    Args:
        student: says whether numbers are rounded on the way.
        interpreter: of the student.
        feeds: a few.
        run: what ONNX Runtime makes of a feed.

    Raises:
        ModelError: it is more than rounding can be; the message names the output.
    """
    on_grid = any(node.op_type == "QuantizeLinear" for node in student.graph)
    expected = [run(feed) for feed in feeds]
    moved = [] if on_grid else [run(_moved(feed)) for feed in feeds]
    with torch.no_grad():
        found = [interpreter.run(_tensors(feed), {}) for feed in feeds]
    worst = 0.0
    for name in expected[0]:
        limit = PARITY_ON_A_GRID if on_grid else PARITY
        for want, other in zip(expected, moved, strict=False):
            limit = max(limit, min(SWAY * _apart(want[name], other[name], on_grid=False), MOST))
        for want, got in zip(expected, found, strict=True):
            apart = _apart(want[name], got[name].cpu().numpy(), on_grid=on_grid)
            if not apart <= limit:
                raise ModelError(
                    f"the interpreter of distillation computes output {name!r} otherwise than ONNX Runtime: off by "
                    f"{apart:.2g} of its RMS, where {limit:.2g} is allowed. Nothing was trained; leave --distill out, "
                    "and please report it with the model"
                )
            worst = max(worst, apart)
    return worst


def _moved(feed: Feed) -> Feed:
    """The feed with each float one unit in the last place higher."""
    return {
        name: np.nextafter(array, np.array(np.inf, array.dtype))
        if array.dtype.kind == "f"
        else array
        for name, array in feed.items()
    }


def _apart(want: Array, got: Array, *, on_grid: bool) -> float:
    if want.shape != got.shape:
        return float("inf")
    wide = want.astype(np.float64)
    rms = float(np.sqrt(np.square(wide).mean())) if wide.size else 0.0
    error = np.abs(got.astype(np.float64) - wide)
    if not error.size:
        return 0.0
    off = float(np.sqrt(np.square(error).mean())) if on_grid else float(error.max())
    return off / max(rms, 1e-6)


class Trainer:
    """One training: the weights as leaves, the losses, the schedule."""

    def __init__(
        self,
        interpreter: Interpreter,
        weights: Sequence[Weight],
        teacher: Teacher,
        settings: Settings,
    ) -> None:
        self._interpreter = interpreter
        self._weights = weights
        self._teacher = teacher
        self._settings = settings
        self._leaves = [
            torch.tensor(each.start, dtype=_float_of(each), requires_grad=True) for each in weights
        ]
        self._means = [leaf.detach().clone() for leaf in self._leaves]
        self._masks = [None if w.mask is None else torch.tensor(w.mask) for w in weights]

    def run(self, division: Division, seed: int, report: Report) -> Trained:
        """Trains until the steps are done or the held-out samples say that it gets no better."""
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        settings = self._settings
        spread = spreads(division.train, settings.noise)
        optimizer = torch.optim.Adam(self._leaves, lr=settings.rate)
        judged = [(0, self.judge(division.judged))]
        losses: list[tuple[int, float]] = []
        best, share, since = self._snapshot(), 1.0, 0
        every = max(settings.steps // JUDGED, 1)
        step = 0
        for step in range(1, settings.steps + 1):
            rate = share * settings.rate * rate_at(step - 1, settings.steps, settings.schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses.append((step, self._step(optimizer, division.train, spread, rng)))
            if step % every and step != settings.steps:
                continue
            report(step / settings.steps)
            judged.append((step, self.judge(division.judged)))
            lowest = min(judged, key=lambda pair: pair[1])[0]
            if lowest == step:
                best = self._snapshot()
            if len(judged) - 1 - [s for s, _ in judged].index(lowest) >= settings.patience:
                break
            if _is_too_fast(judged, since):
                self._restore(best)
                optimizer = torch.optim.Adam(self._leaves, lr=settings.rate)
                share, since = share / SLOWER, len(judged) - 1
        kept = min(judged, key=lambda pair: pair[1])[0]
        return Trained(best, tuple(losses), tuple(judged), kept, step)

    def judge(self, samples: Sequence[Feed]) -> float:
        """The loss on samples, without noise."""
        total = 0.0
        feeds = grouped(samples, self._settings.batch, joined=self._teacher.joins)
        with torch.no_grad():
            for feed in feeds:
                total += float(self._loss(feed, self._teacher.outputs(feed), self._means))
        return total / len(feeds)

    def _step(
        self,
        optimizer: Optimizer,
        samples: Sequence[Feed],
        spread: Mapping[str, float],
        rng: np.random.Generator,
    ) -> float:
        size = min(self._settings.batch if self._teacher.joins else SINGLES, len(samples))
        chosen = [samples[i] for i in rng.choice(len(samples), size, replace=False)]
        feeds = [join(chosen)] if self._teacher.joins else chosen
        optimizer.zero_grad()
        total = 0.0
        for clean in feeds:
            whole = mixed(clean, self._settings.mix, rng) if self._teacher.joins else clean
            feed = noisy(whole, spread, rng)
            loss = self._loss(feed, self._teacher.outputs(feed), self._leaves) / len(feeds)
            loss.backward()
            total += float(loss.detach())
        for leaf, mask in zip(self._leaves, self._masks, strict=True):
            if leaf.grad is not None and mask is not None:
                leaf.grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            for leaf, mask in zip(self._leaves, self._masks, strict=True):
                if mask is not None:
                    leaf.mul_(mask)
            for leaf, mean in zip(self._leaves, self._means, strict=True):
                mean.lerp_(leaf, 1 - AVERAGED)
        return total

    def _loss(self, feed: Feed, wanted: Mapping[str, Array], leaves: Sequence[Tensor]) -> Tensor:
        ends: list[Tensor] = []
        blocks = frozenset(self._teacher.features)

        def watch(name: str, value: Tensor) -> Tensor:
            if name not in blocks:
                return value
            ends.append(error_of(tensor_of(wanted[name]), value))
            return value.detach() if self._settings.mode is Mode.BLOCKS else value

        weights = {w.name: _used(w, leaf) for w, leaf in zip(self._weights, leaves, strict=True)}
        made = self._interpreter.run(_tensors(feed), weights, watch)
        total = sum(
            (self._output_loss(name, made[name], wanted[name]) for name in self._teacher.floats),
            start=torch.zeros(()),
        )
        share = self._settings.features or (1.0 if self._settings.mode is Mode.BLOCKS else 0.0)
        return total + share * sum(ends, start=torch.zeros(())) / max(len(ends), 1)

    def _output_loss(self, name: str, made: Tensor, wanted: Array) -> Tensor:
        want = tensor_of(wanted).to(made.dtype)
        tail = self._teacher.logits.get(name)
        if tail is None:
            return error_of(want, made)
        heat = self._settings.temperature
        if tail == "Softmax":
            want, made = (torch.log(torch.clamp(each, min=1e-12)) for each in (want, made))
        ahead, behind = (torch.log_softmax(each / heat, -1) for each in (want, made))
        return heat**2 * (ahead.exp() * (ahead - behind)).sum(-1).mean()

    def _restore(self, numbers: Sequence[Array]) -> None:
        """Goes back to a snapshot."""
        with torch.no_grad():
            for leaf, mean, array in zip(self._leaves, self._means, numbers, strict=True):
                leaf.copy_(torch.tensor(array, dtype=leaf.dtype))
                mean.copy_(leaf)

    def _snapshot(self) -> tuple[Array, ...]:
        return tuple(mean.cpu().numpy().astype(np.float64) for mean in self._means)


def _is_too_fast(judged: Sequence[tuple[int, float]], since: int) -> bool:
    """Whether a rate is to be given up that was taken at the judgement `since`."""
    values = [loss for _, loss in judged]
    least = min(values)
    return values[-1] > WORSE * least or (least == values[0] and len(values) - 1 - since >= TRIED)


def error_of(want: Tensor, made: Tensor) -> Tensor:
    """Sum of squared differences over the sum of squares of what is wanted about its mean."""
    scale = (want - want.mean()).square().sum().clamp(min=1e-12)
    return (made - want).square().sum() / scale


def _float_of(weight: Weight) -> Any:  # noqa: ANN401  torch.dtype
    tensor = weight.value.const_value
    double = tensor is not None and tensor.dtype == ir.DataType.DOUBLE
    return torch.float64 if double else torch.float32


def _used(weight: Weight, leaf: Tensor) -> Tensor:
    """What the graph reads: the leaf itself, or the whole numbers that it is rounded to."""
    if weight.grid is None:
        return leaf
    return on_grid(weight.grid, leaf)


def on_grid(grid: Grid, leaf: Tensor) -> Tensor:
    """The whole numbers nearest to a leaf, as floats with the gradient of the leaf."""
    scale, zero = (
        torch.tensor(np.ascontiguousarray(each)).to(leaf.dtype) for each in grid.along(leaf.dim())
    )
    within = torch.clamp(leaf / scale + zero, grid.low, grid.high)
    return straight_through(torch.round(within), within)


def _tensors(feed: Feed) -> dict[str, Tensor]:
    return {name: tensor_of(array) for name, array in feed.items()}
