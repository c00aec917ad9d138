"""The Kubernetes API as steps use it: a handful of calls that outlast an API server's bad minutes.

The official client is imported inside functions: a compiled pipeline and a
local run need none of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from components.cluster.manifest import PodFacts
from draftline.errors import AccessDenied, DraftlineError, PlatformError

POD_NAME_ENV = "DRAFTLINE_POD"
"""Names the step's pod; set by the pipeline from the pod's own fields."""

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
NAMESPACE_ENV = "DRAFTLINE_NAMESPACE"
"""Names its namespace, likewise."""

STEP_CONTAINER = "main"
"""Name that Argo Workflows gives to a step's own container."""

_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_TIMEOUT = (5.0, 30.0)
_STREAM_TIMEOUT = (5.0, 60.0)
_WATCH_S = 45
_MAX_WAIT_S = 15.0

Outcome = TypeVar("Outcome")


class Cluster:
    """One namespace of a cluster.

    Args:
        namespace: Where everything happens.
        unreachable_s: For how long transient errors are tried again.
        configuration: Of the client; ``None`` takes the pod's own, or ``KUBECONFIG``.
    """

    def __init__(self, namespace: str, unreachable_s: float, configuration: Any = None) -> None:
        from kubernetes import client

        configuration = configuration or load_configuration()
        # Tenacity tries again, with waits; urllib3 would do so at once, three times, under it.
        configuration.retries = False
        self.namespace = namespace
        self._unreachable_s = unreachable_s
        api = client.ApiClient(configuration)
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)

    def get(self, group: str, plural: str, name: str) -> dict[str, Any] | None:
        """A custom object (version ``v1``), ``None`` when there is none.

        Raises:
            AccessDenied: the account may not.
            PlatformError: the API does not answer, or refuses.
        """
        try:
            found: dict[str, Any] = self._call(
                f"read {plural}/{name}",
                lambda: self._custom.get_namespaced_custom_object(
                    group, "v1", self.namespace, plural, name, _request_timeout=_TIMEOUT
                ),
            )
        except NotThere:
            return None
        return found

    def create(self, group: str, plural: str, body: Mapping[str, Any]) -> bool:
        """Create a custom object; whether this call did. Errors as :meth:`get`.

        An answer that got lost is asked for again, so the object may be there though this says it was before.
        """
        try:
            self._call(
                f"create {plural}/{body['metadata']['name']}",
                lambda: self._custom.create_namespaced_custom_object(
                    group, "v1", self.namespace, plural, body, _request_timeout=_TIMEOUT
                ),
            )
        except _Conflict:
            return False
        return True

    def delete(self, group: str, plural: str, name: str, within_s: float | None = None) -> None:
        """Delete a custom object and what it owns; absent is fine. Errors as :meth:`get`."""
        try:
            self._call(
                f"delete {plural}/{name}",
                lambda: self._custom.delete_namespaced_custom_object(
                    group, "v1", self.namespace, plural, name,
                    propagation_policy="Background", _request_timeout=_TIMEOUT,
                ),
                within_s,
            )  # fmt: skip
        except NotThere:
            return

    def changes(self, group: str, plural: str, name: str) -> Iterator[dict[str, Any] | None]:
        """A custom object as it is now and after each change; ``None`` once it is gone. Errors as :meth:`get`.

        Without changes the object comes again every minute.
        """
        from kubernetes import watch
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        while True:
            # Asked for anew each time: it tells a watch that broke from an object that went.
            found = self.get(group, plural, name)
            yield found
            if found is None:
                return
            try:
                for event in watch.Watch().stream(
                    self._custom.list_namespaced_custom_object, group, "v1", self.namespace, plural,
                    field_selector=f"metadata.name={name}", timeout_seconds=_WATCH_S, _request_timeout=_STREAM_TIMEOUT,
                ):  # fmt: skip
                    if event["type"] == "DELETED":
                        break
                    yield event["object"]
            except ApiException as error:
                if error.status in (401, 403):
                    # Reading it anew would end in the same refusal, at once and for ever.
                    raise _translated(f"watch {plural}/{name}", self.namespace, error) from None
                # An old resource version: reading it anew mends it.
            except (HTTPError, ValueError):
                # A dropped connection, half a line: reading it anew mends each.
                continue

    def pods(self, selector: str) -> list[Any]:
        """Pods by label, oldest first. Errors as :meth:`get`."""
        found = self._call(
            "list pods",
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=selector, _request_timeout=_TIMEOUT),
        )
        return sorted(found.items, key=lambda pod: str(pod.metadata.creation_timestamp))

    def log(self, pod: str) -> Iterator[str]:
        """Lines of a pod's log with their timestamps, as they come, until it ends.

        Raises:
            ApiException, HTTPError: of the client; a log that broke is no reason to fail.
        """
        response = self._core.read_namespaced_pod_log(
            pod, self.namespace, follow=True, timestamps=True, _preload_content=False, _request_timeout=_STREAM_TIMEOUT
        )
        rest = b""
        try:
            for chunk in response.stream(4096, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
        finally:
            response.release_conn()
        if rest:
            yield rest.decode("utf-8", "replace")

    def own_pod(self, environ: Mapping[str, str]) -> PodFacts:
        """What jobs take over from the pod of this process. Errors as :meth:`get`."""
        name = environ.get(POD_NAME_ENV, "")
        if not name:
            raise PlatformError(
                f"{POD_NAME_ENV} is not set, so the step does not know its own pod",
                remedy="Run it in Kubeflow Pipelines, or without ray_job on this machine",
            )
        pod = self._call(
            f"read pod {name}", lambda: self._core.read_namespaced_pod(name, self.namespace, _request_timeout=_TIMEOUT)
        )
        return pod_facts(self._core.api_client.sanitize_for_serialization(pod))

    def _call(self, doing: str, call: Callable[[], Outcome], within_s: float | None = None) -> Outcome:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        def is_transient(error: BaseException) -> bool:
            return error.status in _TRANSIENT if isinstance(error, ApiException) else isinstance(error, HTTPError)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=_MAX_WAIT_S),
            stop=tenacity.stop_after_delay(self._unreachable_s if within_s is None else within_s),
            reraise=True,
        )
        try:
            return retrying(call)
        except ApiException as error:
            raise _translated(doing, self.namespace, error) from None
        except HTTPError as error:
            raise PlatformError(
                f"cannot {doing}: the Kubernetes API does not answer",
                got=str(error).splitlines()[0],
                remedy="Start the same run again when it does; the work continues where it stopped",
            ) from None


class NotThere(PlatformError):
    """The API knows no such object."""


class _Conflict(PlatformError):
    """The name is taken."""


def pod_facts(pod: Mapping[str, Any]) -> PodFacts:
    """What jobs take over from a pod (as JSON): references in its environment, never values."""
    containers = pod["spec"]["containers"]
    own = next((one for one in containers if one["name"] == STEP_CONTAINER), containers[0])
    references = [
        {"name": entry["name"], "valueFrom": entry["valueFrom"]}
        for entry in own.get("env", [])
        if {"secretKeyRef", "configMapKeyRef"} & set(entry.get("valueFrom") or {})
    ]
    return PodFacts(
        image=own["image"],
        pull_policy=own.get("imagePullPolicy", "IfNotPresent"),
        pull_secrets=tuple(secret["name"] for secret in pod["spec"].get("imagePullSecrets") or ()),
        env_from=tuple(references),
    )


def current_namespace(environ: Mapping[str, str] = os.environ) -> str:
    """The namespace of this pod.

    Raises:
        PlatformError: this is no pod.
    """
    if environ.get(NAMESPACE_ENV):
        return environ[NAMESPACE_ENV]
    try:
        return NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PlatformError(
            "the step does not know its namespace",
            got=f"{NAMESPACE_FILE}: {error.strerror}",
            remedy="Give its account a token (automountServiceAccountToken), or run without ray_job",
        ) from None


def load_configuration() -> Any:
    """The client's configuration: the pod's own, elsewhere that of ``KUBECONFIG``.

    Raises:
        PlatformError: there is neither.
    """
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(configuration)
        else:
            config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration)
    except (config.ConfigException, OSError) as error:
        raise PlatformError(
            "there is no way to the Kubernetes API",
            got=str(error).splitlines()[0],
            remedy="Run this in a pod with a service account's token, or set KUBECONFIG",
        ) from None
    return configuration


def _translated(doing: str, namespace: str, error: Any) -> DraftlineError:
    detail = f"{error.status} {_message(error)}"
    if error.status in (401, 403):
        return AccessDenied(
            f"may not {doing} in namespace {namespace}",
            got=detail,
            remedy="Install the chart with pipeline.enabled=true, and name the steps' account in pipeline.subjects",
        )
    if error.status == 404:
        return NotThere(
            f"cannot {doing} in namespace {namespace}",
            got=detail,
            remedy="Check the name and that KubeRay is there",
        )
    kind = _Conflict if error.status == 409 else PlatformError
    return kind(f"cannot {doing} in namespace {namespace}", got=detail)


def _message(error: Any) -> str:
    import json

    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
