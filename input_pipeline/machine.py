"""What this process may use of its machine: CPUs and memory, within the limits of a container."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def num_cpus(root: str | os.PathLike = '/') -> int:
    """CPUs that this process may use: those it may run on, and no more than its quota pays for.

    Args:
      root: of the file system that describes the machine.

    Returns:
      At least 1; a quota of 2.5 CPUs counts as 3, which it keeps busy.
    """
    if hasattr(os, 'sched_getaffinity'):
        found = float(len(os.sched_getaffinity(0)))
    else:
        found = float(os.cpu_count() or 1)
    for folder in _groups('cpu', root):
        quota, period = ((_read(folder / 'cpu.max') or '') + ' max max').split()[:2]
        if not quota.isdigit():  # the first version of control groups
            quota = _read(folder / 'cpu.cfs_quota_us') or ''
            period = _read(folder / 'cpu.cfs_period_us') or ''
        if quota.isdigit() and period.isdigit() and int(period):
            found = min(found, int(quota) / int(period))
    return max(math.ceil(found), 1)


def free_memory(root: str | os.PathLike = '/') -> int | None:
    """Bytes that this process can still get before something is killed; None if nobody says.

    Args:
      root: of the file system that describes the machine.
    """
    found = []
    available = _field(_read(Path(root, 'proc/meminfo')), 'MemAvailable:')
    if available is not None:
        found.append(available * 1024)
    for folder in _groups('memory', root):
        for limit, used, cache in (
            ('memory.max', 'memory.current', 'inactive_file'),
            ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
        ):
            limit, used = _read(folder / limit) or '', _read(folder / used) or ''
            if limit.isdigit() and used.isdigit():
                # Files that were read are let go of when memory runs out.
                given_back = _field(_read(folder / 'memory.stat'), cache) or 0
                found.append(max(int(limit) - int(used) + given_back, 0))
    return min(found, default=None)


def _groups(controller: str, root: str | os.PathLike) -> Iterator[Path]:
    """Folders of this process's control groups, from its own to the root.

    A container may see its own group as the root, under a name that only the machine knows.
    """
    for line in (_read(Path(root, 'proc/self/cgroup')) or '').splitlines():
        _, _, rest = line.partition(':')
        controllers, _, name = rest.partition(':')
        if not controllers:
            mounts = ('', 'unified')
        elif controller in controllers.split(','):
            mounts = (controllers, controller)
        else:
            continue
        own = Path(name.lstrip('/'))
        for mount in dict.fromkeys(mounts):
            top = Path(root, 'sys/fs/cgroup', mount)
            yield from (top / each for each in (own, *own.parents) if (top / each).is_dir())


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _field(text: str | None, name: str) -> int | None:
    """The number after a name, of lines of 'name number'."""
    for line in (text or '').splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return None
