"""What a task is: the loss, and what its answers are worth. The rest of a run does not know.

A family (`models`) turns clips into outputs; a task says what a batch holds beside its clips, what
the outputs should have been, and how well a whole list was answered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from input_pipeline.pipeline import Annotate
from input_pipeline.video_list import LabelledSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Tree = Any
Labels = tuple[tuple[str, ...], ...]  # class names of each head; () where there are none


def labels_of(source: LabelledSource) -> Labels:
    """Class names of each head; () where there are none."""
    names = source.class_names
    return names if not names or isinstance(names[0], tuple) else (tuple(names),)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows for a person, on the console or on a page.

    Attributes:
      title: above it.
      columns: their names.
      rows: texts.
      bars: column whose percentages a page draws as bars, too; None for none.
      folded: a page shows the title alone until it is asked for the rest.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: int | None = None
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing for a page.

    Attributes:
      title: above it.
      draw: makes it, under whatever theme is set; called once for each.
      text: for those who do not see it.
      style: class of the page's style sheet.
    """

    title: str
    draw: Callable[[], Figure]
    text: str
    style: str = ''


@dataclasses.dataclass(frozen=True)
class Figures:
    """What an evaluator found on a whole list.

    Attributes:
      scalars: name -> number; for logs, summaries and `evaluation.json`. `dist_jax.scalars` knows
        what they are called and how they are written.
      num_classes: of each head, where a figure may say something of many classes only.
      headline: those that a summary shows, the most important first.
      line: the same in a line of a log.
      details: further JSON values of `evaluation.json`.
      sections: tables and pictures of the page, in order.
      brief: tables of the console.
      files: written beside `evaluation.json`: name -> function that makes the content.
    """

    scalars: Mapping[str, float]
    num_classes: tuple[int, ...] = ()
    headline: tuple[str, ...] = ()
    line: str = ''
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sections: tuple[Table | Picture, ...] = ()
    brief: tuple[Table, ...] = ()
    files: Mapping[str, Callable[[], bytes]] = dataclasses.field(default_factory=dict)


class Evaluator(Protocol):
    """Judges the answers to a list."""

    def add(self, rows: Mapping[str, Tree]) -> None:
        """Takes rows of this host, axis 0 of every leaf, without padding and unreadable videos.

        They are `index` (the number of the record), `label` and the keys of `Task.eval_annotate`,
        and what `Task.predict` returns.
        """

    def add_queries(self, rows: Mapping[str, Tree]) -> None:
        """Takes rows of this host of `Task.queries`, each on one host; of tasks that have any.

        They are `index` (the number of the query), its keys, and what `Task.predict_queries`
        returns.
        """

    def result(self) -> Figures:
        """The figures of all rows of all hosts; every host must call it.

        Raises:
          NonFiniteScoresError: predictions are NaN or infinite; the same on all hosts.
        """


class Task(Protocol):
    """What a run learns; made of the class names of a list.

    Attributes:
      needs_classes: whether it reads those: a list of captions alone is no list for it, and all its
        lists have the same.
      needs_captions: whether it reads captions: a list of classes is no list for it.
      labels: class names of each head of the network, those of the list or its own; () where there
        are no classes.
      annotate: makes the task's own keys of a training batch from a record, in a reader; None for
        none.
      eval_annotate: likewise of a batch of an evaluation.
      element_spec: what goes to the devices in training beside `video` and `mask`: name -> shape
        and dtype of one row. `label` is there without being made.
      input_keys: names of those that the network reads, too.
      eval_input_keys: keys of `eval_annotate` that the network reads.
      couples_rows: the loss of a row reads other rows, so that a batch cannot be cut into parts.
      mixes: whether targets are distributions, which mixup and cutmix may average.
      select_by: the scalar of an evaluation by which the best checkpoint is chosen; the higher, the
        better.

    Two more may be left out, see `label_sets` and `neutral_text`.
    """

    needs_classes: bool
    needs_captions: bool
    labels: Labels
    annotate: Annotate | None
    eval_annotate: Annotate | None
    element_spec: Mapping[str, jax.ShapeDtypeStruct]
    input_keys: tuple[str, ...]
    eval_input_keys: tuple[str, ...]
    couples_rows: bool
    mixes: bool
    select_by: str

    def check_list(self, source: LabelledSource, where: str) -> None:
        """Warns in the log of what a list lacks; `where` names it.

        Raises:
          ValueError: it lacks what this task cannot do without.
        """

    def samples(self, source: LabelledSource) -> LabelledSource:
        """What of a list is trained on, a record each; the list itself where that is its videos."""

    def check(self, outputs: Tree) -> None:
        """Raises ValueError if a network with these outputs (shapes) cannot do this."""

    def targets(self, batch: Mapping[str, jax.Array]) -> Tree:
        """What the outputs of a batch should be; axis 0 of every leaf are its rows."""

    def loss(self, outputs: Tree, targets: Tree, mask: jax.Array) -> jax.Array:
        """Loss of each row, float32 (B,), of outputs of the network and targets; mask (B,).

        Rows with mask 0 are zeros, of the clip and of every key but `label`. What comes out of them
        is multiplied by 0: it must be finite, and so must its gradient.
        """

    def predict(self, outputs: Tree, num_views: int) -> dict[str, Tree]:
        """Answers (B, ...) from outputs of B * num_views clips, the views of a video together."""

    def queries(self, source: LabelledSource) -> Mapping[str, np.ndarray] | None:
        """What a list is judged with beside its videos: rows (Q, ...) that the network reads by
        themselves, the same on all hosts; None for nothing."""

    def predict_queries(self, outputs: Tree) -> dict[str, Tree]:
        """Answers (Q, ...) from outputs of queries."""

    def evaluator(self, source: LabelledSource) -> Evaluator:
        """A fresh judge of the answers to a list."""


def label_sets(task: Task | type[Task]) -> bool:
    """Attribute `label_sets` of a task, or False: whether videos have any number of classes.

    Its lists are read so, whatever they are, and lists that say so are for such tasks alone.
    """
    return getattr(task, 'label_sets', False)


def neutral_text(task: Task) -> str:
    """Attribute `neutral_text` of a task, or '': what text heads compare class names with."""
    return getattr(task, 'neutral_text', '')
