"""A config out of its file, the files below it and `a.b=c` overrides; and what of it a resumed run may change."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from dynamo_jax.config.checks import impossible
from dynamo_jax.config.explain import explain, other_bases
from dynamo_jax.config.fields import fields, holds_paths, type_below
from dynamo_jax.config.home import at_home
from dynamo_jax.config.overrides import apply_override
from dynamo_jax.config.syntax import Bare, ConfigError, dump, is_null, parse, plain
from dynamo_jax.config.tree import Config

# Keys that change where, how fast or how verbosely a run goes, but no number that it computes. A resume may change
# them; a change of any other key is refused (see `differences`).
FREE_ON_RESUME = (
    "run_dir", "device", "mesh", "trainer.steps", "trainer.micro_batch", "trainer.row_tokens",
    "trainer.compilation_cache", "rollout.batch",
    "policy.remat", "objective.kl.host_memory", "checkpoint", "logging", "verifier.workers", "watchdog",
    "task.allow_overlap",
)  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `key.sub=value` overrides, check everything that needs no device.

    The value of an override is in YAML; that of a text is all that follows the `=`, as it is written (`overrides.py`).
    A `~` at the start of a path is the home folder.

    A file may name another as its `base`, relative to itself, and then holds only what differs from it: sections merge,
    values and lists replace. `base=FILE` as an override lays the same differences over another file.

    Raises `ConfigError` naming the file, the key, the value and the remedy.
    """
    tree = _read_yaml(Path(path))
    _locate_base(Path(path), tree)
    for override in overrides:
        apply_override(tree, override)
    where, tree = _over_base(str(path), tree, (Path(path).resolve(),))
    config = _parse(where, tree)
    for key, value, why, remedy in impossible(config):
        raise ConfigError(f"{where}: {key} = {json.dumps(value)}: {why}. {remedy}")
    return config


def resolved(config: Config) -> dict[str, Any]:
    """The complete tree as plain dicts, lists and scalars: what `config.yaml` of a run folder holds."""
    return _plain(config)


def dump_config(config: Config) -> str:
    """`resolved(config)` as YAML text that `load_config` reads back to an equal config."""
    return dump(resolved(config))


def differences(old: dict[str, Any], new: dict[str, Any], free: Sequence[str] = FREE_ON_RESUME) -> list[str]:
    """`key: old -> new` for each resolved key that differs and changes the result (is not under `free`).

    A key that `old` lacks, as it was written before there was such a key, counts as its default; `~/x` and the path
    that it stands for are the same. Where the learning rate falls to the run's last update, `optimizer.decay_steps` is
    the number of that: a run that goes on longer needs it set to what it was.
    """
    a, b = (_with_decay_steps(_flatten(tree, Config)) for tree in (_with_defaults(old, Config), new))
    if "microbatch" in (a.get("modulation.scope"), b.get("modulation.scope")):
        free = [key for key in free if key not in ("trainer.micro_batch", "trainer.row_tokens")]
    return [
        f"{key}: {a.get(key)!r} -> {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
    ]


def _with_defaults(tree: dict[str, Any], section: Any) -> dict[str, Any]:
    """`tree`, resolved by an older version, with the defaults of all keys of `section` that are newer."""
    newer = {
        name: field.get_default(call_default_factory=True)
        for name, field in fields(section).items()
        if name not in tree and not field.is_required()
    }
    defaults = _plain(newer)
    known = {
        name: _with_defaults(value, type_below(section, name)) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return {**defaults, **known}


def _plain(section: Any) -> dict[str, Any]:
    """A section, or some of its settings by their names, as plain values by the keys that are written."""
    tree: dict[str, Any] = pydantic.TypeAdapter(Any).dump_python(section, mode="json", by_alias=True)
    return tree


def _flatten(tree: dict[str, Any], section: Any, prefix: str = "") -> dict[str, Any]:
    """Each setting of a resolved tree by its whole key. A mapping of free keys is one setting."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        below = type_below(section, name)
        if isinstance(value, dict) and below is not dict:
            flat |= _flatten(value, below, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _expanded(value) if holds_paths(section, name) else value
    return flat


def _with_decay_steps(flat: dict[str, Any]) -> dict[str, Any]:
    """Of a rate that falls over the whole run: how many updates these are (`Config.updates`)."""
    if flat["optimizer.schedule"] == "constant" or flat["optimizer.decay_steps"] is not None:
        return flat
    budget = flat["rollout.prompts"] * flat["rollout.per_prompt"]
    updates = flat["trainer.steps"] * (budget // (flat["trainer.mini_batch"] or budget))
    return {**flat, "optimizer.decay_steps": updates}


def _expanded(value: Any) -> Any:
    """The paths of a setting without `~`, which an older version has kept as it was given."""
    if isinstance(value, list):
        return [_expanded(path) for path in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file. The recipes are in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}. Give a YAML file, such as those in configs/.") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        value = tree.value if isinstance(tree, Bare) else tree
        what = "empty" if value is None else f"a {type(value).__name__}"
        raise ConfigError(f"{path}: is {what}, not a mapping of keys. Start from one of the recipes in configs/.")
    return tree


def _locate_base(path: Path, tree: dict[str, Any]) -> None:
    """Make a `base` that is relative to its file relative to where we are, as one given as an override is."""
    base = tree.get("base")
    if isinstance(base, str) and base:
        try:
            tree["base"] = str(path.parent / at_home(base))
        except ValueError as error:
            raise ConfigError(f"{path}: base = {json.dumps(base)}: {error}.") from None


def _over_base(where: str, tree: dict[str, Any], seen: tuple[Path, ...]) -> tuple[str, dict[str, Any]]:
    """`tree` laid over its base, over that one's base, and so on; and the files' names, for messages."""
    base = tree.pop("base", None)
    if is_null(base):
        return where, tree
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{where}: base = {json.dumps(base, default=plain)}: should be the path of a config file.")
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


def _parse(where: str, tree: dict[str, Any]) -> Config:
    try:
        text = json.dumps(tree, default=plain, ensure_ascii=False).encode()
    except ValueError as error:  # an anchor inside itself, half a surrogate pair
        raise ConfigError(f"{where}: holds what no config can: {error}. Write plain values.") from None
    if misread := list(other_bases(tree)):
        raise ConfigError("\n".join(f"{where}: {line}" for line in misread))
    try:
        # JSON mode: strict about numbers and strings, yet lists become tuples.
        return pydantic.TypeAdapter(Config).validate_json(text, by_alias=True, by_name=False)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {explain(e, tree)}" for e in error.errors())) from None
