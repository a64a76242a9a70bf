"""Reductions, arg max, top k, and softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from graphopt.distill.operators.call import Call, Operator, Tensor

Reducer = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduced(function: Reducer) -> Operator:
    def run(call: Call) -> Tensor:
        axes = call.ints(1, "axes")
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return call.x
            axes = list(range(call.x.dim()))
        return function(
            call.x, tuple(axis % call.x.dim() for axis in axes), bool(call.get("keepdims", 1))
        )

    return run


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        if call.opset >= 13:
            return function(call.x, call.get("axis", -1))
        axis = call.get("axis", 1) % max(call.x.dim(), 1)
        flat = call.x.flatten(axis) if axis else call.x.reshape(1, -1)
        return function(flat, -1).reshape(call.x.shape)

    return run


def _arg(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        axis = call.get("axis", 0) % call.x.dim()
        if call.get("select_last_index", 0):
            raise NotImplementedError("select_last_index")
        found = function(call.x, axis)
        return found.unsqueeze(axis) if call.get("keepdims", 1) else found

    return run


def _top_k(call: Call) -> tuple[Tensor, Tensor]:
    count = (call.ints(1, "k") or [1])[0]
    found = torch.topk(
        call.x, count, dim=call.get("axis", -1), largest=bool(call.get("largest", 1)), sorted=True
    )
    return found.values, found.indices


def _lp_normalization(call: Call) -> Tensor:
    axis, p = call.get("axis", -1), call.get("p", 2)
    return call.x / torch.linalg.vector_norm(call.x, ord=p, dim=axis, keepdim=True)


OPERATORS: Mapping[str, Operator] = {
    "ReduceMean": _reduced(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceSum": _reduced(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "ReduceMax": _reduced(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": _reduced(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduced(_product),
    "ReduceL1": _reduced(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduced(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "ReduceLogSum": _reduced(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": _reduced(lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
    "ReduceSumSquare": _reduced(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "ArgMax": _arg(lambda x, axis: torch.argmax(x, dim=axis)),
    "ArgMin": _arg(lambda x, axis: torch.argmin(x, dim=axis)),
    "TopK": _top_k,
    "Softmax": _softmax(lambda x, axis: torch.softmax(x, dim=axis)),
    "LogSoftmax": _softmax(lambda x, axis: torch.log_softmax(x, dim=axis)),
    "LpNormalization": _lp_normalization,
}
