"""The shards of a folder as an Apache Beam pipeline, for many machines.

Workers need what a process of this machine needs: the folder and the videos under the same paths,
in a bucket or on a shared file system, and this package. A bundle that is tried again, or twice at
the same time, does no harm: a shard gets its name when it is whole, and has the same bytes each
time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from dist_jax.dataset.building.shards import ShardBuilder, Task


class BuildShard(beam.DoFn):
    """Builds the shard of a task and yields the number of its records."""

    def __init__(self, folder: str):
        self._folder = folder

    def setup(self):
        """Reads the manifest, once in every worker."""
        self._builder = ShardBuilder(self._folder)

    def process(self, task: tuple[str, int]):
        """Takes (split, number of the shard)."""
        result = self._builder.build(Task(*task))
        beam.metrics.Metrics.counter('build_dataset', 'stored').inc(len(result['rows']))
        beam.metrics.Metrics.counter('build_dataset', 'dropped').inc(len(result['problems']))
        yield len(result['rows'])


def build_with_beam(
    folder: str | os.PathLike, tasks: Sequence[Task], options: Sequence[str]
) -> None:
    """Builds shards and waits until all are there.

    Args:
      folder: of the build.
      tasks: the shards.
      options: Beam's own flags, such as --runner=DataflowRunner.
    """
    # The class lives in a module that workers import, so the main session is not needed.
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = (
            pipeline
            | 'shards' >> beam.Create([(task.split, task.number) for task in tasks])
            | 'spread' >> beam.Reshuffle()
            | 'build' >> beam.ParDo(BuildShard(os.fspath(folder)))
        )
