"""The picture of `benchmarks.prune_curves`: one row of two diagrams a network.

On the left the shares of zeros that were asked for, and 2:4 in a column of its own; on the right the share of the
multiply-adds that went.  The full line is graphopt, the broken one onnxsim, the grey one the network as it was.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, BETWEEN, BELOW = 330, 200, 76, 84, 120, 88
PATTERN = WIDTH + 34
"""Where 2:4 is drawn, behind the axis of zeros."""

COLOURS = {"graphopt": "#0b62a4", "onnxsim": "#c2571a"}
DASHES = {"graphopt": "none", "onnxsim": "6 4"}
NOTHING = 0.005
"""Of the arithmetic; who removes less has removed nothing."""

NEAR = 0.08
"""Points of two curves closer together than this share of the axis would be written over one another."""

BEYOND = 0.93
"""Of the axis; what lies there has its number at the right, where no other point is."""

LETTERS = 13
"""Pixels that two numbers, one above the other, need."""

Rows: TypeAlias = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Point:
    """A place in a diagram, in pixels, and what is written there."""

    x: float
    y: float
    text: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """Which accuracies the upright axis shows, in points."""

    low: int
    high: int

    def y(self, accuracy: float) -> float:
        """The pixel of an accuracy, a share."""
        return HEIGHT * (self.high - 100 * accuracy) / (self.high - self.low)


def picture(networks: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The SVG of networks: title and what `benchmarks.prune --save` wrote."""
    parts = [_legend()]
    across = WIDTH + BETWEEN
    for row, (title, known) in enumerate(networks):
        for column, of_channels in enumerate((False, True)):
            place = f"translate({LEFT + column * across},{TOP + row * (HEIGHT + BELOW)})"
            parts.append(f'<g transform="{place}">{_diagram(title, known, of_channels)}</g>')
    width, height = LEFT + across + WIDTH + 56, TOP + len(networks) * (HEIGHT + BELOW) - 20
    drawn = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{drawn}\n</svg>\n'
    )


def _legend() -> str:
    drawn = []
    for place, tool in enumerate(COLOURS):
        x = LEFT + 150 * place
        drawn.append(f'<path d="M{x} 22h34" {_stroke(tool)}/>{_mark(Point(x + 17, 22, ""), tool)}')
        drawn.append(f'<text x="{x + 42}" y="26">{tool}</text>')
    x = LEFT + 300
    drawn.append(f'<path d="M{x} 22h34" stroke="#888"/>')
    drawn.append(f'<text x="{x + 42}" y="26">the network before (dense)</text>')
    return "".join(drawn)


def _diagram(title: str, known: Mapping[str, Any], of_channels: bool) -> str:
    """One network, one kind of amount."""
    rows, dense = known["rows"], next(row for row in known["rows"] if not row["amount"])
    scale = _scale(rows)
    unit = (
        "top-1 accuracy (%)" if known["measure"] == "accuracy" else "Spearman's correlation x 100"
    )
    against = "multiply-adds removed" if of_channels else "zeros among the prunable weights"
    drawn = [f'<text y="-14" font-weight="bold">{escape(title)}</text>', _axes(scale, unit)]
    drawn.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 36}" {_MIDDLE}>{against} (%)</text>')
    drawn.append(_before(scale.y(dense["accuracy"]), dense["accuracy"]))
    lines = {tool: _points(rows, tool, of_channels, scale) for tool in COLOURS}
    drawn += [_line(points, tool) for tool, points in lines.items()]
    drawn += _numbers(lines["graphopt"], lines["onnxsim"])
    if of_channels:
        drawn.append(_no_curve(rows, lines["onnxsim"]))
    else:
        drawn.append(_patterns(rows, scale))
    return "".join(drawn)


_MIDDLE = 'text-anchor="middle"'


def _scale(rows: Rows) -> Scale:
    """From 0 on, or where no accuracy is below a half from tens below the least."""
    found = [100 * row["accuracy"] for row in rows if _known(row["amount"])]
    low = 0 if min(found) < 50 else int(math.floor((min(found) - 2) / 10) * 10)
    return Scale(low, 10 * math.ceil((max(found) + 2) / 10))


def _known(amount: str) -> bool:
    return bool(re.fullmatch(r"([\d.]*|2:4|channels:[\d.]+)", amount))


def _points(rows: Rows, tool: str, of_channels: bool, scale: Scale) -> list[Point]:
    """From left to right: the network before, then what a tool made of it."""
    dense = next(row for row in rows if not row["amount"])
    pattern = r"channels:[\d.]+" if of_channels else r"[\d.]+"
    found = []
    for row in rows:
        if row["tool"] != tool or not re.fullmatch(pattern, row["amount"]):
            continue
        at = 1 - row["macs"] / dense["macs"] if of_channels else float(row["amount"])
        if at > NOTHING:
            found.append(_point(at * WIDTH, row, scale))
    return [Point(0.0, scale.y(dense["accuracy"]), ""), *sorted(found, key=lambda each: each.x)]


def _point(x: float, row: Mapping[str, Any], scale: Scale) -> Point:
    return Point(x, scale.y(row["accuracy"]), f"{100 * row['accuracy']:.1f}")


def _stroke(tool: str) -> str:
    return (
        f'stroke="{COLOURS[tool]}" stroke-width="2" stroke-dasharray="{DASHES[tool]}" fill="none"'
    )


def _mark(point: Point, tool: str) -> str:
    at = f'cx="{point.x:.1f}" cy="{point.y:.1f}" r="3.5"'
    return f'<circle {at} fill="white" stroke="{COLOURS[tool]}" stroke-width="2"/>'


def _line(points: Sequence[Point], tool: str) -> str:
    path = " ".join(f"{each.x:.1f},{each.y:.1f}" for each in points)
    marks = "".join(_mark(each, tool) for each in points[1:])
    return f'<polyline points="{path}" {_stroke(tool)}/>{marks}'


def _numbers(ours: Sequence[Point], theirs: Sequence[Point]) -> list[str]:
    """What is written at points: above the upper of two curves, below the lower, never below the axis."""
    drawn = []
    for points, others, tool in ((ours, theirs, "graphopt"), (theirs, ours, "onnxsim")):
        for each in points[1:]:
            if BEYOND * WIDTH < each.x <= WIDTH:
                drawn.append(_text(_at_right(each, others, tool), tool))
                continue
            near = [other.y for other in others[1:] if abs(other.x - each.x) < NEAR * WIDTH]
            upper = all(each.y < y or (each.y == y and tool == "graphopt") for y in near)
            y = each.y - 8 if upper else each.y + 17
            if y > HEIGHT - 3:
                y = each.y - 8
            if upper and any(HEIGHT - other < LETTERS + 4 for other in near):
                y = min(y, HEIGHT - 10 - LETTERS)  # theirs is written above the axis, too
            drawn.append(_text(Point(each.x, y, each.text), tool))
    return drawn


def _at_right(point: Point, others: Sequence[Point], tool: str) -> Point:
    """Where a number stands at the right of its point: higher or lower where the other tool's would hide it."""
    y = point.y + 4
    for other in others[1:]:
        if abs(other.x - point.x) < NEAR * WIDTH / 2 and abs(other.y - point.y) < LETTERS:
            upper = point.y < other.y or (point.y == other.y and tool == "graphopt")
            y = min(y - LETTERS / 2, HEIGHT - LETTERS) if upper else min(y + LETTERS / 2, HEIGHT)
    return Point(point.x + 22, y, point.text)


def _text(point: Point, tool: str) -> str:
    return (
        f'<text x="{point.x:.1f}" y="{point.y:.1f}" {_MIDDLE} font-size="11" fill="{COLOURS[tool]}" '
        f'stroke="white" stroke-width="3" paint-order="stroke">{point.text}</text>'
    )


def _patterns(rows: Rows, scale: Scale) -> str:
    """2:4 of both tools, in a column of its own."""
    found = [(row["tool"], _point(PATTERN, row, scale)) for row in rows if row["amount"] == "2:4"]
    if not found:
        return ""
    drawn = [f'<path d="M{PATTERN} 0V{HEIGHT}" stroke="#ddd"/>']
    drawn.append(f'<text x="{PATTERN}" y="{HEIGHT + 18}" {_MIDDLE}>2:4</text>')
    places = {tool: [Point(0, 0, ""), point] for tool, point in found}
    drawn += [_mark(point, tool) for tool, point in found]
    drawn += _numbers(places.get("graphopt", []), places.get("onnxsim", []))
    return "".join(drawn)


def _no_curve(rows: Rows, points: Sequence[Point]) -> str:
    """Why onnxsim has no curve of channels."""
    if len(points) > 1:
        return ""
    tried = any(r["tool"] == "onnxsim" and r["amount"].startswith("channels:") for r in rows)
    said = "onnxsim removes nothing" if tried else "onnxsim was not run"
    return f'<text x="10" y="{HEIGHT - 10}" fill="{COLOURS["onnxsim"]}">{said}</text>'


def _before(level: float, accuracy: float) -> str:
    """The network as it was: a line, and its accuracy at the left."""
    said = _text(Point(16, level - 6, f"{100 * accuracy:.1f}"), "graphopt")
    said = said.replace(COLOURS["graphopt"], "#666")
    return f'<path d="M0 {level:.1f}H{WIDTH}" stroke="#888"/>{said}'


def _axes(scale: Scale, unit: str) -> str:
    drawn = []
    step = 20 if scale.high - scale.low > 50 else 10
    for number in range(scale.low, scale.high + 1, step):
        y = scale.y(number / 100)
        drawn.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#eee"/>')
        drawn.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{number}</text>')
    for number in range(0, 101, 20):
        x = WIDTH * number / 100
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT + 18}" {_MIDDLE}>{number}</text>')
    drawn.append(f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="black"/>')
    turned = f'transform="translate(-44,{HEIGHT / 2}) rotate(-90)"'
    drawn.append(f"<text {turned} {_MIDDLE}>{escape(unit)}</text>")
    return "".join(drawn)
