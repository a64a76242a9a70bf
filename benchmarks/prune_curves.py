"""Draws accuracy against sparsity and against arithmetic, from what `benchmarks.prune --save` has written.

    python -m benchmarks.prune_curves ROWS.json ... -o CURVES.svg

One row of two diagrams a model: on the left the shares of zeros that were asked for, on the right the share of the
multiply-adds; the full line is graphopt, the broken one onnxsim, and the grey one the model as it was.
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
STYLE = {"graphopt": 'stroke="#0b62a4"', "onnxsim": 'stroke="#c2571a" stroke-dasharray="6 4"'}
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
    size = f'width="{2 * (WIDTH + LEFT) + 20}" height="{height}"'
    given.output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
    return 0


def _diagram(known: Mapping[str, Any], kind: str) -> str:
    """One model, one kind of amount."""
    dense = next(row for row in known["rows"] if not row["amount"])
    title = f"{known['model']}: accuracy against {'zeros' if kind == 'zeros' else 'multiply-adds'}"
    drawn = [f'<text y="-12" font-weight="bold">{escape(title)}</text>', _axes()]
    level = HEIGHT * (1 - dense["accuracy"])
    drawn.append(f'<path d="M0 {level:.1f}H{WIDTH}" stroke="#999" stroke-width="1"/>')
    for place, (tool, style) in enumerate(STYLE.items()):
        points = _points(known["rows"], tool, kind, dense)
        drawn.append(_line(points, style, above=tool == "graphopt"))
        y = HEIGHT + 52
        drawn.append(f'<path d="M{place * 130} {y}h28" {style} stroke-width="2"/>')
        drawn.append(f'<text x="{place * 130 + 34}" y="{y + 4}">{tool}</text>')
    return "".join(drawn)


def _points(
    rows: Sequence[Mapping[str, Any]], tool: str, kind: str, dense: Mapping[str, Any]
) -> Points:
    """Place from left to right, accuracy, and what is written there: the dense model first."""
    mine = [row for row in rows if row["tool"] == tool and row["amount"]]
    if kind == "zeros":
        found = [
            (float(row["amount"]), row) for row in mine if re.fullmatch(r"[\d.]+", row["amount"])
        ]
    else:
        found = [
            (1 - row["macs"] / dense["macs"], row)
            for row in mine
            if row["amount"].startswith("channels")
        ]
    points = [(0.0, dense["accuracy"], "")]
    return points + sorted((at, r["accuracy"], f"{100 * r['accuracy']:.1f}") for at, r in found)


def _line(points: Points, style: str, *, above: bool) -> str:
    places = [(at * WIDTH, HEIGHT * (1 - accuracy), text) for at, accuracy, text in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    drawn = [f'<polyline points="{path}" fill="none" {style} stroke-width="2"/>']
    for x, y, text in places[1:]:
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="white" {style}/>')
        at = y - 8 if above or y > HEIGHT - 20 else y + 17
        drawn.append(
            f'<text x="{x:.1f}" y="{at:.1f}" text-anchor="middle" font-size="11">{text}</text>'
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
