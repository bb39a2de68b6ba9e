"""Ranks of the release where nothing ties, and the mean over all orders where something does."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dist_jax import retrieval_metrics
from dist_jax.metrics import NonFiniteScoresError

GOLDEN = Path(__file__).parent / 'golden' / 'side4video_retrieval.safetensors'


@pytest.fixture(scope='module')
def golden():
    found = load_file(GOLDEN)
    return {key: value for key, value in found.items() if key.startswith('metrics/')}


def _as_recorded(ranks, lower_median=False):
    """R@1, R@5, R@10 in percent, median rank, mean rank."""
    lower = np.quantile(ranks.expected, 0.5, method='lower')
    recalls = [100 * ranks.recall(most) for most in (1, 5, 10)]
    return [*recalls, lower if lower_median else ranks.median, ranks.mean]


def test_square_matrix_has_the_recorded_ranks_and_figures(golden):
    scores = golden['metrics/square/sim']
    found = retrieval_metrics.retrieval(scores, np.arange(len(scores)))
    for name, ranks in (('t2v', found.text_to_video), ('v2t', found.video_to_text)):
        np.testing.assert_array_equal(ranks.higher, golden[f'metrics/square/{name}_rank0'])
        np.testing.assert_allclose(_as_recorded(ranks), golden[f'metrics/square/{name}'], rtol=1e-6)
    assert found.ties == 0


@pytest.mark.parametrize('shuffled', [False, True])
@pytest.mark.parametrize('block', [1, 100, retrieval_metrics.BLOCK])
def test_several_sentences_a_video_have_the_recorded_ranks(golden, monkeypatch, block, shuffled):
    monkeypatch.setattr(retrieval_metrics, 'BLOCK', block)
    scores = golden['metrics/multi/sim']
    right = np.repeat(np.arange(14), np.diff(golden['metrics/multi/cut_off_points'], prepend=0))
    order = np.random.default_rng(0).permutation(60) if shuffled else np.arange(60)
    found = retrieval_metrics.retrieval(scores[order], right[order])
    ranks = found.text_to_video
    np.testing.assert_array_equal(ranks.higher, golden['metrics/multi/t2v_rank0'][order])
    np.testing.assert_allclose(_as_recorded(ranks, True), golden['metrics/multi/t2v'], rtol=1e-6)
    assert ranks.median == golden['metrics/multi/t2v_median_numpy']
    ranks = found.video_to_text
    np.testing.assert_array_equal(ranks.higher, golden['metrics/multi/v2t_rank0'])
    np.testing.assert_allclose(_as_recorded(ranks), golden['metrics/multi/v2t'], rtol=1e-6)


def test_a_tie_counts_as_the_mean_of_all_its_orders():
    row = np.array([0.5, 0.9, 0.5, 0.1, 0.5, 0.1], np.float32)
    for right in range(len(row)):
        places = []
        for order in itertools.permutations(range(len(row))):
            ranked = sorted(order, key=lambda column: -row[column])
            places.append(1 + ranked.index(right))
        ranks = retrieval_metrics.retrieval(row[None], np.array([right])).text_to_video
        assert ranks.expected == pytest.approx(np.mean(places))
        for most in range(1, 8):
            assert ranks.recall(most) == pytest.approx(np.mean([p <= most for p in places]))


@pytest.mark.parametrize('sentences', [1, 3])
def test_a_collapsed_model_finds_what_chance_finds(sentences):
    videos = 20
    right = np.repeat(np.arange(videos), sentences)
    found = retrieval_metrics.retrieval(np.full((len(right), videos), 0.7, np.float32), right)
    for ranks in (found.text_to_video, found.video_to_text):
        assert not ranks.higher.any()  # as the first, if ranks were strict
        assert [ranks.recall(most) for most in (1, 5, 10)] == pytest.approx([0.05, 0.25, 0.5])
        assert ranks.median == ranks.mean == 10.5
    assert found.ties == 1


def test_only_ties_of_the_right_one_count():
    scores = np.array([[3.0, 1, 1], [0, 2, 2], [0, 0, 1]])
    found = retrieval_metrics.retrieval(scores, np.arange(3))
    assert found.text_to_video.expected.tolist() == [1, 1.5, 1]
    assert found.video_to_text.expected.tolist() == [1, 1, 2.5]
    assert found.ties == pytest.approx(2 / 6)


def test_videos_without_sentences_are_candidates_and_no_queries():
    scores = np.array([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
    found = retrieval_metrics.retrieval(scores, np.array([0, 2]))
    assert found.text_to_video.expected.tolist() == [3, 2]
    assert found.text_to_video.num_candidates == 3
    assert found.video_to_text.expected.tolist() == [2, 2]
    assert found.video_to_text.num_candidates == 2


def test_a_single_pair_is_found():
    found = retrieval_metrics.retrieval(np.array([[-2.0]]), np.array([0]))
    assert found.text_to_video.median == found.video_to_text.mean == 1 and found.ties == 0
    assert retrieval_metrics.best_others(np.array([[-2.0]]), np.array([0])).tolist() == [-1]


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_named(value):
    scores = np.zeros((5, 4), np.float32)
    scores[3, 2] = value
    with pytest.raises(NonFiniteScoresError, match=r'1 of 5 sentences .*: sentence 3 with video 2'):
        retrieval_metrics.retrieval(scores, np.zeros(5, int))


def test_without_sentences_there_is_nothing_to_find():
    with pytest.raises(ValueError, match='no sentences'):
        retrieval_metrics.retrieval(np.zeros((0, 4)), np.zeros(0, int))


def test_the_best_other_is_never_the_right_one(monkeypatch):
    monkeypatch.setattr(retrieval_metrics, 'BLOCK', 7)
    scores = np.random.default_rng(0).standard_normal((9, 5))
    right = np.arange(9) % 5
    before = scores.copy()
    found = retrieval_metrics.best_others(scores, right)
    np.testing.assert_array_equal(scores, before)
    for row, own, other in zip(scores, right, found):
        assert other == max(set(range(5)) - {own}, key=row.__getitem__)
