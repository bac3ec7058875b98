"""Pages as Jinja templates with autoescape: names and corpus text cannot become markup."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flows.pages.provenance import phrase
from flows.pages.text import minute, number, printable, shape
from flows.run.numbers import parameters, size
from stackwise_core.stages.identity import Ref


def _finalize(value: object) -> object:
    """Make every inserted text printable, so that no template can forget it."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_finalize,
)
_FILTERS: dict[str, Callable[..., Any]] = {
    "count": "{:,}".format,
    "minute": minute,
    "number": number,
    "parameters": parameters,
    "phrase": phrase,
    "prod": math.prod,
    "shape": shape,
    "size": size,
}
_ENVIRONMENT.filters.update(_FILTERS)


def render(template: str, **values: Any) -> Markup:
    """Return a template of this folder, filled in; the result is safe to insert into another."""
    return Markup(_ENVIRONMENT.get_template(template).render(values))  # escaped by the environment


def artifact_page(template: str, document: dict[str, Any], **values: Any) -> str:
    """Return the page of an artifact, which needs no other file."""
    name = Ref.model_validate(document["ref"]).name
    recipe = json.dumps({key: document[key] for key in ("recipe", "facts", "fingerprint")}, indent=2)
    return str(render(template, name=name, document=document, recipe_json=recipe, **values))
