"""A progress line on stderr for what takes more than a second."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DELAY_SECONDS = 1.0


@contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, float | None], None]]:
    """Gives a function to call with what is being done and, where known, the fraction done.

    Shows nothing unless stderr is a terminal, and nothing during the first second.
    """
    if quiet or not sys.stderr.isatty():
        yield _ignore
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from graphopt.cli.console import stderr

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=stderr(),
        transient=True,
    )
    task = bar.add_task("starting", total=None)

    def update(what: str, fraction: float | None = None) -> None:
        total = None if fraction is None else 1.0
        bar.update(task, description=what, total=total, completed=fraction or 0.0)

    timer = threading.Timer(DELAY_SECONDS, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:
            bar.stop()


def _ignore(what: str, fraction: float | None = None) -> None:
    """Takes what there is to say and keeps it."""
    del what, fraction
