"""Draws accuracy against sparsity and against arithmetic, from what `benchmarks.prune --save` has written.

    python -m benchmarks.prune_curves ROWS.json ... -o CURVES.svg

One row of two diagrams a model: on the left the shares of zeros that were asked for, on the right the share of the
multiply-adds that went; the full line is graphopt, the broken one onnxsim, and the grey one the model as it was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 360, 220, 64, 34, 110
STYLE = {"graphopt": 'stroke="#0b62a4"', "onnxsim": 'stroke="#c2571a"'}
DASHES = {"graphopt": "none", "onnxsim": "6 4"}
NOTHING = 0.005
"""Of the arithmetic; who removes less has removed nothing."""

NEAR = 0.08
"""Points of two curves closer together than this share of the axis would be written over one another."""

Points = list[tuple[float, float, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the picture; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(argv)
    parts, height = [], 0
    for path in given.rows:
        known = json.loads(path.read_text())
        for column, kind in enumerate(("zeros", "arithmetic")):
            at = f"translate({LEFT + column * (WIDTH + LEFT)},{TOP + height})"
            parts.append(f'<g transform="{at}">{_diagram(known, kind)}</g>')
        height += HEIGHT + GAP
    size = f'width="{2 * (WIDTH + LEFT) + 60}" height="{height}"'
    given.output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
    return 0


def _diagram(known: Mapping[str, Any], kind: str) -> str:
    """One model, one kind of amount."""
    dense = next(row for row in known["rows"] if not row["amount"])
    against = "zeros" if kind == "zeros" else "multiply-adds"
    title = f"{known['model']}: {known.get('measure', 'accuracy')} against {against}"
    drawn = [f'<text y="-12" font-weight="bold">{escape(title)}</text>', _axes()]
    level = HEIGHT * (1 - dense["accuracy"])
    drawn.append(f'<path d="M0 {level:.1f}H{WIDTH}" stroke="#999" stroke-width="1"/>')
    points = {tool: _points(known["rows"], tool, kind, dense) for tool in STYLE}
    drawn += [_line(points[tool], style, DASHES[tool]) for tool, style in STYLE.items()]
    drawn += [_numbers(points["graphopt"], points["onnxsim"], first=True)]
    drawn += [_numbers(points["onnxsim"], points["graphopt"], first=False)]
    for place, (tool, style) in enumerate(STYLE.items()):
        y, x = HEIGHT + 52, place * 190
        drawn.append(
            f'<path d="M{x} {y}h28" {style} stroke-dasharray="{DASHES[tool]}" stroke-width="2"/>'
        )
        said = tool if len(points[tool]) > 1 else f"{tool}: {_why_none(known['rows'], tool, kind)}"
        drawn.append(f'<text x="{x + 34}" y="{y + 4}">{said}</text>')
    return "".join(drawn)


def _why_none(rows: Sequence[Mapping[str, Any]], tool: str, kind: str) -> str:
    """Why a tool has no curve."""
    tried = any(row["tool"] == tool and _is_of(row["amount"], kind) for row in rows)
    return "removed nothing" if tried else "not run"


def _is_of(amount: str, kind: str) -> bool:
    """Whether an amount belongs into a diagram."""
    return bool(re.fullmatch(r"[\d.]+" if kind == "zeros" else r"channels:[\d.]+", amount))


def _points(
    rows: Sequence[Mapping[str, Any]], tool: str, kind: str, dense: Mapping[str, Any]
) -> Points:
    """Place from left to right, accuracy, and what is written there: the dense model first."""
    found = []
    for row in rows:
        if row["tool"] != tool or not _is_of(row["amount"], kind):
            continue
        at = float(row["amount"]) if kind == "zeros" else 1 - row["macs"] / dense["macs"]
        if at > NOTHING:
            found.append((at, row["accuracy"], f"{100 * row['accuracy']:.1f}"))
    return [(0.0, dense["accuracy"], ""), *sorted(found)]


def _line(points: Points, style: str, dashes: str) -> str:
    places = [(at * WIDTH, HEIGHT * (1 - accuracy)) for at, accuracy, _ in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = [
        f'<polyline points="{path}" fill="none" {style} stroke-dasharray="{dashes}" stroke-width="2"/>'
    ]
    drawn += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="white" {style}/>' for x, y in places[1:]
    ]
    return "".join(drawn)


def _numbers(points: Points, others: Points, *, first: bool) -> str:
    """What is written at points: above the upper of two curves, below the lower; never below the axis."""
    drawn = []
    for at, accuracy, text in points[1:]:
        x, y = at * WIDTH, HEIGHT * (1 - accuracy)
        near = [other for place, other, _ in others[1:] if abs(place - at) < NEAR]
        above = all(accuracy > other or (accuracy == other and first) for other in near)
        written = y - 8 if above else y + 17
        if not above and y > HEIGHT - 20:
            written = y - 8
        elif above and any(HEIGHT * other < 20 for other in near):
            written = min(written, HEIGHT - 22)  # theirs is written above the axis
        drawn.append(
            f'<text x="{x:.1f}" y="{written:.1f}" text-anchor="middle" font-size="11" stroke="white" '
            f'stroke-width="3" paint-order="stroke">{text}</text>'
        )
    return "".join(drawn)


def _axes() -> str:
    drawn = [f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="black"/>']
    for tenth in range(0, 11, 2):
        x, y = WIDTH * tenth / 10, HEIGHT * (1 - tenth / 10)
        drawn.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{10 * tenth} %</text>')
        drawn.append(
            f'<text x="{x:.1f}" y="{HEIGHT + 18}" text-anchor="middle">{10 * tenth} %</text>'
        )
        drawn.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="#eee"/>')
    drawn.append(f'<text x="{WIDTH}" y="{HEIGHT + 34}" text-anchor="end">removed</text>')
    return "".join(drawn)


if __name__ == "__main__":
    sys.exit(main())
