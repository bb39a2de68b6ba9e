"""Measures brute force over an index of so many windows: seconds and memory.

  python -m tools.benchmark_search
  python -m tools.benchmark_search --windows 1000000 --size 768 --queries 8

Writes an index of random unit vectors, opens it as `dist_jax search` does and compares all of it
with a query, twice: the first time the file may come from the disk and the program is compiled.
Memory is what the process has of its own; the pages of the file are the system's to keep or drop.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from dist_jax.search import index_file
from dist_jax.search import query as search
from dist_jax.search.index_file import Video
from dist_jax.search.index_model import score_by_vectors
from input_pipeline.escape import Console

OF_VIDEO = 1000  # windows
SETTINGS = {'model': {}, 'preprocessing': {}, 'windows': {}}
PLACES = {'folder': '/', 'model': '/'}


def make(path: Path, windows: int, size: int) -> None:
    """Writes an index of random vectors (windows, size), one for each window."""

    def video(number: int) -> Video:
        count = min(OF_VIDEO, windows - number * OF_VIDEO)

        def read() -> dict[str, np.ndarray]:
            rng = np.random.default_rng(number)
            vectors = rng.standard_normal((count, size), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            starts = np.arange(count) * 4.0
            spans = np.stack([starts, starts + 8], axis=1)
            return {'spans': spans, 'vectors': vectors.astype(np.float16)}

        return Video(f'{number}.mp4', 0, 0, '', count, read)

    videos = [video(number) for number in range(-(-windows // OF_VIDEO))]
    index_file.write(path, PLACES, SETTINGS, videos)


class Memory:
    """Peak of this process's own memory while it is open, in MiB, above what it began with."""

    def __enter__(self) -> 'Memory':
        self._stop = threading.Event()
        self._first = self._peak = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *unused) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = (self._peak - self._first) / 2**10

    @staticmethod
    def _now() -> int:
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, self._now())


def main(argv: list[str] | None = None) -> int:
    """Runs the measurement and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--windows', type=int, default=1_000_000)
    parser.add_argument('--size', type=int, default=512, help='of a vector')
    parser.add_argument('--queries', type=int, default=1, help='vectors that are looked for')
    parser.add_argument('--folder', help='where the index is written; a temporary one by default')
    arguments = parser.parse_args(argv)
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((arguments.queries, arguments.size), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    console = Console()
    table = Table('', 'seconds', 'own memory, MiB', title_justify='left')
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / 'random.index'
        make(path, arguments.windows, arguments.size)
        console.print(
            f'{arguments.windows} vectors of {arguments.size}, float16: '
            f'{os.path.getsize(path) / 2**30:.2f} GiB; {jax.device_count()} x '
            f'{jax.devices()[0].device_kind}, {os.cpu_count()} CPUs'
        )
        for title in ('first', 'again'):
            with Memory() as memory:
                start = time.perf_counter()
                index = index_file.read(path)
                opened = time.perf_counter()
                found = search.scores(index, score_by_vectors(jnp.asarray(queries)))
                compared = time.perf_counter()
                search.best(index, found, 5)
                end = time.perf_counter()
            table.add_row(f'{title}: open', f'{opened - start:.2f}', '')
            table.add_row(f'{title}: compare', f'{compared - opened:.2f}', '')
            table.add_row(f'{title}: best', f'{end - compared:.2f}', f'{memory.peak:.0f}')
    console.print(table)
    return 0


if __name__ == '__main__':
    sys.exit(main())
