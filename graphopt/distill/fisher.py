"""What the rows of weights contribute to a model's own answers; importing this imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.distill.batches import Array, Feed
from graphopt.distill.interpret import Interpreter
from graphopt.distill.losses import logit_outputs
from graphopt.distill.operators import Tensor
from graphopt.distill.operators.elementwise import tensor_of
from graphopt.distill.teacher import tails


def contributions(
    model: ir.Model, feeds: Sequence[Feed], rows: Mapping[str, int], seed: int
) -> dict[str, Array]:
    """Of each weight, [samples, rows]: sum over the row of w dlog p(y) / dw, y drawn from the model's own answer.

    No labels: y is drawn from the softmax of outputs that are scores of classes; of other outputs, which are taken for
    the mean of a normal distribution as wide as they are spread, log p(y) is the product with a random direction.
    Source: the empirical Fisher information of gates on channels (Theis et al. 2018), with the model as its teacher.

    Args:
        model: whose main graph the interpreter knows.
        feeds: one sample each.
        rows: the axis of rows, by name of the weight.
        seed: of what is drawn.

    Raises:
        ModelError: the interpreter does not know an operator.
    """
    interpreter = Interpreter(model)
    leaves = {name: _leaf(model.graph.initializers[name]) for name in rows}
    random = torch.Generator().manual_seed(seed)
    found: dict[str, list[Array]] = {name: [] for name in rows}
    for feed in feeds:
        made = interpreter.run({name: tensor_of(array) for name, array in feed.items()}, leaves)
        likelihood = _likelihood(model, made, random)
        grads = torch.autograd.grad(likelihood, list(leaves.values()), allow_unused=True)
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            product = torch.zeros_like(leaf) if grad is None else leaf.detach() * grad
            flat = product.movedim(rows[name], 0).flatten(1)
            found[name].append(flat.sum(1).numpy().astype(np.float64))
    return {name: np.stack(parts) for name, parts in found.items()}


def _leaf(value: ir.Value) -> Tensor:
    assert value.const_value is not None
    return tensor_of(value.const_value.numpy()).clone().requires_grad_()


def _likelihood(model: ir.Model, made: Mapping[str, Tensor], random: Any) -> Tensor:  # noqa: ANN401  torch.Generator
    floats = {name: value for name, value in made.items() if value.is_floating_point()}
    known = tails(model.graph)
    scores = logit_outputs({n: v.detach().numpy() for n, v in floats.items()}, known)
    total = torch.zeros(())
    for name, value in floats.items():
        if name not in scores:
            spread = value.detach().std(correction=0).clamp(min=1e-6)
            direction = torch.randn(value.shape, generator=random, dtype=value.dtype)
            total = total + (direction * value / spread).sum()
            continue
        logits = torch.log(value.clamp(min=1e-12)) if known[name] == "Softmax" else value
        log_p = torch.log_softmax(logits, -1).flatten(0, -2)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=random)
        total = total + log_p.gather(1, drawn).sum()
    return total
