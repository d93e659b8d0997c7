"""A simulated step to look at: as text for a terminal, and as a chart.  It only reads a Timeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .simulate import Event, Timeline

LETTERS = {"F": "F", "B": "B", "I": "I", "W": "W", "encode": "e", "decode": "d", "send": "=", "optimizer": "o"}
STYLES = {"F": "blue", "B": "green", "I": "green", "W": "yellow", "encode": "red", "decode": "red", "send": "magenta",
          "optimizer": "cyan"}  # fmt: skip
COLORS = {"F": "#4477aa", "B": "#228833", "I": "#228833", "W": "#ccbb44", "codec": "#ee6677", "send": "#aa3377",
          "optimizer": "#66ccee"}  # fmt: skip
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights", "codec": "codec",
         "send": "on the link", "optimizer": "optimizer"}  # fmt: skip


def rows(timeline: Timeline, devices: Sequence[str], most: int = 6) -> list[tuple[str, int | tuple[int, int]]]:
    """Label and resource of each line: devices, with the links to the next between them; the middle is left out where
    there are more devices than `most`."""
    count = len(devices)
    shown = list(range(count)) if count <= most else [*range(most // 2), *range(count - most // 2, count)]
    found: list[tuple[str, int | tuple[int, int]]] = []
    for device in shown:
        found.append((devices[device], device))
        for a, b in timeline.links:
            if min(a, b) == device and max(a, b) in shown:
                found.append((f"  {devices[a]} > {devices[b]}", (a, b)))
    return found


def text(timeline: Timeline, devices: Sequence[str], width: int = 100) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each line its label, and (characters, style) pieces that are `width` long together.  A character shows what
    took most of its time; a dot is waiting."""
    lines = []
    cell = timeline.seconds / width if timeline.seconds else 1.0
    by_resource: dict[object, list[Event]] = {}
    for event in timeline.events:
        by_resource.setdefault(event.resource, []).append(event)
    for label, resource in rows(timeline, devices):
        shares: list[dict[str, float]] = [{} for _ in range(width)]
        for event in by_resource.get(resource, ()):
            for k in range(int(event.start / cell), min(width, int(event.end / cell) + 1)):
                part = min(event.end, (k + 1) * cell) - max(event.start, k * cell)
                if part > 0:
                    shares[k][event.kind] = shares[k].get(event.kind, 0.0) + part
        pieces: list[tuple[str, str]] = []
        for share in shares:
            kind = max(share, key=share.__getitem__) if sum(share.values()) >= cell / 2 else None
            letter, style = (LETTERS[kind], STYLES[kind]) if kind else (".", "dim")
            if pieces and pieces[-1][1] == style:
                pieces[-1] = (pieces[-1][0] + letter, style)
            else:
                pieces.append((letter, style))
        lines.append((label, pieces))
    return lines


def chart(steps: Sequence[tuple[str, Timeline]], devices: Sequence[str], path: str | Path) -> Path:
    """A Gantt chart (PNG, or what the suffix says) of one or more steps over the same time, one panel each.

    Raises ValueError if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ValueError("Charts need matplotlib: pip install 'hf_actcompress[plots]'.") from None
    lines = [rows(timeline, devices) for _, timeline in steps]
    height = sum(0.24 * len(found) + 0.75 for found in lines) + 0.5
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(steps), 1, squeeze=False, sharex=True,
                           gridspec_kw={"height_ratios": [len(found) for found in lines]})[:, 0]  # fmt: skip
    seen: dict[str, str] = {}
    for ax, (title, timeline), found in zip(axes, steps, lines, strict=True):
        places = {resource: k for k, (_, resource) in enumerate(found)}
        spans: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for event in timeline.events:
            if event.resource in places:
                kind = "codec" if event.kind in ("encode", "decode") else event.kind
                spans.setdefault((places[event.resource], kind), []).append((event.start, event.end - event.start))
        for (place, kind), bars in spans.items():
            seen.setdefault(kind, COLORS[kind])
            ax.broken_barh(bars, (place - 0.4, 0.8), facecolor=COLORS[kind], edgecolor="white", linewidth=0.2)
        ax.set_yticks(range(len(found)), [label for label, _ in found], fontsize=7)
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.set_title(f"{title}: {timeline.seconds:.3g} s", loc="left", fontsize=9, fontweight="bold")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, max(timeline.seconds for _, timeline in steps))
    kinds = [kind for kind in NAMES if kind in seen]
    figure.legend([Patch(color=COLORS[kind]) for kind in kinds], [NAMES[kind] for kind in kinds],
                  loc="outside lower center", ncols=len(seen), frameon=False, fontsize=8)  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
