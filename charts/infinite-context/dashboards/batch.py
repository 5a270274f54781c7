"""Dashboard: batch Jobs, what they do and what they leave."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import add, dashboard, graph, number, rows_of, variable

JOBS = 'namespace="$namespace", job_name=~"$batch"'
TARGET = 'namespace="$namespace", job=~".+-batch"'


def build() -> Dashboard:
    """Jobs by kube-state-metrics, their engines by vLLM's own metrics, their volumes by the kubelet."""
    board = dashboard("ic-batch", "InfiniteContext / Batch", "Batch jobs, their progress and their volumes.")
    variables = [
        variable("namespace", "Namespace", "label_values(kube_job_info, namespace)"),
        variable(
            "batch", "Job", 'label_values(kube_job_info{namespace="$namespace"}, job_name)', several=True
        ),
    ]
    return add(board, variables=variables, panels=[*_now(), *_over_time()])


def _now() -> list[Any]:
    """Numbers of this moment."""
    return [
        number("Running", "Jobs.", "short", f"sum(kube_job_status_active{{{JOBS}}})"),
        number(
            "Failed",
            "Jobs out of attempts.",
            "short",
            f'sum(kube_job_failed{{{JOBS}, condition="true"}})',
            alarm=1,
        ),
        number("Complete", "Jobs.", "short", f'sum(kube_job_complete{{{JOBS}, condition="true"}})'),
        number(
            "Running requests",
            "In engines of batches.",
            "short",
            f"sum(vllm:num_requests_running{{{TARGET}}})",
        ),
        number(
            "Waiting requests",
            "In engines of batches.",
            "short",
            f"sum(vllm:num_requests_waiting{{{TARGET}}})",
        ),
        number(
            "Age of the oldest",
            "Running job.",
            "s",
            f"time() - min(kube_job_status_start_time{{{JOBS}}} and kube_job_status_active{{{JOBS}}} > 0)",
        ),
    ]


def _over_time() -> list[Any]:
    """What the engines did, what became of the pods, what the volumes hold."""
    return [
        graph(
            "Tokens per second",
            "Read and written. Needs monitoring.scrape.batch.",
            "short",
            (
                f"sum by (job) (rate(vllm:prompt_tokens_total{{{TARGET}}}[$__rate_interval]))",
                "{{job}} prompt",
            ),
            (
                f"sum by (job) (rate(vllm:generation_tokens_total{{{TARGET}}}[$__rate_interval]))",
                "{{job}} generation",
            ),
        ),
        graph(
            "Requests finished per minute",
            "By reason.",
            "short",
            (
                f"60 * sum by (finished_reason) (rate(vllm:request_success_total{{{TARGET}}}[$__rate_interval]))",
                "{{finished_reason}}",
            ),
        ),
        graph(
            "Pods",
            "Of the jobs, by what became of them.",
            "short",
            (f"sum(kube_job_status_active{{{JOBS}}})", "active"),
            (f"sum(kube_job_status_succeeded{{{JOBS}}})", "succeeded"),
            (f"sum(kube_job_status_failed{{{JOBS}}})", "failed"),
        ),
        graph(
            "Volumes",
            "Share still free, by claim.",
            "percentunit",
            (
                (
                    'kubelet_volume_stats_available_bytes{namespace="$namespace"}'
                    ' / kubelet_volume_stats_capacity_bytes{namespace="$namespace"}'
                ),
                "{{persistentvolumeclaim}}",
            ),
            max=1,
        ),
        rows_of(
            "Schedules",
            "Seconds since a CronJob last succeeded.",
            ('time() - kube_cronjob_status_last_successful_time{namespace="$namespace"}', "A"),
        ),
    ]
