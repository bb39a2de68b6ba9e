# ruff: noqa: RUF001 - the multiplication signs are meant
"""The picture in the documentation says what the code does, and comes out the same each time."""

import dataclasses
import xml.etree.ElementTree as ElementTree

import pytest

from tools import draw_architecture


@pytest.fixture(scope='module')
def figures():
    return draw_architecture.collect('b16_8+16f_k400')


def _words(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


def test_committed_picture_is_the_current_one(figures):
    assert draw_architecture.draw(figures).encode() == draw_architecture.DEFAULT_OUT.read_bytes()


def test_shapes_and_counts_are_those_of_the_paper(figures):
    words = ' '.join(_words(draw_architecture.draw(figures)))
    assert 'trained: 26.1 M' in words and 'frozen' in words
    for shape in ('B × 16 × 224 × 224 × 3', 'B·8 × 197 × 768', 'B × 16 × 14 × 14 × 96'):
        assert shape in words


def test_picture_follows_the_figures(figures):
    other = dataclasses.replace(figures, num_frames=32, layers=24)
    words = ' '.join(_words(draw_architecture.draw(other)))
    assert '1 … 24' in words and 'B·16 × 197 × 768' in words


def test_everything_lies_on_the_paper(figures):
    root = ElementTree.fromstring(draw_architecture.draw(figures))
    for box in root.iter('{http://www.w3.org/2000/svg}rect'):
        right = float(box.get('x', 0)) + float(box.get('width'))
        bottom = float(box.get('y', 0)) + float(box.get('height'))
        assert right <= draw_architecture.WIDTH and bottom <= draw_architecture.HEIGHT


def test_command_writes_the_file_and_refuses_unknown_variants(tmp_path, capsys):
    out = tmp_path / 'docs' / 'a.svg'
    assert draw_architecture.main(['--out', str(out)]) == 0
    assert out.read_bytes() == draw_architecture.DEFAULT_OUT.read_bytes()
    assert draw_architecture.main(['--variant', 'b16_8+16f_k40']) == 2
    assert 'did you mean' in capsys.readouterr().err
