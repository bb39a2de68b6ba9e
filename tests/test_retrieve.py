"""Judging retrieval: what is scored, what is left out, and what a person is shown."""

import csv
import functools
import io
import shutil

import cv2
import jax
import numpy as np
import pytest

from dist_jax import drawing, strip_sheet
from dist_jax.evaluate import with_videos
from dist_jax.metrics import NonFiniteScoresError
from dist_jax.reports import console, page
from dist_jax.similarity import Texts, Videos, similarity
from dist_jax.tasks import retrieve_evaluator
from dist_jax.tasks.api import Picture, Table
from dist_jax.tasks.retrieve import Retrieve
from dist_jax.tasks.retrieve_evaluator import RetrieveEvaluator
from input_pipeline.video_list import Record, VideoList

WIDTH, FRAMES, WORDS = 8, 3, 4
MEAN = functools.partial(similarity, interaction='meanP')


def _source(counts, path='clip {}.mp4'.format, text='sentence {} of video {}'.format):
    records = [
        Record(path(i), (), f'v{i}', captions=tuple(text(k, i) for k in range(count)))
        for i, count in enumerate(counts)
    ]
    return VideoList(records, ())


def _rows(counts, seed=0, noise=0.5):
    """Videos and sentences that lie near theirs."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(counts)), counts)
    centre = rng.standard_normal((len(counts), 1, WIDTH))
    frames = centre + noise * rng.standard_normal((len(counts), FRAMES, WIDTH))
    words = centre[owners] + noise * rng.standard_normal((len(owners), WORDS, WIDTH))
    mask = (np.arange(WORDS) < rng.integers(2, WORDS + 1, (len(owners), 1))).astype(np.float32)
    videos = {
        'index': np.arange(len(counts)),
        'label': np.zeros((len(counts), 0), np.int32),
        'frames': frames.astype(np.float32),
        'frame_logits': rng.standard_normal(frames.shape[:2], np.float32),
    }
    sentences = {
        'index': np.arange(len(owners)),
        'tokens': np.zeros(words.shape[:2], np.int32),
        'word_mask': mask,
        'words': words.astype(np.float32),
        'word_logits': rng.standard_normal(words.shape[:2], np.float32),
        'pooled': words[:, 0].astype(np.float32),
    }
    return owners, videos, sentences


def _take(rows, which):
    return {key: column[which] for key, column in rows.items()}


def _evaluator(counts, add=slice(None), **source):
    owners, videos, sentences = _rows(counts)
    evaluator = RetrieveEvaluator(_source(counts, **source), similarity, owners)
    evaluator.add(_take(videos, add))
    evaluator.add_queries(sentences)
    return evaluator


def _table(figures):
    return list(csv.DictReader(io.StringIO(figures.files['ranks.csv']().decode())))


@pytest.mark.parametrize('compare', [similarity, MEAN])
def test_blocks_score_as_one_and_are_compiled_once(monkeypatch, compare):
    counts = [3, 1, 2, 4, 1, 1, 2]
    owners, videos, sentences = _rows(counts)
    names = ('words', 'word_mask', 'word_logits', 'pooled')
    whole = compare(
        Texts(*(sentences[name] for name in names)),
        Videos(videos['frames'], np.ones((7, FRAMES), np.float32), videos['frame_logits']),
    )
    seen, traced = {}, []

    def figures(found, scores, right, texts, record, num_skipped):
        seen.update(scores=scores, right=right, texts=texts, paths=[record(i).path for i in right])

    def noted(texts, videos):
        traced.append(texts.words.shape)
        return compare(texts, videos)

    monkeypatch.setattr(retrieve_evaluator, 'retrieval_figures', figures)
    monkeypatch.setattr(retrieve_evaluator, 'BLOCK', 4)
    for _ in range(2):
        evaluator = RetrieveEvaluator(_source(counts), noted, owners)
        for part in (slice(4, 7), slice(0, 0), slice(0, 4)):
            evaluator.add(_take(videos, part))
        for part in ([13, 1, 2, 3, 4, 5], [], [0], [6, 7, 8, 9, 10, 11, 12]):
            evaluator.add_queries(_take(sentences, np.array(part, int)))
        evaluator.result()
    np.testing.assert_allclose(seen['scores'], whole, atol=1e-6)
    np.testing.assert_array_equal(seen['right'], owners)
    assert seen['texts'][:5] == [
        *(f'sentence {k} of video 0' for k in range(3)),
        'sentence 0 of video 1',
        'sentence 0 of video 2',
    ]
    assert seen['paths'] == [f'clip {i}.mp4' for i in owners]
    assert traced == [(4, WORDS, WIDTH)]


def test_many_pairs_score_as_few_do():
    """XLA:CPU of jaxlib 0.10.2 computes sums of more than 32,768 pairs wrongly."""
    _, videos, sentences = _rows([1] * 260)

    def score(which):
        names = ('words', 'word_mask', 'word_logits', 'pooled')
        shown = _take(videos, which)
        ones = np.ones_like(shown['frame_logits'])
        return jax.jit(similarity)(
            Texts(*(sentences[name] for name in names)),
            Videos(shown['frames'], ones, shown['frame_logits']),
        )

    parts = [score(slice(i, i + 65)) for i in range(0, 260, 65)]
    np.testing.assert_allclose(score(slice(None)), np.concatenate(parts, 1), atol=1e-5)


def test_sentences_of_unreadable_videos_are_left_out_and_counted():
    counts = [2, 1, 3, 2]
    found = _evaluator(counts, add=[0, 2, 3]).result()
    assert found.scalars['num_sentences'] == 7
    assert found.scalars['num_skipped_sentences'] == 1
    rows = _table(found)
    assert [row['video'] for row in rows] == ['clip 0.mp4'] * 2 + ['clip 2.mp4'] * 3 + [
        'clip 3.mp4'
    ] * 2
    assert all('video 1' not in row['sentence'] for row in rows)
    assert all('clip 1.mp4' not in row['found_instead'] for row in rows)
    assert {float(row['rank']) for row in rows} <= {1, 2, 3}


def test_scores_that_are_no_numbers_name_sentence_and_video():
    owners, videos, sentences = _rows([1, 1, 1])
    videos['frames'][2] = np.nan
    evaluator = RetrieveEvaluator(_source([1, 1, 1]), similarity, owners)
    evaluator.add(videos)
    evaluator.add_queries(sentences)
    with pytest.raises(NonFiniteScoresError, match=r"'sentence 0 of video 0' with clip 2\.mp4"):
        evaluator.result()


def test_scalars_are_written_as_what_they_are(capsys):
    figures = with_videos(_evaluator([2] * 12).result(), 12, ())
    for name in figures.scalars:
        assert page.label(name) != name.replace('_', ' '), f'{name} has no name in words'
    assert set(figures.headline) <= set(figures.scalars)
    recall = figures.scalars['t2v_r1']
    assert 0 < recall <= 1 and figures.scalars['t2v_median_rank'] >= 1
    assert figures.line.startswith(f't2v R@1 {100 * recall:.2f} % median rank ')
    assert page.label('best_val_t2v_r1') == 'best validation text to video R@1'
    assert page.show('val_t2v_median_rank', 3.5) == '3.5'
    table = figures.sections[0]
    assert [row[0].strip() for row in table.rows] == [
        'text to video',
        'by chance',
        'video to text',
        'by chance',
    ]
    assert table.rows[1][1:] == ('8.33 %', '41.67 %', '83.33 %', '6.5', '6.5')
    console.print_evaluation({**figures.scalars, **figures.details}, figures)
    said = capsys.readouterr().out
    assert 'video to text R@10' in said and 'queries with a tie' in said and '8.33 %' in said


def test_report_has_curves_of_recall_and_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'png', lambda *_: b'')
    figures = _evaluator([1] * 4).result()
    rows = [
        f'{{"step": {step}, "val_t2v_r1": 0.1, "val_v2t_r5": 0.2, "val_v2t_median_rank": 7}}'
        for step in (5, 10)
    ]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(rows))
    summary = {'step': 10} | {f'val_{name}': value for name, value in figures.scalars.items()}
    page.write_report(tmp_path, summary, figures)
    text = (tmp_path / 'report.html').read_text()
    for part in ('text-to-video recall', 'video-to-text recall', 'validation median rank'):
        assert f'alt="{part}"' in text or f'alt="validation {part}"' in text
    assert 'validation text to video R@1' in text and 'accuracy' not in text


@pytest.fixture(scope='module')
def paths(clips, tmp_path_factory):
    """Four videos, of which one was lost after it was judged."""
    folder = tmp_path_factory.mktemp('videos')
    found = sorted(clips.rglob('*.mp4'))[:3]
    return [*(str(shutil.copy(path, folder)) for path in found), str(folder / 'lost.mp4')]


def test_page_shows_strips_failures_and_ranks(tmp_path, paths):
    evil = '<script>x</script> \x1b[31m 你好 $a$ =1+1' * 40
    evaluator = _evaluator(
        [2] * 4, path=paths.__getitem__, text=lambda k, i: f'=1+1 {k} {i} {evil}'
    )
    figures = with_videos(evaluator.result(), 4, ())
    stored = {**figures.scalars, 'bad_videos': [], **figures.details}
    page.write_evaluation(tmp_path, stored, figures)
    text = (tmp_path / 'evaluation.html').read_text()
    assert '<script' not in text and '\x1b' not in text
    picture = cv2.imread(str(tmp_path / 'retrieval.png'))
    assert picture.shape[1] == round(140 * strip_sheet.WIDTH) and picture.std() > 5
    assert (tmp_path / 'ranks.csv').read_text().count("'=1+1") == 8


def test_strips_are_read_once_a_video_and_only_when_drawn(monkeypatch):
    read = []

    def one(record):
        read.append(record.path)
        return np.zeros((strip_sheet.FRAMES, 8, 8, 3), np.uint8)

    monkeypatch.setattr(strip_sheet, 'read_strip', one)
    figures = _evaluator([2] * 4).result()
    assert not read
    pictures = [part for part in figures.sections if isinstance(part, Picture)]
    with drawing.theme():
        for part in (*pictures, *pictures):
            part.draw()
    assert sorted(read) == [f'clip {i}.mp4' for i in range(4)]


def test_what_cannot_be_read_any_more_is_a_grey_tile(paths):
    strips = [strip_sheet.read_strip(Record(path, (), '')) for path in paths]
    assert strips[-1] is None
    assert strips[0].shape == (strip_sheet.FRAMES, strip_sheet.SIDE, strip_sheet.SIDE, 3)
    tiles = [strip_sheet.Tile(lambda: None, '1', 'lost.mp4', 0.5, right=True)]
    with drawing.theme():
        (axis,) = strip_sheet.draw([('', [strip_sheet.Row('x', '', tiles)])]).axes
    assert 'cannot be read' in [text.get_text() for text in axis.texts]


def test_where_all_are_found_there_are_no_failures():
    owners, videos, sentences = _rows([1, 1, 1], noise=0)
    evaluator = RetrieveEvaluator(_source([1, 1, 1]), MEAN, owners)
    evaluator.add(videos)
    evaluator.add_queries(sentences)
    figures = evaluator.result()
    assert figures.scalars['t2v_r1'] == figures.scalars['v2t_r1'] == 1
    titles = [part.title for part in (*figures.sections, *figures.brief)]
    assert not any('failures' in title for title in titles)


def test_worst_failures_are_of_different_videos():
    owners, videos, sentences = _rows([3] * 8, noise=4)
    evaluator = RetrieveEvaluator(_source([3] * 8), similarity, owners)
    evaluator.add(videos)
    evaluator.add_queries(sentences)
    figures = evaluator.result()
    table = [part for part in figures.sections if isinstance(part, Table)][-1]
    names = [row[2] for row in table.rows]
    assert len(names) > 3 and len(set(names)) == len(names)
    ranks = [int(row[1]) for row in table.rows]
    assert ranks == sorted(ranks, reverse=True)
    listed = {row['sentence']: row for row in _table(figures)}
    assert ranks[0] == max(float(row['rank']) for row in listed.values())
    for sentence, rank, video, instead in table.rows:
        row = listed[sentence]
        assert (row['rank'], row['video'], row['found_instead']) == (rank, video, instead)


@pytest.mark.parametrize('num_words', [-1, 1, 78, 10**9])
def test_numbers_of_words_that_no_tower_reads_are_named(num_words):
    with pytest.raises(ValueError, match=f'task.num_words={num_words} must be 2'):
        Retrieve(num_words=num_words)
