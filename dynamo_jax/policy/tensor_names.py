"""Which stored tensor is which of the policy's: by its plain name, or by one under the prefixes that wrappers leave."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dynamo_jax.policy.model import DecoderConfig
from dynamo_jax.policy.params import axis_sizes, params_of

# Modules that hold another one and give their name to all that it saves: torch.compile, DataParallel and its kin, FSDP
# and activation checkpointing (around single layers, too), peft. No tensor of a plain Qwen2 has such a part in it.
_WRAPPER = re.compile(
    r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
)
_LORA = re.compile(r"(?<![^.])lora_")
_MERGE = (
    "Adapters are not merged here: merge it into its model (merge_and_unload of peft, then save_pretrained), and point "
    "policy.load at the result."
)

Stored = tuple[Path, str]  # a file, and the name of a tensor in it


def locate(folder: Path, stored: Iterable[Stored], config: DecoderConfig) -> dict[str, Stored]:
    """Where each tensor that the policy needs is, by its plain name. Tensors that it may leave unread are there, too.

    A wrapper's prefix (`_orig_mod.`, `module.`, `base_model.model.`, several of them) is taken off where the rest fits.

    Raises `ValueError`, with the folder and the names, for missing and unknown tensors, for two that have one name
    without their prefixes, and for those of a LoRA adapter.
    """
    sizes = axis_sizes(config.shape)
    expected = {tensor for param in params_of(config.shape).values() for tensor in param.hf_names(sizes)}
    unread = {"lm_head.weight"} if config.shape.tie_word_embeddings else set()

    def fits(name: str) -> bool:
        return name in expected or name in unread or name.endswith("rotary_emb.inv_freq")

    stored = list(stored)
    if lora := [name for _, name in stored if _LORA.search(name)]:
        raise ValueError(f"{folder}: {len(lora)} tensors of a LoRA adapter in the safetensors: {_some(lora)}. {_MERGE}")
    where: dict[str, Stored] = {}
    for path, name in stored:
        plain = _WRAPPER.sub("", name)
        key = plain if fits(plain) else name
        if key in where:
            other = " and ".join(f"{n} in {p.name}" for p, n in (where[key], (path, name)))
            raise ValueError(f"{folder}: {other} are both the tensor {key}. Take the one out that is not meant.")
        where[key] = path, name
    unknown = {name for name in where if not fits(name)}
    remedy = "Use the config.json that belongs to these weights (layers, tied head, biases), or download them again."
    for what, names in (("missing", expected - where.keys()), ("unknown", unknown)):
        if names:
            note = _of_wrappers([name for _, name in stored], unknown)
            raise ValueError(
                f"{folder}: {len(names)} {what} tensors in the safetensors: {_some(names)}. {note}{remedy}"
            )
    return where


def refuse_adapter(folder: Path) -> None:
    """Raise `ValueError` if `folder` is what peft saves of an adapter, which is no model."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: holds a LoRA adapter (adapter_config.json), not a model. {_MERGE}")


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def _of_wrappers(names: Iterable[str], unknown: Iterable[str]) -> str:
    """A sentence about the prefixes that some names carry."""
    prefixes = {"".join(_WRAPPER.findall(name)) for name in names} - {""}
    if not prefixes:
        return ""
    unfit = [name for name in unknown if _WRAPPER.search(name)]
    but = f", but {min(unfit)} fits neither with it nor without" if unfit else ""
    return f"The prefix {_some(prefixes)} of a wrapper was taken off where the rest fits{but}. "
