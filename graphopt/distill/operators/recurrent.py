"""RNN, GRU and LSTM: step by step, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from graphopt.distill.operators.call import Call, Operator, Tensor

Step = Callable[[Tensor, "tuple[Tensor, ...]"], "tuple[Tensor, ...]"]
Direction = Callable[[Call, int], "tuple[Step, Tensor]"]


def _run(call: Call, states: int, direction: Direction) -> tuple[Tensor | None, ...]:
    """Y, Y_h and, of an LSTM, Y_c.

    Args:
        call: inputs X, W, R, B, sequence_lens, then the initial states.
        states: how many tensors are carried from step to step.
        direction: gives the step of one direction, and X times its weights.
    """
    if call.at(4) is not None or call.get("clip") is not None or call.get("layout", 0):
        raise NotImplementedError("sequence_lens, clip and layout")
    weight, repeat = call.inputs[1], call.inputs[2]
    assert weight is not None
    assert repeat is not None
    steps, batch, width = call.x.shape[0], call.x.shape[1], repeat.shape[-1]
    kind = call.get("direction", "forward")
    whole, ends = [], []
    for index in range(weight.shape[0]):
        step, projected = direction(call, index)
        given = [call.at(5 + at) for at in range(states)]
        state = tuple(
            call.x.new_zeros(batch, width) if each is None else each[index] for each in given
        )
        made: list[Tensor] = [state[0]] * steps
        backward = kind == "reverse" or index == 1
        for time in reversed(range(steps)) if backward else range(steps):
            state = step(projected[time], state)
            made[time] = state[0]
        whole.append(torch.stack(made))
        ends.append(state)
    lasts = tuple(torch.stack([state[at] for state in ends]) for at in range(states))
    return (torch.stack(whole, 1), *lasts)


def _parts(call: Call, index: int, gates: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, R and both halves of the bias of one direction, W and R ready to be multiplied by from the right."""
    weight, repeat = call.inputs[1], call.inputs[2]
    assert weight is not None
    assert repeat is not None
    width = repeat.shape[-1]
    bias = call.at(3)
    both = call.x.new_zeros(2 * gates * width) if bias is None else bias[index]
    before, after = both.split(gates * width)
    return weight[index].T, repeat[index].T, before, after


_PLAIN = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


def _activations(call: Call, index: int, usual: list[str]) -> list[Callable[[Tensor], Tensor]]:
    stated = [name.lower() for name in call.get("activations", [])] or usual * 2
    chosen = stated[index * len(usual) : (index + 1) * len(usual)]
    if any(name not in _PLAIN for name in chosen):
        raise NotImplementedError(f"activations {chosen}")
    return [_PLAIN[name] for name in chosen]


def _rnn(call: Call, index: int) -> tuple[Step, Tensor]:
    weight, repeat, before, after = _parts(call, index, 1)
    (outer,) = _activations(call, index, ["tanh"])

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (outer(x + state[0] @ repeat),)

    return step, call.x @ weight + before + after


def _gru(call: Call, index: int) -> tuple[Step, Tensor]:
    weight, repeat, before, after = _parts(call, index, 3)
    gate, outer = _activations(call, index, ["sigmoid", "tanh"])
    width = repeat.shape[0]
    update_reset, hidden = repeat[:, : 2 * width], repeat[:, 2 * width :]
    late = after[2 * width :]
    is_linear_first = call.get("linear_before_reset", 0)

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (old,) = state
        pair = gate(x[:, : 2 * width] + old @ update_reset + after[: 2 * width])
        update, reset = pair.split(width, 1)
        kept = reset * (old @ hidden + late) if is_linear_first else (reset * old) @ hidden + late
        return ((1 - update) * outer(x[:, 2 * width :] + kept) + update * old,)

    return step, call.x @ weight + before


def _lstm(call: Call, index: int) -> tuple[Step, Tensor]:
    if call.get("input_forget", 0):
        raise NotImplementedError("input_forget")
    weight, repeat, before, after = _parts(call, index, 4)
    gate, inner, outer = _activations(call, index, ["sigmoid", "tanh", "tanh"])
    width = repeat.shape[0]
    peepholes = call.at(7)
    peep = (0.0, 0.0, 0.0) if peepholes is None else peepholes[index].split(width)

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        old, cell = state
        entry, leave, forget, new = (x + old @ repeat).split(width, 1)
        kept = gate(forget + peep[2] * cell) * cell
        cell = kept + gate(entry + peep[0] * cell) * inner(new)
        return gate(leave + peep[1] * cell) * outer(cell), cell

    return step, call.x @ weight + before + after


OPERATORS: Mapping[str, Operator] = {
    "RNN": lambda call: _run(call, 1, _rnn),
    "GRU": lambda call: _run(call, 1, _gru),
    "LSTM": lambda call: _run(call, 2, _lstm),
}
