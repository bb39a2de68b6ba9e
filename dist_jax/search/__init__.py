"""`dist_jax index` and `search`."""
