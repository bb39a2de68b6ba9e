"""Text from outside on its way out: one function for each place that it is written to.

Names of files and classes, and the reasons that decoders give, are whatever someone wrote: rich
markup, control sequences, formulas, bytes that are no UTF-8. On Linux a name is bytes; Python holds
those that are not UTF-8 as surrogates (PEP 383), so that the file opens, and no text file, page or
terminal takes them. Inside the program names stay as they are; they change here only.
"""

from __future__ import annotations

import html as _html
import json
import logging
import re
import sys
from typing import Any

import rich.console
from rich.text import Text

# Controls (C0, DEL, C1), the directions and invisible characters that reorder or hide text, line
# separators, surrogates. Joiners (U+200C, U+200D) stay: Persian, Hindi and emoji need them.
_INVISIBLE = (
    '\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb'
    '\ud800-\udfff\U000e0000-\U000e007f'
)
_UNSAFE = re.compile(f'[\x00-\x1f{_INVISIBLE}]')
_UNSAFE_IN_LINES = re.compile(f'[\x00-\x08\x0b-\x1f{_INVISIBLE}]')  # all but tab and newline
_UNSAFE_IN_JSON = re.compile(f'[{_INVISIBLE}]')

# The last four are the full-width forms, which some spreadsheets take as well.
FORMULA_STARTS = tuple('=+-@\t\r\n\uff1d\uff0b\uff0d\uff20')
MAX_NAME_BYTES = 150  # of a file name's stem; file systems allow 255 with ending and number


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f'\\x{code - 0xDC00:02x}'
    return match[0].encode('unicode_escape', 'surrogatepass').decode('ascii')


def terminal(text: object) -> str:
    r"""One line for a terminal, a log or a picture.

    Args:
      text: anything with a `str`.

    Returns:
      The text; what would move the cursor, reorder or hide letters or cannot be encoded stands as
      `\x1b`, `\n`, `\u202e`, and a byte that is not UTF-8 as `\xff`.
    """
    return _UNSAFE.sub(_visible, str(text))


def lines(text: object) -> str:
    """As `terminal`, of a message of several lines: newlines and tabs stay."""
    return _UNSAFE_IN_LINES.sub(_visible, str(text))


def html(text: object) -> str:
    """Text for a page, in an element or a quoted attribute."""
    return _html.escape(lines(text))


def markdown(text: object) -> str:
    """A block that Markdown shows as it is, whatever fences the text holds."""
    longest = max((len(run) for run in re.findall('`+', str(text))), default=0)
    fence = '`' * max(3, longest + 1)
    return f'{fence}\n{lines(text)}\n{fence}'


def csv_cell(text: object) -> str:
    """A cell of a table for people: a spreadsheet shows it and computes nothing.

    What a spreadsheet would take for a formula gets an apostrophe in front, as in its own cells.
    Numbers are written as numbers, not through here.
    """
    name = str(text)
    return ("'" if name.lstrip(' ').startswith(FORMULA_STARTS) else '') + terminal(name)


# What players take for the time of the next subtitle, for tags and for commands.
_OF_SUBTITLES = str.maketrans('<>{}', '\u2039\u203a()')


def subtitle(text: object) -> str:
    """One line of a subtitle (SubRip), whose marks players show and do not obey."""
    return terminal(text).translate(_OF_SUBTITLES)


def json_text(value: Any, indent: int | None = None) -> str:
    r"""JSON that every UTF-8 file takes, and from which `json.loads` makes the same strings.

    Letters stay readable. What `terminal` would change is written as `\uXXXX`; a name that is not
    UTF-8 comes back as Python had it, and opens its file.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _UNSAFE_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], text)


def file_name(text: object) -> str:
    """The stem of a file name, made of a name: one path component, visible, of bounded length.

    Different names may give the same stem.

    Returns:
      At most `MAX_NAME_BYTES` bytes of UTF-8 without separators and control characters, not
      starting with a dot, a dash or a space; 'video' if nothing is left.
    """
    name = re.sub(r'[/\\:*?"<>|]', '_', _UNSAFE.sub('_', str(text)))
    name = name.encode()[:MAX_NAME_BYTES].decode('utf-8', 'ignore')
    return name.lstrip('.- ').rstrip('. ') or 'video'


class Console(rich.console.Console):
    """A console on which strings are data: no markup, no emoji codes, no control sequences.

    What is styled is passed with `style=` or as `styled`. In a log rows are 140 columns wide.
    """

    def __init__(self, stderr: bool = False, **options: Any):
        stream = options.get('file') or (sys.stderr if stderr else sys.stdout)
        options.setdefault('width', None if stream.isatty() else 140)
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(lines(text), **options)


def styled(*parts: str | tuple[str, str]) -> Text:
    """A line of strings and (string, style) pairs, for `Console`."""
    return Text.assemble(
        *(terminal(p) if isinstance(p, str) else (terminal(p[0]), p[1]) for p in parts)
    )


class LogFormatter(logging.Formatter):
    """Messages of a log, whose paths, names and reasons move no cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return lines(super().format(record))
