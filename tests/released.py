"""Files of PyTorch networks as training scripts write them, and tensors that came back whole."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tools.fuzzing.torch_files import save_state_dict


def save_released(
    path: Path, tensors: Mapping[str, np.ndarray], wrap: Callable[[dict[str, Any]], Any]
) -> tuple[Path, list[str]]:
    """The path of a file of a network that ran on several devices, and names of its counters.

    Every name has `module.` before it, and batch norms have counted their batches. `wrap` puts the
    state dict into what else the file holds.
    """
    counted = {
        name.replace('running_var', 'num_batches_tracked'): np.array(7)
        for name in tensors
        if name.endswith('running_var')
    }
    named = {f'module.{name}': value for name, value in {**tensors, **counted}.items()}
    return save_state_dict(path, named, wrap), sorted(counted)


def assert_same_tensors(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> None:
    """Names, types, shapes and every bit."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name
