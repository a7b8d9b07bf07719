"""The metrics, in the text format of Prometheus; only this module imports prometheus_client.

Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from migrator import __version__
from migrator.outcome import ExitCode
from migrator.sidecar.board import Board, Snapshot

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


class Metrics(Collector):
    """Makes the metrics from the board at the moment of the scrape."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> tuple[str, bytes]:
        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with a known value."""
        image = os.environ.get("MIGRATOR_IMAGE_VERSION", "")
        now = self._board.now
        yield InfoMetricFamily(
            "migrator", "What runs.", value={"version": __version__, "image_version": image}
        )
        text = "Whether a backend with this image's revisions may work: 1 or 0."
        yield _gauge("ready", text, self._board.readiness().ready)
        yield from _run(now)
        yield from _check(now)
        yield from _verification(now)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"migrator_{name}", text, value=float(value))


def _labelled(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"migrator_{name}", text, labels=labels)
    for labelled, value in values.items():
        family.add_metric(labelled, value)
    return family


def _run(now: Snapshot) -> Iterator[Metric]:
    report = now.report
    if report is None:
        return
    code = report["code"]
    yield _gauge("last_run_success", "Whether the run ended well: 1 or 0.", code == ExitCode.OK)
    yield _gauge("last_run_exit_code", "The run's exit code.", code)
    yield _gauge("last_run_timestamp_seconds", "When the run ended, since 1970.", now.ended_at)
    yield _gauge("last_run_duration_seconds", "How long the run took.", report["seconds"])
    yield _gauge("last_run_revisions", "How many revisions the run applied.", len(report["revisions"]))
    seconds: Counter[tuple[str, ...]] = Counter()
    for stage in report["stages"]:  # a stage may run twice
        seconds[(stage["stage"],)] += stage["seconds"]
    yield _labelled("last_run_stage_duration_seconds", "How long each stage took.", ("stage",), seconds)
    if report["backup"]:
        size, text = report["backup"]["size"], "The size of the backup that the run made or reused."
        yield _gauge("last_run_backup_size_bytes", text, size)


def _check(now: Snapshot) -> Iterator[Metric]:
    yield CounterMetricFamily("migrator_checks", "Checks of the version rows.", value=now.checks)
    yield CounterMetricFamily("migrator_check_failures", "Checks without a result.", value=now.check_failures)
    check = now.check
    if check is None:
        return
    yield _gauge("database_up", "Whether the database answered the last check: 1 or 0.", check.reached)
    text = "Whether the last check found the database at this image's heads, or compatible: 1 or 0."
    yield _gauge("database_at_heads", text, check.ready)
    if check.pending is not None:
        yield _gauge("pending_revisions", "How many of this image's revisions are pending.", check.pending)
    yield _gauge("last_check_timestamp_seconds", "When the last check ended, since 1970.", check.at)
    yield _gauge("last_check_duration_seconds", "How long the last check took.", check.seconds)


def _verification(now: Snapshot) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "migrator_verify_failures", "Verifications without a result.", value=now.verify_failures
    )
    verification = now.verification
    if verification is None:
        return
    report, text = verification.report, "Whether the last verification found no error: 1 or 0."
    yield _gauge("verify_success", text, report["code"] == 0)
    yield _gauge("last_verify_timestamp_seconds", "When the last verification ended.", verification.at)
    counts: Counter[tuple[str, ...]] = Counter(
        (str(item["rule"]), str(item["severity"])) for item in report["findings"]
    )
    labels = ("rule", "severity")
    yield _labelled("verify_findings", "The number of findings of the last verification.", labels, counts)
