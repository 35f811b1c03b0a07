"""Hugging Face folders of Qwen2's shape, in and out: `config.json` and safetensors. Pickled weights are never read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pydantic
from flax import nnx
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dynamo_jax.config import ArchitectureConfig, MeshConfig, architecture_problems
from dynamo_jax.policy.model import DecoderConfig, abstract_policy
from dynamo_jax.policy.params import PARAMS, axis_sizes, param_name
from dynamo_jax.policy.tensor_names import locate, refuse_adapter
from dynamo_jax.sharding import to_host, to_mesh

# Field of ArchitectureConfig -> key of config.json. Both directions use it.
_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
# What a Qwen2 config.json means by a missing key; all others must be there.
_DEFAULTS = {"head_dim": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}

_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}

_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_FILE_BYTES = 5 * 10**9  # of one safetensors file; what the Hub and transformers split at
_CARRIED_KEYS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def read_architecture(folder: str | Path) -> ArchitectureConfig:
    """The shape that a Qwen2 `config.json` describes, `head_dim` and `vocab_size` filled in.

    Raises `ValueError`, with the file, the key, the value and the remedy, if the file is missing or broken, if the
    model is not a plain Qwen2 (another type or activation, sliding windows, scaled rotary embeddings), or if its sizes
    do not fit together.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        refuse_adapter(Path(folder))
    data = _read_json(path, "Point policy.load at the folder of a Qwen2-type model.")
    for key, value, only in (
        ("model_type", data.get("model_type"), "qwen2"),
        ("hidden_act", data.get("hidden_act", "silu"), "silu"),
        ("use_sliding_window", data.get("use_sliding_window", False), False),
        ("layer_types", data.get("layer_types") or ["full_attention"], ["full_attention"]),
        ("rope_parameters", data.get("rope_parameters") or {}, _PLAIN_ROPE),
        ("rope_scaling", data.get("rope_scaling") or {}, _PLAIN_ROPE),
    ):
        if not _is_plain(value, only):
            raise ValueError(
                f"{path}: {key} = {json.dumps(value)}: only {json.dumps(only)} is supported. "
                "Choose a model of plain Qwen2 shape (Qwen2, Qwen2.5, Qwen2.5-Math and their fine-tunes)."
            )
    rope = data.get("rope_parameters") or {}  # where transformers 5 keeps rope_theta; older files have it at the top
    data = _DEFAULTS | data | {key: rope[key] for key in ("rope_theta",) if key in rope}
    if missing := [key for key in _KEYS.values() if key not in data]:
        raise ValueError(f"{path}: {missing[0]} is missing. Restore the model's own config.json.")
    try:
        shape = ArchitectureConfig(**{field: data[key] for field, key in _KEYS.items()}, qkv_bias=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = _KEYS[str(first["loc"][0])]
        raise ValueError(f"{path}: {key} = {data[key]!r}: {first['msg']}. Restore the model's own file.") from None
    for key, value, why, _ in architecture_problems(shape, MeshConfig()):
        name = _KEYS[key.rpartition(".")[2]]
        raise ValueError(f"{path}: {name} = {value}: {why}. Restore the model's own config.json.")
    return dataclasses.replace(shape, head_dim=shape.head_dim or shape.hidden_size // shape.num_heads)


def load_hf(folder: str | Path, config: DecoderConfig) -> nnx.State:
    """The parameters in a folder's safetensors (`model.safetensors`, or several files and their index).

    They come in `config.param_dtype`, with the shardings of `config.mesh` (without one: on the default device).
    Tensors are read one at a time, so the host holds about one stacked parameter; each device gets its shards only.
    A tied model's `lm_head` and rotary frequencies, which some files repeat, are not read. Names may carry the prefixes
    of wrappers (see `locate`).

    Raises `ValueError`, with file, tensor, both shapes and the remedy, for missing, unknown, wrongly shaped or
    quantised tensors, for those of an adapter, and for missing or damaged files.
    """
    shapes, sizes = abstract_policy(config)[1], axis_sizes(config.shape)
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in _weight_files(Path(folder))}
        stored_names = [(path, name) for path, file in files.items() for name in file.keys()]  # noqa: SIM118 (no dict)
        where = locate(Path(folder), stored_names, config)

        def read(tensor: str, shape: tuple[int, ...]) -> np.ndarray:
            path, name = where[tensor]
            try:
                stored = files[path].get_slice(name)
                if stored.get_dtype() not in _FLOATS:
                    raise ValueError(
                        f"{path}: tensor {name} has type {stored.get_dtype()}, not one of {', '.join(_FLOATS)}. "
                        "Load the weights as they were before quantisation."
                    )
                if tuple(stored.get_shape()) != shape:
                    raise ValueError(
                        f"{path}: tensor {name} has shape {tuple(stored.get_shape())}, but the policy needs {shape}. "
                        "Use the config.json that belongs to these weights."
                    )
                return np.asarray(files[path].get_tensor(name))
            except SafetensorError as error:
                raise _damaged(path, error) from error

        def load(key_path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
            param = PARAMS[param_name(key_path)]
            tensors, shape = param.hf_names(sizes), param.hf_shape(sizes)
            if param.per_layer:
                stacked = np.empty(x.shape, x.dtype)
                for layer, tensor in enumerate(tensors):
                    stacked[layer] = param.from_hf(read(tensor, shape), sizes)
            else:
                stacked = param.from_hf(read(tensors[0], shape), sizes).astype(x.dtype, copy=False)
            loaded: jax.Array = jax.device_put(stacked) if config.mesh is None else to_mesh(stacked, x.sharding)
            return loaded

        return jax.tree_util.tree_map_with_path(load, shapes)


def save_hf(
    folder: str | Path, params: Any, config: DecoderConfig, *, tokenizer_folder: str | Path | None = None
) -> None:
    """Write a folder that `transformers` and vLLM load as Qwen2, in the dtype of `params`.

    The folder appears whole or not at all. A tied head is left out; a policy without QKV biases, which Qwen2 always
    has, gets zeros. Files hold at most 5 GB each. On several processes all must call this: each parameter is gathered,
    and process 0 writes.

    Args:
        params: as from `load_hf` or `init_policy`.
        tokenizer_folder: its tokenizer files and generation_config.json are copied, and its config.json, if it has
            one, gives the special token ids and the context length.

    Raises `ValueError` if `folder` exists and is not empty, if `params` are not those of `config`, or if there is no
    tokenizer in `tokenizer_folder`; `OSError` if the folder cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: already exists and is not an empty folder. Choose another one, or remove it.")
    copied = _tokenizer_files(Path(tokenizer_folder)) if tokenizer_folder is not None else []
    leaves = _checked_leaves(params, config)

    writer = jax.process_index() == 0
    partial = folder.with_name(f".{folder.name}.partial")  # a fixed name, so that a killed export's is cleared here
    try:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            text = json.dumps(_hf_config(config, leaves["embedding"].dtype, tokenizer_folder), indent=2, sort_keys=True)
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")
            for path in copied:
                shutil.copyfile(path, partial / path.name)
        _write_weights(partial, _hf_tensors(leaves, config), writer)
        if writer:
            partial.rename(folder)
    finally:
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
    multihost_utils.sync_global_devices("save_hf")


def _is_plain(value: Any, only: Any) -> bool:
    if isinstance(only, dict):
        return isinstance(value, dict) and all(key == "rope_theta" or only.get(key) == value[key] for key in value)
    if isinstance(only, list):
        return isinstance(value, list) and all(item in only for item in value)
    return bool(value == only)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}. {remedy}") from None
    except ValueError as error:  # also what a file that is not UTF-8 raises
        raise ValueError(f"{path}: broken JSON: {error}. Restore the file. {remedy}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not a JSON object. {remedy}")
    return data


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        refuse_adapter(folder)
        raise ValueError(
            f"{folder}: has neither {single.name} nor {index.name}. Point policy.load at a folder of safetensors; "
            "pickled weights (pytorch_model.bin) are not read: convert them with transformers' save_pretrained."
        )
    names = _read_json(index, "Download it again.").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map = {names!r} does not map tensors to files. Download it again.")
    return [folder / name for name in sorted(set(names.values()))]


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except OSError as error:
        reason = error.strerror or "no such file"
        raise ValueError(f"{path}: cannot be read: {reason}. Download the missing file.") from None
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path}: is not a whole safetensors file ({error}). Download it again.")


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in found):
        raise ValueError(f"{folder}: holds no tokenizer files. Give the folder with tokenizer.json, or none.")
    return found


def _hf_config(config: DecoderConfig, dtype: np.dtype[Any], tokenizer_folder: str | Path | None) -> dict[str, Any]:
    """`config.json` in the spelling of transformers 4 (rope_theta, torch_dtype), which 5 and vLLM read too."""
    shape = dataclasses.asdict(config.shape)
    plain_head = shape["head_dim"] in (None, config.shape.hidden_size / config.shape.num_heads)
    carried: dict[str, Any] = {}
    if tokenizer_folder is not None and (path := Path(tokenizer_folder) / "config.json").is_file():
        source = _read_json(path, "Restore it, or remove it.")
        carried = {key: source[key] for key in _CARRIED_KEYS if key in source}
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": config.shape.num_layers,
        "sliding_window": None,
        "use_sliding_window": False,
        "use_cache": True,
        "torch_dtype": str(dtype),
        **carried,
        # vLLM and transformers derive head_dim; only an unusual one is written.
        **{key: shape[field] for field, key in _KEYS.items() if not (field == "head_dim" and plain_head)},
    }


def _checked_leaves(params: Any, config: DecoderConfig) -> dict[str, Any]:
    """Parameters by our name, after a look at names and shapes."""

    def named(tree: Any) -> dict[str, Any]:
        return {param_name(key_path): x for key_path, x in jax.tree_util.tree_leaves_with_path(tree)}

    leaves, expected = named(params), named(abstract_policy(config)[1])
    for name in sorted(leaves.keys() | expected.keys()):
        has, needs = (tuple(tree[name].shape) if name in tree else None for tree in (leaves, expected))
        if has != needs:
            raise ValueError(
                f"params: {name} has shape {has}, but the config needs {needs} (None: it is not there). "
                "Export parameters with the config that they were trained with."
            )
    return {name: leaves[name] for name in expected}


def _hf_tensors(leaves: dict[str, Any], config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, contiguous, one stacked parameter gathered at a time."""
    sizes = axis_sizes(config.shape)
    for name, x in leaves.items():
        param, host = PARAMS[name], x if isinstance(x, np.ndarray) else to_host(x)
        for tensor, values in zip(param.hf_names(sizes), host if param.per_layer else [host], strict=True):
            yield tensor, param.to_hf(values, sizes)
    for name, param in PARAMS.items():
        if name not in leaves and param.init == "zeros":  # a bias that Qwen2 has
            for tensor in param.hf_names(sizes):
                yield tensor, np.zeros(param.hf_shape(sizes), leaves["embedding"].dtype)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], writer: bool) -> None:
    files: list[list[str]] = []
    total = size = 0
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        path = folder / f"{len(files)}.safetensors"
        try:
            save_file(pending, path, metadata={"format": "pt"})  # without it transformers refuses the file
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        shutil.copymode(folder / "config.json", path)  # safetensors writes files that only their owner may read
        files.append(list(pending))
        pending.clear()

    for name, x in tensors:
        if not writer:
            continue  # this process was needed for the gather alone
        if pending and size + x.nbytes > _MAX_FILE_BYTES:
            flush()
            size = 0
        pending[name] = x
        size += x.nbytes
        total += x.nbytes
    if not writer:
        return
    flush()
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
