"""Command-line tools. They may import everything; only `dist_jax.main` imports them."""
