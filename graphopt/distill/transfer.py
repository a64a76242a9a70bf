"""Weights that a student takes from its teacher before it is trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from graphopt.ir.sparse import thin


def head_start(
    teacher: ir.Model, student: ir.Model, loss: Callable[[ir.Model], float]
) -> int | None:
    """Transfers weights where the student is nearer to the teacher then; returns how many, None where it is not.

    A student that was fitted after pruning mostly is farther away with the original's weights under its zeros.

    Args:
        teacher: the original.
        student: changed in place, or left as it was.
        loss: how far a model is from the teacher.
    """
    old = {name: value.const_value for name, value in student.graph.initializers.items()}
    before = loss(student)
    copied = transfer(teacher, student)
    if not copied or loss(student) < before:
        return copied
    for name, tensor in old.items():
        student.graph.initializers[name].const_value = tensor
    return None


def transfer(teacher: ir.Model, student: ir.Model) -> int:
    """Copies the teacher's weights of the same name, shape and dtype into the student; returns how many.

    Zeros of matrices stay zero, unless there is nothing else in them.
    """
    copied = 0
    for name, value in student.graph.initializers.items():
        theirs = teacher.graph.initializers.get(name)
        mine = value.const_value
        if theirs is None or theirs.const_value is None or mine is None:
            continue
        if theirs.const_value.dtype == mine.dtype and theirs.const_value.shape == mine.shape:
            value.const_value = _masked(theirs.const_value, mine, name)
            copied += 1
    return copied


def _masked(theirs: ir.TensorProtocol, mine: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    numbers = np.array(theirs.numpy())
    if numbers.ndim < 2 or mine.dtype.bitwidth < 8:
        return ir.Tensor(numbers, mine.dtype, name=name)
    zero = mine.numpy() == 0
    if not zero.all():
        numbers[zero] = 0
    return thin(numbers, mine.dtype, name)
