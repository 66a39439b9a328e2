"""Private API of transformers and bitsandbytes that loading uses, with the version it was read in.

tests/models/test_compat.py fails where it is gone or means something else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers.models.auto import auto_factory
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
)


def set_implementations(config: Any, attention: str | None) -> None:
    """Sets the attention implementation of a model config, and the default one for experts (transformers 5.23).

    `attention` is transformers' name; None: sdpa if the model has it, else eager. A keyword of `from_pretrained` would not do: an
    `_attn_implementation` of the folder's config.json overrules it.
    """
    config._attn_implementation, config._experts_implementation = attention, None


def keep_weights_as_stored(model: Any) -> None:
    """Keeps the linear layers in 4 bits of `model` from repacking their weights for a CPU's AVX512-BF16 (bitsandbytes 0.50).

    They would at the first forward pass in evaluation mode, and then compute in bfloat16 for good: training would go on with other
    weights after its first validation than before.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class AttentionSupport(NamedTuple):
    """What a model class says of its attention: whether flash, flex and SDPA kernels may be used, and whether keywords reach it."""

    flash: bool
    flex: bool
    sdpa: bool
    keywords: bool


def attention_support(model_class: Any) -> AttentionSupport:
    """What `model_class` says of its attention (transformers 5.23); nothing for None, a class that the model brings itself."""
    names = ("_supports_flash_attn", "_supports_flex_attn", "_supports_sdpa", "_supports_attention_backend")
    return AttentionSupport(*(bool(getattr(model_class, name, False)) for name in names))


def model_class_of(loader: Any, config: Any) -> Any:
    """The class that `loader`, one of transformers' `Auto…` classes, makes of `config`; None if it has none (transformers 5.23)."""
    try:
        return auto_factory._get_model_class(config, loader._model_mapping)
    except KeyError:
        return None


def config_of_class(model_class: Any, config: Any) -> Any:
    """The part of `config` that `model_class` is made of, as `from_pretrained` of an `Auto…` class takes it (transformers 5.23).

    Where a model of text and pictures gives its text model, that is the text's config.
    """
    text_class = config.sub_configs.get("text_config")
    is_of_text = text_class is not None and getattr(model_class, "config_class", None) is text_class
    return config.get_text_config() if is_of_text else config


def installed_flash_attention() -> frozenset[int]:
    """Versions of the flash-attention packages that are installed and that transformers would take on this machine's GPU."""
    checks = {2: is_flash_attn_2_available, 3: is_flash_attn_3_available, 4: is_flash_attn_4_available}
    return frozenset(version for version, is_available in checks.items() if is_available())


def has_hub_kernels() -> bool:
    """Whether the package `kernels` is installed, with which transformers fetches flash attention from the hub."""
    return bool(is_kernels_available())


def liger_types() -> frozenset[str]:
    """Model types that the installed liger-kernel has kernels for; none where it is not installed (0.8.5)."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:  # or Triton, which it needs, is missing
        return frozenset()
    return frozenset(MODEL_TYPE_TO_APPLY_LIGER_FN)


def use_liger(model: Any) -> None:
    """Replaces the kernels of the layers of `model`, a model of transformers, but not its loss (liger-kernel 0.8.5)."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def transformer_layers(model: Any) -> list[Any]:
    """The layers of `model`, a model of transformers: modules of the classes that it keeps on one device (transformers 5.23)."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
