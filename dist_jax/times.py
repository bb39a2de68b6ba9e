"""Lengths and places in a video: as people write them, and as they read them."""

from __future__ import annotations

import math
import re

_PART = re.compile(r'([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(ms|s|m|h|)\s*')
_UNITS = {'': 1.0, 'ms': 1e-3, 's': 1.0, 'm': 60.0, 'h': 3600.0}


def seconds(text: str) -> float:
    """Reads a length of time: '2', '2s', '500ms', '1m', '1m30s', '0.5h'.

    Raises:
      ValueError: it is none.
    """
    parts = list(_PART.finditer(text.strip()))
    whole = ''.join(part[0] for part in parts) == text.strip()
    if not parts or not whole or (len(parts) > 1 and not all(part[2] for part in parts)):
        raise ValueError(f'{text!r} is no length of time: write seconds, or 2s, 500ms, 1m, 1m30s')
    found = sum(float(part[1]) * _UNITS[part[2]] for part in parts)
    if not math.isfinite(found):
        raise ValueError(f'{text!r} is no length of time that a video has')
    return found


def clock(seconds: float) -> str:
    """Seconds as 1:02:03.4 or 2:03.4."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    ahead = f'{hours}:{minutes:02}' if hours else f'{minutes}'
    return f'{ahead}:{rest // 10:02}.{rest % 10}'


def subtitle_clock(seconds: float) -> str:
    """Seconds as SubRip has them, 01:02:03,456."""
    rest, milliseconds = divmod(round(seconds * 1000), 1000)
    minutes, rest = divmod(rest, 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours:02}:{minutes:02}:{rest:02},{milliseconds:03}'
