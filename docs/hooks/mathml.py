# SPDX-License-Identifier: Apache-2.0
"""Formulas become MathML while the site is built: no script, and no network for the reader."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

# What the Markdown extension `pymdownx.arithmatex` leaves for $inline$ and $$display$$ formulas.
INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of every page."""
    html = DISPLAY.sub(lambda found: convert(unescape(found[1]), display="block"), html)
    return INLINE.sub(lambda found: convert(unescape(found[1])), html)
