"""From the best checkpoint to a model that transformers loads alone, and an adapter that peft loads alone.

What is written is loaded again and compared before it counts; the prompt contract is written last. Knows nothing of Ray,
DeepSpeed or workers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apprentice.data.encoding.prompt_contract import ancestors_of, layout_beside, make_contract
from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import TrainingError
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.reward import is_reward
from apprentice.models.tuning.methods import TUNING_METHODS, load_trainable, trainable
from apprentice.pretrained.hub import PACKAGED_MODELS, local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.fence import Token
from apprentice.run.folder import ADAPTER, CONTRACT_FILE, Run, public_base, weights_sha256
from apprentice.storage import Folder
from apprentice.train.checkpoint.format import Checkpoint, tensors_of
from apprentice.train.engine.deepspeed import WEIGHT

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_CLOSE = 5e-3  # nats: how far merging an adapter in float32 may move a log-probability
_CLOSE_NARROW = 0.25  # nats, in the mean: how far a narrower number format may


def export(recipe: Recipe, run: Run, checkpoint: Checkpoint, layout: Layout, token: Token | None = None) -> None:
    """Writes `model/` and, for methods that have one, `adapter/` of `run` from `checkpoint`.

    The model is saved in the number format it was trained in; an adapter that cannot be merged lies beside its base's weights in
    `model/adapter/`, where `load_model` finds it. Raises `TrainingError` if what was written does not load again as
    the same model, and `FencedError` where others have the run now.
    """
    method = TUNING_METHODS[recipe.tuning.method]
    model: Any = load_model(recipe.model.base, torch.float32, head=recipe.head, trust=recipe.model.trust)
    model = method.wrap(model, recipe.tuning, recipe.seed).eval()
    with tensors_of(checkpoint) as read:
        load_trainable(model, {name: read(f"{WEIGHT}/{name}") for name in trainable(model)})
    probe = torch.tensor([layout.encode_prompt(layout.prompt("Name three colours."))])
    expected = _log_probabilities(model, probe)
    dtype = resolve_dtype(checkpoint.facts["dtype"])
    scratch = run.folder.make().local if run.folder.is_local else None
    with tempfile.TemporaryDirectory(prefix=".export-", dir=scratch, ignore_cleanup_errors=True) as folder:
        written, adapter = Path(folder) / "model", Path(folder) / "adapter"
        if method.save_adapter is not None:
            method.save_adapter(model, adapter, _public_name(recipe.model.base))
            _contract_of_adapter(adapter, recipe, layout)
        if method.merge is None:
            load_model(recipe.model.base, dtype, trust=recipe.model.trust).save_pretrained(written)
            shutil.copytree(adapter, written / ADAPTER)
        else:
            model = method.merge(model)
            model.to(dtype).save_pretrained(written)
        _complete(written, recipe, layout)
        _compare(written, model, dtype, probe, expected, trust=recipe.model.trust)
        del model
        if token is not None:
            token.check()
        if method.save_adapter is not None:
            _publish(adapter, run.adapter)
        _publish(written, run.model)


def _public_name(base: str) -> str:
    return PACKAGED_MODELS[base].hub_id if base in PACKAGED_MODELS else public_base(base)


def _complete(folder: Path, recipe: Recipe, layout: Layout) -> None:
    """Puts tokenizer and contract beside the weights in `folder`."""
    source = local_folder(recipe.model.base)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)
    if (template := layout.tokenizer.given_template) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        layout = replace(layout, tokenizer=Tokenizer(folder))  # which brings the template itself now
    make_contract(recipe, layout, folder, ancestors=ancestors_of(source), run=recipe.name).write(folder)
    layout_beside(folder)


def _contract_of_adapter(folder: Path, recipe: Recipe, layout: Layout) -> None:
    """An adapter says how it was spoken to, and over which weights."""
    base = local_folder(recipe.model.base)
    contract = make_contract(
        recipe, layout, folder, ancestors=ancestors_of(base), run=recipe.name, base_sha256=weights_sha256(base)
    )
    contract.write(folder)


def _log_probabilities(model: Any, probe: Tensor) -> Tensor:
    """Of every token of the vocabulary, at every place of the probe; an encoder-decoder's are those of its first token.

    Of a reward model, the reward of the probe.
    """
    start = getattr(model.config, "decoder_start_token_id", None)
    more = {"decoder_input_ids": torch.tensor([[start]])} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=probe, use_cache=False, **more).logits
    return logits.float() if is_reward(model) else logits.float().log_softmax(dim=-1)


def _compare(folder: Path, model: Any, dtype: torch.dtype, probe: Tensor, expected: Tensor, *, trust: bool) -> None:
    """What is on disk against what is in memory, number by number; and what it says against what was trained."""
    again = load_model(folder, dtype, head=0 if is_reward(model) else None, trust=trust)
    written = again.state_dict()
    odd = [
        name
        for name, tensor in model.state_dict().items()
        if name not in written or not torch.equal(tensor.to(dtype), written[name].to(dtype))
    ]
    if odd:
        raise TrainingError(f"{odd[0]!r} is not the same in the exported model as in training; check the disk, and export again.")
    difference = (_log_probabilities(again, probe) - expected).abs() / (expected.abs().clamp(min=1) if is_reward(model) else 1)
    wide = dtype == torch.float32
    apart = float(difference.max() if wide else difference.mean())
    if not apart <= (_CLOSE if wide else _CLOSE_NARROW):
        raise TrainingError(
            f"the exported model's log-probabilities are {apart:.1e} from the trained model's; do not use it, and report this."
        )


def _publish(source: Path, target: Folder) -> None:
    """Puts a finished folder in its place; on object stores the contract, which makes a model count, goes last.

    What was there before moves aside first: it may not let itself be deleted while somebody reads it.
    """
    if target.is_local:
        if target.exists():
            os.replace(target.local, source.with_name(f"old-{target.name}"))  # goes with the temporary folder
        os.replace(source, target.local)
        return
    target.delete()
    for file in sorted((file for file in source.rglob("*") if file.is_file()), key=lambda file: file.name == CONTRACT_FILE):
        (target / str(file.relative_to(source))).upload(file)
