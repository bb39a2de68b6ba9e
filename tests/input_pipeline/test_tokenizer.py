import html
import json
from pathlib import Path

import ftfy
import numpy as np
import pytest

from input_pipeline.tokenizer import clean, tokenize, tokenize_counted

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


def test_lengths_are_those_before_the_cut_and_count_real_zeros():
    texts = ['word ' * 80, '!~', '']
    rows, lengths = tokenize_counted(texts, 12, truncate=True)
    np.testing.assert_array_equal(rows, tokenize(texts, 12, truncate=True))
    assert lengths.tolist() == [82, 4, 2]
    assert rows[1, :5].tolist() == [49406, 0, 349, 49407, 0]  # the first 0 is a token


def test_printable_ascii_is_cleaned_as_all_else_is():
    """What the short way leaves out changes nothing there."""
    rng = np.random.default_rng(0)
    printable = [chr(code) for code in range(32, 127) if chr(code) != '&']
    texts = [''.join(rng.choice(printable, rng.integers(1, 40))) for _ in range(500)]
    texts += [a + b for a in printable for b in printable]
    short = [clean(text) for text in texts]
    for text, found in zip(texts, short):
        assert found == ' '.join(html.unescape(ftfy.fix_text(text)).split()).lower()


@pytest.mark.parametrize('text', ['a' * 10_000_000, 'é ' * 5001, 'word ' * 3000])
def test_a_text_of_a_book_is_refused_at_once(text):
    with pytest.raises(
        ValueError, match=rf'{text[:4]}.*\.\.\. has {len(text)} characters'
    ) as caught:
        tokenize(text, truncate=True)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    'text', ['\0', 'a\0b', '👩‍👩‍👧 🎸' * 50, '\u202e', '\u200d' * 10_000, '<|endoftext|>']
)
def test_odd_texts_give_tokens_of_one_start_and_one_end(text):
    (row,), (length,) = tokenize_counted(text, 32, truncate=True)
    stop = min(length, 32)
    assert row[0] == 49406 and row[stop - 1] == 49407 and not row[stop:].any()
    assert (row[1 : stop - 1] < 49406).all()
