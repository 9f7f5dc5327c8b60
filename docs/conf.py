"""The site of these pages: ``make docs`` builds it into build/docs with Sphinx, MyST (Markdown) and Furo, warnings as errors."""

from __future__ import annotations

project = "xutrain"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["images/*"]
html_theme = "furo"
html_title = "xutrain"
html_show_copyright = False
html_show_sphinx = False
#: links to headings: the same words that a code forge makes of them
myst_heading_anchors = 4
#: code blocks of commands are plain text
highlight_language = "none"
