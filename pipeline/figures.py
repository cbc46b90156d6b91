"""The pictures of a page, as SVG whose ink has the colour of the text around it. Needs matplotlib."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INK, _BARS = "#010203", "#040506"  # stand for the page's colours
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "earmark",  # the same picture of the same numbers
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def histogram(
    edges: NDArray[np.float64],
    counts: NDArray[np.int64],
    title: str,
    about: str,
    *,
    ticks: Sequence[tuple[float, str]] | None = None,
    log: bool = False,
) -> str:
    """An SVG of how many clips lie in each bin.

    Args:
        edges: [bins + 1].
        counts: [bins].
        title: what is counted; the axis says it.
        about: what a person who does not see it is told.
        ticks: (place, text); matplotlib's own where there are none.
        log: whether the edges are even in their logarithm.
    """
    used = np.flatnonzero(counts)
    first, last = (max(0, used[0] - 1), min(len(counts), used[-1] + 2)) if len(used) else (0, 1)

    def draw(axes: Any) -> None:
        axes.stairs(counts[first:last], edges[first : last + 1], fill=True, color=_BARS)
        if log:
            axes.set_xscale("log")
        axes.set_xlim(edges[first], edges[last])
        if ticks is not None:
            inside = [(at, text) for at, text in ticks if edges[first] <= at <= edges[last]]
            axes.set_xticks([at for at, _ in inside], [text for _, text in inside], minor=False)
            axes.minorticks_off()
        axes.set_xlabel(title)
        axes.set_ylabel("clips")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    return _svg(draw, about)


def scatter(
    x: NDArray[np.float64], y: NDArray[np.float64], x_title: str, y_title: str, about: str
) -> str:
    """An SVG of shares against shares, and the diagonal; both axes by the square root."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, alpha=0.5)
        axes.scatter(np.sqrt(x), np.sqrt(y), s=14, color=_BARS, alpha=0.7, linewidths=0)
        most = min(1.0, 1.2 * max(x.max(initial=0.01), y.max(initial=0.01)))
        at = [tick for tick in (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1) if tick <= most]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(np.sqrt(at), [f"{value:g}" for value in at])
        axes.set_xlim(-0.01, np.sqrt(most))
        axes.set_ylim(-0.01, np.sqrt(most))
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.set_aspect("equal")

    return _svg(draw, about, (5.2, 4.4))


def _svg(draw: Callable[[Any], None], about: str, size: tuple[float, float] = (5.2, 2.6)) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        # Not pyplot: it keeps state of its own and may want a display.
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its style would be that of the whole page.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    # Names that the pictures of a page would share.
    mark = f"f{zlib.crc32(about.encode()):08x}"
    svg = re.sub(r'\bid="', f'id="{mark}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{mark}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_BARS, "var(--accent)")
    svg = re.sub(r"font-family: [^;\"]+;?", "", svg)
    svg = re.sub(
        r'<svg ([^>]*?)width="[^"]*"',
        r"<svg \1",
        re.sub(r' height="[\d.]+pt"', "", svg, count=1),
        count=1,
    )
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_attribute(about)}" ', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
