"""`report.html`: a run on one page, which opens from the disk. Called by `report`.

One file: styles, script and data are inside, nothing is fetched. Every text in the data comes from a data set or a
model and may be hostile: it lies in a JSON island in which `<` cannot stand, is put on the page as text only, and the
page's policy lets nothing run but the one script, known by its hash. The script is plain JavaScript, the files
beside this one in the order of `_SCRIPTS`.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

NAME = "report.html"
_SCRIPTS = ("dom.js", "table.js", "charts.js", "answers.js", "alignment.js", "viewer.js", "facts.js", "main.js")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<noscript><p>This page draws its tables from the data inside it, and needs JavaScript for that. The same numbers are
in table.md and results.json beside it.</p></noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def page(data: Mapping[str, Any]) -> bytes:
    """The whole page, UTF-8. data: plain JSON as `collect` makes it. Raises ValueError for a number that is none."""
    style, script = _file("report.css"), _script()
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    text = _PAGE.format(
        policy=policy,
        title=html.escape(f"{data['results']['recipe']}: report"),
        style=style,
        script=script,
        data=island(data),
    )
    return text.encode()


def island(data: Any) -> str:
    """JSON that can stand in a script element whatever texts are in it: ASCII, without <, > and &."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script() -> str:
    """All parts in one function's scope, so that nothing is global."""
    parts = "\n".join(_file(name) for name in _SCRIPTS)
    return f'"use strict";(()=>{{\n{parts}\n}})();'


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
