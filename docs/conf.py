"""Configuration of the documentation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from numpyro_pvmc import __version__

project = "numpyro_pvmc"
author = "The numpyro_pvmc developers"
copyright = author
release = version = __version__

extensions = ["matplotlib.sphinxext.plot_directive", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.mathjax"]
plot_working_directory = str(Path(__file__).parent)
plot_html_show_formats = False
plot_formats = [("png", 120)]
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"numpyro_pvmc {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

trim_doctest_flags = True
doctest_global_setup = """
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.contrib.control_flow import scan
"""


def skip_field(app, what, name, obj, skip, options):
    """Fields of named tuples are in their signatures; their docstrings say only which number they have."""
    return True if type(obj).__name__ == "_tuplegetter" else skip


def short_names(app, what, name, obj, options, signature, return_annotation):
    """JAX's arrays under the name by which they are imported."""
    return tuple(text and text.replace("jaxlib._jax.", "") for text in (signature, return_annotation))


def setup(app):
    app.connect("autodoc-skip-member", skip_field)
    app.connect("autodoc-process-signature", short_names)
