"""Fixtures: one cluster for the session; for each test a namespace, a database and its Secret."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from cluster.cluster import Cluster
from cluster.cluster import cluster as running_cluster
from cluster.services import end_on_sigterm
from cluster.shop import Shop


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster."""
    end_on_sigterm()
    with running_cluster() as it:
        yield it


@pytest.fixture
def shop(cluster: Cluster) -> Iterator[Shop]:
    """A namespace that enforces restricted Pod Security, and an empty database."""
    shop = Shop(cluster, f"shop-{uuid.uuid4().hex[:6]}")
    shop.create()
    yield shop
    shop.delete()
