"""What the subcommands share: kinds of arguments, and tables that a pipe does not fold."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def whole(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {low} or more")
        return int(text)

    return convert


def shape_of(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 4096x1024")
    return tuple(map(int, sizes))


def make_console() -> Console:
    # Tables that are piped into a file must not be folded to the 80 columns that rich assumes there.
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)


def make_table(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    """Columns of numbers, but for those in `left`, which hold text and are folded where the terminal is narrow."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in columns:
        number = name not in left
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table
