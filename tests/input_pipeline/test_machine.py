"""What a process may use of its machine: affinity, and the limits of a container."""

import os

import pytest

from input_pipeline import machine, workers

CPUS = len(os.sched_getaffinity(0))


@pytest.fixture
def root(tmp_path):
    """Writes files of a machine; their names are paths without the first slash."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f'{text}\n')
        return tmp_path

    return write


V2 = {'proc/self/cgroup': '0::/pod/one'}
V1 = {'proc/self/cgroup': '7:cpu,cpuacct:/docker/1a2b\n4:memory:/docker/1a2b\n0::/'}
GROUP = 'sys/fs/cgroup'


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({}, 64),
        (V2 | {f'{GROUP}/pod/one/cpu.max': 'max 100000'}, 64),
        (V2 | {f'{GROUP}/pod/one/cpu.max': '400000 100000'}, 4),
        (V2 | {f'{GROUP}/pod/one/cpu.max': '250000 100000'}, 3),
        (V2 | {f'{GROUP}/pod/one/cpu.max': '10000 100000'}, 1),
        # The group above says less.
        (
            V2
            | {f'{GROUP}/pod/one/cpu.max': 'max 100000', f'{GROUP}/pod/cpu.max': '200000 100000'},
            2,
        ),
        # Seen from inside: the own group is the root.
        ({'proc/self/cgroup': '0::/', f'{GROUP}/cpu.max': '200000 100000'}, 2),
        (
            V1
            | {
                f'{GROUP}/cpu,cpuacct/cpu.cfs_quota_us': '800000',
                f'{GROUP}/cpu,cpuacct/cpu.cfs_period_us': '100000',
            },
            8,
        ),
        (
            V1
            | {f'{GROUP}/cpu/cpu.cfs_quota_us': '-1', f'{GROUP}/cpu/cpu.cfs_period_us': '100000'},
            64,
        ),
        ({'proc/self/cgroup': 'nonsense'}, 64),
    ],
)
def test_a_quota_of_cpus_counts(files, expected, root, monkeypatch):
    monkeypatch.setattr(machine.os, 'sched_getaffinity', lambda _: set(range(64)))
    assert machine.num_cpus(root(files)) == expected


def test_readers_keep_to_it(monkeypatch):
    assert 1 <= machine.num_cpus() <= CPUS
    monkeypatch.setattr(workers, 'num_cpus', lambda: 3)
    assert workers.usual_number() == 3
    monkeypatch.setattr(workers, 'num_cpus', lambda: 1000)
    assert workers.usual_number() == workers.MOST_WORKERS


def test_memory_is_what_the_machine_and_the_container_leave(root):
    assert machine.free_memory(root({})) is None
    files = V2 | {'proc/meminfo': 'MemTotal: 90 kB\nMemAvailable:   80 kB'}
    assert machine.free_memory(root(files)) == 80 * 1024
    files |= {f'{GROUP}/pod/one/memory.max': 'max', f'{GROUP}/pod/one/memory.current': '9'}
    assert machine.free_memory(root(files)) == 80 * 1024
    files |= {f'{GROUP}/pod/memory.max': '5000', f'{GROUP}/pod/memory.current': '4000'}
    assert machine.free_memory(root(files)) == 1000
    files |= {f'{GROUP}/pod/memory.stat': 'anon 1000\ninactive_file 2500'}
    assert machine.free_memory(root(files)) == 3500
    files = V1 | {
        f'{GROUP}/memory/memory.limit_in_bytes': '700',
        f'{GROUP}/memory/memory.usage_in_bytes': '900',
    }
    assert machine.free_memory(root(files)) == 0
