"""The look of all pictures, and how names stand in them."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size

from input_pipeline.escape import terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.ImageFont import FreeTypeFont

# Themes: text and lines, background, and the colours of curves.
LIGHT = {
    'ink': '#1c2128',
    'paper': '#ffffff',
    'lines': '#d8dee4',
    'cycle': ('#0b6bcb', '#c2571a', '#1a7f37'),
}
DARK = {
    'ink': '#d7dce2',
    'paper': '#161b22',
    'lines': '#343b44',
    'cycle': ('#6cb6ff', '#f0a35e', '#57c56b'),
}


@contextmanager
def theme(colours: Mapping[str, Any] = LIGHT) -> Iterator[None]:
    """The look of all pictures, for figures that are made and saved inside the context."""
    import matplotlib
    from cycler import cycler

    ink, paper, lines = colours['ink'], colours['paper'], colours['lines']
    settings = {
        'font.family': _font_families(),
        'font.size': 9,
        'axes.titlesize': 10,
        'axes.titlelocation': 'left',
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.facecolor': paper,
        'figure.facecolor': paper,
        'savefig.facecolor': paper,
        'text.color': ink,
        'axes.labelcolor': ink,
        'axes.titlecolor': ink,
        'xtick.color': ink,
        'ytick.color': ink,
        'axes.edgecolor': lines,
        'grid.color': lines,
        'grid.linewidth': 0.6,
        'axes.axisbelow': True,
        'axes.formatter.useoffset': False,
        'axes.prop_cycle': cycler(color=colours['cycle']),
        'legend.frameon': False,
        'text.parse_math': False,  # a class name may hold dollar signs
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A letter that no font here has is a box; a warning for each of them helps nobody.
        warnings.filterwarnings('ignore', message='Glyph .* missing')
        yield


def png(draw: Callable[[], Figure], colours: Mapping[str, Any] = LIGHT) -> bytes:
    """A picture of a report, made under a theme."""
    buffer = io.BytesIO()
    with theme(colours):
        draw().savefig(buffer, format='png', dpi=140)
    return buffer.getvalue()


# What matplotlib's own font lacks, as distributions install it; of a row the first that is here.
_MORE_FONTS = (
    ('Noto Sans CJK SC', 'Noto Sans CJK JP', 'Noto Sans SC', 'WenQuanYi Zen Hei'),
    ('Noto Sans Devanagari', 'Lohit Devanagari'),
    ('Noto Sans Thai', 'Garuda'),
)


@functools.cache
def _font_families() -> list[str]:
    """matplotlib's own font, then those of this machine for letters that it lacks."""
    from matplotlib import font_manager

    here = set(font_manager.get_font_names())
    found = (next((name for name in names if name in here), None) for names in _MORE_FONTS)
    return ['DejaVu Sans', *filter(None, found)]


def font(size: int, bold: bool = False, text: str = '') -> FreeTypeFont:
    """A font for a picture that Pillow draws: matplotlib's own, or another for another script.

    Args:
      size: in pixels.
      bold: of matplotlib's own.
      text: what is drawn; the first font here that has all its letters is taken, if there is any.
    """
    from matplotlib import get_data_path
    from PIL import ImageFont

    name = f'DejaVuSans{"-Bold" * bold}.ttf'
    own = os.path.join(get_data_path(), 'fonts', 'ttf', name)
    letters = frozenset(map(ord, text))
    found = next((path for path in (own, *_more_font_files()) if letters <= _has(path)), own)
    return ImageFont.truetype(found, size)


@functools.cache
def _more_font_files() -> tuple[str, ...]:
    from matplotlib import font_manager

    return tuple(font_manager.findfont(name) for name in _font_families()[1:])


@functools.cache
def _has(path: str) -> frozenset[int]:
    """The letters of a font."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


def cut(text: str, most: int) -> str:
    """A name in a picture: at most `most` letters, an ellipsis where it was longer.

    Letters are those that are seen; a wide one, as Chinese has, takes the room of two.
    """
    text = terminal(text)
    return text if cell_len(text) <= most else set_cell_size(text, most - 1).rstrip() + '…'
