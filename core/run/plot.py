"""Curves as inline SVG: one small panel a metric, readable in light and dark, with no script."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360.0, 190.0, 52.0, 12.0, 12.0, 26.0
POINTS = 300  # a panel is narrower than this many pixels


@dataclass(frozen=True)
class Series:
    """A metric over steps; `start` marks where each stage begins."""

    name: str
    xs: list[float]
    ys: list[float]


def panel(series: Series, starts: Sequence[float] = ()) -> str:
    """One figure: the values thin, their running mean bold, the last value in the caption."""
    name, last = html.escape(series.name), series.ys[-1]
    log = min(series.ys) > 0 and max(series.ys) / min(series.ys) > 30
    xs, ys = _thin(series.xs), _thin(series.ys)
    scale = _Scale.of(xs, [math.log10(y) for y in ys] if log else ys)
    parts = [_axes(scale, log), *(_stage(scale, x) for x in starts if scale.x0 < x < scale.x1)]
    raw = [(x, math.log10(y) if log else y) for x, y in zip(xs, ys, strict=True)]
    smooth = [] if series.name.startswith("lr/") else _smooth(raw)
    parts.append(_line(scale, raw, "raw" if smooth else "mean"))
    parts.append(_line(scale, smooth, "mean") if smooth else "")
    label = f"{name} over steps, last value {number(last)}"
    return (
        f'<figure class="panel"><figcaption><span>{name}</span><b>{number(last)}</b></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def number(value: float) -> str:
    """A short number."""
    size = abs(value)
    return f"{value:.2e}" if size and (size < 1e-3 or size >= 1e6) else f"{value:.4g}"


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    @staticmethod
    def of(xs: Sequence[float], ys: Sequence[float]) -> "_Scale":
        low, high = min(ys), max(ys)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return _Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, low - pad, high + pad)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _thin(values: list[float]) -> list[float]:
    if len(values) <= POINTS:
        return values
    return [values[round(i * (len(values) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over a tenth of the points; empty when there are too few to need one."""
    if len(points) < 30:
        return []
    half = len(points) // 20
    out = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        out.append((x, sum(near) / len(near)))
    return out


def _line(scale: _Scale, points: Sequence[tuple[float, float]], style: str) -> str:
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="dot" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3"/>'
    return f'<polyline class="{style}" points="{path}"/>'


def _stage(scale: _Scale, x: float) -> str:
    return f'<line class="stage" x1="{scale.x(x):.1f}" x2="{scale.x(x):.1f}" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}"/>'


def _axes(scale: _Scale, log: bool) -> str:
    out = []
    for tick in _decades(scale.y0, scale.y1) if log else _ticks(scale.y0, scale.y1, 4):
        y, text = scale.y(tick), number(10**tick if log else tick)
        out.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 6:g}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    ticks = _ticks(scale.x0, scale.x1, 4)
    for tick in ticks:
        anchor = "end" if scale.x(tick) > WIDTH - 30 else "middle"
        out.append(f'<text x="{scale.x(tick):.1f}" y="{HEIGHT - 8:g}" text-anchor="{anchor}">{tick:,.6g}</text>')
    return "".join(out)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) inside [low, high]."""
    rough = (high - low) / count
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Exponents of round values between 10^low and 10^high: powers of ten, with 3 between when they are few."""
    whole = [float(i) for i in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) > 5:
        return whole[:: math.ceil(len(whole) / 5)]
    half = [i + math.log10(3) for i in range(math.floor(low), math.ceil(high))] if len(whole) < 3 else []
    return sorted(whole + [tick for tick in half if low <= tick <= high])
