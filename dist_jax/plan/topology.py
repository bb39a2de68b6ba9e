"""TPU topologies without a TPU: libtpu compiles for them on any Linux machine."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from dist_jax.plan.chips import CHIPS, Chip

# libtpu looks for a machine to run on; it is told one, and that it need not have it to itself.
ENVIRONMENT = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v4-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_WORKER_ID': '0',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}

EXAMPLES = {
    'v4': ('v4:2x2x1', 'v4:2x2x2', 'v4:2x2x4', 'v4:2x4x4', 'v4:4x4x4', 'v4:4x4x8', 'v4:8x8x8'),
    'v5e': ('v5e:2x2', 'v5e:2x4', 'v5e:4x4', 'v5e:4x8', 'v5e:8x8', 'v5e:8x16', 'v5e:16x16'),
    'v5p': ('v5p:2x2x1', 'v5p:2x2x2', 'v5p:2x2x4', 'v5p:2x4x4', 'v5p:4x4x4', 'v5p:4x4x8'),
    'v6e': ('v6e:2x2', 'v6e:2x4', 'v6e:4x4', 'v6e:4x8', 'v6e:8x8', 'v6e:8x16', 'v6e:16x16'),
}


class MissingCompilerError(RuntimeError):
    """libtpu, which holds the compiler, is not installed."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod, or several.

    Attributes:
      chip: what it is made of.
      shape: chips along each dimension of a slice.
      num_slices: how many slices.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """As the compiler is asked: 'v4:4x4x8'."""
        return f'{self.chip.name}:{"x".join(map(str, self.shape))}'

    @property
    def num_chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.num_slices

    def __str__(self) -> str:
        slices = f' x {self.num_slices} slices' if self.num_slices > 1 else ''
        return f'{self.name}{slices}'


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """'v4:4x4x8' -> the topology.

    Raises:
      ValueError: no such chip or no such shape; the message lists what there is.
    """
    name, _, sizes = text.strip().lower().partition(':')
    names = [example for group in EXAMPLES.values() for example in group]
    if name not in CHIPS:
        close = difflib.get_close_matches(text, names, 1)
        hint = f'; did you mean {close[0]!r}?' if close else ';'
        raise ValueError(
            f'--topology={text!r}: there is no chip {name!r}{hint} Chips: {", ".join(CHIPS)}, '
            f'as in {", ".join(group[-1] for group in EXAMPLES.values())}'
        )
    chip = CHIPS[name]
    shape = tuple(map(int, sizes.split('x'))) if re.fullmatch(r'\d+(x\d+)*', sizes) else ()
    bounds = chip.host_bounds[: chip.dimensions]
    fits = len(shape) == chip.dimensions and all(
        size > 0 and (size % bound == 0 or math.prod(shape) == 1)
        for size, bound in zip(shape, bounds)
    )
    if not fits:
        raise ValueError(
            f'--topology={text!r}: {name} has {chip.dimensions} dimensions, in hosts of '
            f'{"x".join(map(str, bounds))} chips. Names that work: {", ".join(EXAMPLES[name])}'
        )
    if num_slices < 1:
        raise ValueError(f'--num_slices={num_slices} must be at least 1')
    return Topology(chip, shape, num_slices)


def prepare_environment() -> None:
    """Makes jax run on the CPU and libtpu compile only; before jax is imported.

    Raises:
      MissingCompilerError: libtpu is not installed.
    """
    if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
        raise MissingCompilerError(
            'libtpu is not installed; it holds the TPU compiler. `pip install -c constraints.txt '
            "-e '.[tpu]'` in a clone, or `pip install libtpu`: it compiles on any Linux x86 "
            'machine, without a TPU'
        )
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ.update(ENVIRONMENT)
    import jax

    jax.config.update('jax_platforms', 'cpu')
    # It cannot read programs back for devices that are not there, and warns each time.
    jax.config.update('jax_enable_compilation_cache', False)


def devices(topology: Topology) -> list[Any]:
    """The topology's devices, one a chip, to make a mesh of; call `prepare_environment` first.

    Raises:
      ValueError: the compiler does not know this topology.
    """
    from jax.experimental import topologies

    chip = topology.chip
    options: dict[str, Any] = {'num_slices': topology.num_slices}
    if chip.config_name:
        options |= {'chip_config_name': chip.config_name}
    # One chip is a host of one chip.
    single = math.prod(topology.shape) == 1
    options['chips_per_host_bounds'] = (1, 1, 1) if single else chip.host_bounds
    try:
        found = topologies.get_topology_desc(
            platform='tpu', topology_name=topology.name, **options
        ).devices
    except Exception as error:
        raise ValueError(
            f'--topology={topology.name}: the compiler refuses it ({str(error).splitlines()[0]}). '
            f'Names that work: {", ".join(EXAMPLES[chip.name])}'
        ) from error
    return list(found)


def versions(devices: Sequence[Any]) -> dict[str, str]:
    """Of what turns a config into a program for these devices, as it is loaded.

    Returns:
      `jax`, `jaxlib`; `libtpu`, the package's version or the file that TPU_LIBRARY_PATH names
      instead; `compiler`, what the loaded library says of itself.
    """
    import jax
    import jaxlib

    library = os.environ.get('TPU_LIBRARY_PATH', '')
    package = importlib.util.find_spec('libtpu')
    # jax takes the package where no file is named, and then names the package's own.
    if not os.path.isfile(library) or (package and _inside(library, package.origin)):
        library = importlib.metadata.version('libtpu') if package else ''
    return {
        'jax': jax.__version__,
        'jaxlib': jaxlib.__version__,
        'libtpu': library,
        'compiler': devices[0].client.platform_version,
    }


def _inside(file: str, module: str | None) -> bool:
    """Whether a file lies in the folder of a package."""
    folders = (os.path.dirname(os.path.realpath(path)) for path in (file, module or ''))
    return len(set(folders)) == 1
