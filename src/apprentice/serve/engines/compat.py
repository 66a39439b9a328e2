"""Private API of vLLM, read in vLLM 0.29: its asynchronous engine and the modules that its parts are in.

`tests/serve/engines/test_vllm_stream.py` runs the engine over a stand-in that has these names and nothing else.
"""

from __future__ import annotations

import os
from typing import Any

# Set before vLLM is imported, which reads them: no usage statistics are sent, and a replica's log has warnings only.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

__all__ = [
    "AsyncEngineArgs",
    "AsyncLLM",
    "EngineDeadError",
    "EngineGenerateError",
    "LoRARequest",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "kv_cache_tokens",
    "tokens_input",
]


def kv_cache_tokens(llm: Any) -> int:
    """Tokens that the KV cache of the engine `llm` has room for, of all requests together."""
    cache = llm.vllm_config.cache_config
    return int(cache.num_gpu_blocks or 0) * int(cache.block_size)
