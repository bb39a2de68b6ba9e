"""The site: `sphinx-build -W docs build/site`, then open build/site/index.html.

Pages are Markdown (MyST). The two references are generated from the code each time, into
docs/_generated, which the pages of docs/reference include.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import generate  # noqa: E402

generate.write(Path(__file__).parent / '_generated')

project = 'dist_jax'
author = 'The dist_jax authors'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
exclude_patterns = ['_generated', '**.ipynb', '**/.ipynb_checkpoints']

myst_enable_extensions = ['attrs_block', 'deflist']
myst_heading_anchors = 3  # as GitHub's

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # docstrings say shapes and dtypes
default_role = 'code'
smartquotes = False  # would make one dash of the two of an option
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = 'furo'
html_title = 'dist_jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
pygments_style = 'friendly'
pygments_dark_style = 'github-dark'
highlight_language = 'none'  # of blocks that do not say
