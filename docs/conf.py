"""The documentation site. ``make docs`` builds it; warnings are errors, and nothing is fetched from the network."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs" / "_extensions")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "SpectR"
author = "The SpectR maintainers"
copyright = author
release = version = installed("spectr-lora")
repository = "https://github.com/spectr-lora/spectr"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
    "code_names",
    "generated_pages",
]
exclude_patterns = ["_build"]
suppress_warnings = ["ref.python"]  # a short name in a docstring may be that of several classes
nitpicky = True
highlight_language = "none"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_url_schemes = ["http", "https", "mailto"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Names of other packages are not looked up: that would take their inventories from the network.
nitpick_ignore_regex = [("py:.*", r"(?!spectr\b).*")]
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

# Notebooks are committed without outputs, and executed when the site is built.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars; an error ends the build

html_theme = "pydata_sphinx_theme"
html_title = "SpectR"
html_theme_options = {
    "github_url": repository,
    "use_edit_page_button": True,
    "header_links_before_dropdown": 5,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {"github_user": "spectr-lora", "github_repo": "spectr", "github_version": "main", "doc_path": "docs"}
html_show_sourcelink = False
