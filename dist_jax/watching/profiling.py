"""A trace of some steps of a run, which XProf opens: `xprof --logdir=WORKDIR/profile`.

What goes wrong with it is a warning: no reason to stop a run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

log = logging.getLogger('dist_jax')

FOLDER = 'profile'
BEFORE = 3  # steps of a start that are not traced: the first is compiled, others fill the pipeline


class Profile:
    """Traces the first process once, `steps` steps long, soon after a run starts or continues."""

    def __init__(self, workdir: str | os.PathLike[str], steps: int, first: int, last: int):
        """Prepares.

        Args:
          workdir: of the run.
          steps: to trace; 0 for none.
          first: step that this start begins with.
          last: step that the run ends with.
        """
        self._workdir, self._folder = epath.Path(workdir), ''
        own = steps > 0 and jax.process_index() == 0
        self._start = min(first + BEFORE, max(last - steps, first)) if own else -1
        self._end = min(self._start + steps, last) if own else -1

    def starts_before(self, number: int) -> bool:
        """Whether the trace begins with this step; the device should have nothing else to do."""
        return number == self._start

    def ends_after(self, number: int) -> bool:
        """Whether this step is the last that is traced; wait for it before `stop`."""
        return bool(self._folder) and number + 1 == self._end

    def start(self) -> None:
        """Begins, if it can."""
        folder = tempfile.mkdtemp(prefix='dist_jax_profile_')
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a call of Python a row: too many to open
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except Exception as error:
            log.warning('no step is traced: %s', error)
        else:
            self._folder = folder

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Around a step; names it in the trace."""
        if not self._folder:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation('train', step_num=number)

    def stop(self) -> None:
        """Ends, if it began, and writes the trace to the workdir."""
        if not self._folder:
            return
        folder, self._folder = Path(self._folder), ''
        target = self._workdir / FOLDER
        try:
            jax.profiler.stop_trace()
            for file in sorted(path for path in folder.rglob('*') if path.is_file()):
                place = target / file.relative_to(folder).as_posix()
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.read_bytes())
            shutil.rmtree(folder, ignore_errors=True)
        except Exception as error:
            log.warning('the profile could not be written to %s: %s', target, error)
        else:
            log.info(
                'traced some steps from %d on; pip install xprof && xprof --logdir=%s shows them',
                *(self._start, target),
            )
