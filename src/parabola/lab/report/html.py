# SPDX-License-Identifier: Apache-2.0
"""Pages that need no network: plotly, style, script and data inside one file."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from parabola.lab.report.summary import finite

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, *folders: Path, **content: object) -> str:
    """A page out of a template, with the report's style and script.

    Args:
        template: File name of the template.
        folders: Where to look for it before the report's own folder.
        **content: The template's other variables.
    """
    environment = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        **content,
    )


def embed(value: object) -> str:
    """JSON for a script element: no NaN, and nothing that could end the element."""
    text = json.dumps(plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def plain(value: object) -> object:
    """The value as JSON can hold it: numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    return value
