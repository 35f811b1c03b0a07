"""YAML as people mean it: `1e-6` is a number, `0100` is not 64, and a key stands once."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")


class ConfigError(ValueError):
    """A config that cannot be run. The message names the file, the key, the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Bare:
    """A word without quotes that YAML takes for a number, a truth value or nothing: its value, and how it is written.

    Where a text is needed, an error can then say how to quote what was written, which may be `yes` or `0100`.
    """

    value: int | float | bool | None
    text: str

    @property
    def base(self) -> int:
        """Of a number's digits: YAML 1.1 reads `0100` in base 8 and `1:30` in base 60."""
        if isinstance(self.value, bool) or self.value is None:
            return 10
        return 60 if ":" in self.text else 8 if _OCTAL.fullmatch(self.text) else 10


def parse(text: str, where: str) -> Any:
    """What `text` holds, with `Bare` for every number, truth value and null. Raises `ConfigError` naming `where`."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    # A 13th month, a list as a key, "\\UFFFFFFFF", `!!timestamp x`, ...
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{where}: not valid YAML: {why}. A text with special characters goes in quotes.") from None


def plain(value: Any) -> Any:
    """For `json.dumps(default=...)`: the value of a bare word, the text of whatever else JSON does not know."""
    return value.value if isinstance(value, Bare) else str(value)


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Bare) and value.value is None)


def dump(tree: dict[str, Any]) -> str:
    """`tree` as YAML text, which any YAML reader reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` (no dot) as a string; this loader reads it as the number that everyone means.

    It also refuses a key given twice, of which plain YAML silently keeps the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag in _WORDS:
                key_node.tag = f"{_TAG}str"  # `on: 1` and `5: 1` are keys as they are written
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts the text `1e-6` in quotes, as `_Loader` would read it as a number."""


def _bare(loader: _Loader, node: yaml.ScalarNode) -> Bare:
    return Bare(yaml.SafeLoader.yaml_constructors[node.tag](loader, node), node.value)


def _date(loader: _Loader, node: yaml.ScalarNode) -> str:
    loader.construct_yaml_timestamp(node)  # refuses a 13th month
    return node.value  # type: ignore[no-any-return]  # no setting is a date: one is a text, as it is written


_WORDS = {f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null", "timestamp")}
for _tag in _WORDS - {f"{_TAG}timestamp"}:
    _Loader.add_constructor(_tag, _bare)
_Loader.add_constructor(f"{_TAG}timestamp", _date)
_Loader.add_implicit_resolver(f"{_TAG}float", *_EXPONENT)
_Dumper.add_implicit_resolver(f"{_TAG}float", *_EXPONENT)
