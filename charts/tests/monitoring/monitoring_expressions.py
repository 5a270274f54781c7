"""Every PromQL expression that the chart brings, wherever it stands, and what it asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import chart_tools
import promql_parser
import yaml

# Grafana fills these in when it asks
GRAFANA = {
    "$__rate_interval": "8s",
    "$namespace": "default",
    "$job": "ic-infinite-context",
    "$model": ".*",
    "$node": ".*",
    "$gpu": ".*",
    "$instance": ".*",
    "$batch": ".*",
}
LABEL_VALUES = re.compile(r"label_values\((?P<selector>.+), (?P<label>\w+)\)")


@dataclass(frozen=True)
class Expression:
    """PromQL and where it stands: kind is `dashboard`, `variable`, `record`, `alert` or `scaler`."""

    kind: str
    where: str
    text: str
    legend: str = ""


@dataclass(frozen=True)
class Selector:
    """A metric and the labels by which it is selected, as an expression asks for it."""

    metric: str
    text: str
    labels: frozenset[str]


def of_rules(objects: list[dict[str, Any]]) -> Iterator[Expression]:
    """Recording rules and alerts."""
    for item in chart_tools.of_kind(objects, "PrometheusRule"):
        for group in item["spec"]["groups"]:
            for rule in group["rules"]:
                kind = "alert" if "alert" in rule else "record"
                yield Expression(kind, rule[kind], rule["expr"])


def of_dashboards(objects: list[dict[str, Any]]) -> Iterator[Expression]:
    """Panels and variables."""
    for item in chart_tools.of_kind(objects, "ConfigMap"):
        if "grafana_dashboard" not in item["metadata"]["labels"]:
            continue
        ((name, text),) = item["data"].items()
        board = json.loads(text)
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = LABEL_VALUES.fullmatch(variable["query"])
                assert found, f"{name}: variable {variable['name']} has the query {variable['query']}"
                text = f"count by ({found['label']}) ({found['selector']})"
                yield Expression("variable", f"{name}: {variable['name']}", _filled(text))
        for panel in _panels(board["panels"]):
            for target in panel["targets"]:
                where = f"{name}: {panel['title']} {target['refId']}"
                yield Expression("dashboard", where, _filled(target["expr"]), target.get("legendFormat", ""))


def _panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        if panel["type"] == "row":
            yield from _panels(panel.get("panels") or [])
        else:
            yield panel


def _filled(text: str) -> str:
    for name, value in GRAFANA.items():
        text = text.replace(name, value)
    assert "$" not in text, f"a variable of Grafana is left in {text}"
    return text


def of_scaled_objects(objects: list[dict[str, Any]]) -> Iterator[Expression]:
    """Triggers of KEDA."""
    for item in chart_tools.of_kind(objects, "ScaledObject"):
        for trigger in item["spec"]["triggers"]:
            yield Expression("scaler", f"ScaledObject {trigger['name']}", trigger["metadata"]["query"])


def of_autoscalers(objects: list[dict[str, Any]], series: list[str]) -> Iterator[Expression]:
    """What prometheus-adapter asks Prometheus for an HPA's external metrics, by the rules that the chart brings.

    Args:
        objects: with the HorizontalPodAutoscaler and the ConfigMap of the rules.
        series: names that Prometheus has, from which the adapter makes its own names.
    """
    rules = adapter_rules(objects)
    for item in chart_tools.of_kind(objects, "HorizontalPodAutoscaler"):
        for metric in item["spec"]["metrics"]:
            external = metric["external"]["metric"]
            matchers = {
                "namespace": item["metadata"].get("namespace", "default"),
                **external["selector"]["matchLabels"],
            }
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(matchers.items()))
            for rule in rules:
                pattern, template = (
                    re.compile(rule["name"]["matches"]),
                    rule["name"]["as"].replace("${1}", r"\1"),
                )
                for name in series:
                    if pattern.match(name) and pattern.sub(template, name) == external["name"]:
                        text = (
                            rule["metricsQuery"]
                            .replace("<<.Series>>", name)
                            .replace("<<.LabelMatchers>>", labels)
                        )
                        yield Expression("scaler", f"HorizontalPodAutoscaler {external['name']}", text)


def adapter_rules(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rules for prometheus-adapter."""
    for item in chart_tools.of_kind(objects, "ConfigMap"):
        if item["metadata"]["name"].endswith("-adapter-rules"):
            return yaml.safe_load(item["data"]["values.yaml"])["rules"]["external"]
    return []


def selectors(text: str) -> Iterator[Selector]:
    """The vector selectors of an expression.

    Raises:
        ValueError: it is no PromQL, or selects without the name of a metric.
    """
    yield from _walk(promql_parser.parse(text))


def _walk(node: Any) -> Iterator[Selector]:
    if isinstance(node, promql_parser.VectorSelector):
        if node.name is None:
            raise ValueError(f"{node} has no metric name")
        matchers = [
            *node.matchers.matchers,
            *(matcher for group in node.matchers.or_matchers for matcher in group),
        ]
        yield Selector(node.name, str(node), frozenset(matcher.name for matcher in matchers))
        return
    for name in ("expr", "lhs", "rhs", "vector_selector", "param", "vector"):
        child = getattr(node, name, None)
        if child is not None and not isinstance(child, str):
            yield from _walk(child)
    for argument in getattr(node, "args", None) or []:
        yield from _walk(argument)
