"""Bars with an ETA and plain tables, for everything that lasts longer than a second."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

# rich is imported where it is used: `import keras_lowbit` must stay cheap.

T = TypeVar("T")

SILENT_SECONDS = 1.0


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Generator[T]:
    """Yield the items of `iterable` and show how far the work is.

    On a terminal: a bar with count and ETA on stderr, gone when the work is done. Elsewhere
    (a pipe, a log file): nothing, and one final line if the work took longer than a second.
    Without stderr, as in `pythonw` and in daemons: nothing.

    Args:
        iterable: what to go through.
        description: a few words in front of the bar.
        total: number of items; `len(iterable)` when left out and known.

    Yields:
        The items, unchanged and in order.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    shown = _bar if _is_terminal(sys.stderr) else _line
    yield from shown(iterable, description, total)


def fit_verbosity() -> int:
    """`verbose` for `fit` of Keras: 1, a bar, on a terminal; else 2, lines; 0 without stdout."""
    if sys.stdout is None:
        return 0  # Keras would write to it all the same
    return 1 if _is_terminal(sys.stdout) else 2


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody watches; Python has `None` for a stream that its process lacks."""
    return stream is not None and stream.isatty()


def _bar(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(description), total=total)
        for item in iterable:
            yield item
            progress.advance(task)


def _line(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start, done = time.monotonic(), 0
    try:
        for item in iterable:
            yield item
            done += 1
    finally:
        seconds = time.monotonic() - start
        # `print` takes stdout where it is given no file.
        if seconds > SILENT_SECONDS and sys.stderr is not None:
            count = f"{done}" if total is None else f"{done}/{total}"
            print(f"{description}: {count} in {seconds:.1f} s", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format rows as a plain ASCII (Markdown) table.

    Columns that hold only numbers are aligned to the right. Nothing is cut off or wrapped, so
    the text can be compared, piped and pasted into documentation.

    Args:
        title: a line above the table; empty for none.
        columns: the headings.
        rows: one sequence of cells a row; cells are shown by `str`, `None` as `-`.

    Returns:
        The text, without a final newline.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(
                f"table({title!r}): {len(columns)} columns need {len(columns)} cells a row. "
                f"Got {len(row)}: {row}"
            )
    grid = Table(box=box.MARKDOWN, show_edge=True)
    for i, name in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[i]) for row in cells)
        grid.add_column(Text(name), justify="right" if numeric else "left", no_wrap=True)
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    console = Console(width=100_000, color_system=None, force_terminal=False, no_color=True)
    with console.capture() as capture:
        console.print(grid)
    lines = [line.strip() for line in capture.get().splitlines() if line.strip()]
    return "\n".join(([title, ""] if title else []) + lines)


def _is_number(cell: str) -> bool:
    """Whether a cell reads as a figure; a unit or a percent sign may follow."""
    figure = cell.split(" ")[0].rstrip("%").replace(",", "")
    if cell == "-":
        return True
    try:
        float(figure)
    except ValueError:
        return False
    return True
