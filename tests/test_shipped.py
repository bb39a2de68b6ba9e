"""The CLIP in the package: the file that was tested, whole, and good at what it says."""

import hashlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dist_jax
from dist_jax import backbones, convert, shipped
from dist_jax.models import converted
from dist_jax.models.backbone import Taps
from dist_jax.models.frozen import text_features
from dist_jax.models.layers import l2_normalize
from input_pipeline import motion_world
from input_pipeline.tokenizer import tokenize

SIZE = shipped.SPEC.image_size
CARD = shipped.FILE.with_suffix('.md')


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    folder = shipped.convert_into(str(path))
    assert shipped.convert_into(str(path)) == folder  # not made again
    return backbones.find('tiny_clip', folder, SIZE, '')


def test_its_card_has_its_digest():
    digest = hashlib.sha256(shipped.FILE.read_bytes()).hexdigest()
    assert digest in CARD.read_text()
    assert shipped.FILE.stat().st_size < 8e6


def test_converted_by_hand_its_heads_are_a_guess_that_is_said(tmp_path, caplog):
    found = convert.convert(shipped.FILE, tmp_path / 'guessed', kind='openai')['spec']
    assert (found['num_heads'], found['text_num_heads']) == (1, 1)
    assert 'how many heads' in caplog.text
    assert '--num_heads=N' in caplog.text and '--text_num_heads=N' in caplog.text
    caplog.clear()
    shipped.write(tmp_path / 'known')
    assert not caplog.text


def test_it_knows_what_it_sees(backbone):
    """Frames of clips that it was not trained on, and looks that nobody showed it."""
    assert backbone.spec == shipped.SPEC and backbone.name == 'tiny_clip'
    params = converted.load_params(backbone.path, as_numpy=True)

    @jax.jit
    def embed(pictures):
        pixels = backbone.kind.pixels.normalize(pictures, jnp.float32)
        found = backbone.encode_image(params['visual'], pixels, Taps(embedding=True))
        return l2_normalize(found['embedding'])

    def top1(split, count):
        clips = [motion_world.plan_clip(0, split, k) for k in range(count)]
        pictures = [motion_world.render_clip(clip, SIZE, np.zeros(1))[0] for clip in clips]
        names = motion_world.class_names(split)[0]
        tokens = tokenize(names, backbone.spec.context_length)
        texts = text_features(params['text'], (tokens,), backbone)[0]
        labels = [motion_world.labels(0, split, k)[0] for k in range(count)]
        return (np.asarray(embed(np.stack(pictures)) @ texts.T).argmax(1) == labels).mean()

    assert top1('test', 160) > 0.6  # of 30 looks
    assert top1('new_looks', 96) > 0.7  # of 6


def test_it_is_installed_with_the_package(tmp_path):
    root = Path(shipped.__file__).parents[1]
    command = [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(tmp_path)]
    subprocess.run(command, check=True, cwd=root)
    for file in (shipped.FILE, CARD):
        assert (tmp_path / file.relative_to(root)).read_bytes() == file.read_bytes()


def test_its_name_is_enough_without_a_run(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    model = dist_jax.load('tiny_clip', labels=['a red square', 'a blue circle'])
    frames = np.full((8, SIZE, SIZE, 3), (0, 0, 255), np.uint8)
    assert model.score(frames).argmax() == 1
    folder = shipped.folder_of('tiny_clip')
    assert folder.startswith(str(tmp_path / 'cache')) and shipped.folder_of('tiny_clip') == folder
    (tmp_path / 'tiny_clip').mkdir()  # one's own is taken first
    assert shipped.folder_of('tiny_clip') == 'tiny_clip' and shipped.folder_of('x') == 'x'
