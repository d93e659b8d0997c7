"""Plots as SVG text.

Colours are CSS variables, so that they follow the page's dark mode.  Each plot carries its points as JSON in an
attribute, from which page.js shows values under the pointer.  NaN is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from .style import STYLES

SIZES = {"wide": (620, 372), "narrow": (360, 320)}


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    family: str
    label: str  # beside the point, where there is room
    lines: Sequence[tuple[str, str]]  # under the pointer: (name, value)
    spread: float | None = None
    hollow: bool = False  # some of its seeds diverged


@dataclass(frozen=True)
class Series:
    name: str
    family: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass
class Frame:
    """The area of a plot: from values to units of the picture."""

    size: tuple[int, int]
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    left: int = 50
    right: int = 14
    top: int = 12
    bottom: int = 44
    parts: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        low, high = (math.log(v) if self.log else v for v in self.x)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return round(self.left + share * (self.size[0] - self.left - self.right), 1)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return round(self.size[1] - self.bottom - (value - low) / (high - low) * self.inner_height, 1)

    @property
    def inner_height(self) -> int:
        return self.size[1] - self.top - self.bottom

    def axes(self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_name: str,
             y_name: str) -> None:  # fmt: skip
        width, height = self.size
        base = height - self.bottom
        add = self.parts.append
        for value, text in y_ticks:
            y = self.at_y(value)
            add(f'<path class="grid" d="M{self.left} {y}H{width - self.right}"/>')
            add(f'<text class="tick" x="{self.left - 7}" y="{y + 4}" text-anchor="end">{escape(text)}</text>')
        for value, text in x_ticks:
            x = self.at_x(value)
            add(f'<path class="axis" d="M{x} {base}v4"/>')
            add(f'<text class="tick" x="{x}" y="{base + 18}" text-anchor="middle">{escape(text)}</text>')
        add(f'<path class="axis" d="M{self.left} {base}H{width - self.right}"/>')
        add(f'<text class="name" x="{(self.left + width - self.right) / 2}" y="{height - 6}" text-anchor="middle">'
            f"{escape(x_name)}</text>")  # fmt: skip
        middle = (self.top + base) / 2
        add(f'<text class="name" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_name)}</text>")  # fmt: skip

    def svg(self, title: str, kind: str, hits: Sequence[object], mode: str) -> str:
        width, height = self.size
        data = escape(json.dumps(hits, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
        return (f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" tabindex="0" data-mode="{mode}" '
                f'data-hits="{data}" aria-label="{escape(title)}. Arrow keys read the values.">'
                + "".join(self.parts) + '<g class="focus"></g></svg>')  # fmt: skip


def scatter(points: Sequence[Point], *, title: str, x_name: str, y_name: str, base: tuple[float, float | None] | None,
            least: float) -> str:  # fmt: skip
    """Points with error bars over a logarithmic axis of ratios, in a wide and a narrow picture; `base` is (mean,
    spread) of the line without compression, `least` the smallest span of the y axis."""
    xs = [p.x for p in points]
    ys = [p.y + s * (p.spread or 0.0) for p in points for s in (-1, 1)]
    if base is not None:
        ys += [base[0] + s * (base[1] or 0.0) for s in (-1, 1)]
    y = _padded(min(ys), max(ys), least)
    x = (min(min(xs) / 1.25, 1.5), max(max(xs) * 1.3, 4.0))
    drawn = []
    for kind, size in SIZES.items():
        frame = Frame(size, x, y, log=True)
        frame.axes([(v, f"{v:g}×") for v in _powers(*x, 9 if kind == "wide" else 5)],
                   [(v, f"{v:g}") for v in ticks(*y, 6)], x_name, y_name)  # fmt: skip
        if base is not None:
            _base_line(frame, base)
        hits = []
        for p in points:
            px, py = frame.at_x(p.x), frame.at_y(p.y)
            bars = ""
            if p.spread:
                top, bottom = frame.at_y(p.y + p.spread), frame.at_y(p.y - p.spread)
                bars += f"M{px} {top}V{bottom}M{px - 3} {top}h6M{px - 3} {bottom}h6"
            frame.parts.append(f'<g class="s-{p.family}">' + (f'<path class="bar" d="{bars}"/>' if bars else "")
                               + f'<path class="mark{" hollow" * p.hollow}" transform="translate({px} {py})" '
                               f'd="{STYLES[p.family].shape}"/></g>')  # fmt: skip
            hits.append([px, py, p.family, p.lines])
        if kind == "wide":
            _labels(frame, points, base)
        drawn.append(frame.svg(title, kind, hits, "nearest"))
    return "".join(drawn)


def curves(series: Sequence[Series], *, title: str, x_name: str, y_name: str) -> str:
    """Lines over a common x axis; under the pointer stand the values of all of them at that x."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if math.isfinite(y)]
    x, y = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1), _padded(min(ys), max(ys), 1e-6)
    steps = sorted(set(xs))
    values = [dict(s.points) for s in series]
    drawn = []
    for kind, size in SIZES.items():
        frame = Frame(size, x, y)
        frame.axes([(v, f"{v:g}") for v in ticks(*x, 6 if kind == "wide" else 4)],
                   [(v, f"{v:g}") for v in ticks(*y, 5)], x_name, y_name)  # fmt: skip
        for s in series:
            line = " ".join(f"{frame.at_x(a)},{frame.at_y(b)}" for a, b in s.points if math.isfinite(b))
            frame.parts.append(f'<polyline class="line s-{s.family}{" dashed" * s.dashed}" points="{line}"/>')
            marks = [] if s.dashed else [p for p in s.points if math.isfinite(p[1])]
            for a, b in marks[:: max(1, len(marks) // 7)]:  # colour alone would not tell the lines apart
                place = f"translate({frame.at_x(a)} {frame.at_y(b)}) scale(.8)"
                shape = STYLES[s.family].shape
                frame.parts.append(f'<path class="mark s-{s.family}" transform="{place}" d="{shape}"/>')
        hits = [[frame.at_x(step), [[s.name, f"{v[step]:.4g}", s.family, frame.at_y(v[step])]
                                    for s, v in zip(series, values, strict=True)
                                    if step in v and math.isfinite(v[step])], f"step {step:g}"]
                for step in steps]  # fmt: skip
        drawn.append(frame.svg(title, kind, hits, "x"))
    return "".join(drawn)


def legend(names: Sequence[tuple[str, str]]) -> str:
    """(family, text) pairs with their marks."""
    items = "".join(
        f'<li class="s-{family}"><svg viewBox="-7 -7 14 14" aria-hidden="true"><path class="mark" '
        f'd="{STYLES[family].shape}"/></svg>{escape(text)}</li>'
        for family, text in names
    )
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round values between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next((m for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * step) <= most), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float, most: int) -> list[float]:
    inside = [v for v in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024) if low <= v <= high]
    return inside if len(inside) <= most else [v for v in inside if v in (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)]


def _padded(low: float, high: float, least: float) -> tuple[float, float]:
    pad = max(0.09 * (high - low), (least - (high - low)) / 2, 1e-9)
    return low - pad, high + pad


def _base_line(frame: Frame, base: tuple[float, float | None]) -> None:
    right, y = frame.size[0] - frame.right, frame.at_y(base[0])
    if base[1]:
        top, bottom = frame.at_y(base[0] + base[1]), frame.at_y(base[0] - base[1])
        frame.parts.append(f'<path class="band" d="M{frame.left} {top}H{right}V{bottom}H{frame.left}Z"/>')
    frame.parts.append(f'<path class="base" d="M{frame.left} {y}H{right}"/>')
    frame.parts.append(f'<text class="note" x="{frame.left + 5}" y="{y - 5}">no compression</text>')


def _labels(frame: Frame, points: Sequence[Point], base: tuple[float, float | None] | None) -> None:
    """Names of the points that no other beats in both directions, where they cover nothing."""
    places = [(frame.at_x(p.x), frame.at_y(p.y)) for p in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    taken += [(x - 3, frame.at_y(p.y + p.spread), x + 3, frame.at_y(p.y - p.spread))
              for p, (x, _) in zip(points, places, strict=True) if p.spread]  # fmt: skip
    if base is not None:
        taken.append((frame.left, frame.at_y(base[0]) - 1, frame.size[0], frame.at_y(base[0]) + 1))
        taken.append((frame.left, frame.at_y(base[0]) - 18, frame.left + 100, frame.at_y(base[0])))
    for point, (x, y) in zip(points, places, strict=True):
        if any(q.x >= point.x and q.y >= point.y and (q.x, q.y) != (point.x, point.y) for q in points):
            continue
        wide = 6.1 * len(point.label)
        for left, top in ((x + 9, y - 7), (x - wide / 2, y - 22), (x - wide / 2, y + 9), (x - 9 - wide, y - 7)):
            box = (left, top, left + wide, top + 13)
            inside = box[0] > frame.left and box[2] < frame.size[0] - 2 and box[1] > 0
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                frame.parts.append(f'<text class="label s-{point.family}" x="{left:.1f}" y="{top + 11:.1f}">'
                                   f"{escape(point.label)}</text>")  # fmt: skip
                taken.append(box)
                break
