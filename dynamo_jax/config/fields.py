"""What the tree says of a key: its type, and whether it holds paths."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from dynamo_jax.config.home import AT_HOME
from dynamo_jax.config.tree import Config

TEXTS = tuple[str, ...]


def type_of(keys: Sequence[str]) -> Any:
    """The type of the setting `keys`, leaving aside null and what narrows it, as `plain_type`; None if there is none.

    Below a setting with keys of its own, whatever they are, it is `dict`.
    """
    found: Any = Config
    for key in keys:
        found = type_below(found, key)
    return found


def type_below(section: Any, key: str) -> Any:
    """The type of one key of a section, as `type_of`."""
    if section is dict:
        return dict
    field = fields(section).get(key)
    return None if field is None else plain_type(field.annotation)


def fields(section: Any) -> dict[str, Any]:
    """The settings of a section by their names, as they are written; none of anything else."""
    return {field.alias or name: field for name, field in getattr(section, "__pydantic_fields__", {}).items()}


def plain_type(annotation: Any) -> Any:
    """`str` of `Annotated[str, ...] | None`, `dict` of `dict[str, Any]`, and so on."""
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return plain_type(inner[0])
    if get_origin(annotation) in (Union, types.UnionType):
        others = [a for a in inner if a is not types.NoneType]
        return plain_type(others[0]) if len(others) == 1 else annotation
    if get_origin(annotation) is tuple and inner[1:] == (...,):
        return types.GenericAlias(tuple, (plain_type(inner[0]), ...))
    return dict if get_origin(annotation) is dict else annotation


def holds_paths(section: Any, key: str) -> bool:
    """Whether the setting is a path, or a list of them."""
    field = fields(section).get(key)
    return field is not None and (AT_HOME in field.metadata or AT_HOME in _parts(field.annotation))


def _parts(annotation: Any) -> Iterator[Any]:
    for part in get_args(annotation):
        yield part
        yield from _parts(part)
