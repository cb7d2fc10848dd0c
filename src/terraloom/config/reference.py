"""The generated reference: ``config/schema.json`` for editors, ``config/README.md`` for people."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from terraloom.config.campaign import Campaign
from terraloom.config.load import _inner_model

__all__ = ["schema_text", "tables_text"]


def schema_text() -> str:
    """JSON Schema of a campaign file."""
    schema = Campaign.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def tables_text() -> str:
    """Markdown page with every key, its type, default and meaning."""
    lines = [
        "# Every key of a campaign file",
        "",
        "Generated from the models in `src/terraloom/config`; rewrite it with",
        "`terraloom schema`. Campaigns live in `config/campaigns/`; `config/config.yaml` is the",
        "one that runs by default. A first line `# yaml-language-server: $schema=../schema.json`",
        "lets editors complete and check the keys.",
        "",
    ]
    _table(Campaign, "", lines)
    return "\n".join(lines).rstrip() + "\n"


def _table(model: type[BaseModel], prefix: str, lines: list[str]) -> None:
    title = f"`{prefix}`" if prefix else "Campaign"
    doc = (model.__doc__ or "").strip().split("\n")[0]
    lines += [f"## {title}", "", doc, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        kind = _kind(field.annotation)
        if field.default is PydanticUndefined:
            default = "see below" if field.default_factory else "**required**"
        else:
            default = _show(field.default)
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {default} | {meaning} |")
        sub = _inner_model(field.annotation)
        if sub is not None:
            dotted = f"{prefix}.{name}" if prefix else name
            is_list = str(field.annotation).startswith("list")
            inner.append((f"{dotted}[]" if is_list else dotted, sub))
    lines.append("")
    for dotted, sub in inner:
        _table(sub, dotted, lines)


def _show(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    return "none" if value is None else f"`{json.dumps(value, default=str)}`"


def _kind(annotation: Any) -> str:
    args = [a for a in get_args(annotation) if a is not type(None)]
    text = str(annotation)
    if text.startswith("typing.Literal"):
        return " or ".join(f"`{a}`" for a in args)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f"`{m.value}`" for m in annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if isinstance(annotation, type) and not args:
        return {"str": "text", "int": "integer", "float": "number", "bool": "yes/no"}.get(
            annotation.__name__, annotation.__name__
        )
    if text.startswith("list"):
        return f"list of {_kind(args[0])}"
    if text.startswith("dict"):
        return "mapping"
    if text.startswith("tuple"):
        return f"{len(args)} numbers"
    return _kind(args[0]) if args else "text"
