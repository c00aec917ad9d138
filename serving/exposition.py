"""One page of metrics for many replicas.

The proxy gives a scrape to one replica, so a page of that replica alone would
show another part of the deployment each time. The replica that is asked asks
all of them and labels each one's series with ``replica``. Whoever asks a node
by its address gets the replicas of that node, so that scraping every node
shows every replica once; asked by any other name, it is the whole deployment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serving.metric_table import REPLICA_LABEL

_LOOPBACK = "127."


@dataclass(frozen=True)
class ReplicaPage:
    """What one replica exports.

    Attributes:
        replica: Its name.
        node_ip: Address of the node it runs on.
        text: Its text exposition.
    """

    replica: str
    node_ip: str
    text: str


def pages_for(host: str, pages: Sequence[ReplicaPage], nodes: Collection[str]) -> dict[str, str]:
    """The pages that a scrape is to see, by replica.

    Args:
        host: Whom the scrape asked, from its ``Host`` header.
        pages: Of all replicas.
        nodes: Addresses of all nodes.
    """
    is_node = host in nodes and not host.startswith(_LOOPBACK)
    return {page.replica: page.text for page in pages if not is_node or page.node_ip == host}


class _Pages(Collector):
    """Families of several pages, their samples side by side."""

    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        """Merged families, in the order in which they first occur."""
        merged: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                if family.name.endswith("_created"):
                    # When a counter began: two lines more for each series, and nobody asks.
                    continue
                into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    into.add_sample(sample.name, {**sample.labels, REPLICA_LABEL: replica}, sample.value)
        yield from merged.values()


def merge_pages(pages: Mapping[str, str]) -> bytes:
    """One text exposition of several replicas' ones.

    Args:
        pages: Text exposition by replica.
    """
    registry = CollectorRegistry()
    registry.register(_Pages(pages))
    return generate_latest(registry)
