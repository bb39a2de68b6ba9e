"""What an evaluation of retrieval shows: recalls, ranks, what sentences found, the worst of it."""

from __future__ import annotations

import csv
import functools
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dist_jax import strip_sheet
from dist_jax.drawing import cut, png
from dist_jax.retrieval_metrics import Ranks, Retrieval, best_others
from dist_jax.scalars import percent, show
from dist_jax.strip_sheet import Row, Tile
from dist_jax.tasks.api import Figures, Picture, Table
from input_pipeline import escape
from input_pipeline.video_list import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIRECTIONS = {'t2v': 'text to video', 'v2t': 'video to text'}
RECALLS = (1, 5, 10)
RULE = (
    'from 1; the mean over all orders of those that tie; as median of an even number of ranks the '
    'mean of the middle two'
)
BEST = 5  # videos that are shown of a sentence
QUERIES = 8  # sentences on the sheet, evenly spread over the list
WORST, WORST_SHOWN = 20, 5  # failures in the table of the page, and elsewhere
MOST_LETTERS = 200  # of a sentence in a table


def retrieval_figures(
    found: Retrieval,
    scores: np.ndarray,
    right: np.ndarray,
    texts: Sequence[str],
    record: Callable[[int], Record],
    num_skipped: int = 0,
) -> Figures:
    """The figures of a list of sentences and videos.

    Little is kept of the matrix. Pictures read their videos when they are drawn.

    Args:
      found: `retrieval_metrics.retrieval` of the next two.
      scores: (N, M) float, of sentences with videos.
      right: (N,) int, the video of each sentence.
      texts: the sentences.
      record: the video of a column.
      num_skipped: sentences that are in no figure, as their video cannot be read.
    """
    directions = dict(zip(DIRECTIONS, (found.text_to_video, found.video_to_text)))
    scalars = {
        f'{start}_{name}': value
        for start, ranks in directions.items()
        for name, value in _scalars(ranks).items()
    }
    counts = {'num_sentences': len(texts), 'num_skipped_sentences': num_skipped}
    recall = _recall_table(directions)
    sentences = _Sentences(found.text_to_video, scores, right, texts, record)
    sheets = [(title, rows) for title, rows in sentences.sheets if rows]
    return Figures(
        scalars=scalars | {'ties': found.ties} | counts,
        headline=(*(f't2v_r{most}' for most in RECALLS), 't2v_median_rank', 'v2t_r1'),
        line='  '.join(
            f'{start} R@1 {percent(scalars[f"{start}_r1"])} '
            f'median rank {show("", scalars[f"{start}_median_rank"])}'
            for start in directions
        ),
        details={'rank_rule': RULE},
        sections=(
            recall,
            Picture(
                'Ranks',
                lambda: _histogram(directions),
                text='share of the queries by the rank of what is right',
                style='wide',
            ),
            *(
                Picture(
                    title,
                    functools.partial(strip_sheet.draw, [('', rows)]),
                    text='sentences, and strips of frames of the videos that they find',
                    style='wide',
                )
                for title, rows in sheets
            ),
            *sentences.failures(WORST),
        ),
        brief=(recall, *sentences.failures(WORST_SHOWN)),
        files={
            'retrieval.png': lambda: png(lambda: strip_sheet.draw(sheets)),
            'ranks.csv': lambda: sentences.csv().encode(),
        },
    )


def _scalars(ranks: Ranks) -> dict[str, float]:
    recalls = {f'r{most}': ranks.recall(most) for most in RECALLS}
    return recalls | {'median_rank': ranks.median, 'mean_rank': ranks.mean}


def _recall_table(directions: Mapping[str, Ranks]) -> Table:
    """Both directions, each with what a model gets that finds all things alike."""
    rows = []
    for start, ranks in directions.items():
        last = ranks.num_candidates - 1
        alike = Ranks(np.array([0]), np.array([last]), ranks.num_candidates)
        for name, found in ((DIRECTIONS[start], ranks), ('  by chance', alike)):
            shares = [percent(found.recall(first)) for first in RECALLS]
            rows.append((name, *shares, show('', found.median), show('', found.mean)))
    columns = ('', *(f'R@{most}' for most in RECALLS), 'median rank', 'mean rank')
    return Table('Recall', columns, rows, bars=1)


def _bins(most: int) -> list[tuple[int, int]]:
    """First and last rank of 1, 2, 3 to 5, 6 to 10, 11 to 20, 21 to 50, ... up to `most`."""
    ends = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5)]
    ends = [*(end for end in ends if end < most), most]
    return [(before + 1, end) for before, end in zip([0, *ends], ends)]


def _histogram(directions: Mapping[str, Ranks]) -> Figure:
    """Share of the queries by rank, and what chance gives."""
    from matplotlib.figure import Figure

    bins = _bins(max(ranks.num_candidates for ranks in directions.values()))
    figure = Figure(figsize=(8.2, 3.2), layout='constrained')
    axis = figure.subplots()
    ends = np.array([end for _, end in bins])
    place, width = np.arange(len(bins)), 0.4
    for i, (start, ranks) in enumerate(directions.items()):
        at = place + (i - 0.5) * width
        # Half a rank, of ties, belongs to the bin above.
        count = np.bincount(np.searchsorted(ends, ranks.expected), minlength=len(bins))
        share = 100 * count / len(ranks.expected)
        axis.bar(at, share, 0.94 * width, color=f'C{i}', label=DIRECTIONS[start])
        for x, value in zip(at, share):
            if value:
                axis.annotate(
                    f'{value:.0f}' if value >= 9.95 else f'{value:.1f}',
                    (x, value),
                    (0, 2),
                    textcoords='offset points',
                    ha='center',
                    fontsize=7.5,
                )
        chance = 100 * np.diff(np.minimum([0, *ends], ranks.num_candidates)) / ranks.num_candidates
        _draw_chance(axis, at, chance, width, 'chance' if i else None)
    names = [f'{first:,}' if first == last else f'{first:,}-{last:,}' for first, last in bins]
    axis.set_xticks(place, names)
    axis.set_xlabel('rank of what is right')
    axis.set_title('share of the queries, %')
    axis.margins(y=0.1)
    axis.grid(True, axis='y')
    axis.tick_params(length=0)
    axis.legend(loc='lower right', bbox_to_anchor=(1, 1), borderaxespad=0, ncols=3)
    return figure


def _draw_chance(
    axis: Axes, at: np.ndarray, share: np.ndarray, width: float, label: str | None
) -> None:
    import matplotlib

    ink = matplotlib.rcParams['text.color']
    reach = 0.47 * width
    axis.hlines(share, at - reach, at + reach, color=ink, linewidth=1.2, label=label)


class _Sentences:
    """What each sentence found.

    Attributes:
      sheets: (title, rows) of the sentences that are shown with their videos.
    """

    def __init__(
        self,
        ranks: Ranks,
        scores: np.ndarray,
        right: np.ndarray,
        texts: Sequence[str],
        record: Callable[[int], Record],
    ):
        self._ranks, self._right, self._texts, self._record = ranks, right, texts, record
        self._others = best_others(scores, right)
        self._strip = functools.cache(lambda column: strip_sheet.read_strip(record(column)))
        evenly = ((np.arange(QUERIES) + 0.5) * len(texts) / QUERIES).astype(int)
        expected = ranks.expected
        order = np.argsort(-expected, kind='stable')
        order = order[expected[order] > 1]
        _, first = np.unique(right[order], return_index=True)
        self._worst = order[np.sort(first)[:WORST]]
        shown = {
            'Some sentences and the videos they find, the right one framed': np.unique(
                evenly.astype(int)
            ),
            'Worst failures, the right video framed': self._worst[:WORST_SHOWN],
        }
        self.sheets = [
            (title, [self._row(i, scores[i]) for i in some]) for title, some in shown.items()
        ]

    def _row(self, sentence: int, scores: np.ndarray) -> Row:
        """The best videos of a sentence, and its own behind them if it is not among them."""
        right = int(self._right[sentence])
        best = np.argsort(-scores, kind='stable')[:BEST].tolist()
        places = {column: str(1 + i) for i, column in enumerate(best)}
        places[right] = self._place(sentence)
        tiles = [
            Tile(
                functools.partial(self._strip, column),
                place,
                self._name(column),
                float(scores[column]),
                right=column == right,
                apart=column not in best,
            )
            for column, place in places.items()
        ]
        return Row(self._texts[sentence], f'rank {places[right]} of {len(scores):,}', tiles)

    def _name(self, column: int) -> str:
        return os.path.basename(self._record(column).path)

    def _place(self, sentence: int) -> str:
        """'3', or '3-5' of one that ties with two others."""
        first, equal = 1 + self._ranks.higher[sentence], self._ranks.equal[sentence]
        return f'{first:,}-{first + equal:,}' if equal else f'{first:,}'

    def failures(self, most: int) -> list[Table]:
        """The sentences whose right video stands last, one a video, where any is not first."""
        if not len(self._worst):
            return []
        rows = [
            (
                cut(self._texts[i], MOST_LETTERS),
                self._place(i),
                self._name(self._right[i]),
                self._name(self._others[i]),
            )
            for i in self._worst[:most]
        ]
        columns = ('sentence', 'rank', 'its video', 'found instead')
        return [Table('Worst failures, one of each video', columns, rows)]

    def csv(self) -> str:
        """A row for each sentence."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator='\n')
        writer.writerow(('sentence', 'video', 'rank', 'tied', 'found_instead'))
        path = functools.cache(lambda column: escape.csv_cell(self._record(column).path))
        ranks = zip(self._ranks.expected.tolist(), self._ranks.equal.tolist())
        for i, (text, (rank, equal)) in enumerate(zip(self._texts, ranks)):
            writer.writerow(
                (
                    escape.csv_cell(text),
                    path(int(self._right[i])),
                    f'{rank:.10g}',
                    equal,
                    path(int(self._others[i])) if rank > 1 else '',
                )
            )
        return buffer.getvalue()
