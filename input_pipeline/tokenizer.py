"""CLIP's byte-pair tokens of a text; the vocabulary comes with `instant_clip_tokenizer`."""

import functools
import html
import re
from collections.abc import Sequence

import ftfy
import instant_clip_tokenizer
import numpy as np

from input_pipeline.escape import terminal

START = 49406
END = 49407
CONTEXT_LENGTH = 77
MOST_CHARACTERS = (
    10_000  # of a text: byte pairs of a single long word take the square of its length
)


@functools.cache
def _vocabulary() -> instant_clip_tokenizer.Tokenizer:
    return instant_clip_tokenizer.Tokenizer()  # takes a moment to build


def clean(text: str) -> str:
    """Repairs the encoding, resolves HTML entities (doubly escaped ones too), joins white space."""
    # Nothing needs repair in printable ASCII, and ftfy takes most of the time.
    if not text.isascii() or not text.isprintable() or '&' in text:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return ' '.join(text.split()).lower()


def check_text(text: str) -> None:
    """Raises ValueError if a text has bytes that are not UTF-8 or over `MOST_CHARACTERS`."""
    shown = terminal(text[:60]) + '...' * (len(text) > 60)
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f'the text {shown} has {len(text)} characters, more than the {MOST_CHARACTERS} of a '
            'long description: shorten it'
        )
    if not text.isascii() and re.search('[\ud800-\udfff]', text):
        raise ValueError(
            f'the text {shown} is not UTF-8 and says nothing to a text encoder: save its '
            'file (a label map, a list of captions) as UTF-8, or rename the folder; class names '
            'may stay with model.head=linear'
        )


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> np.ndarray:
    """Tokenizes texts as CLIP does.

    Args:
      texts: one text or several; an empty text is allowed.
      context_length: tokens per row, start and end included.
      truncate: cut what is too long and keep the end token, instead of raising.

    Returns:
      (n, context_length) int32: start token, text, end token, zeros.

    Raises:
      ValueError: if a text is too long and `truncate` is False, or `check_text` refuses it.

    Source: CLIP, simple_tokenizer.py; agrees with it on all recorded texts.
    """
    return tokenize_counted(texts, context_length, truncate)[0]


def tokenize_counted(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """As `tokenize`, with the tokens that each text has before it is cut, (n,) int64.

    Padding is the id of a real token: a row alone does not say where its text ends.
    """
    if context_length < 2:
        raise ValueError(f'context_length={context_length} leaves no room for start and end')
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = np.zeros((len(texts), context_length), np.int32)
    lengths = np.zeros(len(texts), np.int64)
    for i, text in enumerate(texts):
        check_text(text)
        tokens = [START, *_vocabulary().encode(clean(text)), END]
        lengths[i] = len(tokens)
        if len(tokens) > context_length:
            if not truncate:
                raise ValueError(
                    f'text of {len(tokens)} tokens is over context_length={context_length}; '
                    f'shorten it or set truncate: {text!r}'
                )
            tokens = [*tokens[: context_length - 1], END]
        rows[i, : len(tokens)] = tokens
    return rows, lengths
