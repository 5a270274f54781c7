"""dashboards/metrics.yaml: what something asks for, no more; and what stands for exporters."""

import re
from pathlib import Path

import chart_tools
import monitoring_expressions
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

CONTRACT = yaml.safe_load((chart_tools.CHART / "dashboards" / "metrics.yaml").read_text())["sources"]
EXPOSITION = Path(__file__).parent / "exposition"
KEDA = {"autoscaling.kind": "keda"}
HPA = {"autoscaling.kind": "hpa"}
HISTOGRAM = ("_bucket", "_sum", "_count")


def contract():
    """Name to (source, entry) of every series, those of histograms by their three suffixes."""
    series = {}
    for source, about in CONTRACT.items():
        for name, entry in about["metrics"].items():
            suffixes = HISTOGRAM if entry["type"] == "histogram" else ("",)
            for suffix in suffixes:
                series[name + suffix] = (source, name, entry)
    return series


def labels_of(name):
    source, _, entry = contract()[name]
    about = CONTRACT[source]
    known = {*about["target_labels"], *about["labels"], *entry.get("labels", [])} - {
        *entry.get("without", [])
    }
    return known | ({"le"} if name.endswith("_bucket") else set())


@pytest.fixture(scope="module")
def expressions(monitored):
    objects = monitored(set=KEDA)
    cert_manager = monitored(set={"monitoring.certificate.source": "cert-manager"})
    hpa = monitored(set=HPA)
    return [
        *monitoring_expressions.of_rules(objects),
        *monitoring_expressions.of_rules(cert_manager),
        *monitoring_expressions.of_dashboards(objects),
        *monitoring_expressions.of_scaled_objects(objects),
        *monitoring_expressions.of_autoscalers(hpa, list(contract())),
    ]


@pytest.fixture(scope="module")
def selectors(expressions):
    return [
        (item.where, found) for item in expressions for found in monitoring_expressions.selectors(item.text)
    ]


def test_there_are_expressions_of_every_kind(expressions):
    assert {item.kind for item in expressions} == {"alert", "record", "dashboard", "variable", "scaler"}
    scalers = [item.where for item in expressions if item.kind == "scaler"]
    assert scalers == [
        "ScaledObject waiting-requests",
        "ScaledObject kv-cache-usage",
        "HorizontalPodAutoscaler vllm_kv_cache_usage_perc",
        "HorizontalPodAutoscaler vllm_num_requests_waiting",
    ]


def test_what_is_asked_for_is_in_the_contract_and_the_other_way_round(selectors):
    used = {found.metric for _, found in selectors if not found.metric.startswith("ic:")}
    assert not used - set(contract())
    used_names = {contract()[metric][1] for metric in used}
    assert used_names == {name for about in CONTRACT.values() for name in about["metrics"]}


def test_recorded_names_that_are_asked_for_are_recorded(expressions, selectors):
    recorded = {item.where for item in expressions if item.kind == "record"}
    used = {found.metric for _, found in selectors if found.metric.startswith("ic:")}
    assert used <= recorded


def test_matchers_use_labels_of_the_contract(selectors):
    for where, found in selectors:
        if not found.metric.startswith("ic:"):
            assert found.labels <= labels_of(found.metric), f"{where}: {found.text}"


def test_groupings_use_labels_of_the_contract(expressions):
    for item in expressions:
        known = {"namespace", "job", "model_name"}
        for found in monitoring_expressions.selectors(item.text):
            known |= set() if found.metric.startswith("ic:") else labels_of(found.metric)
        for grouping in re.findall(r"\b(?:by|on) \(([^)]*)\)", item.text):
            assert set(grouping.split(", ")) <= known, f"{item.where}: {grouping}"


@pytest.mark.parametrize("source", sorted(path.stem for path in EXPOSITION.glob("*.prom")))
def test_an_exposition_has_the_contracts_names_types_and_labels(source):
    text = (EXPOSITION / f"{source}.prom").read_text()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    about = CONTRACT[source]
    assert types == {name: entry["type"] for name, entry in about["metrics"].items()}
    renamed = {f"exported_{name}": name for name in ("namespace", "pod", "container")}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # the parser writes `_total` after every counter
            metric = sample.name if sample.name in types else sample.name.removesuffix("_total")
            wanted = {*about["labels"], *about["metrics"][metric].get("labels", [])}
            assert set(sample.labels) == {renamed.get(name, name) for name in wanted}, sample.name
