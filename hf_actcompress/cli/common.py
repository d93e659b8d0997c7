"""What the subcommands share: kinds of arguments, help texts, progress bars, and tables that fit into the terminal.

Nothing here imports torch; rich is imported when something is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

MODEL = (
    "'minilm' or 'efficientnet-lite0' (from their packages), a timm name, a local folder, or the hub id of a "
    "transformers model that classifies texts or images"
)
UNLIMITED = 10_000  # columns of a pipe or file, where nothing is folded or left out
GAP = 2  # spaces between two columns of a table
CONTROL = {code: None for code in (*range(9), *range(11, 32), 127)}  # characters that would steer the terminal


# Arguments


class Help(argparse.HelpFormatter):
    """Wraps paragraphs, but leaves those with line breaks of their own as they are (examples)."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.strip("\n").split("\n\n")
        return "\n\n".join(part if "\n" in part else super(Help, self)._fill_text(part, width, indent)
                           for part in parts)  # fmt: skip


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers of `least` or more."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return convert


def shape_of(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 4096x1024")
    return tuple(map(int, sizes))


def percent(text: str) -> str:
    """`text` with its % signs as argparse wants them in a help text."""
    return text.replace("%", "%%")


def parse_codecs(specs: Iterable[str], option: str) -> list[Any]:
    """The codecs of specs.  Raises ValueError, which names `option`."""
    from ..codecs import parse_codec

    try:
        return [parse_codec(spec) for spec in specs]
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


# Output


def make_progress() -> Any:
    """A progress bar on stderr, which is gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
               TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True)


def print_json(value: Any) -> None:
    """`value` as JSON on stdout.  NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_console() -> Any:
    """Writes to stdout at the width of the terminal, or of COLUMNS; a pipe or file has no width."""
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else UNLIMITED, markup=False, highlight=False, emoji=False)


def print_table(
    title: str, names: Sequence[str], rows: Sequence[Sequence[Any]], *, keys: Sequence[str] = (),
    left: Sequence[str] = (), drop: Sequence[str] = (), last: Sequence[str] = (), split: bool = False,
    styles: Sequence[str | None] = (),
) -> None:  # fmt: skip
    """A table that keeps its answer at every width.

    names: headings.  rows: cells, as str or rich's Text.
    keys: columns of names (default: the first); they are folded into lines where a name may be divided.
    left: more columns that are aligned to the left; all others hold numbers and are aligned to the right.
    drop: columns that are left out where the terminal is too narrow, the least important first; a line names them.
    last: more of them, left out only where folding does not help.
    split: the table goes on below, with the keys repeated, instead of leaving columns out.
    styles: of the rows.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = make_console()
    keys = keys or names[:1]
    rows = [[cell.translate(CONTROL) if isinstance(cell, str) else cell for cell in row] for row in rows]
    blocks, left_out = fit(names, rows, console.width, keys, drop, last, split)
    console.print(" ".join(title.translate(CONTROL).split()), style="bold")
    for block_names, block_rows in blocks:
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for name in block_names:
            table.add_column(name, justify="left" if name in (*keys, *left) else "right", no_wrap=True,
                             overflow="fold")  # fmt: skip
        for number, row in enumerate(block_rows):
            table.add_row(*row, style=styles[number] if styles else None)
        console.print(table)
        console.print()
    if left_out:
        console.print(f"Left out at {console.width} columns: {', '.join(left_out)}. A wider terminal or --json has "
                      "them.\n", style="dim")  # fmt: skip


Block = tuple[list[str], list[list[Any]]]


def fit(
    names: Sequence[str], rows: Sequence[Sequence[Any]], width: int, keys: Sequence[str], drop: Sequence[str] = (),
    last: Sequence[str] = (), split: bool = False,
) -> tuple[list[Block], list[str]]:  # fmt: skip
    """The table as blocks (headings, rows) that are at most `width` wide where that can be done, and the headings of
    the columns that were left out.  The arguments are those of `print_table`."""
    columns = {name: [name, *(row[i] for row in rows)] for i, name in enumerate(names)}
    as_given = {name: columns[name] for name in keys}
    left_out: list[str] = []

    def excess() -> int:
        return sum(map(_width, columns.values())) + GAP * (len(columns) - 1) - width

    def fold(limit: int, divide: bool = False) -> None:
        for name in (name for name in keys if name in columns):
            columns[name] = [wrap(str(cell), limit, divide) for cell in as_given[name]]

    def leave_out(unwanted: Sequence[str]) -> None:
        for name in unwanted:
            if name in columns and excess() > 0:
                left_out.append(name)
                del columns[name]

    if excess() > 0:
        fold(2 * width // 5)
        if not split:
            leave_out(drop)
            for divide in (False, True):
                for limit in range(2 * width // 5, 7, -1):
                    if excess() > 0:
                        fold(limit, divide)
                leave_out(last)
    if not split:
        return [_block(columns, [name for name in names if name in columns])], left_out
    room = width - sum(_width(columns[name]) + GAP for name in keys)
    groups: list[list[str]] = [[]]
    for name in (name for name in names if name not in keys):
        if groups[-1] and sum(_width(columns[n]) + GAP for n in [*groups[-1], name]) - GAP > room:
            groups.append([])
        groups[-1].append(name)
    return [_block(columns, [*keys, *group]) for group in groups], left_out


def _block(columns: Mapping[str, list[Any]], names: list[str]) -> Block:
    heads = [columns[name][0] for name in names]
    return heads, [list(row) for row in zip(*(columns[name][1:] for name in names), strict=True)]


def _width(cells: Iterable[Any]) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for cell in cells for line in str(cell).split("\n"))


def wrap(text: str, width: int, divide: bool = False) -> str:
    """`text` in lines of at most `width`, divided after commas, dots, slashes, bars and spaces; with `divide` anywhere
    where that is not enough."""
    lines = []
    for line in text.split("\n"):
        now = ""
        for piece in re.findall(r"(?:[^,./|\s]|\.(?=\d))+[,./|\s]?|[,./|\s]", line):  # 0.1 stays whole
            if now and len(now) + len(piece.rstrip()) > width:
                lines.append(now.rstrip())
                now = ""
            now += piece
            while divide and len(now.rstrip()) > width:
                lines.append(now[:width])
                now = now[width:]
        lines.append(now.rstrip())
    return "\n".join(lines)
