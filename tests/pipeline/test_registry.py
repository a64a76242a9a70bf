"""Where passes come from: installed packages, modules, files; and what is said about those that cannot be used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from graphopt.errors import OptionError
from graphopt.numerics import Numerics
from graphopt.pipeline import Pass, Repeat
from graphopt.pipeline.adapters import FunctionPass, OnnxIrPass, RulesPass, SurgeonPass
from graphopt.pipeline.registry import all_passes, find_pass, load_pass, pipeline_for
from graphopt.targets import Precision, get_target
from tests.pipeline.conftest import SOURCE, Install

pytestmark = pytest.mark.usefixtures("acme")


def test_a_pass_is_described() -> None:
    info = all_passes()["fold"]
    assert (info.name, info.numerics, info.source) == ("fold", Numerics.EXACT, "acme 1.0")
    assert info.doc == "Folds what is constant."
    assert [str(option) for option in info.options] == [
        "limit: int = 3",
        "ratio: float = 0.5",
        "mode: one of fast, thorough = 'fast'",
        "ops: tuple[str, ...] = []",
        "tag: str | none = None",
    ]


def test_a_pass_that_is_an_object_is_described_too() -> None:
    assert all_passes()["cut"].numerics is Numerics.LOSSY
    assert all_passes()["cut"].options == ()


def test_a_factory_makes_passes(install: Install) -> None:
    install(
        "maker",
        """
        from graphopt.pipeline import RewritePass
        def tidy(level: int = 2) -> RewritePass:
            "Tidies."
            return RewritePass("tidy", ())
        PASSES = {"tidy": tidy}
        """,
    )
    assert [str(option) for option in find_pass("tidy").options] == ["level: int = 2"]
    assert find_pass("tidy").doc == "Tidies."


def test_our_own_passes_come_first(install: Install) -> None:
    install("aaa", SOURCE.replace('"fold"', '"aaa-fold"').replace('"cut"', '"aaa-cut"'))
    install("graphopt", SOURCE.replace('"fold"', '"our-fold"').replace('"cut"', '"our-cut"'))
    assert list(all_passes()) == ["our-fold", "our-cut", "aaa-fold", "aaa-cut", "fold", "cut"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import nothing_of_this_name",
            "entry point 'own' (bad_rules) of bad 1.0 cannot be loaded: ModuleNotFoundError",
        ),
        ("1 / 0", "of bad 1.0 cannot be loaded: ZeroDivisionError"),
        ("PASS = {}", "bad 1.0: bad_rules has no mapping PASSES"),
        (
            "PASSES = {'x': 3}",
            "bad 1.0, pass x: its options do not fit together or are out of range: a int is no pass",
        ),
        (
            SOURCE.replace('{"fold": Fold, "cut": Cut()', '{"slice": Cut'),
            "bad 1.0: pass 'cut' is listed in PASSES as 'slice'",
        ),
        (SOURCE, "pass 'fold' is in acme 1.0 and in bad 1.0"),
    ],
)
def test_a_broken_package_is_named(install: Install, source: str, message: str) -> None:
    install("bad", source)
    with pytest.raises(OptionError) as caught:
        all_passes()
    assert message in str(caught.value)


def test_an_unknown_pass_is_answered_with_the_closest() -> None:
    with pytest.raises(
        OptionError,
        match=r"unknown pass 'fald' \(did you mean 'fold'\?\); known passes: cut, fold; for",
    ):
        find_pass("fald")


def test_the_pipeline_of_the_target() -> None:
    (step,) = pipeline_for(get_target("cpu"), Precision.FP32)
    assert isinstance(step, Pass)
    assert step.name == "fold"


def test_a_target_without_one_gets_the_portable_one() -> None:
    first, second = pipeline_for(dataclasses.replace(get_target("cpu"), name="npu"), Precision.FP32)
    assert isinstance(first, Repeat)
    assert second.name == "fold"


def test_no_pipeline_at_all() -> None:
    with pytest.raises(
        OptionError, match="no pipeline for target 'cpu' at precision int8; there is one for: fp32"
    ):
        pipeline_for(get_target("cpu"), Precision.INT8)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{'cpu': ()}", "PIPELINES of odd_rules must map"),
        ("[]", "PIPELINES of odd_rules must map"),
        (
            "{('tensorrt', 'fp32'): ('fold',)}",
            r"odd 1.0, pipeline \(tensorrt, fp32\): expected a tuple of passes",
        ),
    ],
)
def test_a_broken_table_of_pipelines_is_named(install: Install, table: str, message: str) -> None:
    install("odd", f"PASSES = {{}}\nPIPELINES = {table}")
    with pytest.raises(OptionError, match=message):
        pipeline_for(get_target("tensorrt"), Precision.FP32)


USER = """
from __future__ import annotations
import dataclasses
from typing import TYPE_CHECKING
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from graphopt.numerics import Numerics
from graphopt.pipeline import Pass, RewritePass
from graphopt.rewrite import Op, Var, exact
if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

x = Var()
@exact(Op("Neg", Op("Neg", x)))
def drop_double_neg(m, g):
    return m[x]
RULES = (drop_double_neg,)
MIXED = (drop_double_neg, 3)
EMPTY = ()

def surgeon(graph: gs.Graph) -> None: ...
def on_model(model: ir.Model) -> ir.Model: return model
def on_proto(model: onnx.ModelProto): ...
def unsaid(thing): ...
def factory(depth: int = 1) -> Pass: return RewritePass(f"depth-{depth}", RULES)
stock = common.RemoveUnusedNodesPass()
Stock = common.RemoveUnusedNodesPass
class NeedsArguments(ir.passes.InPlacePass):
    def __init__(self, what): ...
    def call(self, model): ...
class NoPass: ...
@dataclasses.dataclass(frozen=True)
class Mine:
    name: str = "mine"
    numerics: Numerics = Numerics.EXACT
    level: int = 1
    def run(self, model, ctx): return False
mine = Mine(level=4)
number = 3
class Space:
    inner = mine
"""


@pytest.fixture
def user(tmp_path: Path) -> str:
    path = tmp_path / "user_code.py"
    path.write_text(USER)
    return str(path)


@pytest.mark.parametrize(
    ("name", "kind", "pass_name"),
    [
        ("surgeon", SurgeonPass, "surgeon"),
        ("on_model", FunctionPass, "on-model"),
        ("RULES", RulesPass, "user-code"),
        ("drop_double_neg", RulesPass, "drop-double-neg"),
        ("stock", OnnxIrPass, "stock"),
        ("Stock", OnnxIrPass, "stock"),
    ],
)
def test_objects_of_a_file_become_passes(user: str, name: str, kind: type, pass_name: str) -> None:
    step = load_pass(f"{user}:{name}")
    assert isinstance(step, kind)
    assert step.name == pass_name


def test_objects_of_a_module_become_passes(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(user).parent)
    step = load_pass("user_code:surgeon")
    assert isinstance(step, SurgeonPass)
    assert step.origin == "gs:user_code:surgeon"


@pytest.mark.parametrize(
    ("text", "kind"),
    [("gs:{}:unsaid", SurgeonPass), ("ir:{}:unsaid", FunctionPass), ("ir:{}:stock", OnnxIrPass)],
)
def test_a_prefix_says_what_a_function_takes(user: str, text: str, kind: type) -> None:
    assert isinstance(load_pass(text.format(user)), kind)


def test_passes_classes_and_factories(user: str) -> None:
    names = [
        load_pass(f"{user}:{name}").name for name in ("Mine", "mine", "Space.inner", "factory")
    ]
    assert names == ["mine", "mine", "mine", "depth-1"]
    assert load_pass(f"{user}:factory{{depth=5}}").name == "depth-5"
    assert getattr(load_pass(f"{user}:mine"), "level", None) == 4
    assert getattr(load_pass(f"{user}:mine{{level=2}}"), "level", None) == 2


def test_numerics_can_be_declared(user: str) -> None:
    step = load_pass(f"{user}:surgeon{{numerics=lossy}}")
    assert isinstance(step, SurgeonPass)
    assert step.numerics is Numerics.LOSSY
    assert SurgeonPass("x", step.function, "y").numerics is Numerics.REORDERED


def test_a_known_pass_is_loaded_by_name() -> None:
    assert load_pass("fold{limit=9}").name == "fold"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "unsaid",
            "does not say what it takes. Annotate its parameter as onnx_graphsurgeon.Graph or onnx_ir.Model, or",
        ),
        ("on_proto", "does not say what it takes"),
        ("MIXED", "holds something else than rules"),
        ("EMPTY", "holds something else than rules"),
        ("number", "is a int; expected a pass or pass class"),
        ("NoPass", "has no run(model, ctx)"),
        ("NeedsArguments", "cannot be made without arguments"),
        ("surgoen", "has no 'surgoen' (did you mean 'surgeon'?)"),
        ("mine{level=high}", "option 'level' is 'high'; expected int, as in the default 4"),
        ("mine{lvel=3}", "no option 'lvel' (did you mean 'level'?)"),
        ("factory{depth=1, width=2}", "no option 'width'"),
    ],
)
def test_what_cannot_be_loaded_is_explained(user: str, name: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        load_pass(f"{user}:{name}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_module_anywhere:x", "cannot import 'no_such_module_anywhere'"),
        ("no/such/file.py:x", "'no/such/file.py' is not a Python file"),
        (":x", "':x' is not module:object"),
        ("gs:module", "cannot import 'gs'"),
        ("fold, cut", "names 2 passes"),
        ("", "names 0 passes"),
    ],
)
def test_a_place_that_is_none_is_explained(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        load_pass(text)
    assert message in str(caught.value)


def test_a_file_that_fails_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise RuntimeError('no luck')")
    with pytest.raises(OptionError, match="raised RuntimeError: no luck"):
        load_pass(f"{path}:x")


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    for name in ("first", "second"):
        path.write_text(
            f"from graphopt.pipeline import RewritePass\nit = RewritePass({name!r}, ())\n"
        )
        assert load_pass(f"{path}:it").name == name
