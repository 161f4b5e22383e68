"""Pages of one file: a template filled in, with report.css and scripts inlined.

Charts are drawn by ECharts (vendor/) from data that stands in the page as JSON. A page loads nothing: its content security
policy forbids every request, and scripts other than its own. Everything that comes from a plan, a model or a result passes
the templates' autoescape, or `script_json`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import markupsafe

CHARTING = ("vendor/echarts.min.js", "charts.js", "views.js", "drawn.js")
"""The scripts that a page with charts has, in order."""

_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def page(template: str, charts: Mapping[str, Any] | None = None, **values: Any) -> str:
    """The page that `template` makes of `values`: `title`, the `kind` of page that stands above it, `what` it is to a browser,
    the `facts` below it (name, value), and what the template itself asks for. `charts` is data by name of chart."""
    style, scripts = _asset("report.css"), [_asset(name) for name in ("report.js", *(CHARTING if charts else ()))]
    return fragment(
        template,
        policy=_policy(style, scripts),
        style=markupsafe.Markup(style),
        scripts=[markupsafe.Markup(script) for script in scripts],
        charts=charts or {},
        chart_data=markupsafe.Markup(script_json(charts or {})),
        **values,
    )


def fragment(template: str, **values: Any) -> str:
    """What `template` makes of `values`, every string of them escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def script_json(value: Any) -> str:
    """JSON that may stand in a script element whatever its strings hold: nothing in it ends the element or a line.

    Raises ValueError where a number is not finite."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPES)


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(style: str, scripts: Sequence[str]) -> str:
    """Nothing is loaded, and nothing runs or styles but what stands in the page (charts set colours and places on elements)."""
    return (
        f"default-src 'none'; script-src {' '.join(_hash(one) for one in scripts)}; style-src {_hash(style)}; "
        "style-src-attr 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
