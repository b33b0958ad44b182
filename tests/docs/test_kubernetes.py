"""The manifests of deploy/kubernetes: valid by Kubernetes' own schemas, and what they name exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from h5feed_server.store_address import StoreAddress

from tests.support.documentation import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (FOLDER / "components").iterdir())
VERSIONS = ("1.33", kubernetes_validate.latest_version())

Manifest = dict[str, Any]


def _documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def _built(folder: Path) -> list[Manifest]:
    """What ``kubectl kustomize`` makes of a folder, as far as these files use it."""
    (kustomization,) = _documents(folder / "kustomization.yaml")
    assert kustomization.keys() <= {"apiVersion", "kind", "resources", "labels", "patches"}
    manifests: list[Manifest] = []
    for resource in kustomization["resources"]:
        path = (folder / resource).resolve()
        manifests += _built(path) if path.is_dir() else _documents(path)
    # No file is left over.
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert files == {name for name in kustomization["resources"] if name.endswith(".yaml")}
    for labels in kustomization.get("labels", ()):
        for manifest in manifests:
            manifest["metadata"].setdefault("labels", {}).update(labels["pairs"])
    _patch(manifests, kustomization)
    return manifests


def _patch(manifests: list[Manifest], kustomization: Manifest) -> None:
    for patch in kustomization.get("patches", ()):
        target = _named(manifests, patch["target"]["kind"], patch["target"]["name"])
        for operation in yaml.safe_load(patch["patch"]):
            _change(target, operation)


def _change(target: Manifest, operation: dict[str, Any]) -> None:
    """One operation of a JSON patch (RFC 6902)."""
    *way, last = operation["path"].strip("/").split("/")
    place: Any = target
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    if operation["op"] == "add" and last == "-":
        place.append(operation["value"])
        return
    key = int(last) if isinstance(place, list) else last
    is_there = key < len(place) if isinstance(place, list) else key in place
    if operation["op"] == "add":
        assert not is_there
        place[key] = operation["value"]
    elif operation["op"] == "remove":
        assert is_there
        del place[key]
    else:
        assert operation["op"] == "replace" and is_there
        place[key] = operation["value"]


def _named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (one for one in manifests if one["kind"] == kind and one["metadata"]["name"] == name)
    return found


def _has_volume(manifests: list[Manifest]) -> bool:
    """Whether the data are files, and not objects of a store."""
    return any(one["kind"] == "PersistentVolume" for one in manifests)


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return _built(FOLDER / "overlays" / request.param)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_components_are_valid(manifests: list[Manifest], component: str, version: str) -> None:
    """With each overlay. What they change is there, and what they scale by is a metric of the server."""
    (kustomization,) = _documents(FOLDER / "components" / component / "kustomization.yaml")
    assert kustomization["kind"] == "Component" and kustomization.keys() == {"apiVersion", "kind", "patches"}
    _patch(manifests, kustomization)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)
    metrics = _named(manifests, "HorizontalPodAutoscaler", "h5feed")["spec"]["metrics"]
    observed = (ROOT / "docs" / "how-to" / "observe.md").read_text()
    names = [one["pods"]["metric"]["name"] for one in metrics if one["type"] == "Pods"]
    assert names and all(f"| `{name}` | gauge |" in observed for name in names)


@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_valid(manifests: list[Manifest], version: str) -> None:
    """By the schemas of an older and the newest release, which allow no unknown key."""
    # Those with a volume, too, have the two manifests of it.
    assert len(manifests) == (7 if _has_volume(manifests) else 5)
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_mistakes_are_noticed(manifests: list[Manifest]) -> None:
    """The validation is not blind."""
    deployment = _named(manifests, "Deployment", "h5feed")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_what_they_name_exists(manifests: list[Manifest]) -> None:
    """Selectors meet labels, the autoscaler and the budget point at the Deployment, ports and volumes meet."""
    deployment = _named(manifests, "Deployment", "h5feed")
    template = deployment["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    service, budget = _named(manifests, "Service", "h5feed"), _named(manifests, "PodDisruptionBudget", "h5feed")
    network = _named(manifests, "NetworkPolicy", "h5feed")
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
        network["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in pod["topologySpreadConstraints"]),
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)

    scaled = _named(manifests, "HorizontalPodAutoscaler", "h5feed")["spec"]
    target = scaled["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"]) == (deployment["apiVersion"], deployment["kind"])
    assert target["name"] == deployment["metadata"]["name"] and "replicas" not in deployment["spec"]
    assert 1 <= scaled["minReplicas"] < scaled["maxReplicas"]

    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (exposed,) = service["spec"]["ports"]
    # Clients of a headless Service connect to the port of the container itself.
    assert service["spec"]["clusterIP"] == "None" and exposed["port"] == ports[exposed["targetPort"]] == 8000
    assert {port["port"] for rule in network["spec"]["ingress"] for port in rule["ports"]} <= ports.keys()
    probes = [container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["port"] for probe in probes} <= ports.keys()
    assert [probe["path"] for probe in probes] == ["/healthz", "/readyz", "/healthz"]

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    if not _has_volume(manifests):
        (source,) = container["envFrom"]
        page = (ROOT / "docs" / "how-to" / "replicas.md").read_text()
        assert f"secret generic {source['secretRef']['name']} " in page
        command, url = container["args"]
        assert command == "serve" and StoreAddress.parse(url)
        assert {port["port"] for rule in network["spec"]["egress"] for port in rule["ports"]} == {53, 443}
        (kept,) = (one["value"] for one in container["env"] if one["name"] == "H5FEED_STORE_CACHE_BYTES")
        limit = int(volumes["cache"]["emptyDir"]["sizeLimit"].removesuffix("Gi")) << 30
        # Layouts and splits have room next to it.
        assert int(kept) + (4 << 30) < limit
        return
    assert network["spec"]["egress"] == []
    claim = volumes["data"]["persistentVolumeClaim"]
    (data,) = (mount for mount in container["volumeMounts"] if mount["name"] == "data")
    assert claim["readOnly"] and data["readOnly"]
    claimed = _named(manifests, "PersistentVolumeClaim", claim["claimName"])["spec"]
    volume = _named(manifests, "PersistentVolume", claimed["volumeName"])["spec"]
    assert claimed["accessModes"] == volume["accessModes"] == ["ReadOnlyMany"]
    assert claimed["storageClassName"] == volume["storageClassName"]
    assert claimed["resources"]["requests"]["storage"] == volume["capacity"]["storage"]


def test_the_pod_fits_the_image(manifests: list[Manifest]) -> None:
    """The user, the port and the folders are those of the Dockerfile; the page tells the name of the secret."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    pod = _named(manifests, "Deployment", "h5feed")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert f"--uid {pod['securityContext']['runAsUser']} " in dockerfile and "EXPOSE 8000" in dockerfile
    assert "H5FEED_CACHE_DIR=/cache" in dockerfile and 'CMD ["serve", "/data"]' in dockerfile
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    data = {"/data"} if _has_volume(manifests) else set()
    assert mounted == {"/cache", "/tmp"} | data and container["securityContext"]["readOnlyRootFilesystem"]
    (secret,) = (variable["valueFrom"]["secretKeyRef"] for variable in container["env"] if "valueFrom" in variable)
    page = (ROOT / "docs" / "how-to" / "replicas.md").read_text()
    assert f"secret generic {secret['name']} --from-literal={secret['key']}=" in page
    settings = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert all(f"`{variable['name']}`" in settings for variable in container["env"])
