"""A matplotlib figure -> an inline SVG that takes the page's font and colours, in light and in dark."""

from __future__ import annotations

import importlib.resources
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.4
"""Inches. A figure is drawn for a narrow screen, where it shows at about its own size; two stand side by side."""

# Stand-ins that no figure uses otherwise; the page gives each its value as a CSS variable.
COLOURS = {
    "card": "#010100",
    "ink": "#010101",
    "muted": "#010102",
    "grid": "#010103",
    "base": "#010104",
    "local": "#010105",
    "central": "#010106",
    "federated": "#010107",
    "personal": "#010108",
}
NUM_SERIES = 8
"""Colours for what has no name of its own"""
COLOURS |= {f"series{index}": f"#01011{index}" for index in range(NUM_SERIES)}

_STYLE: Any = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.05,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Give the figures made and written inside the house style."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser has other fonts
        yield


def inline_svg(figure: Figure, name: str, label: str) -> Markup:
    """Return the figure as an ``<svg>`` element whose ids begin with `name`; `label` is what a screen reader says."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    opening = re.search(r'viewBox="([^"]+)"', text)
    assert opening is not None
    body = text[text.index(">") + 1 :]
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", body)
    for variable, stand_in in COLOURS.items():
        body = body.replace(stand_in, f"var(--{variable})")
    return Markup(f'<svg role="img" aria-label="{escape(label)}" viewBox="{opening[1]}">{body}')


def standalone_svg(svg: str) -> str:
    """Return an inline SVG as the content of a file: with namespace, size, background and the page's light colours."""
    css = importlib.resources.files("fedit.report").joinpath("report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#\w+);", css.partition("@media")[0]))
    svg = re.sub(r"var\(--(\w+)\)", lambda variable: light[variable[1]], svg)
    width, height = svg.partition('viewBox="')[2].partition('"')[0].split()[2:]
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}pt" height="{height}pt" '
        f'style="background: {light["card"]}" '
    )
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + svg.replace("<svg ", opening, 1)
