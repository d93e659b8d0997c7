"""Error against compression: which runs no other beats, as a table and as a figure.

It knows numbers and names only; matplotlib is imported inside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hf_actcompress.report.style import make_figure, save_figure

Point = tuple[float, float, str]  # compression ratio, error in %, what it is
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000")
MARKERS = "os^DvPX"


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points to which no other is at least equal in both and better in one, by rising ratio."""
    best, front = float("inf"), []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if point[1] < best:
            best = point[1]
            front.append(point)
    return front[::-1]


def table(points: Sequence[Point]) -> str:
    """Markdown, by rising ratio; those of the front are marked."""
    front = pareto(points)
    lines = ["| compression | error, % | smaller by | on the front |", "| --- | ---: | ---: | :---: |"]
    for ratio, error, name in sorted(points):
        mark = "yes" if (ratio, error, name) in front else ""
        lines.append(f"| {name} | {error:.2f} | {ratio:.1f} | {mark} |")
    return "\n".join(lines)


def plot(
    groups: Mapping[str, Sequence[Point]], path: str | Path, *, dense: float | None = None,
    published: Sequence[Point] = (), label: str = "test error, %",
    joined: bool | Collection[str] = True,
) -> Path:  # fmt: skip
    """One colour a group; the front of all in grey; published figures as hollow stars.

    joined: which groups are lines by rising ratio: all, none, or those of these names.  Returns the PNG's path;
    ValueError without points.
    """
    everything = [point for points in groups.values() for point in points]
    if not everything:
        raise ValueError("There is nothing to draw: no group has points.")
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, (ax,) = make_figure(1, 1, 4.4)
    for i, (name, points) in enumerate(groups.items()):
        x, y = zip(*[(p[0], p[1]) for p in sorted(points)], strict=True)
        line = joined if isinstance(joined, bool) else name in joined
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        ax.plot(x, y, color=color, marker=marker, label=name, linewidth=1.2 if line else 0, markersize=6,
                markeredgecolor="white", markeredgewidth=0.6, zorder=3)  # fmt: skip
    front = pareto(everything)
    x = [front[0][0], *(p[0] for p in front)]
    ax.step(x, [front[0][1], *(p[1] for p in front)], where="pre", color="#999999", linewidth=5, alpha=0.35,
            label="front", zorder=1)  # fmt: skip
    if published:
        ax.plot([p[0] for p in published], [p[1] for p in published], "*", color="black", markerfacecolor="none",
                markersize=11, label="published", zorder=4)  # fmt: skip
    if dense is not None:
        ax.axhline(dense, color="#333333", linewidth=1.1, linestyle=(0, (5, 2)), label=f"dense, {dense:.2f}")
    ax.set_xscale("log")
    ticks = [t for t in (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)
             if min(p[0] for p in everything) / 1.2 <= t <= max(p[0] for p in everything) * 1.2]  # fmt: skip
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.xaxis.set_minor_locator(NullLocator())
    errors = sorted(p[1] for p in [*everything, *published])
    # A few failures at the end of a curve should not flatten all others.
    top = min(errors[-1], 4 * errors[len(errors) // 2])
    ax.set_ylim(0 if errors[0] < top / 3 else None, 1.08 * top)
    ax.set_xlabel("smaller by (counted bits)")
    ax.set_ylabel(label)
    figure.legend(loc="outside upper center", frameon=False, ncols=4, fontsize=8.5)
    return save_figure(figure, path)
