"""The notebooks of docs/notebooks: each is a Markdown page, and an .ipynb made of it.

    python -m tools.notebooks            # check that the pairs agree and hold no outputs
    python -m tools.notebooks --write    # make the .ipynb anew, of the pages
    python -m tools.notebooks --run      # run every cell, in temporary folders, on the CPU

`--run` sets NOTEBOOK_STEPS, with which the notebooks train shortly. Wants the extra `docs`.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / 'docs' / 'notebooks'
STEPS = 20


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m tools.notebooks',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('names', nargs='*', metavar='NAME', help='demo, search, ...; all of them')
    parser.add_argument('--write', action='store_true', help='make the .ipynb anew')
    parser.add_argument('--run', action='store_true', help='run every cell')
    parser.add_argument('--steps', type=int, default=STEPS, help='of training (%(default)s)')
    return parser.parse_args(argv)


def notebook_of(page: Path) -> nbformat.NotebookNode:
    """The notebook of a page, without outputs; the same page gives the same bytes."""
    notebook = jupytext.read(page)
    kernel = notebook.metadata['kernelspec']
    notebook.metadata = nbformat.NotebookNode(
        kernelspec=kernel, language_info=nbformat.NotebookNode(name='python')
    )
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f'{page.stem}-{number}', nbformat.NotebookNode()
    return notebook


def problem(page: Path) -> str:
    """What is wrong with the .ipynb of a page; '' if nothing is."""
    path = page.with_suffix('.ipynb')
    if not path.exists() or path.read_text(encoding='utf-8') != text_of(page):
        return f'{path.name} is not what {page.name} gives: python -m tools.notebooks --write'
    return ''


def text_of(page: Path) -> str:
    return nbformat.writes(notebook_of(page)) + '\n'


def run(page: Path, steps: int) -> str:
    """Runs the cells of a page one after the other; what went wrong, or ''."""
    os.environ['NOTEBOOK_STEPS'] = str(steps)
    with tempfile.TemporaryDirectory() as folder:
        resources = {'metadata': {'path': folder}}
        client = NotebookClient(notebook_of(page), timeout=600, resources=resources)
        client.create_kernel_manager()
        client.km.transport, client.km.ip = 'ipc', f'{folder}/kernel'
        try:
            client.execute()
        except CellExecutionError as error:
            return str(error)
    return ''


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    pages = sorted(FOLDER.glob('*.md'))
    pages = [page for page in pages if not arguments.names or page.stem in arguments.names]
    # Commands of cells are those of this Python.
    os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    with tempfile.TemporaryDirectory() as programs:  # commands that follow each other share them
        os.environ['JAX_COMPILATION_CACHE_DIR'] = programs
        return int(not pages or any([handle(page, arguments) for page in pages]))


def handle(page: Path, arguments: argparse.Namespace) -> bool:
    """Writes, checks and runs a page as the arguments say; prints and returns whether it failed."""
    begin, cpu = time.monotonic(), _cpu()
    if arguments.write:
        page.with_suffix('.ipynb').write_text(text_of(page), encoding='utf-8')
    wrong = problem(page)
    if arguments.run and not wrong:
        wrong = run(page, arguments.steps)
    seconds = f'{time.monotonic() - begin:.0f} s, {_cpu() - cpu:.0f} s of CPU'
    print(f'{page.stem:12} {seconds}  {wrong or "ok"}', flush=True)
    return bool(wrong)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
