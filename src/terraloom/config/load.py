"""Reading campaign files: safe YAML, every problem in one message that names key and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from terraloom.config.campaign import Campaign
from terraloom.config.site import Site
from terraloom.errors import ConfigError
from terraloom.log import hide_secrets

__all__ = ["load_campaign", "load_site", "parse_campaign", "read_yaml"]


_M = TypeVar("_M", bound=BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice (plain YAML silently keeps the last)."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands here twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeys.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    lambda loader, node: _mapping(loader, node, deep=True),  # type: ignore[arg-type]
)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: The file is missing, not YAML, or not a mapping.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (FileNotFoundError, IsADirectoryError) as err:
        raise ConfigError(
            "there is no such file", where=str(path), fix="write one with `terraloom init`"
        ) from err
    except (yaml.YAMLError, ValueError) as err:  # an impossible date is a ValueError
        raise ConfigError(f"not valid YAML: {err}", where=str(path)) from err
    if not isinstance(data, dict):
        raise ConfigError("the file holds no keys", where=str(path))
    return data


def load_campaign(path: Path | str) -> Campaign:
    """Read and validate a campaign file.

    Raises:
        ConfigError: With campaign file, key, value found, what is allowed, what to do.
    """
    return parse_campaign(read_yaml(path), where=str(path))


def parse_campaign(data: Mapping[str, Any], *, where: str = "campaign") -> Campaign:
    """Validate the keys of a campaign; all problems are reported at once."""
    return _validated(
        Campaign, data, where=where,
        allowed="the keys of config/README.md (config/schema.json for editors)",
        fix="correct the file, then `terraloom check` it",
    )  # fmt: skip


def load_site(path: Path | str) -> Site:
    """Read and validate the file that describes a cluster.

    Raises:
        ConfigError: With file, key, value found, what is allowed, what to do.
    """
    return _validated(
        Site, read_yaml(path), where=str(path), allowed=", ".join(Site.model_fields),
        fix="correct the file; docs/how-to/run-on-slurm.md lists the keys",
    )  # fmt: skip


def _validated(
    model: type[_M], data: Mapping[str, Any], *, where: str, allowed: str, fix: str
) -> _M:
    if open_secrets := list(_secrets(data)):
        raise ConfigError(
            f"key `{'`, `'.join(open_secrets)}`: an address with a password, token or signature in "
            "it; what stands in this file is copied into logs, results and their history",
            where=where, allowed="addresses as anybody may see them",
            fix="take it out of the file; put it into .netrc or the environment, or leave it out "
            "where Terraloom signs addresses itself",
        )  # fmt: skip
    try:
        return model.model_validate(dict(data))
    except ValidationError as err:
        problems = [_explain(e, model) for e in err.errors()]
        found = problems[0] if len(problems) == 1 else "\n  ".join(["several problems", *problems])
        raise ConfigError(found, where=where, allowed=allowed, fix=fix) from err


def _secrets(value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of the texts that hold a secret."""
    if isinstance(value, str) and hide_secrets(value) != value:
        yield key
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            yield from _secrets(inner, f"{key}.{n}")


def _explain(error: Any, model: type[BaseModel]) -> str:
    loc = [p for p in error["loc"] if not (isinstance(p, str) and p.startswith("function-"))]
    key = ".".join(str(p) for p in loc) or "(whole file)"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(
            str(loc[-1]), _known_keys(loc[:-1], model), n=1, cutoff=0.5
        )
        hint = f"; did you mean `{near[0]}`?" if near else ""
        return f"key `{key}`: unknown{hint}"
    if error["type"] == "missing":
        return f"key `{key}`: missing"
    if error["type"] == "model_type" and error.get("input") is None:
        return f"key `{key}`: empty; give it keys or leave it out"
    text = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = f", found {value!r}" if isinstance(value, (str, int, float, bool)) else ""
    return f"key `{key}`: {text}{shown}"


def _known_keys(path: list[Any], model: Any) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if _is_model(model) else None
        if field is None:
            return []
        model = _inner_model(field.annotation)
    return list(model.model_fields) if _is_model(model) else []


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inner_model(annotation: Any) -> Any:
    if _is_model(annotation):
        return annotation
    for arg in get_args(annotation):
        found = _inner_model(arg)
        if found is not None:
            return found
    return None
