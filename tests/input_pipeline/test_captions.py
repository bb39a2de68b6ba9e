"""Pairs of videos and captions, their tokens, and what a list of them is checked for."""

import json
import pickle

import numpy as np
import pytest

from dist_jax.dataset import build
from input_pipeline import pipeline
from input_pipeline.captions import CaptionPairs, CaptionTokens, check_captions, sentence_rows
from input_pipeline.sources import open_source
from input_pipeline.tokenizer import tokenize
from input_pipeline.transforms import CentreCrop
from input_pipeline.video_list import Record, VideoList

CAPTIONS = (('a dog', '!~'), ('a cat sits',), ('a', 'b', 'word ' * 40))
OWNERS = [0, 0, 1, 2, 2, 2]


@pytest.fixture(scope='module')
def videos():
    return VideoList(
        [
            Record(f'/v/{k}.mp4', (), str(k), start=k or None, captions=captions)
            for k, captions in enumerate(CAPTIONS)
        ],
        (),
    )


def test_pairs_are_the_captions_in_order_with_the_number_of_their_video(videos):
    pairs = CaptionPairs(videos)
    assert len(pairs) == 6 and (pairs.class_names, pairs.num_classes) == ((), 0)
    assert pairs.labels.tolist() == OWNERS and pairs.labels.dtype == np.int64
    expected = [
        Record(f'/v/{k}.mp4', k, str(k), start=k or None, captions=(caption,))
        for k, captions in enumerate(CAPTIONS)
        for caption in captions
    ]
    assert list(pairs) == expected and type(pairs[3].label) is int
    assert pairs[np.int64(5)] == pairs[-1] == expected[5]
    with pytest.raises(IndexError):
        pairs[6]
    assert list(pickle.loads(pickle.dumps(pairs))) == expected


def test_what_processes_copy_does_not_grow_with_the_pairs():
    videos = [Record(str(k), (), str(k), captions=('one', 'two')) for k in range(3000)]
    outside = []
    content = pickle.dumps(CaptionPairs(VideoList(videos, ())), 5, buffer_callback=outside.append)
    assert len(content) < 3000 < sum(buffer.raw().nbytes for buffer in outside)


def test_tokens_are_cut_as_clip_cuts_them_and_the_mask_knows_words_from_zeros(videos):
    pairs, annotate = CaptionPairs(videos), CaptionTokens(6)
    assert annotate.spec == {'tokens': ((6,), np.int32), 'word_mask': ((6,), np.float32)}
    rows = [annotate(record, record.label, None) for record in pairs]
    for record, row in zip(pairs, rows):
        assert {key: (value.shape, value.dtype) for key, value in row.items()} == annotate.spec
        np.testing.assert_array_equal(row['tokens'], tokenize(record.captions, 6, truncate=True)[0])
    assert rows[1]['tokens'].tolist() == [49406, 0, 349, 49407, 0, 0]  # the first 0 is a word
    assert rows[1]['word_mask'].tolist() == [1, 1, 1, 1, 0, 0]
    assert rows[5]['tokens'][-1] == 49407 and rows[5]['word_mask'].all()
    assert pickle.loads(pickle.dumps(annotate)) == annotate


def test_all_sentences_of_a_list_are_the_rows_of_its_pairs(videos):
    rows, owners = sentence_rows(videos, 6)
    annotate = CaptionTokens(6)
    of_pairs = [annotate(record, record.label, None) for record in CaptionPairs(videos)]
    for key, (shape, dtype) in annotate.spec.items():
        assert rows[key].shape == (6, *shape) and rows[key].dtype == dtype
        np.testing.assert_array_equal(rows[key], [row[key] for row in of_pairs])
    assert owners.tolist() == OWNERS and owners.dtype == np.int64


def test_batches_hold_tokens_and_videos_that_cannot_be_read_none(clips, tmp_path):
    paths = [clips / 'train/000000.mp4', tmp_path / 'missing.mp4', clips / 'train/000002.mp4']
    videos = VideoList([Record(str(p), (), '', captions=c) for p, c in zip(paths, CAPTIONS)], ())
    reader = pipeline.TrainReader(
        num_frames=2, image_size=48, transforms=(CentreCrop(48),), annotate=CaptionTokens(6)
    )
    batches = pipeline.train_batches(
        CaptionPairs(videos), reader, batch_size=6, seed=0, num_steps=1, shuffle=False
    )
    (batch,) = batches
    rows, owners = sentence_rows(videos, 6)
    assert batch['label'].tolist() == owners.tolist() == OWNERS
    assert batch['mask'].tolist() == [1, 1, 0, 1, 1, 1]
    readable = batch['mask'][:, None]
    np.testing.assert_array_equal(batch['tokens'], rows['tokens'] * readable)
    np.testing.assert_array_equal(batch['word_mask'], rows['word_mask'] * readable)


def test_cut_captions_are_counted_in_the_log(videos, caplog):
    check_captions(videos, 'train.csv', 77)
    assert not caplog.text
    check_captions(videos, 'train.csv', 4)
    assert 'train.csv: 2 of 6 captions have more than task.num_words=4 tokens' in caplog.text
    assert len(caplog.records) == 1


def test_a_list_without_captions_and_one_without_words_are_errors_that_name_it():
    classes = VideoList([Record('a', 0, 'A')], ('run',))
    with pytest.raises(ValueError, match=r'^l\.txt: video 0, A, has no caption.*path,caption'):
        check_captions(classes, 'l.txt', 32)
    some = VideoList([Record('a', (), 'A', captions=('x',)), Record('b', (), 'B')], ())
    with pytest.raises(ValueError, match=r'l\.txt: video 1, B, has no caption'):
        check_captions(some, 'l.txt', 32)
    for caption, message in (('caf\udce9', r'caf\\xe9 is not UTF-8'), ('x' * 10**7, 'characters')):
        with pytest.raises(ValueError, match=rf'l\.txt: video 0, A: .*{message}'):
            check_captions(VideoList([Record('a', (), 'A', captions=(caption,))], ()), 'l.txt', 32)


def test_pairs_of_a_built_set_are_those_of_its_list_and_no_shard_is_opened(tmp_path, clips):
    entries = [
        {'path': f'{k:06d}.mp4', 'captions': list(captions)} for k, captions in enumerate(CAPTIONS)
    ]
    (tmp_path / 'train.jsonl').write_text('\n'.join(map(json.dumps, entries)))
    words = ['custom', '--list', f'train={tmp_path}/train.jsonl', '--videos', f'{clips}/train']
    assert build.main([*words, '--out', f'{tmp_path}/built', '--workers', '0']) == 0
    listed = open_source(tmp_path / 'train.jsonl', root=clips / 'train')
    built = open_source(tmp_path / 'built', purpose='train')
    for found in zip(CaptionPairs(listed), pickle.loads(pickle.dumps(CaptionPairs(built)))):
        one, other = ((pair.label, pair.video_id, pair.captions) for pair in found)
        assert one == other
        with open(found[0].path, 'rb') as file:
            assert file.read() == found[1].load()
    for shard in (tmp_path / 'built').glob('*.array_record*'):
        shard.unlink()
    pairs = CaptionPairs(open_source(tmp_path / 'built', purpose='train'))
    assert len(pairs) == 6 and pairs[5].captions == CAPTIONS[2][2:]
    check_captions(built, tmp_path / 'built', 6)
    with pytest.raises(OSError, match='no such shard'):
        pairs[5].load()
