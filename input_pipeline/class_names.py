"""When two class names are one: lists write the same class in several ways."""

_REPLACED = str.maketrans({'"': None, '\u201c': None, '\u201d': None, '_': ' ', '\u2019': "'"})


def clean(name: str) -> str:
    """A class name as it is written out.

    Double quotes go, underscores become spaces, a typographic apostrophe becomes a plain one, white
    space is stripped at the ends and one space elsewhere. Case, other signs and accents stay.
    """
    return ' '.join(name.translate(_REPLACED).split())


def key(name: str) -> str:
    """Equal for two names exactly if `clean` and case folding make them equal."""
    return clean(name).casefold()
