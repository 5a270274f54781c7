"""Dashboard: is the service well, and how fast is it."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from panels import MODEL, TARGET, add, dashboard, graph, number, quantiles, release_variables

TTFT = "vllm:time_to_first_token_seconds"


def build() -> Dashboard:
    """Health, latency, throughput, queue and errors of a release."""
    board = dashboard(
        "ic-serving", "InfiniteContext / Serving", "Health, latency and throughput of a release."
    )
    return add(
        board,
        variables=release_variables("vllm:num_requests_running"),
        panels=[*_now(), Row("Latency"), *_latency(), Row("Load"), *_load(), Row("Errors"), *_errors()],
    )


def _now() -> list[Any]:
    return [
        number("Replicas up", "Pods whose metrics Prometheus gets.", "short", f"sum(up{{{TARGET}}})"),
        number("Running", "Requests in the engines.", "short", f"sum(vllm:num_requests_running{{{MODEL}}})"),
        number(
            "Waiting", "Requests in queues.", "short", f"sum(vllm:num_requests_waiting{{{MODEL}}})", alarm=10
        ),
        number(
            "KV cache",
            "Fullest replica.",
            "percentunit",
            f"max(vllm:kv_cache_usage_perc{{{MODEL}}})",
            alarm=0.95,
        ),
        number(
            "TTFT p95",
            "Time to first token, last 5 minutes; no value without traffic.",
            "s",
            f"histogram_quantile(0.95, sum by (le) (rate({TTFT}_bucket{{{MODEL}}}[5m])))",
        ),
        number(
            "5xx", "Share of requests.", "percentunit", f"max(ic:http_errors:ratio{{{TARGET}}})", alarm=0.05
        ),
    ]


def _latency() -> list[Any]:
    return [
        graph(
            "Time to first token",
            "Queue and prefill. Grows with the context.",
            "s",
            *quantiles(TTFT, MODEL),
        ),
        graph(
            "Time between tokens",
            "What a reader of a stream feels.",
            "s",
            *quantiles("vllm:inter_token_latency_seconds", MODEL),
        ),
        graph(
            "Whole request",
            "From arrival to the last token.",
            "s",
            *quantiles("vllm:e2e_request_latency_seconds", MODEL),
        ),
        graph(
            "Where the time goes",
            "Mean seconds of a request by phase.",
            "s",
            *[
                (
                    (
                        f"sum(rate(vllm:request_{phase}_time_seconds_sum{{{MODEL}}}[$__rate_interval]))"
                        f" / (sum(rate(vllm:request_{phase}_time_seconds_count{{{MODEL}}}[$__rate_interval])) > 0)"
                    ),
                    phase,
                )
                for phase in ("queue", "prefill", "decode")
            ],
        ),
        graph(
            "Slow first tokens",
            "Share of requests beyond the objective's bound, by window. Burn-rate alerts read these.",
            "percentunit",
            *[
                (f"ic:ttft_slow:ratio_rate{window}{{{MODEL}}}", window)
                for window in ("5m", "30m", "1h", "6h")
            ],
            max=1,
        ),
        graph(
            "Slow tokens",
            "Share of tokens beyond the objective's bound, by window.",
            "percentunit",
            *[
                (f"ic:inter_token_slow:ratio_rate{window}{{{MODEL}}}", window)
                for window in ("5m", "30m", "1h", "6h")
            ],
            max=1,
        ),
    ]


def _load() -> list[Any]:
    return [
        graph(
            "Requests",
            "In the engines and in queues.",
            "short",
            (f"ic:requests_running:sum{{{MODEL}}}", "running"),
            (f"ic:requests_waiting:sum{{{MODEL}}}", "waiting"),
            (f"sum by (reason) (vllm:num_requests_waiting_by_reason{{{MODEL}}})", "waiting: {{reason}}"),
        ),
        graph(
            "Tokens per second",
            "Read and written.",
            "short",
            (f"ic:prompt_tokens:rate{{{MODEL}}}", "prompt"),
            (f"ic:generation_tokens:rate{{{MODEL}}}", "generation"),
        ),
        graph(
            "KV cache in use",
            "By pod. Full: requests wait, or are preempted and computed again.",
            "percentunit",
            (f"vllm:kv_cache_usage_perc{{{MODEL}}}", "{{pod}} engine {{engine}}"),
            max=1,
        ),
        graph(
            "Preemptions per minute",
            "By pod.",
            "short",
            (f"60 * rate(vllm:num_preemptions_total{{{MODEL}}}[$__rate_interval])", "{{pod}}"),
        ),
        graph(
            "Replicas",
            "What the autoscaler wants, what there is, and where it ends.",
            "short",
            ('kube_deployment_spec_replicas{namespace="$namespace", deployment="$job"}', "wanted"),
            (
                'kube_deployment_status_replicas_available{namespace="$namespace", deployment="$job"}',
                "available",
            ),
            (
                'kube_horizontalpodautoscaler_spec_max_replicas{namespace="$namespace"}',
                "most: {{horizontalpodautoscaler}}",
            ),
        ),
        graph(
            "Tokens per step",
            "Mean size of the engine's batches.",
            "short",
            (
                (
                    f"sum by (pod) (rate(vllm:iteration_tokens_total_sum{{{MODEL}}}[$__rate_interval]))"
                    f" / (sum by (pod) (rate(vllm:iteration_tokens_total_count{{{MODEL}}}[$__rate_interval])) > 0)"
                ),
                "{{pod}}",
            ),
        ),
    ]


def _errors() -> list[Any]:
    return [
        graph(
            "HTTP answers per second",
            "By class of status. A client that hangs up counts as 2xx.",
            "reqps",
            (
                f'sum by (status) (rate(http_requests_total{{{TARGET}, handler=~"/v1/.+"}}[$__rate_interval]))',
                "{{status}}",
            ),
        ),
        graph(
            "Requests ended, by reason",
            "As the engine saw them.",
            "reqps",
            (
                f"sum by (finished_reason) (rate(vllm:request_success_total{{{MODEL}}}[$__rate_interval]))",
                "{{finished_reason}}",
            ),
        ),
        graph(
            "Shares of errors",
            "Alerts read these.",
            "percentunit",
            (f"ic:http_errors:ratio{{{TARGET}}}", "HTTP 5xx"),
            (f"ic:request_errors:ratio{{{MODEL}}}", "engine"),
            max=1,
        ),
        graph(
            "Memory of the API server",
            "Resident, by pod.",
            "bytes",
            (f"process_resident_memory_bytes{{{TARGET}}}", "{{pod}}"),
        ),
    ]
