"""Strict schemas, written by hand, of the custom objects whose CRDs are not at hand.

They hold what the chart writes and no more: another field, or a misspelt one,
is refused. Read off the published types of the Gateway API v1 and of Kueue's
v1beta1 and v1beta2.
"""

from __future__ import annotations

from typing import Any

_NAME = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", "maxLength": 253}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"}


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "additionalProperties": False, "properties": properties}


def _list(items: Any, **bounds: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, **bounds}


def _kind(api_version: str, kind: str, spec: dict[str, Any], *, is_namespaced: bool) -> dict[str, Any]:
    strings = {"type": "object", "additionalProperties": {"type": "string"}}
    metadata = {
        "name": _NAME,
        "labels": strings,
        "annotations": strings,
        **({"namespace": _NAME} if is_namespaced else {}),
    }
    return _object(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api_version},
        kind={"const": kind},
        metadata=_object(("name", "namespace") if is_namespaced else ("name",), **metadata),
        spec=spec,
    )


_HTTP_ROUTE = _object(
    ("parentRefs", "rules"),
    parentRefs=_list(_object(("name",), name=_NAME, namespace=_NAME, sectionName=_NAME, port=_PORT), maxItems=32),
    hostnames={"type": "array", "items": {"type": "string"}, "maxItems": 16},
    rules=_list(
        _object(
            ("matches", "backendRefs"),
            matches=_list(
                _object(
                    ("path",),
                    path=_object(
                        ("type", "value"), type={"const": "PathPrefix"}, value={"type": "string", "pattern": "^/"}
                    ),
                )
            ),
            backendRefs=_list(_object(("name", "port"), name=_NAME, port=_PORT)),
            timeouts=_object((), request={"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}),
        )
    ),
)

_TOLERATION = _object(
    (),
    key={"type": "string"},
    operator={"enum": ["Exists", "Equal"]},
    value={"type": "string"},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
    tolerationSeconds={"type": "integer"},
)

_FLAVOR = _object(
    (),
    nodeLabels={"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 8},
    tolerations={"type": "array", "items": _TOLERATION, "maxItems": 8},
)


def _cluster_queue(cohort: str) -> dict[str, Any]:
    quota = _object(("name", "nominalQuota"), name={"type": "string"}, nominalQuota=_QUANTITY)
    group = _object(
        ("coveredResources", "flavors"),
        coveredResources=_list({"type": "string"}, maxItems=64),
        flavors=_list(_object(("name", "resources"), name=_NAME, resources=_list(quota, maxItems=64)), maxItems=64),
    )
    selector = _object((), matchLabels={"type": "object", "additionalProperties": {"type": "string"}})
    return _object(
        ("resourceGroups", "namespaceSelector"),
        **{cohort: _NAME},
        namespaceSelector=selector,
        resourceGroups=_list(group, maxItems=16),
    )


_LOCAL_QUEUE = _object(("clusterQueue",), clusterQueue=_NAME)


def _kueue(version: str, cohort: str) -> dict[tuple[str, str], dict[str, Any]]:
    api = f"kueue.x-k8s.io/{version}"
    return {
        (api, "ResourceFlavor"): _kind(api, "ResourceFlavor", _FLAVOR, is_namespaced=False),
        (api, "ClusterQueue"): _kind(api, "ClusterQueue", _cluster_queue(cohort), is_namespaced=False),
        (api, "LocalQueue"): _kind(api, "LocalQueue", _LOCAL_QUEUE, is_namespaced=True),
    }


_GATEWAY = "gateway.networking.k8s.io/v1"

SUBSETS: dict[tuple[str, str], dict[str, Any]] = {
    (_GATEWAY, "HTTPRoute"): _kind(_GATEWAY, "HTTPRoute", _HTTP_ROUTE, is_namespaced=True),
    **_kueue("v1beta1", "cohort"),
    **_kueue("v1beta2", "cohortName"),
}
"""By API version and kind."""
