"""dist_jax: image-to-video transfer with a frozen backbone, in JAX/Flax.

    import dist_jax

    model = dist_jax.load('runs/b16')                # a run, a converted checkpoint, a backbone
    model.predict('a.mp4').top                       # ((('opening a door', 0.93), ...),)
    model.embed('a.mp4')                             # (E,) float32
    model.score(frames, labels=['a dog', 'a cat'])   # (2,) float32, of a text head

`load` and `VideoModel` are what is public; all else may change between versions. Importing this
imports no jax: the first use does.
"""

from typing import Any

__all__ = ['VideoModel', 'load']


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from dist_jax import video_model

    return getattr(video_model, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
