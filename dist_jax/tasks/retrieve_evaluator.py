"""Judges sentences and videos of a whole list by what each finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from dist_jax.retrieval_metrics import retrieval
from dist_jax.sharding import gather_rows
from dist_jax.similarity import Texts, Videos
from dist_jax.tasks.api import Figures, Tree
from dist_jax.tasks.retrieve_figures import retrieval_figures
from input_pipeline.escape import terminal
from input_pipeline.video_list import LabelledSource, Record

BLOCK = 256  # sentences that are compared with all videos in a call


class RetrieveEvaluator:
    """Recalls and ranks of a list, in both directions; see `retrieve_figures`.

    A host keeps the words of its own sentences only. Of N sentences and M videos, each host has the
    (N, M) float32 scores of all at the end, and while they are gathered three times that: 2.2 GB of
    59,800 x 2,990, the test list of MSR-VTT 7k.
    """

    def __init__(
        self,
        source: LabelledSource,
        similarity: Callable[[Texts, Videos], jax.Array],
        owners: np.ndarray,
    ):
        """Starts without rows.

        Args:
          source: the videos.
          similarity: of N sentences with M videos, float32 (N, M). The same function is compiled
            once for all evaluators of a list.
          owners: (Q,) int, not decreasing: the record of each sentence. The sentences of a record
            are its captions, in order.
        """
        self._source, self._owners = source, np.asarray(owners)
        self._similarity = jax.jit(similarity)
        self._videos: list[dict[str, Tree]] = []
        self._queries: list[dict[str, Tree]] = []

    def add(self, rows: Mapping[str, Tree]) -> None:
        """Takes `index`, `frames` (n, T, E) and `frame_logits` (n, T) of some videos."""
        self._videos.append({key: rows[key] for key in ('index', 'frames', 'frame_logits')})

    def add_queries(self, rows: Mapping[str, Tree]) -> None:
        """Takes `index` of some sentences (into `owners`), `words` (n, S, E), `word_mask` (n, S),
        `word_logits` (n, S) and `pooled` (n, E)."""
        keys = ('index', 'words', 'word_mask', 'word_logits', 'pooled')
        self._queries.append({key: rows[key] for key in keys})

    def result(self) -> Figures:
        """The figures of all that was added on all hosts; each must have added something, be it no
        rows.

        Sentences of videos that were not added are left out, and counted.

        Raises:
          NonFiniteScoresError: naming a sentence and a video.
        """
        videos = gather_rows(self._videos)
        rows = gather_rows(self._score(videos))
        source, numbers = self._source, videos['index']  # figures keep these, not what was added
        column = np.full(len(source), -1)
        column[numbers] = np.arange(len(numbers))
        kept = column[self._owners[rows['index']]] >= 0
        rows = jax.tree.map(lambda leaf: leaf[kept], rows)
        sentences, scores = rows['index'], rows['scores']
        right, texts = column[self._owners[sentences]], self._texts(sentences)

        def record(i: int) -> Record:
            return source[int(numbers[i])]

        def name(row: int, i: int) -> str:
            return f'{terminal(texts[row])!r} with {terminal(record(i).path)}'

        found = retrieval(scores, right, name)
        num_skipped = len(self._owners) - len(texts)
        return retrieval_figures(found, scores, right, texts, record, num_skipped)

    def _score(self, videos: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Parts of `index` (n,) and `scores` (n, M) of this host's sentences with all M videos."""
        logits = videos['frame_logits']
        shown = Videos(videos['frames'], np.ones_like(logits), logits)
        shown = jax.device_put(shown, jax.local_devices()[0])
        num_sentences = sum(len(part['index']) for part in self._queries)
        found = [{'index': np.zeros(0, int), 'scores': np.zeros((0, len(logits)), np.float32)}]
        for rows in _blocks(self._queries, min(BLOCK, num_sentences)):
            texts = Texts(rows['words'], rows['word_mask'], rows['word_logits'], rows['pooled'])
            with jax.default_matmul_precision('highest'):  # ranks hang on the last digits
                scores = np.asarray(self._similarity(texts, shown))
            own = rows['index'] >= 0
            found.append({'index': rows['index'][own], 'scores': scores[own]})
        return found

    def _texts(self, sentences: np.ndarray) -> list[str]:
        """The captions of these numbers."""
        owners = self._owners[sentences]
        places = sentences - np.searchsorted(self._owners, owners)
        captions = {i: self._source[i].captions for i in np.unique(owners).tolist()}
        return [captions[i][place] for i, place in zip(owners.tolist(), places.tolist())]


def _blocks(
    parts: Iterable[Mapping[str, np.ndarray]], size: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Rows in blocks of one size; what fills up the last has the last row and `index` -1."""
    held = None
    for part in parts:
        held = part if held is None else jax.tree.map(lambda *two: np.concatenate(two), held, part)
        while len(held['index']) >= max(size, 1):
            yield {key: rows[:size] for key, rows in held.items()}
            held = {key: rows[size:] for key, rows in held.items()}
    if held is not None and (count := len(held['index'])):
        place = np.arange(size)
        block = {key: rows[np.minimum(place, count - 1)] for key, rows in held.items()}
        yield block | {'index': np.where(place < count, block['index'], -1)}
