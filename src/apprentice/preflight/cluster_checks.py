"""Checks of the storage and of the cluster's resources; they need a connection to Ray."""

from __future__ import annotations

import uuid
from dataclasses import fields

from apprentice.errors import StorageError
from apprentice.preflight.lookup import RecipeLookup
from apprentice.ray_cluster.autoscaler import has_autoscaler
from apprentice.ray_cluster.nodes import call_on_every_node, node_resources
from apprentice.ray_cluster.session import is_connected
from apprentice.storage import Folder


def check_storage(lookup: RecipeLookup) -> str:
    """Checks that the storage can be written to and is the same on every node, and that the tracking services can be reached.

    Raises `StorageError`, `ResourcesError`, or `RecipeError` for a tracking service.
    """
    from apprentice.train.metrics.backends import check_backends_installed

    recipe = lookup.recipe
    folder = Folder.at(recipe.storage)
    mark = uuid.uuid4().hex
    probe = folder / f".probe-{mark}"
    try:
        existed = folder.exists()
        try:
            probe.write_text(mark)
            answers = call_on_every_node(_read_probe, probe, mark) if is_connected() else {}
        finally:
            probe.delete()
            if not existed and folder.exists() and not folder.children():
                folder.delete()
    except OSError as error:
        raise StorageError(f"storage {folder} cannot be written to: {error}. Choose another `storage`.") from error
    if blind := {name: reason for name, reason in answers.items() if reason}:
        name, reason = next(iter(blind.items()))
        raise StorageError(
            f"storage {folder} is not the same folder on every node: {len(blind)} of {len(answers)} nodes do not see what is"
            f" written here, {name} among them ({reason}). Mount it everywhere, give the nodes its credentials, or use s3://…."
        )
    check_backends_installed(recipe)
    nodes = f", seen by {len(answers)} nodes" if answers else ""
    return f"{folder}{nodes}" + "".join(f", figures to {name} too" for name in recipe.training.tracking)


def _read_probe(probe: Folder, mark: str) -> str:
    """Empty if this node reads `mark` in the file `probe`, which another node wrote, and can write beside it; else the reason."""
    try:
        if probe.read_text() != mark:
            return "another file is there"
        reply = Folder(f"{probe.uri}-{uuid.uuid4().hex}")
        reply.write_text(mark)
        reply.delete()
    except (OSError, StorageError) as error:
        return " ".join(str(error).split())[:200]
    return ""


def check_workers(lookup: RecipeLookup) -> str:
    """Checks that the cluster has the CPUs, GPUs and memory of the recipe's workers, and estimates each worker's memory.

    Raises `ResourcesError`, or `RecipeError` for a dtype or a tuning method that the hardware lacks.
    """
    from apprentice.models.loading import check_dtype, count_parameters, resolve_dtype
    from apprentice.models.tuning.methods import check_tuning
    from apprentice.train.distributed.async_validation import validates_asynchronously
    from apprentice.train.distributed.resources import GIB, check_resources, has_resources, required_resources
    from apprentice.train.engine.deepspeed_config import choose_micro_batch
    from apprentice.train.memory.measure import estimate_peak_memory

    recipe, folder = lookup.recipe, lookup.model_folder
    on_gpu = recipe.training.resources.gpus > 0
    check_dtype(recipe.model.dtype, folder, on_gpu=on_gpu)
    check_tuning(recipe.tuning)
    parameters = count_parameters(folder)
    dtype = resolve_dtype(recipe.model.dtype, "cuda" if on_gpu else "cpu")
    ask = required_resources(recipe, parameters, dtype)
    nodes = node_resources()
    autoscaled = ""
    if not has_resources(ask, nodes):
        if not has_autoscaler():
            check_resources(ask, nodes)
        autoscaled = "; the cluster's autoscaler is asked for nodes when training begins"
    aside = "; one more validates aside" if validates_asynchronously(recipe, nodes) else ""
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    trained = parameters if recipe.tuning.method == "full" else 0  # other methods train few parameters in comparison
    length = recipe.data.packing.length
    micro = choose_micro_batch(recipe.training, workers=ask.workers, length=length, on_gpu=on_gpu)
    each = estimate_peak_memory(recipe, parameters, trained, dtype, workers=ask.workers, micro=micro, length=length)
    sizes = {part.name: getattr(each, part.name) for part in fields(each)}
    parts = [f"{name} {'unknown' if size is None else f'{size / GIB:.1f}'}" for name, size in sizes.items()]
    gpus = f", {ask.gpus:g} GPUs" if ask.gpus else ""
    writers = recipe.training.grpo.actors if recipe.training.aim.rounds else 0
    beside = f"; beside them {writers} that write{'s' if writers == 1 else ''} replies, with three models each" if writers else ""
    return (
        f"{ask.workers} workers of {ask.cpus:g} CPUs{gpus} and about {each.total / GIB:.1f} GiB each ({', '.join(parts)}, with"
        f" {micro} rows at once){beside}{aside}; {cpus:g} CPUs there{autoscaled}"
    )
