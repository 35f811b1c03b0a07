"""Reading a config: strict YAML, `a.b=c` overrides, errors that name the file, the key, the value and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from dynamo_jax.config.checks import impossible
from dynamo_jax.config.tree import Config

# Keys that change where, how fast or how verbosely a run goes, but no number that it computes. A resume may change
# them; a change of any other key is refused (see `differences`).
FREE_ON_RESUME = (
    "run_dir", "device", "mesh", "trainer.steps", "trainer.micro_batch", "trainer.compilation_cache", "rollout.batch",
    "policy.remat", "checkpoint", "logging", "verifier.workers", "watchdog",
    "task.allow_overlap",
)  # fmt: skip


class ConfigError(ValueError):
    """A config that cannot be run. The message names the file, the key, the value and the remedy."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `key.sub=value` overrides (values in YAML syntax), check everything that needs no device.

    A file may name another as its `base`, relative to itself, and then holds only what differs from it: sections merge,
    values and lists replace. `base=FILE` as an override lays the same differences over another file.

    Raises `ConfigError` naming the file, the key, the value and the remedy.
    """
    tree = _read_yaml(Path(path))
    _locate_base(Path(path), tree)
    for override in overrides:
        _apply_override(tree, override)
    where, tree = _over_base(str(path), tree, (Path(path).resolve(),))
    config = _parse(where, tree)
    for key, value, why, remedy in impossible(config):
        raise ConfigError(f"{where}: {key} = {json.dumps(value)}: {why}. {remedy}")
    return config


def resolved(config: Config) -> dict[str, Any]:
    """The complete tree as plain dicts, lists and scalars: what `config.yaml` of a run folder holds."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]


def dump_config(config: Config) -> str:
    """`resolved(config)` as YAML text that `load_config` reads back to an equal config."""
    return yaml.dump(resolved(config), Dumper=_Dumper, sort_keys=False)


def differences(old: dict[str, Any], new: dict[str, Any], free: Sequence[str] = FREE_ON_RESUME) -> list[str]:
    """`key: old -> new` for each resolved key that differs and changes the result (is not under `free`).

    A key that `old` lacks, as it was written before there was such a key, counts as its default.
    """
    a, b = _flatten(_with_defaults(old, Config), Config), _flatten(new, Config)
    if "microbatch" in (a.get("modulation.scope"), b.get("modulation.scope")):
        free = [key for key in free if key != "trainer.micro_batch"]
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
    ]


def _with_defaults(tree: dict[str, Any], section: Any) -> dict[str, Any]:
    """`tree`, resolved by an older version, with the defaults of all keys of `section` that are newer."""
    fields = section.__pydantic_fields__
    newer = [name for name, field in fields.items() if name not in tree and not field.is_required()]
    defaults = {name: fields[name].get_default(call_default_factory=True) for name in newer}
    plain = json.loads(json.dumps(defaults, default=dataclasses.asdict))
    known = {
        name: _with_defaults(value, inner) if isinstance(value, dict) and (inner := _section(section, name)) else value
        for name, value in tree.items()
    }
    return {**plain, **known}


def _flatten(tree: dict[str, Any], section: Any, prefix: str = "") -> dict[str, Any]:
    """Each setting by its dotted key. A setting that is itself a mapping, of keys that are no settings, stays whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _section(section, key)
        flat |= (
            _flatten(value, inner, f"{prefix}{key}.") if isinstance(value, dict) and inner else {prefix + key: value}
        )
    return flat


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` (no dot) as a string; this loader reads it as the number that everyone means.

    It also refuses a key given twice, of which plain YAML silently keeps the last.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers, so that they are read back as texts."""


for each in (_Loader, _Dumper):
    each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a 13th month, a list as a key, ...
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file. The recipes are in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Give a YAML file, such as those in configs/.") from None
    tree = _yaml(text, str(path))
    if not isinstance(tree, dict):
        what = "empty" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path}: is {what}, not a mapping of keys. Start from one of the recipes in configs/.")
    return tree


def _locate_base(path: Path, tree: dict[str, Any]) -> None:
    """Make a `base` that is relative to its file relative to where we are, as one given as an override is."""
    if isinstance(tree.get("base"), str):
        tree["base"] = str(path.parent / tree["base"])


def _over_base(where: str, tree: dict[str, Any], seen: tuple[Path, ...]) -> tuple[str, dict[str, Any]]:
    """`tree` laid over its base, over that one's base, and so on; and the files' names, for messages."""
    base = tree.pop("base", None)
    if base is None:
        return where, tree
    if not isinstance(base, str):
        raise ConfigError(f"{where}: base = {json.dumps(base, default=str)}: should be the path of a config file.")
    path = Path(base)
    if path.resolve() in seen:
        raise ConfigError(f"{where}: base = {json.dumps(base)}: comes back to itself. Name a file that does not.")
    below = _read_yaml(path)
    _locate_base(path, below)
    where, below = _over_base(f"{where} over {path}", below, (*seen, path.resolve()))
    return where, _merged(below, tree)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return {**below, **above, **both}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: is not of the form key.sub=value, for example trainer.steps=10")
    *parents, leaf = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        if node.get(parent) is None:
            node[parent] = {}
        if not isinstance(node[parent], dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = node[parent]
    node[leaf] = _yaml(text, f"override {override!r}")


def _parse(where: str, tree: dict[str, Any]) -> Config:
    try:
        text = json.dumps(tree, default=str, ensure_ascii=False).encode()
    except ValueError as error:  # an anchor inside itself, half a surrogate pair
        raise ConfigError(f"{where}: holds what no config can: {error}. Write plain values.") from None
    try:
        # JSON mode: strict about numbers and strings, yet lists become tuples.
        return pydantic.TypeAdapter(Config).validate_json(text)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(e)}" for e in error.errors())) from None


def _explain(error: Any) -> str:
    *parents, leaf = [str(part) for part in error["loc"]] or [""]
    key = ".".join([*parents, leaf])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _keys_of(Config, parents)
        close = difflib.get_close_matches(leaf, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known keys here: {', '.join(known)}."
        return f"{key}: unknown key. {hint}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing. Add it to the file or give it as {key}=VALUE."
    why = error["msg"].replace("Input should", "should").replace("an object", "a section of keys")
    why = why.replace("a valid array", "a list, such as [1, 8]")  # pydantic speaks of JSON, the file is YAML
    return f"{key} = {json.dumps(error['input'])}: {why}. Correct it."


def _keys_of(section: Any, parents: list[str]) -> list[str]:
    for name in parents:
        section = _section(section, name)
    return [field.name for field in dataclasses.fields(section)]


def _section(section: Any, name: str) -> Any:
    """The dataclass of the key `name` of a section, which may be optional; None if the key is none of a section."""
    if name not in section.__pydantic_fields__:
        return None
    annotation = section.__pydantic_fields__[name].annotation
    types = (annotation, *getattr(annotation, "__args__", ()))
    return next((t for t in types if dataclasses.is_dataclass(t)), None)
