"""Sphinx: pages in Markdown (MyST), the API from docstrings. Warnings are errors in `tox run -e docs`."""

from __future__ import annotations

from typing import Any

from sphinx.util import logging

import gblr_plugin

logger = logging.getLogger(__name__)
project = "gblr_plugin"
version = release = gblr_plugin.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"gblr_plugin {version}"

# Anchors as code-hosting sites make them, so that one link works on both; a broken one is a warning.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Tensor Attributes", "params_style"), ("Non-Tensor Attributes", "params_style")]

# Every reference to a name of this package must resolve. Those of other packages have no inventory at hand: the build
# needs no network.
nitpicky = True
nitpick_ignore_regex = [
    # Internal, though docstrings name them.
    (
        r"py:.*",
        r"(gblr_plugin\.)?(kernels\.layout\.Layout|layers\.protocol\.StructuredLayer|calibration\.batches|matrix\.metric\.Metric|calibration\.sequential\.M|calibration\.calls\.Call|learning\.goals\.CostTargets|overlap_map|families\.base\.Self)",
    ),
    # Annotations that Sphinx cuts at their commas.
    (r"py:class", r"(list|dict)\[.*"),
    (r"py:.*", r"(torch|nni|schema|collections|pathlib|typing|matplotlib|tensorboard|numpy|os|nn|optional)\b.*"),
    (r"py:(class|exc|obj)", r"(Tensor|Figure|T|Self|Any|Path|Module|Optimizer|Parameter|Evaluator|ImportError)"),
]


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Names as docstrings write them: by the module that defines them, or bare; each is documented in one place."""
    name = node.get("reftarget", "").rpartition(".")[2]
    domain = env.domains["py"]
    found = [full for full, entry in domain.objects.items() if full.rpartition(".")[2] == name and not entry.aliased]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, content)


def keep_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in a property's first line for its type."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(": ", " — ")


def keep_addresses_apart(app: Any, pagename: str, templatename: str, context: Any, doctree: Any) -> None:
    """Warn of a document at whose address the builder writes a page of its own: search, genindex, py-modindex."""
    if doctree is None and pagename in app.env.found_docs:
        logger.warning("the builder writes its own page at the address of this document; rename it", location=pagename)


def setup(app: Any) -> None:
    """Connect these."""
    app.connect("html-page-context", keep_addresses_apart)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
