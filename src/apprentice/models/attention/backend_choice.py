"""Choice of a model's attention: by device, number format, architecture and purpose, not by which package is installed.

Packed rows (training, log-probabilities, validation) of a causal model run as one flat sequence, whose examples the attention is
told; no (length, length) tensor exists. Whatever else is done with a model (export, scoring, writing) has the architecture's
default. What `auto` tries in turn for packed rows:

    on a GPU    flash_attention_4, _3    packages made for GPUs of capability 10 and 9
                varlen                   PyTorch's own (`varlen.py`)
                flash_attention_2        the package, for dropout and soft caps, which PyTorch's has not
                flex_attention           for soft caps
    on CPUs     segments                 each example by itself (`segments.py`)
    on both     t5_segments              the same in T5 and mT5, with their biases (`t5_segments.py`)
                None                     the architecture's default, with masks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from apprentice.errors import ModelError
from apprentice.models import compat
from apprentice.models.attention.segments import SEGMENTS, register_segments
from apprentice.models.attention.t5_segments import T5_SEGMENTS, TYPES, register_t5_segments
from apprentice.models.attention.ulysses import ULYSSES, register_ulysses
from apprentice.models.attention.varlen import VARLEN, has_varlen, register_varlen
from apprentice.pretrained.architecture import mixing_obstacle

FLEX = "flex_attention"
_NARROW = (torch.bfloat16, torch.float16)  # all that flash kernels multiply
_OLDEST = (8, 0)  # compute capability from which on they run
_LARGEST_HEAD = 256
_LOSE_KEYWORDS = ("nemotron",)  # types whose layers do not hand on what their attention is told; of 121 read in transformers 5.23
_LOSE_WINDOWS = ("phimoe", "qwen2_moe", "doge")  # types whose sliding window is in their mask alone, in transformers 5.23
_ROW_ROPE = ("dynamic", "longrope")  # types of rotary positions whose frequencies depend on the longest example of a row
_DROPOUTS = ("attention_dropout", "attn_pdrop")  # names of the dropout of attention weights in configs


@dataclass(frozen=True)
class PackedCompute:
    """Where packed rows run through a model: type of device, number format, a GPU's compute capability, workers that share rows."""

    device: str
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)
    sequence_parallel: int = 1

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, sequence_parallel: int = 1) -> PackedCompute:
        """That of packed rows on `device` of this machine."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return cls(device.type, dtype, capability, sequence_parallel)


def choose_attention(word: str, packed: PackedCompute | None, config: Any, model_class: Any) -> str | None:
    """transformers' name of the attention that the recipe's `word` means; None leaves it to the architecture.

    `packed` is None for any purpose but packed rows. `model_class` is the model's class in transformers, or None if it brings its
    own. Raises `ModelError` for `flash` where it cannot run, and for a model whose rows workers cannot share.
    """
    if packed is not None and packed.sequence_parallel > 1:
        check_shared_rows(packed.sequence_parallel, config, model_class)
        register_ulysses()
        return ULYSSES
    if word in ("sdpa", "eager"):
        return word
    if word == "flex":
        return FLEX
    if word == "flash":
        return None if packed is None else _flash(packed, config, model_class)
    if packed is None or model_class is None:
        return None
    if config.is_encoder_decoder:
        return _of_encoder_decoder(config, model_class)
    if not _hands_on(config) or mixing_obstacle(config.to_dict()) is not None:
        return None
    return _fastest(packed, config, model_class) if packed.device == "cuda" else _on_cpu(config, model_class)


def is_flat(name: str) -> bool:
    """Whether the attention `name` takes packed rows of a causal model as one flat sequence, with bounds in place of masks."""
    return name in (VARLEN, SEGMENTS, ULYSSES) or "flash" in name


def has_masks(name: str | None) -> bool:
    """Whether the attention `name` (None: the architecture's default) computes whole packed rows, with a mask."""
    return name is None or not (is_flat(name) or name in (FLEX, T5_SEGMENTS))


def check_shared_rows(workers: int, config: Any, model_class: Any) -> None:
    """Raises `ModelError` unless `workers` workers can share the rows of a model (training.sequence_parallel)."""
    support, heads = compat.attention_support(model_class), int(getattr(config.get_text_config(), "num_attention_heads", 0) or 0)
    if config.is_encoder_decoder:
        raise ModelError(
            f"training.sequence_parallel {workers} is for causal models, and {config.model_type} is an encoder-decoder; set it to"
            " 1."
        )
    is_plain = _takes_bounds_alone(support, config) and _hands_on(config)
    if mixing_obstacle(config.to_dict()) is not None or not is_plain:
        raise ModelError(
            f"training.sequence_parallel {workers} cannot be used with {config.model_type}, whose attention takes more than tokens"
            " and their bounds, or other layers mix tokens; set it to 1."
        )
    if kinds := _rope_types(config) & set(_ROW_ROPE):
        raise ModelError(
            f"training.sequence_parallel {workers} cannot be used with {config.model_type}, whose rotary positions"
            f" ({min(kinds)}) depend on the length of whole rows, of which each worker has a part; set it to 1."
        )
    if heads % workers:
        raise ModelError(
            f"training.sequence_parallel {workers} does not divide the {heads} attention heads of {config.model_type}, which"
            " workers that share a row divide among them; choose a divisor."
        )


def _flash(packed: PackedCompute, config: Any, model_class: Any) -> str:
    """The name that `flash` means for packed rows: the newest package for this GPU, else a kernel that transformers fetches."""
    installed, has_kernels = compat.installed_flash_attention(), compat.has_hub_kernels()
    if packed.device != "cuda" or not (installed or has_kernels):
        raise ModelError("model.attention flash needs a GPU and the package flash-attn, which are not here; use auto.")
    support = compat.attention_support(model_class)
    # Without keywords a layer does not hear where examples begin, and would attend to all before it.
    hears_bounds = config.is_encoder_decoder or (support.keywords and _hands_on(config))
    if not (support.flash and hears_bounds and _fits_flash(packed, config)):
        dtype = str(packed.dtype).removeprefix("torch.")
        raise ModelError(f"model.attention flash cannot run {config.model_type} in {dtype} on this GPU; use auto.")
    versions = _packages(packed, config, newest_only=False)
    for version in versions:
        if version in installed:
            return f"flash_attention_{version}"
    if has_kernels:
        return f"flash_attention_{versions[0]}"
    raise ModelError(f"model.attention flash: no installed package does what {config.model_type} needs on this GPU; use auto.")


def _of_encoder_decoder(config: Any, model_class: Any) -> str | None:
    """Attention by examples for T5's class that writes; no other encoder-decoder packs, or has biases that layers share."""
    if config.model_type not in TYPES or not model_class.__name__.endswith("ForConditionalGeneration"):
        return None
    register_t5_segments()
    return T5_SEGMENTS


def _on_cpu(config: Any, model_class: Any) -> str | None:
    """Attention by examples for what needs no more than causal attention and windows."""
    if not _takes_bounds_alone(compat.attention_support(model_class), config):
        return None
    register_segments()
    return SEGMENTS


def _fastest(packed: PackedCompute, config: Any, model_class: Any) -> str | None:
    """The first of the module's list that runs this causal architecture on this GPU."""
    support, installed = compat.attention_support(model_class), compat.installed_flash_attention()
    if not (support.sdpa or _soft_cap(config)):
        return None  # attention sinks, which most of the list have not
    if support.flash and support.keywords and _fits_flash(packed, config):
        for version in _packages(packed, config, newest_only=True):
            if version in installed:
                return f"flash_attention_{version}"
        if has_varlen() and not _soft_cap(config) and not _dropout(config) and _head_size(config) % 8 == 0:
            register_varlen()
            return VARLEN
        if 2 in installed:
            return "flash_attention_2"
    return FLEX if support.flex and _soft_cap(config) and not _dropout(config) else None


def _takes_bounds_alone(support: compat.AttentionSupport, config: Any) -> bool:
    """Whether attention is told bounds, and needs no more than them and a window: neither soft caps nor attention sinks."""
    return support.flash and support.keywords and support.sdpa and not _soft_cap(config)


def _hands_on(config: Any) -> bool:
    """Whether the layers hand on to their attention what it cannot do without where there is no mask: bounds, and a window."""
    has_window = bool(getattr(config, "sliding_window", None))
    return config.model_type not in _LOSE_KEYWORDS and not (has_window and config.model_type in _LOSE_WINDOWS)


def _packages(packed: PackedCompute, config: Any, *, newest_only: bool) -> list[int]:
    """Versions of flash attention's packages that do what the model needs on this GPU, the fastest first."""
    major, needs_old = packed.capability[0], bool(_dropout(config))
    versions = [] if newest_only else [2]
    if major == 9 and not needs_old:
        versions.insert(0, 3)
    if major >= 10 and not needs_old and not _soft_cap(config) and _head_size(config) <= 128:
        versions.insert(0, 4)
    return versions


def _fits_flash(packed: PackedCompute, config: Any) -> bool:
    """Whether the kernels of flash attention run on this GPU, in this number format, with heads as large as the model's."""
    return packed.dtype in _NARROW and packed.capability >= _OLDEST and _head_size(config) <= _LARGEST_HEAD


def _head_size(config: Any) -> int:
    """Size of the largest head of queries in any layer."""
    text = config.get_text_config()
    named = [value for name, value in text.to_dict().items() if name.endswith("head_dim") and isinstance(value, int)]
    parts = (getattr(text, "qk_nope_head_dim", 0) or 0) + (getattr(text, "qk_rope_head_dim", 0) or 0)
    return max([*named, parts]) or int(text.hidden_size) // int(text.num_attention_heads)


def _soft_cap(config: Any) -> float | None:
    cap: float | None = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return cap


def _rope_types(config: Any) -> set[str]:
    """Types of the rotary positions in all layers; a config has one set of parameters, or one for each type of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return {str(part["rope_type"]) for part in (parameters, *parameters.values()) if isinstance(part, dict) and "rope_type" in part}


def _dropout(config: Any) -> float:
    text = config.get_text_config()
    return max(float(getattr(text, name, None) or 0.0) for name in _DROPOUTS)
