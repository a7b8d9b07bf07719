"""The metrics, in the text format of Prometheus; only this module imports prometheus_client.

Names and units follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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
        """Return the content type, and all metrics."""
        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with a known value."""
        image = os.environ.get("MIGRATOR_IMAGE_VERSION", "")
        now = self._board.now
        yield InfoMetricFamily(
            "migrator", "What runs.", value={"version": __version__, "image_version": image}
        )
        yield _gauge(
            "ready",
            "Whether a backend with this image's revisions may work: 1 or 0.",
            self._board.readiness().ready,
        )
        yield from _run(now)
        yield from _check(now)
        yield from _verification(now)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"migrator_{name}", text, value=float(value))


def _labelled(name: str, text: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"migrator_{name}", text, labels=labels)


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
    stages = _labelled("last_run_stage_duration_seconds", "How long each stage took.", ("stage",))
    seconds: dict[str, float] = {}
    for stage in report["stages"]:  # a stage may run twice
        seconds[stage["stage"]] = seconds.get(stage["stage"], 0.0) + stage["seconds"]
    for name, value in seconds.items():
        stages.add_metric((name,), value)
    yield stages
    if report["backup"]:
        yield _gauge(
            "last_run_backup_size_bytes",
            "The size of the backup that the run made or reused.",
            report["backup"]["size"],
        )


def _check(now: Snapshot) -> Iterator[Metric]:
    yield CounterMetricFamily("migrator_checks", "Checks of the version rows.", value=now.checks)
    yield CounterMetricFamily("migrator_check_failures", "Checks without a result.", value=now.check_failures)
    check = now.check
    if check is None:
        return
    yield _gauge("database_up", "Whether the database answered the last check: 1 or 0.", check.reached)
    yield _gauge(
        "database_at_heads",
        "Whether the last check found the database at this image's heads, or compatible: 1 or 0.",
        check.ready,
    )
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
    report = verification.report
    yield _gauge(
        "verify_success", "Whether the last verification found no error: 1 or 0.", report["code"] == 0
    )
    yield _gauge("last_verify_timestamp_seconds", "When the last verification ended.", verification.at)
    findings = _labelled(
        "verify_findings", "The number of findings of the last verification.", ("rule", "severity")
    )
    counts: dict[tuple[str, str], int] = {}
    for item in report["findings"]:
        key = (str(item["rule"]), str(item["severity"]))
        counts[key] = counts.get(key, 0) + 1
    for key, count in counts.items():
        findings.add_metric(key, count)
    yield findings
