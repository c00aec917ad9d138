"""Every pod that a release makes, whatever makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.charts.helm import Document, Release


@dataclass(frozen=True)
class PodOf:
    """A pod template and the object it comes from.

    Attributes:
        owner: Kind and name, for messages.
        template: With ``metadata`` and ``spec``.
        is_service: Whether it runs for ever, and so needs probes.
    """

    owner: str
    template: Document
    is_service: bool

    @property
    def spec(self) -> Document:
        """Of the pod."""
        spec: Document = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """Of the pod."""
        labels: dict[str, str] = self.template["metadata"].get("labels", {})
        return labels

    @property
    def containers(self) -> list[Document]:
        """Init containers too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(release: Release) -> list[PodOf]:
    """All pod templates of a release."""
    return list(_pods(release))


def _pods(release: Release) -> Iterator[PodOf]:
    for document in release.documents:
        owner = f"{document['kind']} {document['metadata']['name']}"
        match document["kind"]:
            case "Deployment" | "StatefulSet":
                yield PodOf(owner, document["spec"]["template"], is_service=True)
            case "Job":
                yield PodOf(owner, document["spec"]["template"], is_service=False)
            case "Pod":
                yield PodOf(owner, document, is_service=False)
            case "RayService":
                cluster = document["spec"]["rayClusterConfig"]
                yield PodOf(f"{owner} head", cluster["headGroupSpec"]["template"], is_service=True)
                for group in cluster["workerGroupSpecs"]:
                    yield PodOf(f"{owner} {group['groupName']}", group["template"], is_service=True)


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a Kubernetes label selector takes a pod."""
    for expression in selector.get("matchExpressions", []):
        value = labels.get(expression["key"])
        is_met = {
            "In": value in expression.get("values", []),
            "Exists": value is not None,
            "NotIn": value not in expression.get("values", []),
            "DoesNotExist": value is None,
        }[expression["operator"]]
        if not is_met:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def references(node: Any) -> Iterator[tuple[str, str]]:
    """Secrets, config maps and claims that a pod's spec names: pairs of kind and name."""
    if isinstance(node, list):
        for item in node:
            yield from references(item)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ("secretKeyRef", "secretRef"):
            yield "Secret", value["name"]
        elif key in ("configMapKeyRef", "configMapRef"):
            yield "ConfigMap", value["name"]
        elif key == "secret" and isinstance(value, dict):
            yield "Secret", value["secretName"]
        elif key == "configMap" and isinstance(value, dict):
            yield "ConfigMap", value["name"]
        elif key == "persistentVolumeClaim":
            yield "PersistentVolumeClaim", value["claimName"]
        elif key == "imagePullSecrets":
            for secret in value:
                yield "Secret", secret["name"]
        else:
            yield from references(value)
