"""The HTML report: self-contained, complete, escaped; and as a browser shows it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt import optimize
from graphopt.report.diff import diff_models
from graphopt.report.drawing import draw, drawings
from graphopt.report.examine import Examined, Point, examine
from graphopt.report.html import run_html
from tests.cli.conftest import save
from tests.rewriting import parse

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}> {
  a = Identity(x)
  b = Add(a, w)
  c = Identity(b)
  s = Relu(c)
  y = Sin(s)
}"""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    model = save(tmp_path / "<b>model&.onnx", MODEL)
    result = optimize(model, output=tmp_path / "out.onnx", remarks=True, stages=True)
    assert result.path is not None
    path = tmp_path / "report.html"
    path.write_text(
        run_html(result.report, examine(model, result.path, seconds=0.01, target="cpu"))
    )
    return path


class Tags(HTMLParser):
    """Collects what a page refers to, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]
        if tag not in {"meta", "line", "circle", "rect", "path"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"line", "circle", "rect", "path"}:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else(page: Path) -> None:
    tags = Tags()
    tags.feed(page.read_text())
    assert tags.open == []
    assert tags.links == []
    assert not re.search(r"https?://|@import|url\(", page.read_text())


def test_the_page_holds_what_the_run_did(page: Path) -> None:
    text = page.read_text()
    for wanted in ("verified", "5 → 3", "Latency", "Error along the graph", "drop-identity"):
        assert wanted in text
    for wanted in ("as it was read", "FLOPs", "Legality", "For cpu: no findings", 'id="sizes"'):
        assert wanted in text
    assert "&lt;b&gt;model&amp;.onnx" in text
    assert "<b>model" not in text


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    report = optimize(save(tmp_path / "m.onnx", MODEL), verify="off").report
    text = run_html(report)
    assert "unverified" in text
    assert "Latency" not in text
    assert "<svg" not in text


def test_a_model_that_the_runtime_refuses_says_why(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
    g (float[2] x) => (float[2] y) { a = Identity(x) y = my.Op(a) }"""
    model = save(tmp_path / "m.onnx", text)
    result = optimize(model, output=tmp_path / "o.onnx")
    assert result.path is not None
    found = examine(model, result.path)
    assert (found.latency, found.along) == ((), ())
    assert "the reference cannot be run" in run_html(result.report, found)


def test_a_drawing_connects_what_is_connected() -> None:
    proto = parse("g (float[4] x) => (float[4] y) { a = Relu(x) b = Neg(x) y = Add(a, b) }")
    drawn = draw(list(ir.from_proto(proto).graph), "gone")
    assert (drawn.count("<rect"), drawn.count("<path")) == (3, 2)
    assert draw([], "gone") == ""


def test_both_sides_of_a_change_are_drawn_with_what_lies_next_to_them() -> None:
    before = parse("g (float[4] x) => (float[4] y) { a = Neg(x) b = Relu(a) y = Sin(b) }")
    after = parse("g (float[4] x) => (float[4] y) { a = Neg(x) other = Abs(a) y = Sin(other) }")
    models = [ir.from_proto(proto) for proto in (before, after)]
    found = diff_models(models[0], models[1])
    (change,) = drawings(models[0], models[1], found)
    assert change.title == "Relu → Abs"
    for side, style, name in (
        (change.before, "gone", "Relu b"),
        (change.after, "new", "Abs other"),
    ):
        assert side.count('class="kept"') == 2
        assert side.count(f'class="{style}"') == 1
        assert f"<title>{name}</title>" in side


@pytest.mark.parametrize(
    ("profile", "error", "style"),
    [("reordered", 1e-3, "bad"), ("reordered", 30.0, "some"), ("lossy", 1e-3, "some")],
)
def test_what_no_gate_judges_is_not_called_bad(profile: str, error: float, style: str) -> None:
    made = optimize(parse(MODEL)).report
    report = dataclasses.replace(
        made, verification=dataclasses.replace(made.verification, profile=profile)
    )
    point = Point("v", "Relu", error, passed=False)
    nothing = diff_models(ir.from_proto(parse(MODEL)), ir.from_proto(parse(MODEL)))
    text = run_html(report, Examined(nothing, (), along=(point,), feed="normal"))
    assert f'<circle class="{style}"' in text
    assert ("another quantity" in text) == (error > 1)


def test_a_browser_shows_and_sorts_the_page(page: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium: install it to have the page tried in a browser")
    # What the script throws, and whether a click sorts, is left in the page's title for --dump-dom to show.
    probe = """<script>
    window.onerror = message => { document.title = "error " + message; };
    </script>"""
    click = """<script>
    const head = Array.from(document.querySelectorAll("th")).find(h => h.textContent === "operator");
    head.click(); head.click();
    const rows = Array.from(head.closest("table").tBodies[0].rows).map(r => r.cells[0].textContent);
    document.title += " sorted:" + rows.join();
    </script></body>"""
    text = page.read_text().replace("<title>", probe + "<title>").replace("</body>", click)
    tried = tmp_path / "tried.html"
    tried.write_text(text)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800"]
    ran = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", tried.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", ran.stdout)
    assert title is not None
    assert "error" not in title[1]
    assert title[1].endswith("sorted:Sin,Relu,Identity,Add")
    assert 'id="verdict" class="verified"' in ran.stdout
