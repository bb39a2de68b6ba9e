"""The commands, one a module: HELP and SUMMARY, `parser()`, which loads no jax, and `run(argv)`."""
