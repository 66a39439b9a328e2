"""Batch prediction: the replies of a run or a model to every row of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.errors import RunError
from apprentice.pipeline.prepare import Progress
from apprentice.pipeline.serve import find_contract
from apprentice.pretrained.architecture import check_generates_text, model_config
from apprentice.pretrained.hub import local_folder
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Model, Serving, find_recipe, load_recipe
from apprentice.run.folder import find_run
from apprentice.storage import Folder

PROMPT_TOKENS = 2048  # longest prompt for a model whose config states no context length


def predict_file(
    target: str,
    file: Path | str,
    out: Path | str | None,
    *,
    max_tokens: int,
    contract: str | None,
    recipe: str | None,
    restart: bool,
    storage: str,
    trust: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Writes the replies of the run or model `target` to every row of `file`, a path or URI; returns a summary.

    The replies go to `out`, by default `<file>-replies` without the file's suffix. `contract` (a run or model folder) or
    `recipe` gives a bare model its prompt format. `max_tokens` limits each reply. Raises `RunError` for a run without a
    trained model.
    """
    from apprentice.model_pool.answer_settings import TokenLimits
    from apprentice.predict import launch
    from apprentice.pretrained.trust import check_model_folder

    run = find_run(target, storage)
    if run is not None and not run.is_trained:
        raise RunError(f"run {run.name!r} has no trained model yet; train it first.")
    settings = run.recipe() if run is not None else load_recipe(find_recipe(recipe)) if recipe is not None else None
    model = settings.model if settings is not None else Model(base=target)
    model = model.model_copy(update={"trust": model.trust or trust})
    folder = local_folder(str(run.model) if run is not None else target, trust=model.trust)
    check_generates_text(folder)
    layout = layout_beside(folder, None if run is not None else find_contract(folder, contract, recipe, storage))
    check_model_folder(folder, trust=model.trust)
    config = model_config(folder)
    context = config.get("max_position_embeddings") or config.get("n_positions") or PROMPT_TOKENS + max_tokens
    limits = TokenLimits(context - max_tokens, max_tokens)
    place = Folder.at(out or f"{str(file).removesuffix(Path(file).suffix)}-replies")
    with ray_session():
        return launch.predict(
            Folder.at(file),
            place,
            folder,
            model,
            layout,
            limits,
            restart=restart,
            serving=settings.serving if settings is not None else Serving(),
            gpus=settings.training.resources.gpus if settings is not None else 0.0,
            progress=lambda values: progress("predict", values),
        )
