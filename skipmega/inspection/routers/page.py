"""The inspection as one self-contained HTML page."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from skipmega.inspection.routers.findings import Findings
from skipmega.inspection.routers.kinds import KINDS, RULES

_WORDS = {
    "depth": "Number of routed layers that a token executed.",
    "loss": "How hard it was to predict the token after this one, having read up to this one, in nats: what "
    "the layers that the token executes work on.",
    "surprise": "How hard it was to predict this token: the loss of the one before it.",
    "random gate": "A coin for each layer and token that executes as often as the layer does. It knows "
    "nothing of the token: what lies within its 95% range may be chance, and of twenty things that are "
    "chance, one lies outside.",
}


def build_page(findings: Findings, texts: list[dict[str, Any]]) -> str:
    """The page, which needs nothing beside it.

    Args:
        findings: of :func:`skipmega.inspection.routers.findings.find_out`.
        texts: what is shown of each source: ``name``, and of each token ``text`` (none of a part of a
            character), ``document``, ``kind`` (index of KINDS), ``executed`` (0 or 1 for each routed layer),
            ``loss``, ``surprise`` and ``count``.
    """
    folder = files("skipmega.inspection.routers") / "html"
    page, css, script = ((folder / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    data = {"findings": findings, "texts": texts, "kinds": KINDS, "words": _WORDS | RULES}
    # no "<" within the script element, which a text could otherwise end
    inline = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    template = Environment(autoescape=True).from_string(page)
    return template.render(
        name=findings["model"]["name"], css=Markup(css), script=Markup(script), data=Markup(inline)
    )
