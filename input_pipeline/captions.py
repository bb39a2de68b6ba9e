"""Captions of videos: pairs to train on, their tokens, and all sentences of a list.

A list of captions has a record for each video, with all its captions (`Record.captions`). What is
trained on are pairs of a video and one of its captions, `CaptionPairs`; what is evaluated are the
videos, each once, and all sentences, `sentence_rows`.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from absl import logging
from numpy.typing import DTypeLike

from input_pipeline.tokenizer import tokenize_counted
from input_pipeline.video_list import Label, LabelledSource, Record
from input_pipeline.workers import Rows


class CaptionPairs:
    """The pairs of a list: a record for each caption of each video, in the order of the list.

    A record is that of the video, with the one caption in `captions` and the number of the video in
    the list as its label. Nothing of the list is copied, and no shard opened.

    Attributes:
      class_names: ().
      num_classes: 0.
      labels: (N,) int64, the number of the video of each pair.
    """

    class_names = ()
    num_classes = 0

    def __init__(self, source: LabelledSource):
        """Takes a list of captions; videos without one are in no pair."""
        self._source = source
        counts = np.array([len(source[i].captions) for i in range(len(source))], np.int64)
        self._starts = np.cumsum(counts) - counts
        self.labels = np.repeat(np.arange(len(source)), counts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        video = int(self.labels[index])
        record = self._source[video]
        caption = record.captions[index - int(self._starts[video])]
        return dataclasses.replace(record, label=video, captions=(caption,))


@dataclass(frozen=True)
class CaptionTokens:
    """Tokens of the first caption of a record, for the batches of a reader (`pipeline.Annotate`).

    Attributes:
      num_words: tokens of a row, S, start and end included; what is longer is cut.
    """

    num_words: int

    @property
    def spec(self) -> Mapping[str, tuple[tuple[int, ...], DTypeLike]]:
        """`tokens` (S,) int32 and `word_mask` (S,) float32."""
        return {
            'tokens': ((self.num_words,), np.int32),
            'word_mask': ((self.num_words,), np.float32),
        }

    def __call__(self, record: Record, label: Label, rng: np.random.Generator | None) -> Rows:
        """The rows of a clip, see `token_rows`."""
        del label, rng
        rows, _ = token_rows(record.captions[:1], self.num_words)
        return {key: row for key, (row,) in rows.items()}


def token_rows(captions: Sequence[str], num_words: int) -> tuple[Rows, int]:
    """Tokens of captions, with what is a word of them.

    Args:
      captions: Q texts.
      num_words: tokens of a row, S.

    Returns:
      `tokens` (Q, S) int32: start, byte pairs, of which at most S - 2 are kept, end, zeros; and
      `word_mask` (Q, S) float32, 1 for all of these but the zeros. And how many were cut.

    Raises:
      ValueError: of a text without words, see `tokenizer.check_text`.

    Source: Side4Video's retrieval.
    """
    tokens, lengths = tokenize_counted(captions, num_words, truncate=True)
    # From the lengths: 0 is the id of a token, too.
    mask = np.arange(num_words) < lengths[:, None]
    rows = {'tokens': tokens, 'word_mask': mask.astype(np.float32)}
    return rows, int((lengths > num_words).sum())


def sentence_rows(source: LabelledSource, num_words: int) -> tuple[Rows, np.ndarray]:
    """All captions of all videos, in the order of the list.

    Args:
      source: N videos with Q captions together.
      num_words: tokens of a row, S.

    Returns:
      `tokens` (Q, S) int32 and `word_mask` (Q, S) float32 as of `token_rows`; and the number of the
      video of each, (Q,) int64, not decreasing.
    """
    pairs = CaptionPairs(source)
    captions = [caption for i in range(len(source)) for caption in source[i].captions]
    return token_rows(captions, num_words)[0], pairs.labels


def check_captions(source: LabelledSource, path: str | os.PathLike, num_words: int) -> None:
    """Looks at all captions of a list once; logs how many are cut.

    Args:
      source: the list.
      path: where it is from, for messages.
      num_words: tokens of a row, S.

    Raises:
      ValueError: naming the list and the video, if there is none, or one that has no tokens.
    """
    total = num_cut = 0
    for i in range(len(source)):
        record = source[i]
        if not record.captions:
            raise ValueError(
                f'{path}: video {i}, {record.video_id}, has no caption, and retrieval learns from '
                'sentences; name a list of captions: CSV with the columns path,caption, JSON lines '
                'with path and captions (and no label), the lists of MSR-VTT, MSVD or VATEX, or a '
                'set that was built of such a list'
            )
        try:
            num_cut += token_rows(record.captions, num_words)[1]
        except ValueError as error:
            raise ValueError(f'{path}: video {i}, {record.video_id}: {error}') from error
        total += len(record.captions)
    if num_cut:
        logging.warning(
            '%s: %d of %d captions have more than task.num_words=%d tokens, start and end counted; '
            'what is beyond them is cut',
            *(path, num_cut, total, num_words),
        )
