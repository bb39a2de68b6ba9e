"""Clips with sentences: what they say is what is seen, and it takes all of it to find a clip."""

import functools
import re
from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from video_files import contents

from dist_jax import recipe
from dist_jax.configs import base
from dist_jax.dataset import make
from input_pipeline import motion_clips, world
from input_pipeline.captions import CaptionPairs, check_captions
from input_pipeline.datasets import DATASETS
from input_pipeline.motion_captions import (
    COLOURS,
    LOOKS,
    MOTIONS,
    NUM_WORDINGS,
    combination,
    describe,
    generate,
    render_clip,
)
from input_pipeline.sources import open_source
from input_pipeline.tokenizer import tokenize_counted

SMALL = {'num_train': 10, 'num_val': 9, 'size': 48, 'num_frames': 8}
ALL = [describe(look, motion) for look in LOOKS for motion in range(len(MOTIONS))]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'clips'
    assert generate(path, **SMALL)
    return path


def test_while_a_built_in_set_is_made_there_are_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, 'Bar', functools.partial(recipe.Bar, silence=0.0))
    monkeypatch.setattr(recipe, 'DATASETS', {'small': SimpleNamespace(generate=_small)})
    recipe.make_builtin('small', str(tmp_path / 'set'))
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith('make 9/19 47 %') for line in lines)


def _small(folder, progress):
    generate(folder, **SMALL, progress=progress)


def test_lists_open_as_a_run_opens_them_without_labels(folder):
    config = base.get_config()
    base.demo(config)
    config.data.update(name='motion_captions', root=str(folder))
    recipe.prepare_builtin_data(config, '')
    assert config.data.label_map == '' and DATASETS['motion_captions'].flip is None
    for split, count in (('train', 10), ('val', 9)):
        source = open_source(config.data[f'{split}_list'], usual_format='json', purpose=split)
        check_captions(source, folder, 32)
        assert len(source) == count and source.class_names == ()
        assert len(CaptionPairs(source)) == NUM_WORDINGS * count
        for k, record in enumerate(source):
            assert record.captions == describe(*combination(0, split, k))
            assert record.path == f'{folder}/{split}/{k:06d}.mp4'


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(folder, tmp_path):
    generate(tmp_path / 'again', **SMALL, num_threads=3)
    assert contents(tmp_path / 'again') == contents(folder)
    other = [combination(1, 'val', 8 * k)[0] for k in range(9)]
    assert other != [combination(0, 'val', 8 * k)[0] for k in range(9)]
    assert not generate(folder, **SMALL)
    with pytest.raises(ValueError, match=r"holds another set.*'motion_captions', 'motion_clips'"):
        motion_clips.generate(folder)


def test_no_two_looks_or_motions_share_a_sentence_and_none_is_cut():
    sentences = [sentence for clip in ALL for sentence in clip]
    assert len(set(sentences)) == len(sentences) == len(ALL) * NUM_WORDINGS == 2304
    assert tokenize_counted(sentences, 32, truncate=True)[1].max() <= 32


def test_validation_clips_need_look_and_motion_and_none_is_there_twice():
    clips = [combination(0, 'val', k) for k in range(200)]
    assert len(set(clips)) == 200
    assert set(Counter(look for look, _ in clips).values()) == {8}
    assert set(Counter(motion for _, motion in clips).values()) == {25}
    most = [combination(0, 'val', k) for k in range(len(ALL))]
    assert len(set(most)) == len(ALL) == 576
    train = {combination(0, 'train', k) for k in range(1000)}
    assert train == set(most)


def test_every_sentence_says_look_and_motion():
    for look in LOOKS[::7]:
        for motion, name in enumerate(MOTIONS):
            for sentence in describe(look, motion):
                assert f' {look.shape}' in sentence and f'{look.colour}' in sentence
                words = {'halved': 'dark', 'striped': 'strip', 'checked': 'check'}
                assert words[look.texture] in sentence
                found = re.findall('left|right|up|rises|down|sinks', sentence)
                ways = [{'rises': 'up', 'sinks': 'down'}.get(word, word) for word in found]
                assert 'moves ' + ', then '.join(ways) == name


def test_the_object_is_alone_and_has_the_colour_of_its_name():
    hues = {'red': 0, 'yellow': 30, 'green': 60, 'blue': 112, 'purple': 142}  # of 180
    for k, look in enumerate(LOOKS):
        picture = world.draw_object(np.random.default_rng(k), 96, look)
        ground = picture[0, 0].astype(int)
        thing = (np.abs(picture - ground) > 12).any(2).astype(np.uint8)
        thing = cv2.morphologyEx(thing, cv2.MORPH_CLOSE, np.ones((7, 7)))
        assert cv2.connectedComponents(thing)[0] == 2  # the ground and one object
        hue, saturation, value = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)[thing > 0].T
        bright = value > 180
        assert bright.mean() > 0.2
        if look.colour == 'white':
            assert np.median(saturation[bright]) < 60
        else:
            distance = (hue[bright].astype(int) - hues[look.colour] + 90) % 180 - 90
            assert abs(np.median(distance)) < 12 and np.median(saturation[bright]) > 120
    assert set(hues) | {'white'} == set(COLOURS)


@pytest.mark.parametrize('index', range(8))
def test_the_object_moves_as_the_sentences_say(index):
    """By correlation of neighbouring frames; the motions themselves are those of the clips."""
    frames = render_clip(0, 'train', index, 32, 48).astype(float).sum(3)
    spectra = np.fft.fft2(frames - frames.mean((1, 2), keepdims=True))
    correlation = np.fft.ifft2(spectra[1:] * spectra[:-1].conj()).real.reshape(31, -1)
    steps = (np.stack(np.divmod(correlation.argmax(1), 48), 1) + 24) % 48 - 24
    step = {'right': [0, 3], 'left': [0, -3], 'down': [3, 0], 'up': [-3, 0]}
    first, second = MOTIONS[combination(0, 'train', index)[1]].split()[1::2]
    assert steps[:16].tolist() == [step[first.strip(',')]] * 16
    assert steps[16:].tolist() == [step[second]] * 15


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'size': 50}, 'size=50'),
        ({'num_frames': 10}, 'num_frames=10'),
        ({'num_val': 577}, 'num_val=577 is more than the 576'),
    ],
)
def test_wrong_arguments_are_errors(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / 'clips', **(SMALL | change))
    assert not (tmp_path / 'clips').exists()


def test_command_writes_the_set_and_a_contact_sheet(tmp_path, capsys):
    out = tmp_path / 'clips'
    arguments = ['--captions', '--out', str(out), '--num_train', '2', '--num_val', '10']
    assert make.main([*arguments, '--frames', '8']) == 0
    assert (out / 'contact_sheet.png').read_bytes()[:4] == b'\x89PNG'
    assert f'wrote {out}' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make.main([*arguments, '--images'])
    assert '--images: not allowed with argument --captions' in capsys.readouterr().err
