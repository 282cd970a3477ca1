"""Sphinx's settings: `make docs` writes the pages to build/docs. Nothing is fetched while it builds."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import fastopt

project = "fastopt"
author = "The fastopt developers"
copyright = f"2026, {author}"
version = release = fastopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["requirements.txt"]
html_theme = "furo"
html_title = f"fastopt {release}"
html_static_path = ["_static"]
html_css_files = ["fastopt.css"]
html_copy_source = False

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings are read as source, too
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes and dtypes
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# What docstrings name of other projects is found in theirs.
nitpick_ignore_regex = [(r"py:.*", r"(torch|callable|optional|Tensor|float|bool)\b.*")]

# Formulas are MathML, which browsers draw themselves: no page fetches a program for them.
html_math_renderer = "mathml"


def _visit_math(self, node):
    self.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_math, None))
