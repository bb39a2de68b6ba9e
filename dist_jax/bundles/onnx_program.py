"""A program as ONNX, by jax2onnx: onnxruntime runs it without jax.

jax2onnx brings an orbax-checkpoint of its own, so it is for an environment of its own (extra
`onnx`). It knows neither batches of unknown size behind every operation nor layouts of convolutions
over time: the program is traced here, for one batch size and in the forms for CPUs, and handed over
as a jaxpr.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from dist_jax.bundles import verify

if TYPE_CHECKING:
    from dist_jax.bundles.export import Program

PLATFORM = 'cpu'  # whose forms are taken


def check(dtype: Any) -> None:
    """Raises ValueError for a model that onnxruntime cannot run, ImportError without jax2onnx."""
    if dtype != jnp.float32:
        raise ValueError(
            f'ONNX programs compute in float32, and this model in {jnp.dtype(dtype).name}, which '
            'onnxruntime does not multiply on CPUs; pass --config.model.dtype=float32'
        )
    _jax2onnx()


def write(program: Program, path: Path, batch_size: int, places: Mapping[str, int]) -> None:
    """Writes a program whose weights lie in the safetensors file beside it.

    Args:
      program: made for `PLATFORM`.
      path: file to write.
      batch_size: videos that it takes.
      places: of the weights in `verify.WEIGHTS`, in bytes.

    Raises:
      ValueError: jax2onnx does not know an operation of it.
    """
    import onnx

    weights, video = program.arguments(batch_size)
    names, outputs = list(weights), sorted(jax.eval_shape(program.run, weights, video))

    def run(video: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        found = program.run(dict(zip(names, arrays)), video)
        return [found[name] for name in outputs]

    arguments = [video, *weights.values()]
    traced = jax.make_jaxpr(run)(*arguments)
    # It warns of each value whose type it does not know, and there is no harm in that.
    logging.getLogger('onnx_ir').setLevel(logging.ERROR)
    try:
        model = _jax2onnx()(
            jaxpr_as_fun(traced),
            arguments,
            model_name='dist_jax',
            input_names=[verify.VIDEO, *names],
            output_names=outputs,
        )
    except Exception as error:  # of whatever it does not know
        raise ValueError(f'jax2onnx cannot convert this model: {error}') from error
    graph = model.graph
    inputs = {item.name: item for item in graph.input}
    for name, leaf in weights.items():
        graph.input.remove(inputs[name])
        tensor = onnx.TensorProto(
            name=name,
            dims=leaf.shape,
            data_type=inputs[name].type.tensor_type.elem_type,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        size = leaf.size * leaf.dtype.itemsize
        place = {'location': verify.WEIGHTS, 'offset': places[name], 'length': size}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())


def _jax2onnx() -> Callable[..., Any]:
    try:
        from jax2onnx import to_onnx
    except ImportError:
        raise ImportError(
            "ONNX needs jax2onnx, in an environment of its own: pip install 'dist_jax[onnx]'"
        ) from None
    return to_onnx
