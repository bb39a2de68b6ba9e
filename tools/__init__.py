"""Command-line tools. They may import everything; only dist_jax.main reaches them, to offer them as commands."""
