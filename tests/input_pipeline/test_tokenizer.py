import json
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.tokenizer import tokenize

GOLDEN = json.loads((Path(__file__).parents[1] / 'golden' / 'clip_tokens.json').read_text())


def test_all_recorded_texts_give_the_recorded_tokens():
    rows = tokenize(list(GOLDEN))
    assert rows.shape == (len(GOLDEN), 77)
    assert rows.dtype == np.int32
    for text, row in zip(GOLDEN, rows):
        tokens = GOLDEN[text]
        assert row[: len(tokens)].tolist() == tokens, text
        assert not row[len(tokens) :].any(), text


def test_empty_text_is_start_and_end():
    assert tokenize('', 4).tolist() == [[49406, 49407, 0, 0]]


def test_bytes_that_are_no_text_are_an_error_that_names_it():
    with pytest.raises(ValueError, match=r'text caf\\xe9 is not UTF-8 .* model.head=linear'):
        tokenize('caf\udce9')


def test_long_text_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r'82 tokens is over context_length=77.*truncate.*word'):
        tokenize(['fine', 'word ' * 80])


def test_truncation_keeps_the_end_token():
    row = tokenize('word ' * 80, truncate=True)[0]
    assert row[0] == 49406
    assert row[-1] == 49407
    assert (row[1:-1] == row[1]).all()


def test_text_that_just_fits_is_whole():
    np.testing.assert_array_equal(tokenize('word ' * 75), tokenize('word ' * 75, truncate=True))


def test_doubly_escaped_html_and_broken_encoding_are_repaired():
    np.testing.assert_array_equal(tokenize('a &amp;amp; b'), tokenize('a & b'))
    np.testing.assert_array_equal(tokenize('cafÃ©'), tokenize('Café'))
