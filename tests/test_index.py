"""An index of a folder and its search: what is in the file, resuming, other people's files."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from video_files import pictures, write_video

from dist_jax import backbones, main, paths
from dist_jax.embedding import journal as embed_journal
from dist_jax.embedding.embedder import Embedder
from dist_jax.models import converted
from dist_jax.models.backbone import Taps
from dist_jax.models.frozen import text_features
from dist_jax.search import index_file, index_model
from dist_jax.search import query as search
from input_pipeline.tokenizer import tokenize
from input_pipeline.video_list import Record
from input_pipeline.windows import WindowReader

WINDOWS = ['--window=1', '--stride=0.5', '--num_frames=2', '--batch_size=4']


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('backbone') / 'tiny')
    backbones.write_random(path, 'tiny')
    return path


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Six videos in two depths, one without a UTF-8 name; four files that are none."""
    folder = tmp_path_factory.mktemp('index') / 'videos'
    (folder / 'b' / 'c').mkdir(parents=True)
    names = ['a.mp4', 'b/c/d.mp4', 'b/e.mkv', 'b/f.MP4', 'g.mp4', os.fsdecode(b'h\xe9 [red].mp4')]
    for seed, name in enumerate(names):
        write_video(folder / name, pictures(8 + 6 * seed, seed=seed), fps=10)
    (folder / 'b' / 'broken.mp4').write_bytes(b'no video')
    (folder / 'cut.mp4').write_bytes((folder / 'a.mp4').read_bytes()[:-100])
    (folder / '.hidden.mp4').write_bytes(b'')
    (folder / 'notes.txt').write_text('words')
    return folder


@pytest.fixture(scope='module')
def made(videos, backbone, tmp_path_factory):
    """An index of `videos` by the command."""
    out = tmp_path_factory.mktemp('made') / 'my.index'
    assert run('index', videos, '--out', out, f'--backbone={backbone}', *WINDOWS) == 0
    return out


def run(*arguments):
    try:
        return main.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code


def copy_of(folder, target):
    """A copy with the same times of change."""
    return Path(shutil.copytree(folder, target / 'videos'))


def test_the_file_holds_what_the_documentation_says(made, videos, backbone):
    tensors = load_file(made)
    names = bytes(tensors['paths'])
    ends = tensors['path_ends'].tolist()
    found = [os.fsdecode(names[a:b]) for a, b in zip([0, *ends], ends)]
    assert found == paths.videos_below(str(videos))[0]
    assert len(found) == 8 and found[0] == 'a.mp4' and found[1] == 'b/broken.mp4'
    bad = {found[k] for k in set(range(8)) - set(tensors['video'].tolist())}
    assert bad == {'b/broken.mp4', 'cut.mp4'}
    assert tensors['vectors'].dtype == np.float16
    assert tensors['vectors'].shape == (len(tensors['spans']), 64)
    np.testing.assert_allclose(np.linalg.norm(tensors['vectors'].astype(float), axis=1), 1, 1e-3)
    with safe_open(made, 'np') as file:
        metadata = file.metadata()
    settings = json.loads(metadata['settings'])
    assert metadata['format'] == 'dist_jax index' and metadata['version'] == '1'
    assert settings['model']['sha256'] == converted.load_metadata(backbone)['params_sha256']
    assert settings['windows'] == {'window': 1.0, 'stride': 0.5}
    opened = index_file.read(made)
    assert dict(opened.unreadable())['b/broken.mp4'].startswith('not a video: starts with')
    assert dict(opened.unreadable())['cut.mp4'].startswith('truncated: ')


def test_the_example_of_the_documentation_reads_it(made, monkeypatch, capsys):
    text = (Path(main.__file__).parents[1] / 'docs' / 'guides' / 'search.md').read_text()
    example = text.partition('```python\n')[2].partition('```')[0]
    exec(example.replace("'videos.index'", repr(str(made))), {})
    lines = capsys.readouterr().out.splitlines()
    opened = index_file.read(made)
    assert len(lines) == len(opened.spans)
    assert lines[0].startswith("'a.mp4' 0.0 0.8 ") and float(lines[0].split()[-1]) > 0.99


def test_vectors_are_those_of_the_image_tower(made, videos, backbone):
    stored = backbones.stored(backbone)
    params = converted.load_params(backbone, ['visual'])['visual']
    model = index_model.of_backbone(backbone, 2, 'float32')
    opened = index_file.read(made)
    for name in ('a.mp4', 'b/e.mkv'):
        number = [opened.name(k) for k in range(opened.num_videos)].index(name)
        rows = slice(*opened.first[number : number + 2].tolist())
        windows = list(WindowReader(model.views, 1, 0.5).read(Record(str(videos / name), (), '')))
        assert [tuple(span) for span in opened.spans[rows].tolist()] == [w[:2] for w in windows]
        clips = np.concatenate([window.clip for window in windows])
        pixels = stored.kind.pixels.normalize(clips)
        frames = stored.encode_image(params, pixels, Taps(embedding=True))['embedding']
        expected = np.asarray(frames).reshape(-1, 2, 64).mean(1)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(opened.vectors[rows], expected, atol=1e-3)


def test_a_sentence_finds_the_nearest_windows(made, backbone, tmp_path, capfd):
    picture, table = tmp_path / 'hits.png', tmp_path / 'hits.json'
    words = 'A red square moves left'
    assert run('search', made, words, f'--output={picture}', f'--json={table}', '--top=3') == 0
    said = capfd.readouterr()
    assert 'loading the backbone' not in said.err  # nobody needs the image tower
    assert '6 videos (2 others could not be read)' in said.out and str(picture) in said.out
    assert picture.read_bytes().startswith(b'\x89PNG')
    hits = json.loads(table.read_bytes())['hits']
    opened = index_file.read(made)
    params = converted.load_params(backbone, ['text'])
    tokens = tokenize([words])
    (query,) = text_features(
        params['text'], (jax.numpy.asarray(tokens),), backbones.stored(backbone)
    )
    products = opened.vectors.astype(np.float32) @ np.asarray(query)[0]
    best = {}
    for product, video, span in zip(products, opened.video.tolist(), opened.spans.tolist()):
        best[video] = max(best.get(video, (-9,)), (product, span))
    expected = sorted(((*row, video) for video, row in best.items()), reverse=True)[:3]
    for hit, (product, (start, end), video) in zip(hits, expected, strict=True):
        assert hit['score'] == pytest.approx(product, abs=1e-5)
        assert (hit['path'], hit['start'], hit['end']) == (opened.name(video), start, end)
        assert os.path.exists(hit['file']) and not hit['problem']


def test_a_video_finds_itself_and_windows_of_one_video(made, videos, tmp_path, capfd):
    table = tmp_path / 'hits.json'
    options = [f'--output={tmp_path}/a.png', f'--json={table}']
    assert run('search', made, f'--video={videos}/b/e.mkv', *options) == 0
    hits = json.loads(table.read_bytes())['hits']
    assert hits[0]['path'] == 'b/e.mkv' and hits[0]['score'] == pytest.approx(1, abs=1e-3)
    assert len({hit['path'] for hit in hits}) == 5
    assert run('search', made, f'--video={videos}/g.mp4', *options, '--all_windows', '--dark') == 0
    assert [hit['path'] for hit in json.loads(table.read_bytes())['hits']] == ['g.mp4'] * 5
    assert run('search', made, f'--video={videos}/cut.mp4', *options) == 2
    assert 'cut.mp4 cannot be read: truncated' in capfd.readouterr().err


def test_videos_that_are_gone_get_a_grey_tile(made, videos, tmp_path, capfd):
    folder = copy_of(videos, tmp_path)
    (folder / 'a.mp4').unlink()
    (folder / 'g.mp4').write_bytes((videos / 'cut.mp4').read_bytes())
    options = [f'--output={tmp_path}/a.png', f'--json={tmp_path}/a.json', f'--folder={folder}']
    assert run('search', made, 'anything', *options, '--top=9') == 0
    hits = json.loads((tmp_path / 'a.json').read_bytes())['hits']
    problems = {hit['path']: hit['problem'] for hit in hits if hit['problem']}
    assert problems == {
        'a.mp4': 'is not there any more',
        'g.mp4': 'has changed since it was indexed',
    }
    assert 'is not there any more' in capfd.readouterr().out


def test_only_what_is_new_is_embedded(made, videos, backbone, tmp_path, monkeypatch, capfd):
    folder, out = copy_of(videos, tmp_path), tmp_path / 'my.index'
    command = ['index', folder, '--out', out, f'--backbone={backbone}', *WINDOWS]
    assert run(*command) == 0
    first = out.read_bytes()
    asked = []
    embed = Embedder.embed

    def watched(self, records, *rest, **options):
        records = list(records)
        asked.append([os.path.relpath(record.path, folder) for record in records])
        return embed(self, records, *rest, **options)

    monkeypatch.setattr(Embedder, 'embed', watched)
    assert run(*command) == 0  # broken ones are tried again
    assert out.read_bytes() == first and asked.pop() == ['b/broken.mp4', 'cut.mp4']
    (folder / 'a.mp4').unlink()
    shutil.copy(videos / 'g.mp4', folder / 'b' / 'broken.mp4')
    write_video(folder / 'g.mp4', pictures(12, seed=77), fps=10)
    write_video(folder / 'new.mp4', pictures(12, seed=78), fps=10)
    (folder / 'cut.mp4').unlink()
    capfd.readouterr()
    assert run(*command) == 0
    assert asked.pop() == ['b/broken.mp4', 'g.mp4', 'new.mp4']
    assert '7 videos' in capfd.readouterr().out
    opened = index_file.read(out)
    assert opened.num_videos == 7 and not opened.unreadable()
    # The same as of an index that is new, but for the rounding of other places in a batch.
    os.replace(out, tmp_path / 'old.index')
    assert run(*command) == 0
    fresh = index_file.read(out)
    np.testing.assert_array_equal(opened.spans, fresh.spans)
    np.testing.assert_allclose(opened.vectors, fresh.vectors, atol=2e-3)


@pytest.mark.parametrize('share', [0.05, 0.4, 0.7, 0.999])
def test_a_journal_that_breaks_off_anywhere_goes_on(
    made, videos, backbone, tmp_path, monkeypatch, share
):
    out = tmp_path / 'my.index'
    command = ['index', videos, '--out', out, f'--backbone={backbone}', *WINDOWS]
    write = index_file.write
    monkeypatch.setattr(index_file, 'write', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*command)
    journal = Path(f'{out}.partial')
    content = journal.read_bytes()
    journal.write_bytes(content[: int(share * len(content))])
    monkeypatch.setattr(index_file, 'write', write)
    assert run(*command) == 0
    assert out.read_bytes() == made.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ['my.index']


def test_vectors_of_two_sizes_are_not_joined(made, tmp_path):
    opened = index_file.read(made)
    rows = {'spans': np.zeros((1, 2)), 'vectors': np.zeros((1, 32), np.float16)}
    videos = [*opened.videos(), index_file.Video('z.mp4', 1, 1, '', 1, lambda: rows)]
    with pytest.raises(index_file.IndexFileError, match='delete both and make it again'):
        index_file.write(tmp_path / 'x', opened.places, opened.settings, videos)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_index_ends_as_one_that_never_stopped(made, videos, backbone, tmp_path):
    out = tmp_path / 'my.index'
    command = [sys.executable, '-m', 'dist_jax', 'index', videos, '--out', out]
    command += [f'--backbone={backbone}', *WINDOWS]
    root = str(Path(main.__file__).parents[1])
    environment = os.environ | {'PYTHONPATH': root}
    journal = Path(f'{out}.partial')
    kills, enough = 0, 0
    while not out.exists():
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        with contextlib.closing(process.stderr):
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if journal.exists() and journal.stat().st_size > enough and kills < 3:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                time.sleep(0.001)
            process.kill()
            assert process.wait() in (0, -signal.SIGKILL), process.stderr.read()
        enough = journal.stat().st_size + 100 if journal.exists() else 0
    assert kills >= 2
    assert out.read_bytes() == made.read_bytes() and not journal.exists()


def test_none_that_can_be_read_is_no_index(backbone, tmp_path, capfd):
    (tmp_path / 'videos').mkdir()
    (tmp_path / 'videos' / 'a.mp4').write_bytes(b'')
    command = [
        'index',
        tmp_path / 'videos',
        '--out',
        tmp_path / 'x.index',
        f'--backbone={backbone}',
    ]
    assert run(*command) == 1
    assert 'none of 1 videos could be read' in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['videos']


def test_an_index_is_made_with_one_model_and_one_setting(made, videos, backbone, tmp_path, capfd):
    shutil.copy(made, tmp_path / 'my.index')
    command = ['index', videos, '--out', tmp_path / 'my.index', f'--backbone={backbone}']
    assert run(*command, '--window=2', '--num_frames=2') == 2
    said = capfd.readouterr().err
    assert 'window: 1.0 there, 2.0 now' in said and 'name another --out' in said.lower()
    (tmp_path / 'others').mkdir()
    shutil.copy(videos / 'a.mp4', tmp_path / 'others')
    command[1] = tmp_path / 'others'
    assert run(*command, *WINDOWS) == 2
    assert f'is the index of {videos}, not of' in capfd.readouterr().err
    backbones.write_random(str(tmp_path / 'other'), 'tiny', seed=1)
    command = ['index', videos, '--out', tmp_path / 'my.index', f'--backbone={tmp_path}/other']
    assert run(*command, *WINDOWS) == 2 and 'sha256: ' in capfd.readouterr().err
    assert run('search', made, 'words', f'--backbone={tmp_path}/other') == 2
    assert 'is not the model that made' in capfd.readouterr().err
    assert (tmp_path / 'my.index').read_bytes() == made.read_bytes()


def test_a_backbone_that_moved_is_named(made, backbone, tmp_path, capfd):
    tensors = load_file(made)
    with safe_open(made, 'np') as file:
        metadata = file.metadata()
    for place in ('/nowhere', 'gs://somebody/bucket'):
        places = json.loads(metadata['places']) | {'model': place}
        save_file(tensors, tmp_path / 'x', metadata | {'places': json.dumps(places)})
        assert run('search', tmp_path / 'x', 'words') == 2
        assert f'{place}, which is not a folder here; pass --backbone' in capfd.readouterr().err
    options = [f'--backbone={backbone}', f'--output={tmp_path}/a.png']
    assert run('search', tmp_path / 'x', 'words', *options) == 0


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['index'], ['required: FOLDER, --out']),
        (['index', 'none', '--out=x', '--backbone=.'], ['none: no such folder']),
        (['index', '.', '--out=x'], ['pass --workdir=RUN for a retrieval run, or --backbone=']),
        (['index', '.', '--out=x', '--backbone=b'], ['--backbone: no folder b (`dist_jax conv']),
        (['index', '.', '--out=x', '--backbone=.', '--batch_size=0'], ['--batch_size=0 must be']),
        (['index', '.', '--out=x', '--backbone=.'], ['no video in this folder, nothing']),
        (['index', '.', '--out=x', '--backbone=.', '--step=3'], ['--step and --config go with']),
        (['search', 'none', 'words'], ['no file or folder none']),
        (['search', '.'], ['a sentence in quotes, or --video=FILE']),
        (['search', '.', 'words', '--video=.'], ['a sentence in quotes, or --video=FILE']),
        (['search', '.', '--top=0', 'words'], ['--top=0 must be at least 1']),
        (['search', '.', 'words', '--output=.'], ['. is what is searched: write to another']),
        (['search', '.', 'words', '--json=.'], ['. is what is searched: write to another']),
    ],
)
def test_wrong_usage_is_explained(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in expected) and 'Traceback' not in said
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_make_one_index(tmp_path):
    path = str(tmp_path / 'x.partial')
    with embed_journal.Journal(path, 'x') as journal:
        journal.begin({'model': {}})
        with pytest.raises(embed_journal.InUseError, match='being made by another process'):
            embed_journal.Journal(path, 'x')
    assert not os.path.exists(path)  # nothing was in it


def test_brute_force_is_the_same_in_parts(made, monkeypatch):
    opened = index_file.read(made)
    query = np.random.default_rng(0).standard_normal((300, 64), np.float32)
    expected = (opened.vectors.astype(np.float32) @ query.T).max(1)
    for size in (1, 5 * 128, 10**9):
        monkeypatch.setattr(search, 'CHUNK_BYTES', size)
        found = search.scores(opened, index_model.score_by_vectors(jax.numpy.asarray(query)))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_index_without_windows_has_no_hits(made, tmp_path):
    none = {name: load_file(made)[name][:0] for name in ('vectors', 'spans', 'video')}
    opened = index_file.read(changed(made, tmp_path / 'x', **none))
    found = search.scores(opened, index_model.score_by_vectors(jax.numpy.ones((1, 64))))
    assert search.best(opened, found, 3) == search.best(opened, found, 3, all_windows=True) == []


def test_many_pairs_score_as_numpy_says():
    """XLA:CPU of jaxlib 0.10.2 computes some products of more than 32,768 pairs wrongly."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((9000, 64), np.float32).astype(np.float16)
    queries = rng.standard_normal((40, 64), np.float32)
    score = jax.jit(index_model.score_by_vectors(jax.numpy.asarray(queries)))
    expected = (vectors.astype(np.float32) @ queries.T).max(1)
    np.testing.assert_allclose(score({'vectors': vectors}), expected, rtol=1e-5)


# Files of other people.


def changed(made, path, metadata=None, **tensors):
    """The index with other tensors or metadata; None leaves a tensor out."""
    with safe_open(made, 'np') as file:
        known = file.metadata()
    found = {name: leaf for name, leaf in (load_file(made) | tensors).items() if leaf is not None}
    save_file(found, path, known | (metadata or {}))
    return path


def broken_tensors(tensors):
    """(what is wrong, tensors to put in)."""
    count, videos = len(tensors['spans']), len(tensors['sizes'])
    wrong = np.full(videos, -(2**63), np.int64)
    wrong[-1] = tensors['path_ends'][-1]
    yield 'a tensor is missing', {'spans': None}
    yield 'vectors of other windows', {'vectors': tensors['vectors'][1:]}
    yield 'vectors of another dtype', {'vectors': tensors['vectors'].astype(np.int8)}
    yield 'vectors of nothing', {'vectors': np.zeros((count, 0), np.float16)}
    yield 'flat vectors', {'vectors': tensors['vectors'].reshape(-1)}
    yield 'weights without frames', {'weights': np.ones((count, 3), np.float32)}
    yield 'times that are none', {'spans': np.full((count, 2), np.nan)}
    yield 'endless times', {'spans': np.full((count, 2), 1e300)}
    yield 'negative times', {'spans': -tensors['spans'] - 1}
    yield 'times that run backwards', {'spans': tensors['spans'][:, ::-1].copy()}
    yield 'videos that are not there', {'video': tensors['video'] + 100}
    yield 'videos out of order', {'video': tensors['video'][::-1].copy()}
    yield 'ends that overflow', {'path_ends': wrong}
    yield 'ends too far', {'path_ends': tensors['path_ends'] * 2}
    yield 'fewer sizes', {'sizes': tensors['sizes'][1:]}
    for name in ('../../etc/passwd', '/etc/passwd', 'a\0b', 'x/../y'):
        text = np.frombuffer(name.encode(), np.uint8)
        ends = np.full(videos, len(text))
        yield f'a path like {name!r}', {'paths': text, 'path_ends': ends}


def test_a_damaged_or_hostile_index_is_one_message(made, tmp_path):
    for what, tensors in broken_tensors(load_file(made)):
        path = changed(made, tmp_path / 'x', **tensors)
        with pytest.raises(index_file.IndexFileError):
            index_file.read(path)
            pytest.fail(what)
    deep = '{"model":' + '[' * 100_000 + ']' * 100_000 + '}'
    for metadata in (
        {'settings': '[]'},
        {'settings': '{}'},
        {'settings': deep},
        {'settings': '{' + ' ' * 2**21 + '}'},
        {'places': '{"folder": 3, "model": ""}'},
        {'places': r'{"folder": "/\ud800", "model": ""}'},
        {'places': 'nothing'},
        {'format': 'pt'},
        {'version': '2'},
        {'version': '\x1b[31m' * 99},
    ):
        with pytest.raises(index_file.IndexFileError) as raised:
            index_file.read(changed(made, tmp_path / 'x', metadata))
        assert '\x1b' not in str(raised.value) and len(str(raised.value)) < 500
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'text').write_text('words')
    (tmp_path / 'huge').write_bytes((2**62).to_bytes(8, 'little') + b'{}')
    for name in ('fifo', 'text', 'huge', '.'):
        with pytest.raises(index_file.IndexFileError):
            index_file.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='dist_jax index FOLDER --out'):
        index_file.read(tmp_path / 'none')


def test_any_flipped_byte_is_an_index_or_a_message(made, tmp_path):
    content = made.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, 2500 if rng.random() < 0.7 else len(content), 3):
            damaged[place] = rng.integers(256)
        if rng.random() < 0.2:
            del damaged[rng.integers(len(damaged)) :]
        (tmp_path / 'x').write_bytes(damaged)
        try:
            opened = index_file.read(tmp_path / 'x')
            score = index_model.score_by_vectors(jax.numpy.ones((1, 64)))
            search.best(opened, search.scores(opened, score), 3)
            opened.unreadable()
        except index_file.IndexFileError:
            pass


def test_settings_of_a_hostile_index_ask_for_nothing_huge(made, tmp_path, capfd):
    with safe_open(made, 'np') as file:
        settings = json.loads(file.metadata()['settings'])
    for part, name, value in (
        ('preprocessing', 'num_frames', 10**12),
        ('preprocessing', 'num_frames', 'many'),
        ('preprocessing', 'image_size', 10**6),
        ('model', 'kind', '\x1b[31m'),
        ('model', 'dtype', ['float32']),
        ('model', 'sha256', None),
        ('windows', 'window', 'long'),
        ('windows', 'stride', -1),
    ):
        other = settings | {part: settings[part] | {name: value}}
        path = changed(made, tmp_path / 'x', {'settings': json.dumps(other)})
        video = [f'--video={tmp_path}/none.mp4'] if part == 'windows' else ['words']
        (tmp_path / 'none.mp4').touch()
        assert run('search', path, *video, f'--output={tmp_path}/x.png') == 2
        said = capfd.readouterr().err
        assert 'Traceback' not in said and '\x1b' not in said and len(said) < 1000, said
    other = changed(made, tmp_path / 'x', vectors=load_file(made)['vectors'][:, :32].copy())
    assert run('search', other, 'words', f'--output={tmp_path}/x.png') == 2
    assert 'are none of its model' in capfd.readouterr().err
    nan = np.full_like(load_file(made)['vectors'], np.nan)
    other = changed(made, tmp_path / 'x', vectors=nan)
    assert run('search', other, 'words', f'--output={tmp_path}/x.png') == 2
    assert 'not finite numbers' in capfd.readouterr().err
