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


@functools.cache
def _vocabulary() -> instant_clip_tokenizer.Tokenizer:
    return instant_clip_tokenizer.Tokenizer()  # takes a moment to build


def clean(text: str) -> str:
    """Repairs the encoding, resolves HTML entities (doubly escaped ones too), joins white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return ' '.join(text.split()).lower()


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
      ValueError: if a text is too long and `truncate` is False, or holds bytes that are not UTF-8.

    Source: CLIP, simple_tokenizer.py; agrees with it on all recorded texts.
    """
    if context_length < 2:
        raise ValueError(f'context_length={context_length} leaves no room for start and end')
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = np.zeros((len(texts), context_length), np.int32)
    for row, text in zip(rows, texts):
        if not text.isascii() and re.search('[\ud800-\udfff]', text):
            raise ValueError(
                f'the text {terminal(text)} is not UTF-8 and says nothing to a text head: save the '
                'label map as UTF-8, or rename the folder, or use model.head=linear'
            )
        tokens = [START, *_vocabulary().encode(clean(text)), END]
        if len(tokens) > context_length:
            if not truncate:
                raise ValueError(
                    f'text of {len(tokens)} tokens is over context_length={context_length}; '
                    f'shorten it or set truncate: {text!r}'
                )
            tokens = [*tokens[: context_length - 1], END]
        row[: len(tokens)] = tokens
    return rows
