"""Model loading: base weights or an exported run to a causal, sequence-to-sequence or reward model in memory.

`dtype: auto` is the number format that the hardware multiplies fast; how the attention is chosen is in `attention/`.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from pickle import UnpicklingError  # nosec B403
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from apprentice.errors import ModelError, RecipeError
from apprentice.models.attention.backend_choice import PackedCompute, check_shared_rows, choose_attention
from apprentice.models.compat import config_of_class, keep_weights_as_stored, model_class_of, set_implementations
from apprentice.models.tuning import bottleneck as adapters
from apprentice.models.weights.safetensors_reader import read_header, weight_files
from apprentice.models.weights.splitter import ModelSplitter
from apprentice.pretrained.architecture import FAMILIES, NO_FLOAT16, check_generates_text, family_of, gives_rewards, model_config
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.trust import check_model_folder
from apprentice.run.identity import ADAPTER, ADAPTER_CONFIG
from apprentice.storage import Folder

_FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")  # CPU units that multiply bfloat16, in PyTorch's names
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
REWARD_HEAD = "score"  # name of a reward model's output layer


def resolve_dtype(name: str, device: str | None = None) -> torch.dtype:
    """dtype that `name` means on `device` ("cuda" or "cpu"; None: a GPU if there is one).

    `auto` is bfloat16 on a GPU, on CPUs with AMX (matrix products about five times faster than in float32) and on CPUs with
    AVX512-BF16 (about twice), and float32 on all other CPUs, which only emulate bfloat16.
    """
    if name != "auto":
        return _DTYPES[name]
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    return torch.bfloat16 if on_gpu or multiplies_bfloat16() else torch.float32


def multiplies_bfloat16() -> bool:
    """True if this machine's CPU multiplies bfloat16 in hardware, faster than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit, False) for unit in _FAST_BFLOAT16)


def check_dtype(name: str, folder: Path, *, on_gpu: bool) -> None:
    """Raises `RecipeError` if `name` is float16 and training the model in `folder` would overflow, or run on CPUs."""
    if name != "float16":
        return
    kind = model_config(folder).get("model_type")
    if kind in NO_FLOAT16:
        raise RecipeError(f"model.dtype float16 overflows in {kind}, whose activations leave its range; use bfloat16 or float32.")
    if not on_gpu:
        raise RecipeError("model.dtype float16 is for GPUs, and training.resources.gpus is 0; use auto, bfloat16 or float32.")


def load_model(
    base: str | Path,
    dtype: torch.dtype,
    attention: str = "auto",
    *,
    four_bit: bool = False,
    head: int | None = None,
    trust: bool = False,
    packed: PackedCompute | None = None,
    splitter: ModelSplitter | None = None,
    weights: Folder | None = None,
) -> PreTrainedModel:
    """Loads the model `base` (folder, hub id or packaged model) on the CPU, in evaluation mode.

    `apprentice.pretrained.architecture` decides whether it is causal or sequence-to-sequence. An adapter exported beside the
    weights is attached. `four_bit` quantizes the weights to NF4, by bitsandbytes. `head` loads a reward model instead; if the
    folder has none, the output layer is initialised with `head` as seed. `packed` says where packed rows will run through it; None
    means any other purpose, for which `attention` `auto` and `flash` are the architecture's default. With a `splitter` the model is
    split as it is built, which `find_split_obstacle` must allow; then `weights` may name another place of the files with the
    weights. Raises `ModelError` if the model cannot be found, is no language model (or cannot give rewards), or lacks weights;
    and, unless `trust`, if it would read a pickle or run code of the model's own.
    """
    folder = local_folder(str(base), trust=trust)
    check_model_folder(folder, trust=trust)
    family = family_of(folder)
    if head is None:
        check_generates_text(folder)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    options: dict[str, Any] = {}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    options |= {"trust_remote_code": trust, "use_safetensors": None if trust else True}
    loader: Any = AutoModelForSeq2SeqLM if family == "seq2seq" else AutoModelForCausalLM
    if head is not None:
        loader = AutoModelForSequenceClassification
    try:
        config = read_config(folder, trust=trust)
        set_implementations(config, choose_attention(attention, packed, config, model_class_of(loader, config)))
        if head is not None:
            config.num_labels = 1
        with torch.random.fork_rng():
            torch.manual_seed(head or 0)
            model, missing_keys = _load_weights(loader, folder, config, dtype, options, splitter, weights)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder} cannot be loaded as a {FAMILIES[family]}: {reason}") from error
    except UnpicklingError as error:
        raise ModelError(
            f"the pickled weights in {folder} hold more than numbers, and are not read even with model.trust."
        ) from error
    fresh = {f"{REWARD_HEAD}.weight"} if head is not None and not gives_rewards(folder) else set()
    if missing := sorted(missing_keys - fresh):
        raise ModelError(f"{folder} lacks weights, {missing[0]!r} among them; fetch or export the model again.")
    if head is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # transformers needs one, though here the position decides which token's reward counts
    loaded: PreTrainedModel = _attach_adapter(model, folder / ADAPTER).eval()
    return loaded


def load_float32(folder: Path, *, trust: bool = False) -> PreTrainedModel:
    """Loads the model in `folder` in float32. Raises what `load_model` does."""
    return load_model(folder, torch.float32, trust=trust)


def load_adapted(base: str | Path, adapter: Path, *, trust: bool = False) -> Any:
    """Loads the model `base` in float32 with the adapter in the folder `adapter`. Raises what `load_model` does."""
    return _attach_adapter(load_float32(local_folder(str(base), trust=trust), trust=trust), adapter).eval()


def _load_weights(
    loader: Any,
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    options: dict[str, Any],
    splitter: ModelSplitter | None,
    weights: Folder | None,
) -> tuple[Any, set[str]]:
    """The model of `config` with the weights in `folder`, and the names of those that are missing and were initialised.

    `options` are those of `from_pretrained`, which loads it where there is no `splitter`.
    """
    model_class = model_class_of(loader, config)
    if splitter is not None and model_class is not None:  # without a class `from_pretrained` says what there would be
        from apprentice.models.weights.split_model import load_split_model  # which older transformers cannot import

        return load_split_model(folder, model_class, config_of_class(model_class, config), dtype, splitter, weights)
    options = options | {"config": config, "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    model, report = loader.from_pretrained(folder, **options)
    if "quantization_config" in options:
        keep_weights_as_stored(model)
    return model, set(report["missing_keys"])


def read_config(folder: Path, attention: str | None = None, *, trust: bool = False) -> Any:
    """Reads the model config in `folder`, with `attention` in transformers' name; None: sdpa if the model has it, else eager.

    The folder's own settings of attention and experts are ignored, in nested configs too, because transformers would fetch code by
    such names.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    set_implementations(config, attention)
    return config


def check_rows_can_be_shared(folder: Path, workers: int, *, trust: bool = False) -> None:
    """Raises `ModelError` unless `workers` workers can share the rows of the model in `folder` (training.sequence_parallel)."""
    config = read_config(folder, trust=trust)
    check_shared_rows(workers, config, model_class_of(AutoModelForCausalLM, config))


def build_without_weights(folder: Path, *, trust: bool = False) -> PreTrainedModel:
    """Builds the causal model in `folder` on PyTorch's meta device: layers and shapes without weights."""
    check_model_folder(folder, trust=trust)
    config = read_config(folder, trust=trust)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    return model


def _attach_adapter(model: Any, adapter: Path) -> Any:
    if (adapter / adapters.CONFIG).is_file():
        adapters.load_adapters(model, adapter)
    elif (adapter / ADAPTER_CONFIG).is_file():
        from peft import PeftModel

        with warnings.catch_warnings():  # peft uses a deprecated attribute of transformers
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return PeftModel.from_pretrained(model, adapter)
    return model


def count_parameters(folder: Path) -> int:
    """Number of parameters in the weight files of `folder`; 0 if there are no files.

    Safetensors say it in their headers; those that are not loaded, such as `consolidated.safetensors`, are left out. Pickles are
    not opened: their size is divided by that of a number in the config's dtype.
    """
    loaded = [file for file in weight_files(folder) if file.is_file()]
    if files := loaded or sorted(folder.glob("*.safetensors")):
        return sum(_count_in_header(file) for file in files)
    size = sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
    if not size:
        return 0
    config = model_config(folder)
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    return size // dtype.itemsize


def _count_in_header(file: Path) -> int:
    header, _ = read_header(file)
    return sum(math.prod(entry["shape"]) for entry in header.values())
