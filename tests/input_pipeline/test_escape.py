"""Text from outside on its way to terminals, pages, tables and files."""

import csv
import io
import json
import logging
import os

import pytest
from rich.table import Table

from input_pipeline import escape

NOT_UTF8 = os.fsdecode(b'caf\xe9.mp4')
NAMES = [
    'plain.mp4',
    'a[/]b.mp4',
    'a\\[/b]',
    'ends in \\',
    ':smile: [link=http://x]y',
    '\x1b[2J\x1b]0;title\x07',
    '\x9b31mred',
    'txt.\u202e4pm',
    'two\nlines\r',
    NOT_UTF8,
    '=HYPERLINK("http://x")',
    '$x^2$ <script>alert(1)</script>',
    '`' * 4,
    '\U000e0041',
]


@pytest.mark.parametrize('name', NAMES)
def test_no_control_character_and_no_surrogate_leaves(name):
    for write in (
        escape.terminal,
        escape.lines,
        escape.html,
        escape.csv_cell,
        escape.subtitle,
        escape.file_name,
        escape.markdown,
        escape.json_text,
    ):
        text = write(name)
        text.encode('utf-8')
        assert not {'\x1b', '\x07', '\x9b', '\u202e', '\r', '\udce9'} & set(text), write


def test_readable_names_stay_as_they_are():
    for name in ('opening a door', 'дверь', '开门', 'می\u200cکنم', 'a\\b [c]', '👩\u200d🚀'):
        assert escape.terminal(name) == escape.csv_cell(name) == name
        assert json.loads(escape.json_text(name)) == name


def test_a_byte_that_is_not_utf8_is_shown_as_a_byte():
    assert escape.terminal(NOT_UTF8) == r'caf\xe9.mp4'


@pytest.mark.parametrize('name', NAMES)
def test_json_gives_back_the_same_name(name):
    assert json.loads(escape.json_text({'path': [name]}, indent=1)) == {'path': [name]}


@pytest.mark.parametrize('start', ['=', '+', '-', '@', '\t', '\r', '  =', '\uff1d'])
def test_a_spreadsheet_computes_nothing(start):
    buffer = io.StringIO()
    csv.writer(buffer).writerow([escape.csv_cell(start + 'cmd')])
    (cell,) = next(csv.reader(io.StringIO(buffer.getvalue())))
    assert cell.startswith("'")


def test_a_subtitle_holds_no_times_and_no_tags():
    text = escape.subtitle('a\n1 --> 2 <i>b</i> {\\an8}')
    assert not set('<>{}\n') & set(text) and 'b' in text


@pytest.mark.parametrize('name', [*NAMES, '../../etc/passwd', '...', '', '-rf', 'é' * 300])
def test_a_file_name_is_one_short_component(name, tmp_path):
    stem = escape.file_name(name)
    (tmp_path / (stem + '-12-attention.png')).write_bytes(b'')
    assert os.path.basename(stem) == stem and not stem.startswith(('.', '-'))
    assert [path.name for path in tmp_path.iterdir()] == [stem + '-12-attention.png']


@pytest.mark.parametrize('name', NAMES)
def test_a_console_shows_names_as_they_are(name):
    buffer = io.StringIO()
    console = escape.Console(file=buffer, width=200)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console.print(table)
    console.print(name, soft_wrap=True)
    console.print(escape.styled(('said: ', 'bold red'), name), soft_wrap=True)
    shown = buffer.getvalue()
    assert shown.count(escape.lines(name).split('\n')[0]) >= 4
    assert not {'\x1b', '\x07', '\x9b', '\u202e', '\udce9'} & set(shown)


def test_a_log_shows_names_and_keeps_its_lines():
    record = logging.LogRecord('x', logging.WARNING, 'f', 1, 'bad: %s\nnext', (NAMES[5],), None)
    text = escape.LogFormatter('%(message)s').format(record)
    assert text == 'bad: \\x1b[2J\\x1b]0;title\\x07\nnext'


def test_a_fence_in_a_text_does_not_end_its_block():
    assert escape.markdown('a\n```\nb') == '````\na\n```\nb\n````'
