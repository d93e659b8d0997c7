"""How codecs look and are named in every figure and on the page, and how a figure is made and saved.

matplotlib is imported inside.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, DPI = 8.0, 200  # 1600 pixels, which a README shows at about half that: no text below 8 points
PERCENT = {"accuracy"}  # metrics that are shown in %


class Style(NamedTuple):
    color: str
    marker: str  # of matplotlib
    shape: str  # the same as an SVG path about the origin, of about 9 units
    ink: str  # of text on white, which needs more contrast than a marker
    dark: str  # of both on a dark page


# Okabe and Ito's colours first, which stay apart for colour-blind readers; the markers say the same once more.
STYLES = {
    "uniform": Style("#0072B2", "o", "M-4.4 0a4.4 4.4 0 1 0 8.8 0a4.4 4.4 0 1 0-8.8 0Z", "#00527F", "#4FA8E0"),
    "block": Style("#D55E00", "s", "M-4-4H4V4H-4Z", "#994400", "#F08A4B"),
    "rotated": Style("#882255", "p", "M0-5.2L4.9-1.6L3.1 4.2H-3.1L-4.9-1.6Z", "#6B1A43", "#D98BB0"),
    "trellis": Style("#332288", ">", "M5 0L-4 5V-5Z", "#2A1C70", "#A79BEA"),
    "sort": Style("#009E73", "^", "M0-5L5 4H-5Z", "#006F50", "#33C29A"),
    "kmeans": Style("#CC79A7", "D", "M0-5.4L5 0L0 5.4L-5 0Z", "#8F4470", "#DE9CC0"),
    "topk": Style("#E69F00", "v", "M0 5L5-4H-5Z", "#7A5400", "#F0B93A"),
    "lowrank": Style("#56B4E9", "P", "M-1.8-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z", "#1F6F9C", "#7CC6F2"),
    "float8": Style("#7F6000", "X", "M-4.6-2.6L-2.6-4.6L0-2L2.6-4.6L4.6-2.6L2-0L4.6 2.6L2.6 4.6L0 2L-2.6 4.6L-4.6 "
                    "2.6L-2-0Z", "#5B4500", "#C9A94F"),
    "identity": Style("#888888", "*", "M0-5.6L1.6-1.8L5.4-1.6L2.5 1L3.4 5L0 2.8L-3.4 5L-2.5 1L-5.4-1.6L-1.6-1.8Z",
                      "#555555", "#A5A5A5"),
    "none": Style("#333333", "_", "M-5-1.2H5V1.2H-5Z", "#333333", "#D0D0D0"),
    "other": Style("#888888", "h", "M-2.6-4.5H2.6L5.2 0L2.6 4.5H-2.6L-5.2 0Z", "#555555", "#A5A5A5"),
}  # fmt: skip
NAMES = {"kmeans": "k-means", "topk": "top-k", "lowrank": "low rank", "none": "no compression"}


def family(codec: str) -> str:
    """The key of STYLES for a spec: the first codec of a chain, the inner one of error feedback."""
    name = re.split(r"[:|]", codec.removeprefix("ef+"))[0]
    if name == "block" and "rotate=" in codec:  # records of version 0.1
        return "trellis" if "levels=trellis" in codec else "rotated"
    return name if name in STYLES else "other"


def style_of(codec: str) -> Style:
    return STYLES[family(codec)]


def label(codec: str) -> str:
    """A spec as a reader names it: "block 4 bits", "top-k 10 %, then uniform 8 bits"."""
    head, _, rest = codec.removeprefix("ef+").partition("|")
    own = family(head)
    words = head if own == "other" else " ".join([NAMES.get(own, own), *_options(head)])
    words = words.replace("low rank rank", "low rank")
    words = f"{words}, then {label(rest)}" if rest else words
    return f"{words}, error feedback" if codec.startswith("ef+") else words


def short_label(codec: str) -> str:
    """The label of a point whose marker shows the family: "4 bits"."""
    head, _, rest = codec.removeprefix("ef+").partition("|")
    words = " ".join(_options(head) + ["patched"] * ("patch=" in head)) or head.partition(":")[0]
    words = f"ef {words}" if codec.startswith("ef+") else words
    return f"{words} | {rest.partition(':')[0]}" if rest else words


def _options(head: str) -> list[str]:
    """What a reader wants to know of the options: bits, share, rank or format."""
    options = dict(item.split("=", 1) for item in head.partition(":")[2].split(",") if "=" in item)
    words = [f"{options['bits']} bit" + "s" * (options["bits"] != "1")] if "bits" in options else []
    words += [_share(options["ratio"])] if "ratio" in options else []
    words += [f"rank {options['rank']}"] if "rank" in options else []
    return words + ([options["format"]] if "format" in options else [])


def _share(ratio: str) -> str:
    try:
        return f"{100 * float(ratio):g} %"
    except ValueError:
        return ratio


def make_figure(lines: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    """A figure, `height` inches for each line of axes, and its axes in reading order.

    Not pyplot's: that would keep global state and choose a display.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#666666"}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height * lines + 0.3), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    return figure, axes


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write the figure, without axes that hold nothing; returns its path."""
    for ax in figure.axes:
        if not ax.has_data():
            ax.remove()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def escape_math(text: str) -> str:
    """Text for a figure, in one line: matplotlib would read what stands between dollar signs as mathematics."""
    return " ".join(text.split()).replace("$", r"\$")
