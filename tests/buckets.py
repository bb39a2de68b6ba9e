"""A bucket in memory, behind epath, where gcsfs is on a pod."""

import typing

from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class Objects(MemoryFileSystem):
    """A bucket: no appending, and a folder is there only while something lies in it."""

    protocol = ('gs', 'gcs')
    cachable = False
    store: typing.ClassVar[dict] = {}
    pseudo_dirs: typing.ClassVar[list] = ['']

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('gs://').removeprefix('gcs://'))

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def _open(self, path, mode='rb', **options):
        assert mode in ('rb', 'wb'), f'{path} was opened with mode {mode}'
        return super()._open(path, mode, **options)


def stand_in_for_buckets(monkeypatch) -> None:
    """Makes gs:// an empty bucket for the length of a test."""
    Objects.store.clear()
    Objects.pseudo_dirs[:] = ['']
    objects = Objects()
    monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: objects)
