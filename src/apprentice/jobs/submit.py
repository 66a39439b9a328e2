"""Client for Ray jobs: packs the working folder, submits the pipeline, follows the job and stops it.

A job's id is `<name>-<identity>-<attempt>`, so all jobs of a run share a prefix. A live job of the run is followed; after one
that ended, the next attempt is submitted, which resumes the run. No environment variable of this process is sent.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError

from apprentice import __version__
from apprentice.errors import RecipeError, ResourcesError, RunError
from apprentice.ray_cluster.compat import enable_token_auth
from apprentice.ray_cluster.session import VERSION_VARIABLE
from apprentice.recipe import SHIPPED, Recipe, find_recipe, load_recipe, parse_recipe, shipped_name
from apprentice.run.identity import identity, identity_hash
from apprentice.storage import Folder, is_uri
from apprentice.tasks.registry import find_tasks

# Files and folders, at any depth of the working folder, that no job needs; those that .gitignore names are left out as well.
NOT_PACKED = (
    "runs/",
    "reports/",
    ".git/",
    ".venv*/",
    "**/__pycache__/",
    "**/.*_cache/",
    "**/*.safetensors",
    "**/*.parquet",
    "**/.env*",
    "**/auth_token",
)
LIVE = ("PENDING", "RUNNING")
_REFUSED = re.compile(r"Request failed with status code 40[13]\b")  # the text is all that Ray's client raises for these
POLL_S = 1.0
LOST_S = 300.0  # seconds without a dashboard after which following gives up; the job goes on
STOP_S = 60.0


@dataclass(frozen=True)
class Submission:
    """A job and the folder of its run; `attached` if the job was live already and nothing was submitted."""

    job: str
    run: str
    attached: bool


def check_paths(file: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe with its paths as they are written.

    Raises `RecipeError` for a relative path, which on a cluster would mean another place on each node.
    """
    recipe = parse_recipe(file, overrides)
    paths = [
        ("storage", recipe.storage),
        ("data.root", recipe.data.root),
        ("data.promptsource", recipe.data.promptsource),
        ("serving.adapters", recipe.serving.adapters),
    ]
    models = [
        ("model.base", recipe.model.base),
        *recipe.training.models.items(),
        ("evaluation.judge", recipe.evaluation.judge),
        *(("serving.beside", name) for name in recipe.serving.beside),
    ]
    # A model name that does not begin so is a hub id, a packaged model or a run.
    for key, path in [*paths, *((key, name) for key, name in models if name and name.startswith((".", "~")))]:
        if path is None or is_uri(path) or path.startswith("/"):
            continue
        raise RecipeError(
            f"{key} {path!r} is a path of this machine: on a cluster each node would look for it in a place of its own."
            f" Give an absolute path that every node has mounted, or s3://…: {key}=/shared/…"
        )
    return recipe


def submit(
    name: str,
    overrides: Sequence[str],
    *,
    address: str,
    ca: str | None = None,
    deploy: bool = False,
    install: bool = False,
    folder: Path | None = None,
) -> Submission:
    """Submits the whole pipeline of the recipe `name` as a job, unless a job of the same run is live.

    `folder` (default: the current one) is packed and sent; `ca` is a certificate file, as in `connect`; `install` lets the
    nodes install this version of apprentice. Raises `RecipeError` before anything is sent, `ResourcesError` where no cluster
    answers or it refuses us, and `RunError` where somebody else submits the same run at this moment.
    """
    file, working = find_recipe(name), (folder or Path.cwd()).absolute()
    as_written, recipe = check_paths(file, overrides), load_recipe(file, overrides)
    where = _in_package(file, working, as_written, recipe)
    client = connect(address, ca)
    run = str(Folder.at(recipe.storage) / recipe.name)
    stem = job_prefix(recipe)
    for _ in range(2):  # a second time if somebody else submitted the same attempt first
        earlier = _call_dashboard(address, lambda: [job.submission_id for job in client.list_jobs() if job.submission_id])
        attempts = sorted(int(match[1]) for one in earlier if (match := re.fullmatch(re.escape(stem) + r"-(\d+)", one)))
        last = f"{stem}-{attempts[-1]}" if attempts else None
        if last and _call_dashboard(address, partial(client.get_job_status, last)) in LIVE:
            return Submission(last, run, attached=True)
        job = f"{stem}-{attempts[-1] + 1 if attempts else 1}"
        words = ["python", "-m", "apprentice.jobs", "pipeline", "--recipe", where, *(["--deploy"] if deploy else []), *overrides]
        try:
            _send(client, address, job, words, working, recipe, install=install)
        except RunError:
            continue
        return Submission(job, run, attached=False)
    raise RunError(f"somebody else submits run {recipe.name!r} at the same time; give the command again to follow their job.")


def job_prefix(recipe: Recipe) -> str:
    """The prefix that the ids of all jobs of a run share: `<name>-<hash of identity and storage>`."""
    place = {"storage": recipe.storage, "name": recipe.name}
    return f"{re.sub('[^A-Za-z0-9_.-]', '-', recipe.name)}-{identity_hash(identity(recipe, anywhere=True) | place)}"


def _in_package(file: Path, working: Path, as_written: Recipe, recipe: Recipe) -> str:
    """Path of the recipe inside the package that is sent, or its name if it is shipped with apprentice.

    Raises `RecipeError` if the recipe, a task file or a table of rows beside it would not be sent.
    """
    if file.is_relative_to(SHIPPED):
        return shipped_name(file)
    # A path that loading made absolute lies beside the recipe; one written as absolute is a path on the cluster.
    relative = [
        Path(loaded) for entry, loaded in zip(_task_entries(as_written), _task_entries(recipe), strict=True) if loaded != entry
    ]
    for needed in (file.absolute(), *relative):
        if not needed.resolve().is_relative_to(working.resolve()):
            raise RecipeError(
                f"{needed} is not under {working}, and only that folder is sent to the cluster; give the command in a folder"
                " that holds both."
            )
    tables = [path for file in relative if file.suffix in (".yaml", ".yml") for path in _data_files(file)]
    for needed in (*relative, *tables):
        if _is_excluded(needed, working):
            raise RecipeError(
                f"{needed} is not sent to the cluster (runs, weights and Parquet files stay here); put it where every node finds"
                " it, and name that place, or keep the rows as JSONL or CSV."
            )
    return str(file.resolve().relative_to(working.resolve()))


def _data_files(task_file: Path) -> Iterator[Path]:
    """Paths of the data files that the tasks in a task file, or in the files of a glob, name."""
    for task in find_tasks(str(task_file), task_file.parent):
        for source in task.sources:
            yield from map(Path, (source.files or {}).values())


def _is_excluded(path: Path, working: Path) -> bool:
    """Whether a path under `working` matches a pattern of `NOT_PACKED`."""
    place = path.resolve()
    if not place.is_relative_to(working.resolve()):
        return False
    folders = place.relative_to(working.resolve()).parts[:-1]
    return any(
        fnmatch(place.name, pattern.removeprefix("**/"))
        if not pattern.endswith("/")
        else any(fnmatch(folder, pattern.removeprefix("**/").rstrip("/")) for folder in folders)
        for pattern in NOT_PACKED
    )


def _task_entries(recipe: Recipe) -> list[str]:
    """All strings in `data.tasks`: names, paths, and the paths of collections."""
    entries = ([task] if isinstance(task, str) else task.model_dump().values() for task in recipe.data.tasks)
    return [text for entry in entries for text in entry if isinstance(text, str)]


def connect(address: str, ca: str | None = None) -> Any:
    """A client for jobs, Ray's `JobSubmissionClient`, connected to the cluster's dashboard at `address`.

    `ca` is a file with the certificate that signed the dashboard's. A Ray token found on this machine is sent unless
    RAY_AUTH_MODE says otherwise, because a cluster started by `ray start` beside such a token asks for it.
    """
    from ray.job_submission import JobSubmissionClient

    enable_token_auth()
    return _call_dashboard(address, lambda: JobSubmissionClient(address, verify=ca or True))


def _call_dashboard(address: str, question: Callable[[], Any]) -> Any:
    """The result of a call to the dashboard; failed connections, certificates and tokens become `ResourcesError`."""
    try:
        return question()
    except (ConnectionError, OSError) as error:
        if "CERTIFICATE_VERIFY_FAILED" in f"{error} {error.__context__}":
            raise ResourcesError(
                f"the certificate of {address} is signed by nobody whom this machine knows; name the CA's certificate: --ca FILE."
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise ResourcesError(
            f"no Ray dashboard answers at {address} ({error.__class__.__name__}: {reason}); check the address, a port-forward, and"
            " --ca for a certificate of your own."
        ) from error
    except (RuntimeError, AuthenticationError) as error:
        if isinstance(error, AuthenticationError) or _REFUSED.match(str(error)):
            raise ResourcesError(
                f"the Ray cluster at {address} asks for a token, and has another than lies here; put its own into"
                " ~/.ray/auth_token or RAY_AUTH_TOKEN, and leave RAY_AUTH_MODE out, or say RAY_AUTH_MODE=token."
            ) from error
        raise


def entrypoint(words: Sequence[str]) -> str:
    """The command line of a job, for the shell that Ray starts it in.

    It begins with `exec`, so that the shell becomes the driver. Ray stops a job by signalling the shell and the child
    processes that exist at that moment; a driver that the shell is just starting would not be among them and would go on
    without end.
    """
    return f"exec {shlex.join(words)}"


def _send(client: Any, address: str, job: str, words: list[str], working: Path, recipe: Recipe, *, install: bool) -> None:
    environment: dict[str, Any] = {
        "working_dir": str(working),
        "excludes": list(NOT_PACKED),
        "env_vars": {VERSION_VARIABLE: __version__},
    }
    if install:
        environment["pip"] = [f"apprentice=={__version__}"]

    def send() -> None:
        client.submit_job(
            entrypoint=entrypoint(words),
            submission_id=job,
            runtime_env=environment,
            metadata={"run": recipe.name, "apprentice": __version__},
            entrypoint_num_cpus=1,
        )

    try:
        _call_dashboard(address, send)
    except RuntimeError as error:
        if "already exists" in str(error):
            raise RunError(job) from error
        raise ResourcesError(f"{address} does not take the job: {' '.join(str(error).split())[-300:]}") from error


def follow(submission: Submission, *, address: str, ca: str | None = None, say: Callable[[str], None]) -> None:
    """Passes the job's output to `say`, line by line, until the job ends.

    A dashboard that does not answer is waited for, up to `LOST_S` seconds; then `ResourcesError` is raised. Raises `RunError`
    with the job's last error line if it failed or was stopped. Ctrl-C ends the following and not the job.
    """
    client = connect(address, ca)
    log = _Log(say)
    lost_since: float | None = None
    while True:
        try:
            asyncio.run(log.tail(client, submission.job))
            status = client.get_job_status(submission.job)
            lost_since = None
        except (ConnectionError, OSError, RuntimeError) as error:
            lost_since = lost_since or time.monotonic()
            if time.monotonic() - lost_since > LOST_S:
                raise ResourcesError(
                    f"the dashboard at {address} has been away for {LOST_S / 60:.0f} minutes; the job may still run: give the same"
                    " command again to follow it."
                ) from error
            status = "RUNNING"
        if status not in LIVE:
            break
        time.sleep(POLL_S)
    if status != "SUCCEEDED":
        raise RunError(f"job {submission.job} {_describe_end(client, submission.job, str(status.value))}")


class _Log:
    """A job's growing log; each line is passed to `say` once, however often the connection breaks."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said = 0  # characters of the log already passed on
        self._open = ""  # the last line, until its newline arrives

    async def tail(self, client: Any, job: str) -> None:
        """Passes on what is new until the job ends. Raises what the client raises.

        Each connection begins with the whole log, of which the characters already passed on are skipped.
        """
        seen = 0
        async for text in client.tail_job_logs(job):
            new = text[max(0, self._said - seen) :]
            seen += len(text)
            self._said = max(self._said, seen)
            *whole, self._open = (self._open + new).split("\n")
            for line in whole:
                self._say(line)
        if self._open:
            self._say(self._open)
            self._open = ""


def _describe_end(client: Any, job: str, status: str) -> str:
    errors = [line for line in client.get_job_logs(job).splitlines() if line.startswith("error: ")]
    if status == "STOPPED":
        return "was stopped; give the same command again and the run goes on."
    return f"failed: {errors[-1].removeprefix('error: ')}" if errors else "failed; its log says more: ray job logs " + job


def stop(job: str, *, address: str, ca: str | None = None) -> None:
    """Asks Ray to stop the job until Ray reports that it has ended. Checkpoints of its run stay.

    Raises `RunError` after `STOP_S` seconds.
    """
    client = connect(address, ca)
    deadline = time.monotonic() + STOP_S
    while _call_dashboard(address, partial(client.get_job_status, job)) in LIVE:
        if time.monotonic() > deadline:
            raise RunError(f"job {job} still runs {STOP_S:.0f} s after it was told to stop; try: ray job stop {job}")
        _call_dashboard(address, partial(client.stop_job, job))
        time.sleep(POLL_S)
