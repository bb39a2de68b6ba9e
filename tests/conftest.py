"""Settings of every test: CPU, quick compilation and a tiny data set."""

import gc
import os
import signal

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be what tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests compile far more than they compute. XLA's older emitters take a third of the time; parts of
# a program for threads that are not there cost a tenth.
os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0 '
    '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
)

import jax
import pytest

from input_pipeline import motion_clips

# Tracing makes millions of small objects, few of them garbage: to look for it as often as Python
# does by default takes a fifth of the time.
gc.freeze()
gc.set_threshold(100_000)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each worker goes through files one after the other, so that modules set up once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


# They wait for processes of their own, while another worker computes.
FIRST = ('test_processes.py', 'test_kill.py', 'test_workdir_lock.py', 'test_ending.py')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Names that are not UTF-8 stand in logs, and what pytest's processes send each other is."""
    report = yield
    report.sections = [
        (title, text.encode(errors='backslashreplace').decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope='session', autouse=True)
def compiled_once(tmp_path_factory):
    """Tests of a session, and processes that they start, read each other's compiled programs."""
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent  # of all workers
    for name, value in (
        ('compilation_cache_dir', str(folder / 'compiled')),
        ('persistent_cache_min_compile_time_secs', 0),
        ('persistent_cache_min_entry_size_bytes', -1),
    ):
        jax.config.update(f'jax_{name}', value)
        os.environ[f'JAX_{name.upper()}'] = str(value)


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
    """A folder with a few of the built-in clips: train.txt, val.txt, labels.txt."""
    folder = tmp_path_factory.mktemp('clips') / 'motion'
    motion_clips.generate(folder, num_train=18, num_val=10, size=48, num_frames=16)
    return folder
