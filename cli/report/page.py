"""Pages of one file: a template filled in, with report.css and report.js inlined.

A page loads nothing: its content security policy forbids every request, and scripts other than its own. Everything that
comes from a plan, a model or a result passes the templates' autoescape.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
import markupsafe


def page(template: str, **values: Any) -> str:
    """The page that `template` makes of `values`: `title`, the `kind` of page that stands above it, `what` it is to a browser,
    the `facts` below it (name, value), and what the template itself asks for."""
    style, script = _asset("report.css"), _asset("report.js")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        policy=_policy(style, script), style=markupsafe.Markup(style), script=markupsafe.Markup(script), **values
    )


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, and nothing runs or styles but what stands in the page (bars set their width in place)."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "style-src-attr 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
