"""What inputs are for, found behind casts, reshapes, offsets, subgraphs and functions."""

from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.verify.roles import Role, Use, input_roles

HEAD = '<ir_version: 10, opset_import: ["" : 17, "my" : 1, "com.microsoft" : 1]>'


def roles(text: str) -> dict[str, Role]:
    return input_roles(ir.from_proto(onnx.parser.parse_model(HEAD + text)))


def role(
    nodes: str, declared: str = "int64[n] x", constants: str = "float[10,4] table = {1}"
) -> Role:
    text = f"g ({declared}) => (float y) <{constants}> {{ {nodes} }}"
    proto = onnx.parser.parse_model(HEAD + text.replace("table = {1}", "table"))
    if "table" in constants:
        proto.graph.initializer.append(
            onnx.TensorProto(name="table", data_type=1, dims=[10, 4], raw_data=bytes(160))
        )
    return input_roles(ir.from_proto(proto))["x"]


@pytest.mark.parametrize(
    ("nodes", "use", "bounds"),
    [
        ("y = Gather(table, x)", Use.INDEX, (10,)),
        ("y = Gather<axis=1>(table, x)", Use.INDEX, (4,)),
        ("a = Cast<to=6>(x) b = Unsqueeze(a, z) y = Gather(table, b)", Use.INDEX, (10,)),
        ("a = Add(x, two) y = Gather(table, a)", Use.INDEX, (8,)),
        ("a = Sub(x, two) y = Gather(table, a)", Use.INDEX, (12,)),
        ("a = Mul(x, two) y = Gather(table, a)", Use.INDEX, (5,)),
        ("a = Sub(two, x) y = Gather(table, a)", Use.INDEX, (3,)),
        ("a = Gather(table, x) y = Gather<axis=1>(table, x)", Use.INDEX, (10, 4)),
        ("y = GatherND(table, x)", Use.INDEX, (10, 4)),
        ("a = Neg(table) y = GatherElements<axis=1>(a, x)", Use.INDEX, (4,)),
        ("y = OneHot(x, two, table)", Use.INDEX, (2,)),
        ("y = Reshape(table, x)", Use.RESHAPE, ()),
        ("y = ConstantOfShape(x)", Use.COUNT, ()),
        ("y = CumSum(table, x)", Use.AXIS, ()),
        ("y = ReduceSum(table, x)", Use.AXIS, ()),
        ("y = com.microsoft.RotaryEmbedding(two, x, table, table)", Use.INDEX, (10,)),
        ("y = com.microsoft.RotaryEmbedding(two, z, x, table)", Use.NUMBER, ()),
        ("y = RotaryEmbedding(two, table, table, x)", Use.INDEX, (10,)),
        ("y = Div(two, x)", Use.POSITIVE, ()),
        ("y = Neg(x)", Use.NUMBER, ()),
        ("y = If (c) <then_branch = t () => (float a) { a = Gather(table, x) },"
         " else_branch = e () => (float b) { b = Neg(table) }>", Use.INDEX, (10,)),
    ],
)  # fmt: skip
def test_integers_are_followed_to_what_they_select(
    nodes: str, use: Use, bounds: tuple[int, ...]
) -> None:
    constants = "float[10,4] table = {1}, int64 two = {2}, int64[1] z = {0}, bool c = {1}"
    found = role(nodes, constants=constants)
    assert found.use is use
    assert found.bounds == bounds


def test_a_loop_and_a_function_hand_their_inputs_on() -> None:
    looped = role(
        """y = Loop (m, c, x) <body = b (int64 i, bool go, int64[n] v) => (bool go_on, int64[n] w)
           { go_on = Identity(go) w = Identity(v) q = Gather(table, v) }>""",
        constants="float[10,4] table = {1}, int64 m = {2}, bool c = {1}",
    )
    assert looped.use is Use.INDEX
    returned = role(
        """a = Loop (m, c, x) <body = b (int64 i, bool go, int64[n] v) => (bool go_on, int64[n] w)
           { go_on = Identity(go) w = Identity(v) }>  y = Gather(table, a)""",
        constants="float[10,4] table = {1}, int64 m = {2}, bool c = {1}",
    )
    assert returned.bounds == (10,)
    text = """g (int64[n] x) => (float[n,4] y) <float[10,4] t = {0}> { a = my.f(x) y = Gather(t, a) }
              <domain: "my", opset_import: ["" : 17]> f (v) => (w) { w = Identity(v) }"""
    proto = onnx.parser.parse_model(HEAD + text.replace("<float[10,4] t = {0}>", "<float[10,4] t>"))
    proto.graph.initializer.append(
        onnx.TensorProto(name="t", data_type=1, dims=[10, 4], raw_data=bytes(160))
    )
    assert input_roles(ir.from_proto(proto))["x"].bounds == (10,)


def test_lengths_come_from_recurrent_nodes_and_names() -> None:
    found = roles(
        """g (float[seq,2,3] x, int32[2] lens, float[1,4,3] w, float[1,4,1] r, int64[b] src_lengths) => (float y)
           { y = LSTM<hidden_size=1>(x, w, r, , lens) z = Neg(src_lengths) }"""
    )
    assert found["lens"] == Role(Use.LENGTH, ("seq",))
    assert found["src_lengths"].use is Use.LENGTH


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("g (float[b,n] x) => (float y) <float one = {1}> { y = Sub(one, x) }", Use.MASK),
        ("g (bool[b,n] x, float[n] a) => (float y) { y = Where(x, a, a) }", Use.MASK),
        ("g (bool x, float[n] a) => (float y) { y = Where(x, a, a) }", Use.FLAG),
        ("g (int64[b,n] attention_mask) => (float y) { y = Neg(attention_mask) }", Use.MASK),
        (
            "g (float[b,1,n,n] mask, float[n] a) => (float y) { y = Add(a, mask) }",
            Use.ADDITIVE_MASK,
        ),
        ("g (float[b,n] mask, float[n] a) => (float y) { y = Mul(a, mask) }", Use.MASK),
    ],
)
def test_masks_are_known_by_flow_and_by_name(text: str, use: Use) -> None:
    assert next(iter(roles(text).values())).use is use


def test_constants_that_a_model_compares_with_are_choices() -> None:
    text = "g (int64 sr, float[n] f) => (bool y) <int64 c = {16000}, float z = {0}> { y = Equal(sr, c) q = Less(f, z) }"
    found = roles(text)
    assert found["sr"] == Role(Use.CHOICE, choices=(16000, 16001))
    assert found["f"].use is Use.NUMBER


def test_a_one_hot_written_out_gives_the_range() -> None:
    text = """g (int32[n] x, int64[1] one) => (bool[n,257] y) <int32[257] iota, int64[2] shape = {1, 257}>
              { a = Unsqueeze(x, one) b = Reshape(iota, shape) c = Expand(b, shape) y = Equal(a, c) }"""
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.arange(257, dtype=np.int32), "iota")
    )
    assert input_roles(ir.from_proto(proto))["x"] == Role(Use.CHOICE, choices=(0, 256))
    proto.graph.initializer[-1].CopyFrom(
        onnx.numpy_helper.from_array(np.zeros(0, np.int32), "iota")
    )
    assert input_roles(ir.from_proto(proto))["x"] == Role()


def test_a_trip_count_tries_none_one_and_several() -> None:
    text = """g (int64 m, float v) => (float y) <bool c = {1}> { y = Loop (m, c, v)
              <body = b (int64 i, bool go, float s) => (bool g2, float t) { g2 = Identity(go) t = Identity(s) }> }"""
    assert roles(text)["m"].choices == (3, 0, 1)


def test_words_of_the_model_are_collected() -> None:
    head = HEAD.replace('"my" : 1, "com.microsoft" : 1', '"ai.onnx.ml" : 2')
    text = """g (string[n] x) => (int64[n] y)
              { y = ai.onnx.ml.LabelEncoder<keys_strings = ["cat", "dog"], values_int64s = [0, 1]>(x) }"""
    assert input_roles(ir.from_proto(onnx.parser.parse_model(head + text)))["x"].words == (
        "cat",
        "dog",
    )
