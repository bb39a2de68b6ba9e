"""Models that go to the Hugging Face Hub and come back, over HTTP; and what others put there."""

import hashlib
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import fake_hub
import numpy as np
import pytest
import text_run
from huggingface_hub import constants

import dist_jax
from dist_jax import convert, main
from dist_jax.configs import base
from dist_jax.hub import card as model_card
from dist_jax.hub import client as hub
from dist_jax.hub import release
from dist_jax.models import FAMILIES, converted, digests

GOLDEN = Path(__file__).parent / 'golden' / 'clip'
CLIP = {file.name: file.read_bytes() for file in (GOLDEN / 'hf').glob('[cm]*')}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(workdir, a video)."""
    data, workdir = text_run.train_in(tmp_path_factory.mktemp('hub'), 4, val_list='val.txt')
    name = (data / 'val.txt').read_text().split()[0]
    return workdir, str(data / name)


@pytest.fixture(scope='module')
def released(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp('released') / 'folder'
    release.write(folder, run[0], name='me/mine')
    return folder


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.getbasetemp() / 'xdg_cache'))


@pytest.fixture
def server(tmp_path, monkeypatch):
    found = fake_hub.FakeHub()
    monkeypatch.setenv('HF_ENDPOINT', found.url)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'hf_cache'))
    monkeypatch.setenv('HF_TOKEN', fake_hub.TOKEN)
    # Its own upload protocol is a binary that no small server can answer.
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    yield found
    found.close()


def resealed(folder, target, change):
    """A copy of a release whose config.json was changed by somebody who can compute the seal."""
    shutil.copytree(folder, target)
    metadata = json.loads((target / release.CONFIG).read_text())
    metadata.pop(digests.SEAL)
    change(metadata)
    (target / release.CONFIG).write_text(json.dumps(digests.seal(metadata)))
    return target


def test_a_run_that_is_pushed_and_pulled_gives_the_same_scores(
    run, server, tmp_path, monkeypatch, capsys
):
    workdir, video = run
    monkeypatch.chdir(tmp_path)
    assert main.main(['push', workdir, 'me/mine', '--private', '--license=mit']) == 0
    assert f'{server.url}/me/mine/commit/' in capsys.readouterr().out
    files = server.files('me/mine')
    assert set(files) == {'.gitattributes', *release.FILES} and 'me/mine' in server.private
    card = files['README.md'].decode()
    model = dist_jax.load(workdir)
    for text in ('license: "mit"', "load('hf://me/mine')", 'top-1', *model.labels[0]):
        assert text in card
    assert workdir not in card + files['config.json'].decode()
    pulled = dist_jax.load('hf://me/mine')
    np.testing.assert_array_equal(pulled.score(video), model.score(video))
    np.testing.assert_array_equal(pulled.embed(video), model.embed(video))
    assert pulled.labels == model.labels
    other = ['running', 'walking']
    np.testing.assert_array_equal(pulled.score(video, other), model.score(video, other))
    # The commands take it, too.
    assert main.main(['predict', '--workdir=hf://me/mine', video]) == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert any(name in said for name in model.labels[0])
    assert [path.name for path in Path('predictions').iterdir()] == [f'{Path(video).stem}.png']
    assert main.main(['features', '--workdir=hf://me/mine', video, '--out=x']) == 2
    assert 'hf://me/mine is a release' in capsys.readouterr().err
    # Without a network, what was fetched is there.
    server.broken = True
    np.testing.assert_array_equal(dist_jax.load('hf://me/mine').score(video), model.score(video))


def test_a_folder_is_written_first_and_uploaded_as_it_is(run, server, tmp_path, capsys):
    workdir, video = run
    folder = tmp_path / 'given'
    dry = ['push', workdir, 'me/later', '--dry_run', f'--output={folder}']
    assert main.main(dry) == 0 and main.main(dry) == 0
    assert not server.requests and '8 classes' in capsys.readouterr().out
    model = dist_jax.load(folder)
    np.testing.assert_array_equal(model.score(video), dist_jax.load(workdir).score(video))
    card = (folder / 'README.md').read_text() + '\nThank you.\n'
    (folder / 'README.md').write_text(card)
    assert main.main(['push', str(folder), 'me/later', '--revision=v1', '--message=first']) == 0
    assert server.messages == ['first'] and 'config.json' not in server.files('me/later')
    assert server.files('me/later', 'v1')['README.md'].decode() == card
    assert dist_jax.load('hf://me/later@v1').labels == model.labels
    assert main.main(['push', str(folder), 'me/later', '--step=2']) == 2
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/precious').touch()
    assert main.main([*dry[:-1], f'--output={tmp_path / "other"}']) == 1
    assert 'is no release' in capsys.readouterr().err


def test_a_card_of_ones_own_and_other_files_stay(run, server):
    old = {'README.md': b'# by hand', 'notes.txt': b'', release.BACKBONE: b'x'}
    server.add('me/old', old)
    target = run[0] + '_none'
    saved = release.write(target, run[0])
    metadata = {**saved, 'files': {release.NETWORK: saved['files'][release.NETWORK]}}
    metadata.pop(digests.SEAL)
    (Path(target) / release.CONFIG).write_text(json.dumps(digests.seal(metadata)))
    hub.push(target, 'me/old')
    files = server.files('me/old')
    assert files['README.md'] == b'# by hand' and set(files) == {
        'README.md',
        'notes.txt',
        release.CONFIG,
        release.NETWORK,
    }
    with pytest.raises(ValueError, match='pass backbone='):
        dist_jax.load('hf://me/old')
    backbone = f'{run[0]}/backbone'
    video = run[1]
    model = dist_jax.load('hf://me/old', backbone=backbone)
    np.testing.assert_array_equal(model.score(video), dist_jax.load(run[0]).score(video))


def test_a_checkpoint_is_converted_from_the_hub(server, tmp_path, capsys):
    unwanted = {'evil.py': b'raise SystemExit', 'tf_model.h5': b'h5', 'model.pkl': b'x'}
    commit = server.add('owner/clip', CLIP | unwanted)
    assert main.main(['convert', 'hf://owner/clip', str(tmp_path / 'clip')]) == 0
    convert.convert(GOLDEN / 'hf', tmp_path / 'local')
    found, local = (converted.load_metadata(tmp_path / name) for name in ('clip', 'local'))
    assert found['hub'] == f'hf://owner/clip@{commit}' and found['hub'] in capsys.readouterr().out
    assert found['params_sha256'] == local['params_sha256']
    assert found['sources'] == local['sources']
    fetched = {path.rpartition('/')[2] for _, path in server.requests if '/resolve/' in path}
    assert fetched == set(CLIP)
    # One file of it, in a folder, at a branch.
    server.add('owner/clip', {f'deep/{name}': data for name, data in CLIP.items()}, 'refs/pr/1')
    index = next(name for name in CLIP if name.endswith('.index.json'))
    for source in (f'hf://owner/clip@refs/pr/1/deep/{index}', 'hf://owner/clip@refs%2Fpr%2F1/deep'):
        metadata = convert.convert(source, tmp_path / 'again', overwrite=True)
        assert metadata['params_sha256'] == local['params_sha256']


def test_the_card_names_the_data_set_and_not_a_file(released):
    metadata = release.read(released).metadata
    text = model_card.text(metadata, 'me/mine')
    assert '"name": "motion_clips"' in text and 'on `val.txt` of `motion_clips`' in text
    metadata['config']['data']['name'] = 'custom'
    text = model_card.text(metadata, 'me/mine')
    assert '"name": "own list"' in text and 'on `val.txt`, an own list' in text


def test_the_card_says_where_a_backbone_came_from(released, tmp_path):
    def known(metadata):
        metadata['backbone']['hub'] = 'hf://owner/clip@' + 'a' * 40
        del metadata['files'][release.BACKBONE]

    folder = resealed(released, tmp_path / 'known', known)
    metadata = release.read(folder).metadata
    text = model_card.text(metadata, 'me/mine')
    assert 'base_model: "owner/clip"' in text and f'convert hf://owner/clip@{"a" * 40}' in text
    with pytest.raises(ValueError, match='dist_jax convert hf://owner/clip@aaa'):
        dist_jax.load(folder)


@pytest.mark.parametrize(
    ('source', 'text'),
    [
        ('hf://owner/none', 'no such repository, or a private one.*hf auth login'),
        ('hf://owner/gated', 'terms to be accepted first.*owner/gated'),
        ('hf://owner/clip@none', "no revision 'none'"),
        ('hf://owner/clip/none.pt', 'no such file; there are'),
        ('hf://owner/empty', 'expected one checkpoint'),
        ('hf://owner/two', 'name the file itself'),
        ('hf://owner/escapes', 'shard outside of its folder'),
        ('hf://owner/code', 'no file of weights'),
        ('hf://owner', 'names nothing on the Hub'),
        ('hf://owner/../../etc', 'names nothing on the Hub'),
        ('hf://owner/name/../../etc/passwd', 'names nothing on the Hub'),
        ('hf://owner/na\x1bme', 'names nothing on the Hub'),
    ],
)
def test_what_cannot_be_fetched_says_why(server, tmp_path, capsys, source, text):
    def index(name):
        return {'model.safetensors.index.json': json.dumps({'weight_map': {'a': name}}).encode()}

    server.add('owner/clip', CLIP)
    server.add('owner/empty', {'README.md': b''})
    server.add('owner/two', {'a.pt': b'', 'b.safetensors': b''})
    server.add('owner/gated', CLIP)
    server.add('owner/escapes', index('../../../etc/passwd'))
    server.add('owner/code', index('evil.py') | {'evil.py': b''})
    server.gated.add('owner/gated')
    server.private.add('owner/none')
    assert main.main(['convert', source, str(tmp_path / 'dest')]) == 2
    said = ' '.join(capsys.readouterr().err.split())
    assert re.search(text, said), said
    assert '\x1b' not in said and not (tmp_path / 'dest').exists()


@pytest.mark.parametrize(
    'listing',
    [
        b'<html>log in to the hotel</html>',
        [1, 2],
        {'id': 'owner/clip', 'sha': 'a' * 40, 'tags': []},
        {'id': 'owner/clip', 'sha': 'a' * 40, 'tags': [], 'siblings': [{'rfilename': 5}]},
        {
            'id': 'owner/clip',
            'sha': 'a' * 40,
            'tags': [],
            'siblings': [{'rfilename': 'model.safetensors', 'size': 'small'}],
        },
    ],
    ids=['page', 'list', 'no files', 'no names', 'no sizes'],
)
def test_an_answer_that_is_none_of_a_hub_is_said(server, tmp_path, capsys, listing):
    server.add('owner/clip', CLIP)
    server.listing = listing
    assert main.main(['convert', 'hf://owner/clip', str(tmp_path / 'dest')]) in (1, 2)
    said = capsys.readouterr().err
    assert 'hf://owner/clip' in said and 'Traceback' not in said


def test_no_network_no_rights_and_no_extra_say_what_to_do(
    released, server, tmp_path, monkeypatch, capsys
):
    server.add('owner/big', {'model.safetensors': b'x', 'config.json': b'{}'})
    monkeypatch.setattr(hub, 'MAX_BYTES', 0)
    with pytest.raises(ValueError, match=r'model.safetensors has 1 bytes, more than 0'):
        hub.fetch_checkpoint('hf://owner/big')
    with pytest.raises(ValueError, match='dist_jax convert hf://owner/big FOLDER'):
        dist_jax.load('hf://owner/big')
    for repo, text in (('others/name', 'may not write'), ('me/x/y', 'owner/name')):
        with pytest.raises(ValueError, match=text):
            hub.push(released, repo)
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(ValueError, match=r'refuses.*hf auth login'):
        hub.push(released, 'me/mine')
    server.broken = True
    with pytest.raises(ConnectionError, match=r'cannot be reached.*HF_ENDPOINT'):
        dist_jax.load('hf://me/never')
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert main.main(['convert', 'hf://owner/clip', str(tmp_path / 'dest')]) == 2
    assert 'cannot be reached' in capsys.readouterr().err
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(ConnectionError, match='HF_HUB_OFFLINE'):
        dist_jax.load('hf://me/never')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match=r"pip install 'dist_jax\[hub\]'"):
        dist_jax.load('hf://me/mine')


@pytest.mark.parametrize('family', FAMILIES)
def test_what_a_run_of_any_row_says_is_taken(family):
    file = importlib.import_module(f'dist_jax.configs.{family}')
    assert file.VARIANTS
    for row in file.VARIANTS:
        saved = release._anywhere(base.plain(file.get_config(row)))
        release._check_config(saved)
        release._check_views(base.restored(saved))


def set_in(*path):
    def change(metadata):
        *groups, name, value = path
        for group in groups:
            metadata = metadata[group]
        metadata[name] = value

    return change


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (set_in('format', 'other'), 'not of a release'),
        (set_in('format_version', 99), 'update dist_jax'),
        (set_in('format_version', 'x'), 'update dist_jax'),
        (set_in('step', '2'), "step='2'"),
        (set_in('config', []), 'config='),
        (set_in('config', 'model', None), 'config.model'),
        (set_in('config', 'model', 'family', '../evil'), 'config.model.family'),
        (set_in('config', 'model', 'family', ['dist']), 'config.model.family'),
        (set_in('config', 'model', 'no_such', 1), 'no_such'),
        (set_in('config', 'model', 'temporal_dim', 'wide'), 'temporal_dim'),
        (set_in('config', 'model', 'temporal_dim', 16), 'does not fit the model'),
        (set_in('config', 'model', 'integration_dim', 2**40), 'integration_dim'),
        (set_in('config', 'model', 'selected_layers', [9**9] * 5), 'selected_layers'),
        (set_in('config', 'model', 'selected_layers', [7]), 'no model can be made of it'),
        (set_in('config', 'model', 'remat', {'a': {'b': 1}}), 'remat'),
        (set_in('config', 'data', 'num_frames', 'many'), 'num_frames'),
        (set_in('config', 'data', 'num_frames', 4.5), 'num_frames'),
        (
            lambda found: found['config']['data'].update(num_frames=4096, image_size=4096),
            'bytes of a video',
        ),
        (set_in('config', 'data', 'name', 'nothing'), 'data.name'),
        (set_in('config', 'data', 'resize', 'x'), 'resize'),
        (set_in('config', 'eval', 'num_crops', 10**9), 'num_crops'),
        (set_in('config', 'eval', 'num_clips', -1), 'num_clips'),
        (set_in('config', 'eval', 'new', 1), 'newer version'),
        (set_in('config', 'task', 'new', {'a': 1}), 'config.task.new'),
        (set_in('config', 'task', 'new', 1), 'no model can be made of it.*new'),
        (set_in('config', 'mesh', {'data': 'x'}), 'mesh'),
        (set_in('class_names', 'abc'), 'class_names'),
        (set_in('class_names', [['a', 3]]), 'class_names'),
        (set_in('files', {}), 'files'),
        (set_in('files', '../x', {'bytes': 1, 'sha256': 'a' * 64}), 'files'),
        (set_in('files', 'network.safetensors', 'sha256', 'a' * 64), 'is not the file'),
        (set_in('files', 'backbone.safetensors', 'sha256', 'a' * 64), 'is not the file'),
        (set_in('backbone', None), 'backbone'),
        (set_in('backbone', 'params_sha256', '../../x'), 'params_sha256'),
        (set_in('backbone', 'params_sha256', 'a' * 64), 'other weights'),
        (set_in('backbone', 'family', 'x'), 'backbone.family'),
        (set_in('backbone', 'spec', 'depth', 9), 'does not fit'),
        (set_in('backbone', 'spec', 'depth', 2**60), 'backbone.spec'),
        (set_in('backbone', 'spec', 'depth', 'deep'), 'no model can be made'),
        (set_in('backbone', 'spec', 'layers', 1), 'layers'),
        (set_in('backbone', 'hub', 'hf://a/b; rm -rf /'), 'backbone.hub'),
    ],
)
def test_a_release_that_says_what_cannot_be_is_refused(
    released, tmp_path, monkeypatch, change, text
):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'empty_cache'))
    folder = resealed(released, tmp_path / 'hostile', change)
    with pytest.raises(ValueError, match=text):
        dist_jax.load(folder)


def test_files_that_are_not_what_was_written_are_refused(released, tmp_path):
    def copy(name):
        shutil.copytree(released, tmp_path / name)
        return tmp_path / name

    folder = copy('bits')
    data = bytearray((folder / release.NETWORK).read_bytes())
    data[-3] ^= 1
    (folder / release.NETWORK).write_bytes(data)
    with pytest.raises(ValueError, match=r'is not the file that config.json'):
        dist_jax.load(folder)
    folder = copy('edited')
    text = (folder / release.CONFIG).read_text()
    (folder / release.CONFIG).write_text(text.replace('moves left', 'moves LEFT'))
    with pytest.raises(ValueError, match='damaged'):
        dist_jax.load(folder)
    for name, text in (('deep', '[' * 10**6), ('none', 'no JSON'), ('list', '[1]')):
        folder = copy(name)
        (folder / release.CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r'config.json'):
            dist_jax.load(folder)
    huge = (2**40).to_bytes(8, 'little') + b'{}'

    def header(metadata):
        digest = hashlib.sha256(huge).hexdigest()
        metadata['files'][release.NETWORK] = {'bytes': len(huge), 'sha256': digest}

    folder = resealed(released, tmp_path / 'huge', header)
    (folder / release.NETWORK).write_bytes(huge)
    with pytest.raises(ValueError, match='damaged safetensors file: a header of'):
        dist_jax.load(folder)
