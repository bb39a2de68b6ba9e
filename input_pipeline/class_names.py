"""Class names: when two are one, which a mirror exchanges, and what they say in words."""

import re
from collections.abc import Sequence

_REPLACED = str.maketrans({'"': None, '\u201c': None, '\u201d': None, '_': ' ', '\u2019': "'"})
_MIRRORED = {
    'left': 'right',
    'leftward': 'rightward',
    'leftwards': 'rightwards',
    'clockwise': 'counterclockwise',
}
_MIRRORED |= {other: side for side, other in _MIRRORED.items()}
# Between 'Eye' and 'Makeup'; 'iPhone', 'TV', 'PhD' and '4x4' stay whole.
_WORD_ENDS = re.compile(r'(?<=[A-Za-z][a-z])(?=[A-Z][a-z])')


def clean(name: str) -> str:
    """A class name as it is written out.

    Double quotes go, underscores become spaces, a typographic apostrophe becomes a plain one, white
    space is stripped at the ends and one space elsewhere. Case, other signs and accents stay.
    """
    return ' '.join(name.translate(_REPLACED).split())


def key(name: str) -> str:
    """Equal for two names exactly if `clean` and case folding make them equal."""
    return clean(name).casefold()


def mirror_pairs(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Classes that a mirror turns into each other.

    Args:
      names: class names by index.

    Returns:
      Pairs (a, b), a < b, such that name a becomes name b when the words left and right (leftward,
      rightward; clockwise, counterclockwise) change places in it: 'from left to right' and 'from
      right to left'. A name that stays the same, or whose mirror image is no class, is in no pair.
    """
    keys = [key(_WORD_ENDS.sub(' ', name)) for name in names]
    place = {text: index for index, text in enumerate(keys)}
    pairs = []
    for index, text in enumerate(keys):
        words = re.split(r'\b', text)
        other = place.get(''.join(_MIRRORED.get(word, word) for word in words), index)
        if index < other:
            pairs.append((index, other))
    return tuple(pairs)


def as_words(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as a text tower should read them.

    Where no name has a space, the names are identifiers: 'ApplyEyeMakeup' becomes 'Apply Eye
    Makeup', 'brush_hair' becomes 'brush hair'. Where any has one they are texts, and stay.
    """
    if any(' ' in name for name in names):
        return tuple(names)
    return tuple(_WORD_ENDS.sub(' ', name).replace('_', ' ').strip() or name for name in names)
