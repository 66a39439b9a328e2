"""Export of the best checkpoint: a folder that transformers loads by itself, and for adapters one that peft loads by itself.

The weights go tensor by tensor from checkpoint and base to the files (`model_writer.py`): into a folder beside the run's model that
takes its place at the end, or, on object stores, which rename nothing, to their place, where they do not count without a contract.

The written weights are loaded again and compared with the trained model on rows of the run (`fidelity.py`) before they count. The
difference goes to `export.json`; the prompt contract is written last, so that a folder with it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import ancestors_of, layout_beside, layout_under, make_contract
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.window import Probe
from apprentice.models.loading import resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.models.weights.splitter import find_split_obstacle
from apprentice.pretrained.hub import PACKAGED_MODELS, local_folder
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.contract import weights_sha256
from apprentice.run.fence import FenceToken
from apprentice.run.folder import Run
from apprentice.run.identity import ADAPTER, CONTRACT_FILE, public_base
from apprentice.storage import Folder
from apprentice.train.checkpoint.fidelity import compare_scores
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.model_writer import create_writer
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
    dtype = resolve_dtype(checkpoint.facts["dtype"])
    base = local_folder(recipe.model.base)
    has_adapter = TUNING_METHODS[recipe.tuning.method].save_adapter is not None
    is_merged = TUNING_METHODS[recipe.tuning.method].merge is not None
    scratch = run.folder.make().local if run.folder.is_local else None
    with (
        open_tensors(checkpoint) as reader,
        tempfile.TemporaryDirectory(prefix=".export-", dir=scratch, ignore_cleanup_errors=True) as folder,
    ):
        model_folder, adapter_folder = Path(folder) / "model", Path(folder) / "adapter"
        model_folder.mkdir()
        writer = create_writer(recipe, reader, dtype, probe.examples, streamed=find_split_obstacle(base) is None)
        if has_adapter:
            writer.save_adapter(adapter_folder, _public_name(recipe.model.base))
            _write_adapter_contract(adapter_folder, recipe, layout)
        if not is_merged:
            shutil.copytree(adapter_folder, model_folder / ADAPTER)
        writer.merge()
        to_store = writer.is_streamed and not run.model.is_local
        place = run.model if to_store else Folder.at(model_folder)
        if to_store:  # whose earlier model goes before this one is read back
            compare_scores(writer.expected, writer.score_merged(probe.examples), dtype, rewards=writer.is_reward)
            if token is not None:
                token.check()
            (run.model / CONTRACT_FILE).delete()
            run.model.delete()
        digest = hashlib.sha256()
        writer.write(model_folder, place, digest)
        _add_tokenizer_and_contract(model_folder, recipe, layout, digest if to_store else None)
        scores = writer.reload_and_score(model_folder, place, probe.examples)
        facts = compare_scores(writer.expected, scores, dtype, rewards=writer.is_reward)
        del writer
        if token is not None:
            token.check()
        sizes = {"rows": probe.rows, "examples": len(probe.examples)}
        run.export_file.write_json({"version": 1, "step": checkpoint.state.step} | sizes | facts)
        if has_adapter:
            _publish(adapter_folder, run.adapter)
        _publish(model_folder, run.model, is_begun=to_store)


def _public_name(base: str) -> str:
    return PACKAGED_MODELS[base].hub_id if base in PACKAGED_MODELS else public_base(base)


def _add_tokenizer_and_contract(folder: Path, recipe: Recipe, layout: Layout, digest: Any) -> None:
    """Puts tokenizer and contract beside the weights in `folder`; `digest` has those that are elsewhere, None if none is."""
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
    contract = make_contract(recipe, layout, folder, ancestors=ancestors_of(source), run=recipe.name)
    if digest is None:
        contract.write(folder)
        layout_beside(folder)
        return
    for file in sorted((folder / ADAPTER).glob("*.safetensors")):
        digest.update(file.read_bytes())
    contract = contract.model_copy(update={"weights_sha256": digest.hexdigest()})
    contract.write(folder)
    layout_under(contract, Tokenizer(folder))


def _write_adapter_contract(folder: Path, recipe: Recipe, layout: Layout) -> None:
    """Prompt contract of an adapter: its prompt format, and the hash of the base weights that it belongs to."""
    base = local_folder(recipe.model.base)
    contract = make_contract(
        recipe, layout, folder, ancestors=ancestors_of(base), run=recipe.name, base_sha256=weights_sha256(base)
    )
    contract.write(folder)


def _publish(source: Path, target: Folder, *, is_begun: bool = False) -> None:
    """Puts a finished folder in its place; on object stores the contract, which makes a model count, goes last.

    What was there before moves aside first: it may not let itself be deleted while somebody reads it. With `is_begun` the weights
    are in the object store already.
    """
    if target.is_local:
        if target.exists():
            os.replace(target.local, source.with_name(f"old-{target.name}"))  # goes with the temporary folder
        os.replace(source, target.local)
        return
    if not is_begun:
        target.delete()
    for file in sorted((file for file in source.rglob("*") if file.is_file()), key=lambda file: file.name == CONTRACT_FILE):
        (target / str(file.relative_to(source))).upload(file)
