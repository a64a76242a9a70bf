"""The losses of a training as a drawing."""

from __future__ import annotations

import math

from graphopt.distill.history import History

WIDTH, HEIGHT = 720, 150


def loss_plot(history: History) -> str:
    """The losses of the steps as a line and those of the held-out samples as dots, on a logarithmic scale, in SVG."""
    points = [*history.losses, *history.judged]
    logs = [math.log10(loss) for _, loss in points if loss > 0 and math.isfinite(loss)]
    if not logs:
        return ""
    low, high = min(logs), max(*logs, min(logs) + 0.1)
    last = max(step for step, _ in points) or 1

    def place(step: int, loss: float) -> tuple[float, float]:
        share = (math.log10(max(loss, 10**low)) - low) / (high - low)
        return round(step / last * WIDTH, 1), round(HEIGHT * (1 - share), 1)

    line = " ".join("{},{}".format(*place(step, loss)) for step, loss in history.losses)
    dots = "".join(
        '<circle class="{}" cx="{}" cy="{}" r="3"><title>step {}: {:.4g}</title></circle>'.format(
            "ok" if step == history.kept else "held", *place(step, loss), step, loss
        )
        for step, loss in history.judged
    )
    scale = "".join(
        f'<text x="{WIDTH + 4}" y="{y}">{10**value:.2g}</text>'
        for value, y in ((high, 8), (low, HEIGHT))
    )
    return (
        f'<svg class="plot" viewBox="-4 -8 {WIDTH + 48} {HEIGHT + 16}" role="img">'
        f'<polyline points="{line}" fill="none" stroke="#888"/>{dots}{scale}</svg>'
    )
