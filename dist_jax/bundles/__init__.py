"""`dist_jax export`, `verify` and `serve`: models without this package."""
