"""Examination of this machine: what works, what works in part, what does not, and what to do about it.

`examine` looks at versions, processors, compilers, open files, ports, storage, the hub and Ray, and needs no recipe. Its results
come one by one, Ray's last because its start takes the longest.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import httpx
import torch
from packaging.requirements import Requirement

from apprentice.errors import ApprenticeError
from apprentice.models.loading import multiplies_bfloat16
from apprentice.ray_cluster.nodes import node_resources
from apprentice.recipe.serving import Serving
from apprentice.storage import Folder, user_cache

State = Literal["works", "limited", "broken"]
GB = 1e9
LEAST_DISK = 5 * GB  # free bytes; a run of a 135M model takes about 2 GB, and Ray spills to the disk
LEAST_SHARED_MEMORY = 2 * GB  # bytes of /dev/shm; with less Ray keeps its objects on the disk
LEAST_OPEN_FILES = 4096  # Ray's processes hold thousands
HUB_TIMEOUT_S = 5.0
MAIN_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow")  # whose versions are told
EXTRAS = {"vllm": "vllm", "mlflow": "mlflow-skinny", "wandb": "wandb"}  # extra of apprentice → package


@dataclass(frozen=True)
class Diagnosis:
    """The result of one examination; what is limited or broken says what to do."""

    subject: str
    state: State
    message: str

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as an object of `apprentice doctor --json`."""
        return asdict(self)


def examine(storage: str, connected: Callable[[], AbstractContextManager[None]]) -> Iterator[Diagnosis]:
    """Yields the diagnoses of this machine. Runs would be kept in `storage`; Ray is connected to by `connected()`."""
    yield _versions()
    yield _extras()
    yield _processors()
    yield _compiler()
    yield _open_files()
    yield _shared_memory()
    yield _port(Serving().host, Serving().port)
    yield _cache()
    yield _storage(storage)
    yield _hub()
    yield _ray(connected)


def _versions() -> Diagnosis:
    """Whether the installed packages are those that apprentice was made for."""
    wrong = []
    for text in metadata.requires("apprentice") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed or 'is missing'} ({requirement.specifier} is needed)")
    if wrong:
        remedy = "install apprentice again with the project's constraints.txt"
        return Diagnosis("versions", "broken", f"{', '.join(wrong)}; {remedy}.")
    versions = ", ".join(f"{name} {_version(name)}" for name in ("apprentice", *MAIN_PACKAGES))
    return Diagnosis("versions", "works", f"Python {sys.version.split()[0]}, {versions}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> Diagnosis:
    versions = {extra: _version(package) for extra, package in EXTRAS.items()}
    present = [f"{extra} {version}" for extra, version in versions.items() if version]
    absent = [extra for extra, version in versions.items() if not version]
    texts = [", ".join(present)] if present else []
    if absent:
        texts.append(f"not installed: {', '.join(absent)} (pip install 'apprentice[{absent[0]}]')")
    return Diagnosis("extras", "works", "; ".join(texts))


def _processors() -> Diagnosis:
    cpus = f"{len(os.sched_getaffinity(0))} CPUs, {'with' if multiplies_bfloat16() else 'without'} bfloat16 products"
    if not torch.cuda.is_available():
        drivers = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
        if drivers:
            return Diagnosis(
                "processors",
                "broken",
                f"{cpus}; {len(drivers)} NVIDIA GPUs that PyTorch {torch.__version__} cannot use: install a build of it for CUDA,"
                " and a driver that is new enough for that.",
            )
        return Diagnosis("processors", "works", f"{cpus}, no GPU")
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    return Diagnosis("processors", "works", f"{cpus}; {len(gpus)} GPUs: {names}")


def _compiler() -> Diagnosis:
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        return Diagnosis(
            "compiler",
            "limited",
            "no C++ compiler; DeepSpeed's offloading and torch.compile need one: install gcc and g++ to use them.",
        )
    return Diagnosis("compiler", "works", str(shutil.which(compiler)))


def _open_files() -> Diagnosis:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < LEAST_OPEN_FILES:
        return Diagnosis(
            "open files", "limited", f"a process may open {limit}; Ray can need more: say `ulimit -n {LEAST_OPEN_FILES}` before."
        )
    return Diagnosis("open files", "works", f"a process may open {limit:,}")


def _shared_memory() -> Diagnosis:
    folder = Path("/dev/shm")  # where Ray keeps its objects  # nosec B108
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    if size < LEAST_SHARED_MEMORY:
        return Diagnosis(
            "shared memory",
            "limited",
            f"{size / GB:.1f} GB in {folder}; Ray keeps its objects on the disk then, which is slow: give a container"
            " `--shm-size=4g`, or a pod a volume in memory there.",
        )
    return Diagnosis("shared memory", "works", f"{size / GB:.1f} GB")


def _port(host: str, port: int) -> Diagnosis:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = "serve with another `serving.port`, or end what listens there"
            return Diagnosis("port", "limited", f"{host}:{port} cannot be used ({error.strerror}); {remedy}.")
    return Diagnosis("port", "works", f"{host}:{port} is free for an endpoint")


def _cache() -> Diagnosis:
    return _writable("cache", Folder.at(user_cache()), "set XDG_CACHE_HOME to a folder that you may write to")


def _storage(storage: str) -> Diagnosis:
    try:
        return _writable("storage", Folder.at(storage), "choose another `storage`")
    except ApprenticeError as error:
        return Diagnosis("storage", "broken", str(error))


def _writable(subject: str, folder: Folder, remedy: str) -> Diagnosis:
    """Whether a file can be written into `folder` and read again; of a local one also the free space."""
    probe, mark = folder / f".probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    try:
        existed = folder.exists()
        try:
            probe.write_text(mark)
            is_same = probe.read_text() == mark
        finally:
            probe.delete()
            if not existed and folder.exists() and not folder.children():
                folder.delete()
    except (OSError, ApprenticeError) as error:
        return Diagnosis(subject, "broken", f"{folder} cannot be written to ({' '.join(str(error).split())}); {remedy}.")
    if not is_same:
        return Diagnosis(subject, "broken", f"{folder} does not give back what is written to it; {remedy}.")
    if not folder.is_local:
        return Diagnosis(subject, "works", str(folder))
    place = next(parent for parent in (folder.local, *folder.local.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < LEAST_DISK:
        return Diagnosis(subject, "limited", f"{folder} has {free / GB:.1f} GB of room; make more, or {remedy}.")
    return Diagnosis(subject, "works", f"{folder}, {free / GB:.0f} GB of room")


def _hub() -> Diagnosis:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    instead = "models come from folders then, or the packaged smollm2-135m-instruct"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Diagnosis("hub", "limited", f"switched off by HF_HUB_OFFLINE; {instead}.")
    try:
        httpx.head(address, timeout=HUB_TIMEOUT_S, follow_redirects=True)
    except (httpx.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Diagnosis("hub", "limited", f"{address} does not answer ({reason}); {instead}, or set HF_ENDPOINT to a mirror.")
    return Diagnosis("hub", "works", address)


def _ray(connected: Callable[[], AbstractContextManager[None]]) -> Diagnosis:
    try:
        with connected():
            nodes = node_resources()
    except ApprenticeError as error:
        return Diagnosis("ray", "broken", str(error))
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    where = os.environ.get("RAY_ADDRESS")
    what = f"the cluster at {where}" if where else "a local Ray starts"
    return Diagnosis("ray", "works", f"{what}: {len(nodes)} node{'s' * (len(nodes) != 1)}, {cpus:g} CPUs, {gpus:g} GPUs")
