"""Long videos: windows have the scores of the evaluation, and the files say what they say."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import threading

import av
import cv2
import jax
import numpy as np
import pytest
import text_run
from video_files import pictures, write_audio, write_video

import dist_jax
from dist_jax import drawing, main, recipe, step, times
from dist_jax.long_videos import annotate, timeline
from dist_jax.long_videos import predict as predict_windows
from dist_jax.long_videos import track as over_time
from dist_jax.long_videos.track import Columns, Track
from dist_jax.tasks.classify import Classify
from dist_jax.video_model import VideoModel
from input_pipeline.decode import DecodeError, VideoReader
from input_pipeline.video_list import Record
from input_pipeline.windows import Window, WindowReader

FPS = 10
KINDS = ('.json', '.csv', '.srt', '.timeline.png')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return text_run.train_in(tmp_path_factory.mktemp('windows'), num_val=2)[1]


@pytest.fixture(scope='module')
def model(workdir):
    return dist_jax.load(workdir)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Of 5 s, of 0.5 s, of 3 s and turned, and one that is damaged after three seconds."""
    folder = tmp_path_factory.mktemp('videos')
    write_video(folder / 'long.mp4', pictures(50, seed=1), fps=FPS)
    write_video(folder / 'short.mp4', pictures(5, seed=2), fps=FPS)
    write_video(folder / 'turned.mp4', pictures(30, seed=3), fps=FPS, rotation=90)
    damaged = write_video(folder / 'damaged.mp4', pictures(60, seed=4), fps=FPS, gop=10)
    with av.open(str(damaged)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(damaged.read_bytes())
    for position, size in packets[35:]:
        content[position + 5 : position + size] = bytes(size - 5)
    damaged.write_bytes(content)
    (folder / 'broken.mp4').write_bytes(b'nothing')
    write_audio(folder / 'sound.mp4')
    return folder


def command(workdir, *arguments):
    try:
        return main.main(['predict', f'--workdir={workdir}', *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


def clips_of(model, path, window, stride):
    views = dataclasses.replace(recipe.eval_reader(model.config), num_clips=1, num_crops=1)
    reader = WindowReader(views, window, stride)
    return [each.clip for each in reader.read(Record(str(path), (), ''))]


def spans(found):
    return [(round(each.start, 3), round(each.end, 3)) for each in found]


@pytest.mark.parametrize('fusion', [0.0, 0.5])
def test_windows_have_the_scores_that_their_clips_have_alone(workdir, videos, fusion):
    model = dist_jax.load(workdir, overrides={'eval.fusion': fusion})
    found = list(model.predict_windows(videos / 'long.mp4', 2.0, most=3))
    assert spans(found) == [(0, 2), (1, 3), (2, 4), (3, 5)]
    clips = clips_of(model, videos / 'long.mp4', 2.0, 1.0)
    for each, clip in zip(found, clips, strict=True):
        np.testing.assert_allclose(each.scores[0], model.score(clip), atol=1e-6)
        ((best, share), *rest) = each.top[0]
        assert len(rest) == 2 and share == each.scores[0].max()
        assert best == model.labels[0][each.scores[0].argmax()]
    assert np.ptp([each.scores[0] for each in found], axis=0).max() > 1e-5


def test_other_classes_can_be_asked_for(model, videos):
    labels = ['running', 'walking']
    (found,) = model.with_labels(labels).predict_windows(videos / 'short.mp4')
    assert {name for name, _ in found.top[0]} == set(labels)
    (clip,) = clips_of(model, videos / 'short.mp4', 2.0, 1.0)
    np.testing.assert_allclose(found.scores[0], model.score(clip, labels=labels), atol=1e-6)


def test_the_last_window_ends_with_the_video(model, videos):
    assert spans(model.predict_windows(videos / 'long.mp4', 2, 1.8)) == [(0, 2), (1.8, 3.8), (3, 5)]
    assert spans(model.predict_windows(videos / 'short.mp4', 2)) == [(0, 0.5)]
    assert spans(model.predict_windows(videos / 'turned.mp4', 1, 1)) == [(0, 1), (1, 2), (2, 3)]


def test_a_damaged_video_has_the_windows_before_the_damage(model, videos):
    found = []
    with pytest.raises(DecodeError, match='corrupt: '):
        for each in model.predict_windows(videos / 'damaged.mp4', 1.0, smooth=3):
            found.append(each)
    assert 4 <= len(found) <= 6 and found[-1].end <= 3.5
    with pytest.raises(DecodeError, match='no video stream'):
        next(model.predict_windows(videos / 'sound.mp4'))
    names = ['broken.mp4', 'short.mp4']
    both = model.predict_windows_all([videos / name for name in names])
    with pytest.raises(DecodeError, match='not a video'):
        next(next(both))
    assert spans(next(both)) == [(0, 0.5)]


def test_mistakes_are_said_at_once(model):
    for arguments, words in (
        ({'window': 0}, 'window=0 must be more than 0'),
        ({'window': float('nan')}, 'window=nan'),
        ({'window': 2.0, 'stride': 0.001}, 'stride=0.001 must be at least'),
        ({'smooth': 2}, 'smooth=2 must be an odd number'),
        ({'smooth': 1001}, 'smooth=1001 must be .* at most 999'),
        ({'batch_size': 0}, 'batch_size=0 must be a positive'),
    ):
        with pytest.raises(ValueError, match=words):
            model.predict_windows('nowhere.mp4', **arguments)


def test_every_frame_is_decoded_once(model, videos, monkeypatch):
    asked = []
    pick = VideoReader._pick

    def counted(self, wanted, shortcuts):
        for index, frame in pick(self, wanted, shortcuts):
            asked.append(index)
            yield index, frame

    monkeypatch.setattr(VideoReader, '_pick', counted)
    assert len(list(model.predict_windows(videos / 'long.mp4', 2.0, 0.5))) == 7
    assert asked == sorted(set(asked)) and len(asked) > 12


class TwoHeads(Classify):
    """The same scores twice, the second time from the last to the first."""

    def predict(self, outputs, num_views):
        ((scores),) = super().predict({'logits': outputs['logits'][:1]}, num_views)['scores']
        return {'scores': (scores, scores[:, ::-1])}


def test_several_heads_have_a_ranking_each(model, videos):
    names = model.labels[0]
    task = TwoHeads((names, tuple(f'{name} too' for name in reversed(names))))
    two = VideoModel(dataclasses.replace(model.trained, task=task), model.config)
    for each in two.predict_windows(videos / 'long.mp4'):
        assert [f'{name} too' for name, _ in each.top[0]] == [name for name, _ in each.top[1]]
        np.testing.assert_array_equal(each.scores[0], each.scores[1][::-1])


# What is made of windows.


def scored(rows, window=2.0, stride=1.0):
    return [
        (k * stride, k * stride + window, (np.array(row, np.float32),))
        for k, row in enumerate(rows)
    ]


def track_of(windows, *labels, most=5):
    track = Track(labels, most)
    for window in windows:
        track.add(window)
    return track


@pytest.mark.parametrize('count', [0, 1, 2, 3, 7, 20])
@pytest.mark.parametrize('width', [1, 3, 5])
def test_smoothing_averages_as_many_before_as_after(count, width):
    rows = np.random.default_rng(0).random((count, 3), np.float32)
    found = list(over_time.smoothed(scored(rows), width))
    assert [each[:2] for each in found] == [each[:2] for each in scored(rows)]
    for k, (_, _, (scores,)) in enumerate(found):
        around = min(k, count - 1 - k, width // 2)
        np.testing.assert_allclose(scores, rows[k - around : k + around + 1].mean(0), rtol=1e-6)


def test_turns_go_from_halfway_to_halfway_and_leave_gaps_as_gaps():
    rows = np.eye(2)[[0, 0, 1, 1]]
    assert track_of(scored(rows), 'ab').turns().tolist() == [
        [0, 1.5],
        [1.5, 2.5],
        [2.5, 3.5],
        [3.5, 5],
    ]
    gaps = track_of(scored(rows, 1.0, 4.0), 'ab')
    assert gaps.turns().tolist() == [[0, 1], [4, 5], [8, 9], [12, 13]]
    assert [each[:2] for each in gaps.segments()] == [(0, 1), (4, 5), (8, 9), (12, 13)]


def test_windows_of_one_best_class_are_one_segment():
    track = track_of(scored([(0.9, 0.1), (0.7, 0.3), (0.4, 0.6), (0.2, 0.8)]), 'ab')
    first, second = track.segments()
    assert first[:2] == (0, 2.5) and second[:2] == (2.5, 5) and first.num_windows == 2
    assert first.best[0].index == 0 and first.best[0].probability == pytest.approx(0.8)
    kept = [each.best[0] and each.best[0].index for each in track.segments(0.65)]
    assert kept == [0, None, 1]
    assert list(Track(('ab',), 5).segments()) == []


def test_columns_keep_the_peaks_of_any_number_of_windows():
    columns = Columns([3])
    rows = np.random.default_rng(0).random((2500, 3), np.float32)
    for row in rows:
        columns.add((row,))
    assert columns.of_each == 4
    (peaks,) = columns.peaks
    expected = [rows[k : k + 4].max(0) for k in range(0, 2500, 4)]
    np.testing.assert_array_equal(peaks, expected)


def test_thumbnails_are_few_and_from_all_over_the_video():
    thumbnails = timeline.Thumbnails()
    assert thumbnails.at(1.0) is None
    for k in range(1000):
        clip = np.full((16, 8, 8, 3), k // 4, np.uint8)
        thumbnails.see(Window(k, k + 2, clip, 1000))
    assert len(thumbnails._kept) <= 2 * timeline.MOST_FRAMES and thumbnails.num_windows == 1000
    found = [int(thumbnails.at(at).mean()) for at in (0, 250, 500, 999)]
    np.testing.assert_allclose(found, [0, 62, 125, 249], atol=20)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('2', 2),
        ('2s', 2),
        ('500ms', 0.5),
        ('1m', 60),
        ('1m30s', 90),
        (' 1.5 s ', 1.5),
        ('.5h', 1800),
    ],
)
def test_lengths_of_time_are_read(text, expected):
    assert times.seconds(text) == expected


@pytest.mark.parametrize('text', ['', 's', '2x', '-1', '1e3', 'nan', '2 3', '1m30', '9' * 400])
def test_what_is_no_length_of_time_is_said(text):
    with pytest.raises(ValueError, match='is no length of time'):
        times.seconds(text)


# The command and its files.


def subtitles(path):
    """(start, end, lines) in seconds, read strictly."""
    found = []
    for number, block in enumerate(path.read_text().strip().split('\n\n'), 1):
        head, when, *lines = block.split('\n')
        assert head == str(number)
        match = re.fullmatch(r'(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})', when)
        h, m, s, ms, *rest = map(int, match.groups())
        end = rest[0] * 3600 + rest[1] * 60 + rest[2] + rest[3] / 1000
        found.append((h * 3600 + m * 60 + s + ms / 1000, end, lines))
    return found


def strict(text):
    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope='module')
def written(workdir, videos, tmp_path_factory):
    """What the command wrote about videos of which two have one name and some are broken."""
    folder = tmp_path_factory.mktemp('written')
    for name in ('one', 'two'):
        (folder / name).mkdir()
        shutil.copy(videos / 'long.mp4', folder / name / 'same.mp4')
    names = [folder / 'one', folder / 'two']
    names += [videos / name for name in ('broken.mp4', 'sound.mp4', 'damaged.mp4', 'short.mp4')]
    options = ['--window=1s', '--stride=500ms', f'--output={folder}/out']
    assert command(workdir, *options, *names) == 1
    return folder / 'out'


def test_every_video_has_its_own_files(written):
    stems = ('one-same', 'two-same', 'damaged', 'short')
    expected = {stem + end for stem in stems for end in KINDS} | {'broken.json', 'sound.json'}
    assert {file.name for file in written.iterdir()} == expected
    for name, words in (
        ('broken', 'cannot be read: not a video'),
        ('sound', 'cannot be read: no video stream'),
        ('damaged', 'on cannot be read: corrupt'),
        ('short', ''),
    ):
        found = strict((written / f'{name}.json').read_text())
        assert words in found['error'] and bool(words) == bool(found['error'])
        assert bool(found['windows']) == (name in ('damaged', 'short'))


def test_the_files_say_what_the_model_says(written, model, videos):
    expected = list(model.predict_windows(videos / 'long.mp4', 1.0))
    found = strict((written / 'one-same.json').read_text())
    assert found['window'] == 1 and found['stride'] == 0.5 and found['end'] == 5
    with open(written / 'one-same.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(found['windows']) == len(rows) == len(expected) == 9
    for each, window, row in zip(expected, found['windows'], rows):
        assert (window['start'], window['end']) == (each.start, each.end)
        assert (float(row['start']), float(row['end'])) == (each.start, each.end)
        (ranking,) = window['top']
        assert [entry['label'] for entry in ranking] == [name for name, _ in each.top[0]]
        assert ranking[0]['probability'] == pytest.approx(each.top[0][0][1], abs=1e-6)
        assert row['class_1'] == ranking[0]['label'] and row['head'] == '0'
        assert float(row['probability_5']) == ranking[4]['probability']
    cues = subtitles(written / 'one-same.srt')
    assert len(cues) == len(found['segments'])
    assert cues[0][0] == 0 and cues[-1][1] == 5
    for (start, end, (line,)), segment in zip(cues, found['segments']):
        assert (start, end) == (segment['start'], segment['end'])
        (best,) = segment['best']
        assert line == f'{best["label"]} ({100 * best["probability"]:.0f} %)'
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(cues))


def test_a_table_of_segments_is_printed_and_a_timeline_drawn(workdir, videos, tmp_path, capsys):
    options = ['--window=2', f'--output={tmp_path}', '--threshold=1']
    assert command(workdir, *options, videos / 'long.mp4') == 0
    assert 'no class is as probable as 1' in capsys.readouterr().out
    assert (tmp_path / 'long.srt').read_text() == ''
    assert command(workdir, *options[:2], '--smooth=3', videos / 'long.mp4') == 0
    said = capsys.readouterr().out
    first = strict((tmp_path / 'long.json').read_text())
    assert first['smooth'] == 3 and first['segments'][0]['best'][0]['label'] in said
    assert '0:00.0' in said and '0:05.0' in said
    picture = cv2.imread(str(tmp_path / 'long.timeline.png'))
    assert picture.shape[1] == 1100 and picture.std() > 5


def test_scores_that_are_no_numbers_are_an_error_of_the_video(
    workdir, videos, tmp_path, monkeypatch
):
    make_eval_step = step.make_eval_step

    def spoiled(*arguments):
        inner = make_eval_step(*arguments)
        return lambda *rest: jax.tree.map(lambda head: head * np.nan, inner(*rest))

    monkeypatch.setattr(step, 'make_eval_step', spoiled)
    assert command(workdir, '--window=2', f'--output={tmp_path}', videos / 'short.mp4') == 1
    found = strict((tmp_path / 'short.json').read_text())
    assert 'not finite' in found['error'] and not found['windows'] and not found['segments']


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--stride=1'], '--stride goes with --window'),
        (['--annotate', '--smooth=3'], '--smooth, --annotate goes with --window'),
        (['--window=fast'], "--window: 'fast' is no length of time"),
        (['--window='], "--window: '' is no length of time"),
        (['--window=0'], '--window=0 must be more than 0'),
        (['--window=2', '--stride=1ms'], 'must be at least'),
        (['--window=2', '--smooth=0'], 'smooth=0 must be an odd number'),
        (['--window=2', '--threshold=50'], '--threshold=50 must be 0 to 1'),
        (['--window=2', '--attention'], '--attention does not go with --window'),
        (['--window=2', '--json=a.json'], '--json does not go with --window'),
    ],
)
def test_options_that_make_no_sense_are_refused(workdir, videos, capsys, arguments, words):
    assert command(workdir, *arguments, videos / 'short.mp4') == 2
    assert words in capsys.readouterr().err


def test_no_video_is_overwritten(workdir, videos, tmp_path, capsys):
    path = shutil.copy(videos / 'short.mp4', tmp_path)
    before = (tmp_path / 'short.mp4').read_bytes()
    assert command(workdir, '--window=2', '--annotate', f'--output={tmp_path}', path) == 2
    assert 'would overwrite' in capsys.readouterr().err
    assert (tmp_path / 'short.mp4').read_bytes() == before


NASTY = ('=1+1, "x"', 'two\nlines --> <b>{\\an8}\x1b[31m', 'caf\udce9 开门')


def test_names_are_data_in_every_file(tmp_path):
    windows = scored(np.eye(3)[[0, 1, 2, 0]] * 0.9)
    two = [(start, end, (rows, rows[::-1])) for start, end, (rows,) in windows]
    track = track_of(two, NASTY, ('x', 'y', 'z'), most=2)
    columns, thumbnails = Columns([3, 3]), timeline.Thumbnails()
    for start, end, scores in two:
        columns.add(scores)
        thumbnails.see(Window(start, end, np.zeros((4, 8, 8, 3), np.uint8), len(two)))
    files = {kind: tmp_path / f'a{end}' for kind, end in predict_windows.ENDINGS.items()}
    found = predict_windows.Found('a\udce9.mp4', track, files)
    options = predict_windows.Options(2.0, threshold=0.5)
    predict_windows.write(found, options, columns, thumbnails, lambda *_: None)
    loaded = strict(files['table'].read_text())
    assert [window['top'][0][0]['label'] for window in loaded['windows']] == [*NASTY, NASTY[0]]
    assert [window['top'][1][0]['label'] for window in loaded['windows']] == ['z', 'y', 'x', 'z']
    with open(files['csv'], newline='', encoding='utf-8') as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} == {7} and len(rows) == 9
    assert [row[2] for row in rows[1:3]] == ['0', '1'] and rows[1][3] == '\'=1+1, "x"'
    cues = subtitles(files['subtitles'])
    assert [len(lines) for _, _, lines in cues] == [2] * 4
    assert cues[1][2] == ['two\\nlines --\u203a \u2039b\u203a(\\an8)\\x1b[31m (90 %)', 'y (90 %)']


# Drawings.


@pytest.mark.parametrize(('num_windows', 'num_classes'), [(1, 1), (2, 30), (1500, 174)])
def test_a_timeline_keeps_all_texts_on_the_page(num_windows, num_classes):
    rng = np.random.default_rng(0)
    labels = (tuple(f'${k}$ ' + 'something long ' * 8 for k in range(num_classes)), ('a', 'b'))
    track, thumbnails = Track(labels, 5), timeline.Thumbnails()
    columns = Columns([num_classes, 2])
    for k in range(num_windows):
        scores = tuple(rng.dirichlet(np.ones(len(own))).astype(np.float32) for own in labels)
        track.add((k, k + 2.0, scores))
        columns.add(scores)
        thumbnails.see(Window(k, k + 2.0, np.zeros((4, 8, 8, 3), np.uint8), num_windows))
    with drawing.theme():
        figure = timeline.draw(timeline.Timeline('title', track, columns, thumbnails, 0.01))
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
    assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.shrunk(0.98, 0.9).overlaps(other.shrunk(0.98, 0.9))


@pytest.mark.parametrize('end', [0.04, 1.0, 3.0, 60.0, 754.2, 3600.0, 3 * 3600.0, 90 * 3600.0])
def test_ticks_are_few_and_within_the_video(end):
    found = timeline.ticks(end)
    assert 1 <= len(found) <= 11 and found[0] == 0 and found[-1] <= end
    assert len(set(map(timeline.tick, found))) == len(found)


def annotated(path, tmp_path, rows, window, **options):
    target = tmp_path / 'out.mp4'
    track = track_of(scored(rows, window, window), ('opening a door', 'closing'))
    assert annotate.write(target, str(path), track, **options) == ''
    with VideoReader(target) as video:
        return video.times, video.frames(np.arange(video.num_frames))


def test_an_annotated_video_has_the_times_and_pictures_of_its_source(tmp_path):
    pts = np.array([0, 1, 2, 5, 9, 10, 11, 15])
    path = write_video(tmp_path / 'a.mkv', pictures(8, 300, 400), fps=FPS, pts=pts)
    times_found, frames = annotated(path, tmp_path, [(0.9, 0.1), (0.2, 0.8)], 0.8)
    with VideoReader(path) as video:
        np.testing.assert_allclose(times_found, video.times, atol=1e-4)
        source = video.frames(np.arange(8))
    assert frames.shape == source.shape
    difference = np.abs(frames.astype(int) - source).mean((2, 3))
    assert difference[:, :200].mean() < 8 and difference[:, -15:].mean() > 40


def test_a_video_that_is_gone_leaves_no_annotated_one(tmp_path):
    track = track_of(scored([(1, 0)]), 'ab')
    target = tmp_path / 'out.mp4'
    assert annotate.write(target, str(tmp_path / 'a.mp4'), track) == 'missing: no such file'
    (tmp_path / 'a.mp4').write_bytes(b'nothing')
    assert 'not a video' in annotate.write(target, str(tmp_path / 'a.mp4'), track)
    assert sorted(os.listdir(tmp_path)) == ['a.mp4']


def test_nothing_is_drawn_below_the_threshold(tmp_path):
    path = write_video(tmp_path / 'a.mp4', pictures(8, 300, 400), fps=FPS)
    _, frames = annotated(path, tmp_path, [(0.9, 0.1), (0.4, 0.6)], 0.4, threshold=0.7)
    dark = frames[:, -15:].mean((1, 2, 3)) < 0.7 * frames[:, :200].mean((1, 2, 3))
    assert dark.tolist() == [True] * 4 + [False] * 4


def test_annotated_videos_are_upright_and_neither_tiny_nor_huge(tmp_path):
    path = write_video(tmp_path / 'a.mp4', pictures(4, 48, 64), fps=FPS, rotation=90)
    _, frames = annotated(path, tmp_path, [(1, 0)], 0.4)
    assert frames.shape[1:3] == (320, 240)
    assert annotate.size(1080, 1920) == (720, 1280)
    assert annotate.size(2160, 3840) == (720, 1280)
    assert annotate.size(32, 1024) == (32, 1024)
    assert annotate.size(9, 288) == (54, 1728)
    assert annotate.size(481, 641) == (480, 640)


def test_a_name_of_any_length_fits_its_band():
    for height, width, lines in ((240, 240, 1), (54, 1728, 2), (720, 1280, 3), (240, 66, 1)):
        said = tuple(('putting something ' * 9, 0.5) for _ in range(lines))
        light, alpha = annotate.band(said, height, width)
        assert light.shape == (*alpha.shape[:2], 3)
        assert len(light) <= height and light.shape[1] == width


def test_the_command_writes_an_annotated_video(workdir, videos, tmp_path, capsys):
    options = ['--window=1', '--annotate', f'--output={tmp_path}']
    assert command(workdir, *options, videos / 'long.mp4', videos / 'damaged.mp4') == 1
    with VideoReader(tmp_path / 'long.mp4') as video:
        assert video.num_frames == 50 and video.size == (240, 320)
    end = strict((tmp_path / 'damaged.json').read_text())['end']
    with VideoReader(tmp_path / 'damaged.mp4') as video:
        assert video.duration == pytest.approx(end, abs=0.11)
    assert f'video: {tmp_path}/long.mp4' in capsys.readouterr().out
    assert not [file for file in os.listdir(tmp_path) if file.startswith('.')]


def test_letters_that_no_font_has_are_drawn_with_the_usual_one():
    assert drawing.font(12, text='moves left').path.endswith('DejaVuSans.ttf')
    assert drawing.font(12, text='\U0010fffd').path.endswith('DejaVuSans.ttf')


def test_whoever_stops_listening_leaves_no_thread(model, videos):
    before = threading.active_count()
    found = model.predict_windows(videos / 'long.mp4', 0.5, 0.1)
    next(found)
    found.close()
    assert threading.active_count() == before
