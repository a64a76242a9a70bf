"""Spec strings and TOML recipes: what they say, that they come back as they were, and what is said of mistakes."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import OptionError
from graphopt.pipeline import Repeat, RewritePass, flatten, registry
from graphopt.pipeline.recipe import Recipe, parse_pipeline, to_spec
from graphopt.pipeline.registry import find_pass, load_pass, pipeline_for
from graphopt.pipeline.spec import format_spec, parse_specs
from graphopt.targets import Precision, all_targets

pytestmark = pytest.mark.usefixtures("acme")


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("fold", "fold", {}),
        (" fold { } ", "fold", {}),
        ("fold{limit=3}", "fold", {"limit": "3"}),
        (
            "fold{a=[1, x,[y]], b={k=v, n=none}}",
            "fold",
            {"a": ["1", "x", ["y"]], "b": {"k": "v", "n": None}},
        ),
        ('fold{s="a, \\"b}\\u00e9", t=\'it is {x}\',}', "fold", {"s": 'a, "b}é', "t": "it is {x}"}),
        ("gs:a/b.py:f{x=1}", "gs:a/b.py:f", {"x": "1"}),
        ('"odd, path.py:f"{x=1}', "odd, path.py:f", {"x": "1"}),
        ("repeat{passes=[fold{limit=1}, cut]}", "repeat", {"passes": ["fold{limit=1}", "cut"]}),
    ],
)
def test_the_grammar(text: str, name: str, options: dict[str, Any]) -> None:
    (spec,) = parse_specs(text)
    assert (spec.name, dict(spec.options)) == (name, options)


def test_several_passes() -> None:
    assert [spec.name for spec in parse_specs("a, b{x=1}, c ,")] == ["a", "b", "c"]
    assert parse_specs("  ") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fold{limit}",
            "expected '=' and a value after option 'limit' at column 11: fold{limit >>> }",
        ),
        ("fold{limit=}", "expected a value at column 12"),
        ("fold{a=1 b=2}", "option 'b'"),
        ("fold{a=1", "expected a comma or '}' at column 9"),
        ("fold{a=[1", "expected a comma or ']' at column 10"),
        ('fold{a="x}', "expected the closing quote"),
        ('fold{a="\\q"}', "expected escapes as in JSON"),
        ("fold{a=1, a=2}", "expected option 'a' only once"),
        ("fold}", "expected a comma between passes"),
        ("{a=1}", "expected the name of a pass at column 1"),
        ("fold{=1}", "expected option=value"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, message: str) -> None:
    if message == "option 'b'":
        assert dict(parse_specs(text)[0].options) == {"a": "1 b=2"}
        return
    with pytest.raises(OptionError) as caught:
        parse_specs(text, "here")
    assert str(caught.value).startswith("here: ")
    assert message in str(caught.value)


values = st.recursive(
    st.none() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), values, max_size=3),
    st.text(min_size=1, max_size=8),
)
def test_what_is_written_is_read(options: dict[str, Any], name: str) -> None:
    if not name.strip():
        return
    (spec,) = parse_specs(format_spec(name, options))
    assert (spec.name, dict(spec.options)) == (name, options)


@pytest.mark.parametrize(
    "text",
    [
        "fold",
        "cut",
        "fold{limit=9}",
        'fold{ratio=0.25, mode=thorough, ops=[Add, com.microsoft::Gelu], tag="a, b"}',
        "fold{ratio=1e-09}",
        "repeat{passes=[fold, cut], limit=3}",
        'repeat{passes=["fold{limit=1}", cut], name=clean}',
    ],
)
def test_a_pass_comes_back_from_its_spec(text: str) -> None:
    (step,) = parse_pipeline(text)
    assert parse_pipeline(to_spec(step)) == (step,)


def test_defaults_are_left_out() -> None:
    (step,) = parse_pipeline("fold{limit=3, ratio=0.75}")
    assert to_spec(step) == "fold{ratio=0.75}"


@pytest.mark.parametrize(("text", "tag"), [("none", None), ('"none"', "none"), ("12", "12")])
def test_none_is_a_value_where_there_is_one(text: str, tag: str | None) -> None:
    (step,) = parse_pipeline(f"fold{{tag={text}}}")
    assert getattr(step, "tag", 0) == tag


def test_passes_of_a_file_have_specs(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "import onnx_ir as ir\nfrom graphopt.rewrite import Op, Var, exact\n"
        "def change(model: ir.Model) -> None: ...\n"
        "@exact(Op('Neg', Var()))\ndef drop(m, g): return None\n"
    )
    assert to_spec(load_pass(f"{path}:change")) == f"ir:{path}:change"
    assert (
        to_spec(load_pass(f"{path}:change{{numerics=exact}}"))
        == f"ir:{path}:change{{numerics=exact}}"
    )
    assert to_spec(load_pass(f"{path}:drop")) == f"{path}:drop"


def test_a_pass_made_in_python_has_no_spec() -> None:
    with pytest.raises(OptionError, match="pass 'own' was made in Python"):
        to_spec(RewritePass("own", ()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fold{limit=many}",
            "pipeline, pass fold: option 'limit' is 'many'; expected int, as in the default 3",
        ),
        ("fold{mode=slow}", "option 'mode' is 'slow'; expected one of fast, thorough"),
        ("fold{ops=Add}", "option 'ops' is 'Add'; expected tuple[str, ...]"),
        (
            "fold{limits=1}",
            "no option 'limits' (did you mean 'limit'?); options: limit: int = 3; ratio",
        ),
        ("cut{x=1}", "no option 'x'; options: none"),
        (
            "fold{limit=-1}",
            "its options do not fit together or are out of range: limit -1 is negative",
        ),
        ("flod", "pipeline: unknown pass 'flod' (did you mean 'fold'?)"),
        ("repeat", "give it passes=[name, …]"),
        ("repeat{passes=[repeat{passes=[fold]}]}", "a group cannot hold another group"),
        ("repeat{passes=[fold], limit=x}", "option 'limit' is 'x'; expected int"),
    ],
)
def test_options_are_checked(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_pipeline(text)
    assert message in str(caught.value)


FULL = """
target = "cpu"
precision = "fp32"
verify = "each"
seed = 7
fold_limit_bytes = 1000
disable = ["cut", "fold/rule"]
pipeline = ["fold{limit=1}, cut", "repeat{passes=[fold]}"]
prepend = ["cut"]
append = ["fold{limit=5}"]
[options.fold]
ratio = 0.125
"""


def recipe(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return Recipe.load(path)


def specs(steps: tuple[Any, ...]) -> list[str]:
    return [to_spec(step) for step in steps]


def test_a_full_recipe(tmp_path: Path) -> None:
    held = recipe(tmp_path, FULL)
    assert (held.target, held.precision, held.verify) == ("cpu", Precision.FP32, "each")
    assert (held.seed, held.fold_limit_bytes, held.disable) == (7, 1000, ("cut", "fold/rule"))
    assert specs(held.apply(())) == [
        "cut",
        "fold{limit=1, ratio=0.125}",
        "cut",
        'repeat{passes=["fold{ratio=0.125}"]}',
        "fold{limit=5, ratio=0.125}",
    ]


def test_an_empty_recipe_changes_nothing(tmp_path: Path) -> None:
    held = recipe(tmp_path, "")
    pipeline = parse_pipeline("fold, repeat{passes=[cut]}")
    assert held.apply(pipeline) == pipeline
    assert (held.target, held.precision, held.verify, held.seed, held.fold_limit_bytes) == (
        None,
    ) * 5
    assert Recipe().apply(pipeline) == pipeline


def test_options_reach_into_groups_of_the_default_pipeline(tmp_path: Path) -> None:
    held = recipe(tmp_path, 'pipeline = "default"\n[options.fold]\nlimit = 8\ntag = "x"\n')
    steps = held.apply((Repeat(flatten(parse_pipeline("fold{ratio=0.1}, cut"))),))
    assert specs(steps) == ['repeat{passes=["fold{limit=8, ratio=0.1, tag=x}", cut]}']


def test_passes_as_tables(tmp_path: Path) -> None:
    text = '[[pass]]\nname = "fold"\nlimit = 4\nops = ["Add"]\n[[pass]]\nname = "repeat"\npasses = ["cut"]\nlimit = 2\n'
    assert specs(recipe(tmp_path, text).apply(parse_pipeline("cut"))) == [
        "fold{limit=4, ops=[Add]}",
        "repeat{passes=[cut], limit=2}",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target = 3", "option 'target' is 3; expected str"),
        ('target = "gpu"', "unknown target 'gpu'"),
        ('precision = "fp7"', "option 'precision' is 'fp7'; expected one of fp32, fp16, bf16"),
        ('verify = "never"', "option 'verify' is 'never'; expected one of final, each, off"),
        ('seed = "7"', "option 'seed' is '7'; expected int"),
        ("sead = 7", "unknown key 'sead' (did you mean 'seed'?); known keys: target, precision"),
        ('disable = "fold"', "option 'disable' is 'fold'; expected tuple[str, ...]"),
        ('pipeline = "mine"', "option 'pipeline' is 'mine'"),
        ('pipeline = ["flod"]', "pipeline: unknown pass 'flod'"),
        ('append = ["fold{limit=x}"]', "append, pass fold: option 'limit' is 'x'; expected int"),
        ('prepend = ["fold{"]', "prepend: expected"),
        ('pipeline = ["cut"]\n[[pass]]\nname = "fold"', "both `pipeline` and [[pass]]"),
        ("[[pass]]\nlimit = 3", "every [[pass]] needs a name"),
        (
            '[[pass]]\nname = "fold"\nlimit = "3"',
            "[[pass]], pass fold: option 'limit' is '3'; expected int",
        ),
        ("x = ", "is not TOML"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        recipe(tmp_path, text)
    assert "r.toml" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[options.flod]\nlimit = 1",
            "[options.flod]: no pass 'flod' in the pipeline (did you mean 'fold'?); it has: cut, fold",
        ),
        (
            "[options.fold]\nlimit = 1.5",
            "[options.fold], pass fold: option 'limit' is 1.5; expected int",
        ),
        ("[options.fold]\nlimits = 1", "no option 'limits' (did you mean 'limit'?)"),
    ],
)
def test_options_for_the_pipeline_are_checked(tmp_path: Path, text: str, message: str) -> None:
    held = recipe(tmp_path, text)
    with pytest.raises(OptionError) as caught:
        held.apply(parse_pipeline("fold, cut"))
    assert message in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"recipe .*none.toml cannot be read: No such file"):
        Recipe.load(tmp_path / "none.toml")
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        Recipe.load(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="is not TOML"):
        Recipe.load(path)


def test_the_class_of_a_known_pass_names_it() -> None:
    maker = find_pass("fold").maker
    assert to_spec(maker(limit=2)) == "fold{limit=2}"


def test_our_own_pipelines_can_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", metadata.entry_points)
    for target in all_targets().values():
        steps = pipeline_for(target, Precision.FP32)
        assert steps
        assert parse_pipeline(", ".join(map(to_spec, steps))) == steps


LATE = """
import dataclasses
import pathlib
from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar
from graphopt.numerics import Numerics
@dataclasses.dataclass(frozen=True)
class Late:
    name: ClassVar[str] = "late"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    share: Fraction = Fraction(1, 2)
    where: pathlib.Path = pathlib.Path("here")
    names: frozenset[str] = frozenset()
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)
    word: str = "some"
    def run(self, model, ctx):
        return False
"""


def test_an_option_of_a_type_that_text_cannot_say_is_refused(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    where = f'"{tmp_path / "late.py"}:Late"'
    with pytest.raises(
        OptionError, match=r"option 'share' .*cannot be given in a recipe; set it in Python"
    ):
        load_pass(f"{where}{{share=0.5}}")


def test_options_of_paths_sets_and_mappings_come_back(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    text = f'"{tmp_path / "late.py"}:Late"{{names=[b, a], table={{k=1}}, where=there/x, word=none}}'
    step = load_pass(text)
    facts: Any = step
    assert (facts.where, facts.names, facts.word) == (Path("there/x"), frozenset("ab"), "none")
    assert dict(facts.table) == {"k": 1}
    assert load_pass(to_spec(step)) == step
