"""Retrieval metrics of a finished evaluation, on the host: who stands where, and with whom.

Scores that are exactly equal have no order. Counting a query's right candidate before those it ties
with would give a model that finds all things alike a recall of 100 %; here a tie counts as the mean
of all its orders. That also is what strict counting gives where nothing ties.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from dist_jax.metrics import check_finite

BLOCK = 2**24  # scores that are looked at together: 64 MiB, and as much made of them


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Where the right candidate of each of Q queries stands.

    Attributes:
      higher: (Q,) int64, candidates that score strictly higher. The release's rank, from 0.
      equal: (Q,) int64, other candidates of the very same score.
      num_candidates: among which it stands.
    """

    higher: np.ndarray
    equal: np.ndarray
    num_candidates: int

    @property
    def expected(self) -> np.ndarray:
        """(Q,) float64, rank from 1: the mean over all orders of those that tie."""
        return 1 + self.higher + self.equal / 2

    def recall(self, most: int) -> float:
        """Share of queries whose right candidate is among the first `most`.

        A query with ties counts as the share of their orders in which it is.
        """
        places = 1 + self.equal
        return float((np.clip(most - self.higher, 0, places) / places).mean())

    @property
    def median(self) -> float:
        """Of the expected ranks; of an even number of queries the mean of the middle two.

        Differs: the release takes the lower one for sentences of lists with several a video.
        """
        return float(np.median(self.expected))

    @property
    def mean(self) -> float:
        """Of the expected ranks."""
        return float(self.expected.mean())


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Both directions.

    Attributes:
      text_to_video: a rank of each sentence's video among all videos.
      video_to_text: a rank of each video that has sentences, in order. A video scores with another
        one's sentences what it scores with the best of them, and its own stand among those.
      ties: share of the queries of both whose right candidate ties with another.
    """

    text_to_video: Ranks
    video_to_text: Ranks

    @property
    def ties(self) -> float:
        both = (self.text_to_video, self.video_to_text)
        return float(np.concatenate([ranks.equal > 0 for ranks in both]).mean())


def retrieval(
    scores: np.ndarray,
    right: np.ndarray,
    name: Callable[[int, int], str] = 'sentence {} with video {}'.format,
) -> Retrieval:
    """Ranks in a matrix of scores.

    Args:
      scores: (N, M) float, of sentences (rows) with videos.
      right: (N,) int, the video of each sentence. A video may have any number of them, in any rows.
      name: what a message calls a row and a column.

    Raises:
      ValueError: there is no sentence.
      NonFiniteScoresError: some scores are NaN or infinite.

    Source: metrics.py of the Side4Video release.
    Differs: its ranks are strict, and of a row with ties in a square matrix it counts several.
    """
    if not len(scores):
        raise ValueError('there are no sentences of these videos to look for')
    check_finite([scores], lambda row: name(row, _first_bad(scores[row])), of='sentences')
    videos = np.unique(right)
    groups = _best_of_groups(scores, right)[:, videos]
    return Retrieval(_ranks(scores, right), _ranks(groups.T, np.arange(len(videos))))


def best_others(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) int64, the best video of each sentence but its own; -1 where there is no other."""
    if scores.shape[1] < 2:
        return np.full(len(scores), -1)
    found = np.empty(len(scores), np.int64)
    for part in _blocks(*scores.shape):
        others = scores[part].copy()
        np.put_along_axis(others, right[part, None], -np.inf, 1)
        found[part] = others.argmax(1)
    return found


def _first_bad(row: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(row))[0])


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _ranks(scores: np.ndarray, right: np.ndarray) -> Ranks:
    """Of (Q, candidates) scores; `right` (Q,) are the right ones."""
    higher, equal = np.empty((2, len(scores)), np.int64)
    for part in _blocks(*scores.shape):
        own = np.take_along_axis(scores[part], right[part, None], 1)
        higher[part] = np.count_nonzero(scores[part] > own, axis=1)
        equal[part] = np.count_nonzero(scores[part] == own, axis=1) - 1
    return Ranks(higher, equal, scores.shape[1])


def _best_of_groups(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(G, M): of each video with sentences, in order, the highest of their scores."""
    order = np.argsort(right, kind='stable')
    _, starts = np.unique(right[order], return_index=True)
    found = np.empty((len(starts), scores.shape[1]), scores.dtype)
    for row, own in enumerate(np.split(order, starts[1:])):
        scores[own].max(0, out=found[row])
    return found
