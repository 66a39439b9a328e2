"""Export of the best checkpoint: a folder that transformers loads by itself, and for adapters one that peft loads by itself.

The written weights are loaded again and compared with the trained model on rows of the run (`fidelity.py`) before they count. The
difference goes to `export.json`; the prompt contract is written last, so that a folder with it is whole.
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

from apprentice.data.encoding.prompt_contract import ancestors_of, layout_beside, make_contract
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.window import Probe
from apprentice.errors import TrainingError
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.reward import is_reward
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.hub import PACKAGED_MODELS, local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.contract import weights_sha256
from apprentice.run.fence import FenceToken
from apprentice.run.folder import Run
from apprentice.run.identity import ADAPTER, CONTRACT_FILE, public_base
from apprentice.storage import Folder
from apprentice.train.checkpoint.fidelity import compare_scores, score_examples
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.restore import restore_model
from apprentice.train.checkpoint.shard_reader import open_tensors

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


def export_model(
    recipe: Recipe, run: Run, checkpoint: Checkpoint, layout: Layout, probe: Probe, token: FenceToken | None = None
) -> None:
    """Writes `model/` and, for methods that have one, `adapter/` of `run` from `checkpoint`; `export.json` says how true they are.

    The model is saved in the number format it was trained in; an adapter that cannot be merged lies beside its base's weights in
    `model/adapter/`, where `load_model` finds it. Raises `TrainingError` if what was written does not load again as
    the same model or says something else of the `probe`, and `FencedError` where others have the run now.
    """
    method = TUNING_METHODS[recipe.tuning.method]
    with open_tensors(checkpoint) as reader:
        model: Any = restore_model(recipe, reader.read, torch.float32, attention="auto", quantized=False).eval()
    expected = score_examples(model, probe.examples)
    dtype = resolve_dtype(checkpoint.facts["dtype"])
    scratch = run.folder.make().local if run.folder.is_local else None
    with tempfile.TemporaryDirectory(prefix=".export-", dir=scratch, ignore_cleanup_errors=True) as folder:
        model_folder, adapter_folder = Path(folder) / "model", Path(folder) / "adapter"
        if method.save_adapter is not None:
            method.save_adapter(model, adapter_folder, _public_name(recipe.model.base))
            _write_adapter_contract(adapter_folder, recipe, layout)
        if method.merge is None:
            load_model(recipe.model.base, dtype, trust=recipe.model.trust).save_pretrained(model_folder)
            shutil.copytree(adapter_folder, model_folder / ADAPTER)
        else:
            model = method.merge(model)
            model.to(dtype).save_pretrained(model_folder)
        _add_tokenizer_and_contract(model_folder, recipe, layout)
        reloaded = _reload_and_compare(model_folder, model, dtype, trust=recipe.model.trust)
        facts = compare_scores(expected, score_examples(reloaded, probe.examples), dtype, rewards=is_reward(reloaded))
        del model, reloaded
        if token is not None:
            token.check()
        sizes = {"rows": probe.rows, "examples": len(probe.examples)}
        run.export_file.write_json({"version": 1, "step": checkpoint.state.step} | sizes | facts)
        if method.save_adapter is not None:
            _publish(adapter_folder, run.adapter)
        _publish(model_folder, run.model)


def _public_name(base: str) -> str:
    return PACKAGED_MODELS[base].hub_id if base in PACKAGED_MODELS else public_base(base)


def _add_tokenizer_and_contract(folder: Path, recipe: Recipe, layout: Layout) -> None:
    """Puts tokenizer and contract beside the weights in `folder`."""
    source = local_folder(recipe.model.base)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, folder / name)
    if (template := layout.tokenizer.template_override) is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        layout = replace(layout, tokenizer=Tokenizer(folder))  # which brings the template itself now
    make_contract(recipe, layout, folder, ancestors=ancestors_of(source), run=recipe.name).write(folder)
    layout_beside(folder)


def _write_adapter_contract(folder: Path, recipe: Recipe, layout: Layout) -> None:
    """Prompt contract of an adapter: its prompt format, and the hash of the base weights that it belongs to."""
    base = local_folder(recipe.model.base)
    contract = make_contract(
        recipe, layout, folder, ancestors=ancestors_of(base), run=recipe.name, base_sha256=weights_sha256(base)
    )
    contract.write(folder)


def _reload_and_compare(folder: Path, model: Any, dtype: torch.dtype, *, trust: bool) -> Any:
    """Loads the model in `folder` and checks that its weights are those of `model`, which is in memory.

    Raises `TrainingError` for the first that is not.
    """
    reloaded = load_model(folder, dtype, head=0 if is_reward(model) else None, trust=trust)
    weights = reloaded.state_dict()
    different = [
        name
        for name, tensor in model.state_dict().items()
        if name not in weights or not torch.equal(tensor.to(dtype), weights[name].to(dtype))
    ]
    if different:
        raise TrainingError(
            f"{different[0]!r} is not the same in the exported model as in training; check the disk, and export again."
        )
    return reloaded


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
