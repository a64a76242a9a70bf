"""Channels of zeros between convolutions, where blocked layouts want more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes import filling
from graphopt_passes.filling import filled_up

from graphopt.targets import get_target
from tests.rewriting import apply, check, parse

G = "g (float[1,3,9,9] x) => (float[1,8,9,9] y)"
HELD = "float[30,3,3,3] w, float[30] b, float[8,30,3,3] v, float[8] c"
FULL = "float[32,3,3,3] w, float[32] b, float[8,32,3,3] v, float[8] c"
PADS = "<pads = [1,1,1,1]>"
BODY = f"h = Conv{PADS}(x, w, b) r = Relu(h) y = Conv{PADS}(r, v, c)"


def test_channels_between_convolutions_are_filled_up() -> None:
    check(filling.RULES, f"{G} <{HELD}> {{ {BODY} }}", f"{G} <{FULL}> {{ {BODY} }}")


def test_what_is_filled_up_is_zero() -> None:
    model = ir.from_proto(parse(f"{G} <{HELD}> {{ {BODY} }}"))
    apply(filling.RULES, model)
    first, _, second = model.graph
    weight, bias, columns = (v.const_value.numpy() for v in (*first.inputs[1:], second.inputs[1]))  # type: ignore[union-attr]
    assert not weight[30:].any()
    assert not bias[30:].any()
    assert not columns[:, 30:].any()
    assert np.all(weight[:30])


@pytest.mark.parametrize(
    "between",
    [
        "r = MaxPool<kernel_shape = [3,3], pads = [1,1,1,1]>(h)",
        "t = LeakyRelu(h) r = AveragePool<kernel_shape = [3,3], pads = [1,1,1,1]>(t)",
        "r = Sigmoid(h)",
        "r = Clip(h, low, high)",
    ],
)
def test_channelwise_operators_lie_between(between: str) -> None:
    ends = "float low = {-1.0}, float high = {1.0}"
    body = BODY.replace("r = Relu(h)", between)
    check(filling.RULES, f"{G} <{HELD}, {ends}> {{ {body} }}", f"{G} <{FULL}, {ends}> {{ {body} }}")


def test_without_bias_none_is_added() -> None:
    body = f"h = Conv{PADS}(x, w) y = Conv{PADS}(h, v)"
    bare = "float[30,3,3,3] w, float[8,30,3,3] v"
    check(
        filling.RULES,
        f"{G} <{bare}> {{ {body} }}",
        f"{G} <{bare.replace('30', '32')}> {{ {body} }}",
    )


def test_chains_are_filled_up_throughout() -> None:
    body = f"h = Conv{PADS}(x, w, b) r = Relu(h) i = Conv{PADS}(r, u) s = Relu(i) y = Conv{PADS}(s, v, c)"
    check(
        filling.RULES,
        f"{G} <{HELD}, float[30,30,3,3] u> {{ {body} }}",
        f"{G} <{FULL}, float[32,32,3,3] u> {{ {body} }}",
    )


@pytest.mark.parametrize(
    "body",
    [
        BODY.replace("Relu(h)", "Exp(h)"),  # may overflow where the bias is large: not in the list
        BODY.replace("Relu(h)", "Softmax<axis = 1>(h)"),  # mixes channels
        BODY.replace("h = Conv", "h = Conv<group = 3>").replace(
            "<group = 3><pads", "<group = 3, pads"
        ),
        f"h = Conv{PADS}(x, w, b) r = Relu(h) o = Conv{PADS}(r, v, c) n = GlobalMaxPool(h)"
        " e = ReduceSum<keepdims = 1>(n) y = Add(o, e)",
    ],
    ids=["overflow", "softmax", "group", "other-use"],
)
def test_others_stay(body: str) -> None:
    held = HELD.replace("[30,3,", "[30,1,") if "group" in body else HELD
    missed = "other uses" if "GlobalMaxPool" in body else ""
    check(filling.RULES, f"{G} <{held}> {{ {body} }}", missed=missed)


def test_values_that_leave_the_graph_stay() -> None:
    outs = G.replace("y)", "y, float[1,30,9,9] r)")
    check(filling.RULES, f"{outs} <{HELD}> {{ {BODY} }}", missed="other uses")


def test_computed_weights_stay() -> None:
    body = BODY.replace("(x, w, b)", "(x, q, b)").replace("h =", "q = Mul(w, k) h =", 1)
    ins = G.replace("x)", "x, float k)", 1)
    check(filling.RULES, f"{ins} <{HELD}> {{ {body} }}", missed="computed weight")


def test_doubles_stay() -> None:
    text = f"{G} <{HELD}> {{ {BODY} }}".replace("float[", "double[")
    assert not apply(filling.RULES, ir.from_proto(parse(text))).rewrites


@pytest.mark.parametrize(
    "form", ["[7,30,3,3]", "[8,30,1,1]"], ids=["few-channels-out", "small-window"]
)
def test_too_little_work_stays(form: str) -> None:
    out = form.split(",", maxsplit=1)[0].strip("[")
    held = HELD.replace("[8,30,3,3]", form).replace("float[8] c", f"float[{out}] c")
    body = BODY.replace(f"{PADS}(r", "(r") if "1,1" in form else BODY
    check(filling.RULES, f"{G.replace('1,8,', f'1,{out},')} <{held}> {{ {body} }}")


def test_tied_weights_stay() -> None:
    body = (
        f"h = Conv{PADS}(x, w, b) i = Conv{PADS}(h, u) j = Conv{PADS}(i, u) y = Conv{PADS}(j, v, c)"
    )
    check(filling.RULES, f"{G} <{HELD}, float[30,30,3,3] u> {{ {body} }}", missed="store it twice")


@pytest.mark.parametrize("target", ["tensorrt", "cuda", "portable", "cpu-arm64"])
def test_other_targets_keep_their_channels(target: str) -> None:
    check(filling.RULES, f"{G} <{HELD}> {{ {BODY} }}", target=target)


@pytest.mark.parametrize(
    ("channels", "filled"),
    [
        (3, 3),
        (14, 14),
        (18, 18),
        (26, 26),
        (28, 28),
        (29, 32),
        (30, 32),
        (42, 44),
        (50, 50),
        (62, 64),
        (128, 128),
    ],
)
def test_how_many_pay(channels: int, filled: int) -> None:
    wanted = get_target("cpu-avx2").channels
    assert wanted is not None
    assert filled_up(channels, wanted) == filled


def test_a_body_of_control_flow_keeps_to_itself() -> None:
    body = (
        f"h = Conv{PADS}(x, w, b) y = If(k) <then_branch = a () => (o) {{ o = Conv{PADS}(h, v, c) }},"
        f" else_branch = e () => (p) {{ p = Conv{PADS}(x, z, c) }}>"
    )
    ins = G.replace("x)", "x, bool k)", 1)
    check(filling.RULES, f"{ins} <{HELD}, float[8,3,3,3] z> {{ {body} }}", missed="other uses")
