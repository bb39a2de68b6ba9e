"""What the markers of a JPEG file say of it, before anything is decoded or allocated."""

import re
from typing import NamedTuple

START = b'\xff\xd8\xff'
_FILL = re.compile(rb'\xff+')
# Full ones of a file of 64 MiB are a thousand.
_MOST_SEGMENTS = 2**14
_INDEX = b'MPF\0'  # of multi-picture files, as telephones and stereo cameras write them
_SCAN, _END = b'\xff\xda', b'\xff\xd9'
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential and progressive
# Lossless, hierarchical and arithmetic frames, and markers without a length: not of a header that
# all decoders read alike.
_OTHERS = (*range(0x02), 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xDA), 0xFF)


class Frame(NamedTuple):
    """Height and width in pixels as stored, before an EXIF orientation turns them."""

    height: int
    width: int


def _next_segment(content: bytes, position: int) -> int:
    length = int.from_bytes(content[position + 2 : position + 4], 'big')
    return _without_fill(content, position + 2 + length)


def _without_fill(content: bytes, position: int) -> int:
    """The position of a marker itself, before which there may be any number of 0xff."""
    if content[position : position + 2] != b'\xff\xff':
        return position
    return _FILL.match(content, position).end() - 1


def _first_scan(content: bytes) -> int:
    """Position behind the segments of the header, which state their lengths."""
    position = _without_fill(content, 2)
    for _ in range(_MOST_SEGMENTS):
        if content[position : position + 1] != b'\xff' or content[position : position + 2] == _SCAN:
            break
        position = _next_segment(content, position)
    return position


def has_end(content: bytes) -> bool:
    """Whether a JPEG has its end marker; decoders paint what is missing grey, without a word."""
    return content.find(_END, _first_scan(content)) >= 0


def count_scans(content: bytes) -> int:
    """Passes over the picture; decoding takes as long as all of them."""
    return content.count(_SCAN, _first_scan(content))


def find_frame(content: bytes) -> Frame | None:
    """Looks whether bytes are one ordinary JPEG picture.

    Args:
      content: of a whole file.

    Returns:
      Its frame, the first of a file with a multi-picture index, where others are previews, depths
      and the like; None for what is no JPEG, has no end, holds several pictures without an index,
      or is not grey, YCbCr or RGB of 8 bits in Huffman codes.
    """
    if not content.startswith(START):
        return None
    scan = _first_scan(content)
    end = content.find(_END, scan)
    if content[scan : scan + 2] != _SCAN or end < 0:
        return None
    one, found, position = content.find(START, end) < 0, None, _without_fill(content, 2)
    while position < scan:
        marker = content[position + 1]
        if marker in _OTHERS or (marker in _FRAMES and found):
            return None
        if marker in _FRAMES:
            precision, *sides, components = content[position + 4 : position + 10].ljust(6, b'\0')
            found = Frame(256 * sides[0] + sides[1], 256 * sides[2] + sides[3])
            if precision != 8 or components not in (1, 3) or not min(found):
                return None
        one |= marker == 0xE2 and content.startswith(_INDEX, position + 4)
        position = _next_segment(content, position)
    return found if one else None
