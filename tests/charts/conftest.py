"""Fixtures of the chart's tests: the real helm, and a release with everything switched on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.charts.helm import Helm, Release, install_helm

EVERYTHING: dict[str, Any] = {
    "global": {
        "imagePullSecrets": [{"name": "registry"}],
        "labels": {"team": "inference"},
        "annotations": {"contact": "inference@example.com"},
    },
    "minio": {"enabled": True},
    "mlflow": {
        "replicas": 2,
        "database": {"type": "bundled"},
        "client": {"existingSecret": "mlflow-login"},
        "ingress": {"enabled": True, "host": "mlflow.example.com", "tlsSecret": "mlflow-tls", "className": "nginx"},
        "podLabels": {"a": "b"},
        "podAnnotations": {"a": "b"},
        "env": [{"name": "LOG_LEVEL", "value": "info"}],
        "corsAllowedOrigins": ["https://mlflow.example.com"],
    },
    "serving": {
        "objectStorage": True,
        "draft": {"uri": "models:/support-desk@champion"},
        "spec": {"policy": "threshold", "min_replicas": 4, "max_replicas": 6},
        "replica": {"cpus": 8, "gpus": 2},
        "worker": {
            "replicasPerPod": 2,
            "nodeSelector": {"gpu": "h100"},
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "serving-worker"}},
                }
            ],
        },
        "apiKeys": {"existingSecret": "clients"},
        "hfToken": {"existingSecret": "hub"},
        "models": {"existingClaim": "models"},
        "cache": {"type": "ephemeral", "storageClass": "fast"},
        "podLabels": {"a": "b"},
        "podAnnotations": {"a": "b"},
        "annotations": {"a": "b"},
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "ingress": {"enabled": True, "host": "llm.example.com", "tlsSecret": "llm-tls", "annotations": {"a": "b"}},
        "gateway": {
            "enabled": True,
            "parentRefs": [{"name": "edge", "namespace": "gateways"}],
            "hostnames": ["llm.example.com"],
        },
    },
    "pipeline": {"subjects": [{"name": "default-editor"}, {"name": "pipeline-runner", "namespace": "kubeflow"}]},
    "kueue": {"enabled": True, "createQueues": True, "cohort": "all", "flavor": {"nodeLabels": {"gpu": "h100"}}},
    "priorityClasses": {"create": True},
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True, "annotations": {"grafana_folder": "LLM"}},
    },
}
"""Values that switch on every template."""

EXTERNAL_SECRETS = {"mlflow-login", "clients", "hub", "registry", "mlflow-tls", "llm-tls"}
EXTERNAL_CLAIMS = {"models"}


@pytest.fixture(scope="session")
def helm(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The real helm; renderings are kept for the session."""
    return Helm(install_helm(pytestconfig.cache.mkdir("helm")), tmp_path_factory.mktemp("helm-home"))  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def everything(helm: Helm) -> Release:
    """A release with every template switched on."""
    return helm.template(EVERYTHING)
