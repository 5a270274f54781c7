"""Dashboard: how long the contexts are, what of them is cached, what a token costs in energy."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from panels import (
    GPU,
    MODEL,
    TARGET,
    add,
    dashboard,
    graph,
    histogram_over_time,
    quantiles,
    release_variables,
    rows_of,
)


def build() -> Dashboard:
    """Context lengths, KV cache in tokens, prefix hits, tokens per joule."""
    board = dashboard(
        "ic-long-context", "InfiniteContext / Long context", "Context lengths, KV cache, prefix hits, energy."
    )
    return add(
        board,
        variables=release_variables("vllm:num_requests_running"),
        panels=[
            *_contexts(),
            Row("KV cache"),
            *_cache(),
            Row("Prefix cache"),
            *_prefix(),
            Row("Energy"),
            *_energy(),
        ],
    )


def _contexts() -> list[Any]:
    return [
        histogram_over_time(
            "Context lengths", "Tokens of prompts.", "short", "vllm:request_prompt_tokens", MODEL
        ),
        histogram_over_time(
            "Tokens computed in prefill",
            "Of a prompt, without what came from the cache.",
            "short",
            "vllm:request_prefill_kv_computed_tokens",
            MODEL,
        ),
        graph(
            "Context length", "Tokens of prompts.", "short", *quantiles("vllm:request_prompt_tokens", MODEL)
        ),
        graph(
            "Prefill", "Seconds of a request.", "s", *quantiles("vllm:request_prefill_time_seconds", MODEL)
        ),
    ]


# vLLM tells the cache's size in tokens only as a label: Grafana has to make it a number
_TOKENS_IN_USE = [
    {"id": "merge", "options": {}},
    {
        "id": "convertFieldType",
        "options": {
            "conversions": [{"targetField": "kv_cache_size_tokens", "destinationType": "number"}],
            "fields": {},
        },
    },
    {
        "id": "calculateField",
        "options": {
            "mode": "binary",
            "alias": "tokens in use",
            "binary": {"left": "kv_cache_size_tokens", "operator": "*", "right": "Value #B"},
            "replaceFields": False,
        },
    },
    {
        "id": "organize",
        "options": {
            "excludeByName": {"Time": True, "Value #A": True},
            "renameByName": {
                "kv_cache_size_tokens": "size, tokens",
                "kv_cache_max_concurrency": "requests of full length",
                "cache_dtype": "dtype",
                "Value #B": "share in use",
            },
        },
    },
]


def _cache() -> list[Any]:
    labels = "pod, engine, cache_dtype, kv_cache_size_tokens, kv_cache_max_concurrency"
    return [
        rows_of(
            "KV cache in tokens",
            "Size of each replica's cache, and how much of it is in use.",
            (f"max by ({labels}) (vllm:cache_config_info{{{TARGET}}})", "A"),
            (f"max by (pod, engine) (vllm:kv_cache_usage_perc{{{MODEL}}})", "B"),
            transformations=_TOKENS_IN_USE,
        ),
        graph(
            "Share in use",
            "By pod, and their mean.",
            "percentunit",
            (f"vllm:kv_cache_usage_perc{{{MODEL}}}", "{{pod}} engine {{engine}}"),
            (f"ic:kv_cache_usage:avg{{{MODEL}}}", "mean"),
            max=1,
        ),
        graph(
            "Requests preempted",
            "Each computes its whole context again.",
            "short",
            (f"sum by (pod) (increase(vllm:num_preemptions_total{{{MODEL}}}[$__rate_interval]))", "{{pod}}"),
        ),
    ]


def _prefix() -> list[Any]:
    return [
        graph(
            "Prefix hits",
            "Share of prompt tokens found in the cache.",
            "percentunit",
            (f"ic:prefix_cache_hits:ratio{{{MODEL}}}", "hits"),
            max=1,
        ),
        graph(
            "Prompt tokens by source",
            "Per second.",
            "short",
            (
                f"sum by (source) (rate(vllm:prompt_tokens_by_source_total{{{MODEL}}}[$__rate_interval]))",
                "{{source}}",
            ),
            (f"sum(rate(vllm:prompt_tokens_cached_total{{{MODEL}}}[$__rate_interval]))", "cached"),
        ),
    ]


def _energy() -> list[Any]:
    return [
        graph(
            "Tokens per joule",
            "Generated tokens over the energy of the GPUs that the release's pods use. Needs dcgm-exporter.",
            "none",
            (f"ic:generation_tokens:per_joule{{{TARGET}}}", "generation"),
            (
                f"sum(ic:prompt_tokens:rate{{{TARGET}}}) / (sum(ic:gpu_power_watts:sum{{{TARGET}}}) > 0)",
                "prompt",
            ),
        ),
        graph(
            "Power",
            "Of those GPUs.",
            "watt",
            (f"DCGM_FI_DEV_POWER_USAGE{{{GPU}}}", "{{Hostname}} GPU {{gpu}}"),
        ),
    ]
