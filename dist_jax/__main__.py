"""`python -m dist_jax` is the command `dist_jax`."""

import sys

from dist_jax.main import main

if __name__ == '__main__':
    sys.exit(main())
