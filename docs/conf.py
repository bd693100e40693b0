"""Settings of the site that ``make docs`` builds: pages in Markdown, and a reference of docstrings.

The build is strict: a warning, such as a link to what is not there, ends it. It needs no network.
"""

from __future__ import annotations

import re
from functools import partial
from importlib import metadata
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import TYPE_CHECKING

from sphinx.util.nodes import make_refnode

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "loopy-taming"
author = copyright = "the loopy-taming developers"
release = metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
myst_heading_anchors = 4  # links name headings as a forge does

default_role = "py:obj"  # names in a docstring's backticks are links
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # values are named, their types are in the signature

# Names in backticks must be those of something; types may be those of other packages.
nitpicky = True
nitpick_ignore_regex = [("py:(class|exc)", ".*")]

ROOT = Path(__file__).resolve().parents[1]
# Pages that begin with a file of the repository.
FILES = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changes": "CHANGELOG.md"}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)")
SOURCES = [path.read_text(encoding="utf-8") for path in ROOT.glob("taming/**/*.py")]
MODULES = [path.relative_to(ROOT).with_suffix("").parts for path in ROOT.glob("taming/**/*.py")]
NAMES = set().union(*MODULES)
NAMES.update(*(re.findall(r"^ *(?:class|def) (\w+)", text, re.MULTILINE) for text in SOURCES))


def _on_the_site(link: re.Match[str], file: str, page: str) -> str:
    """Turn a link of a file of the repository into one of the page that shows it."""
    target = normpath(join(dirname(file), link[1]))
    pages = {name: f"docs/{page}.md" for page, name in FILES.items()}
    return f"]({relpath(pages.get(target, target), dirname(f'docs/{page}'))}"


def show_file(app: Sphinx, page: str, source: list[str]) -> None:
    """Put a page's file of the repository before its own text; let links lead to pages."""
    file = FILES.get(page, f"docs/{page}.md")
    text = (ROOT / file).read_text(encoding="utf-8")
    own = source[0] if page in FILES else ""
    source[0] = LINK.sub(partial(_on_the_site, file=file, page=page), text) + own


def find_short_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> Element | None:
    """Resolve `VQModel.encode` and the like; leave text where the site does not describe it."""
    target = node["reftarget"]
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    found = [name for name in objects if f".{name}".endswith(f".{target}")]
    if len(found) == 1:
        entry = objects[found[0]]
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content)
    return content if NAMES.issuperset(target.split(".")) else None


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("source-read", show_file)
    app.connect("missing-reference", find_short_name)
