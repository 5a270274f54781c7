"""Monitors and autoscalers: what is rendered, what the CRDs take, and what is refused."""

import chart_tools
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule, ServiceMonitor

MODELS = {
    "ScaledObject": ScaledObject,
    "PodMonitor": PodMonitor,
    "ServiceMonitor": ServiceMonitor,
    "PrometheusRule": PrometheusRule,
}
KEDA = {"monitoring.enabled": True, "autoscaling.kind": "keda"}
ZERO = {**KEDA, "autoscaling.scaleToZero.enabled": True}
DEMAND = 'sum(rate(traefik_service_requests_total{service=~"default-ic-.+"}[2m])) or vector(0)'


def values(tmp_path, content):
    """A values file: `--set` makes a string of 0.5, and cuts at commas."""
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(content))
    return [path]


def check_by_crd(item):
    """The CRD's types take it, and know all of it: what they do not know would be dropped by the API server."""
    read = MODELS[item["kind"]].model_validate(item)
    assert read.model_dump(mode="json", by_alias=True, exclude_none=True) == item


def test_nothing_is_rendered_by_default(render):
    kinds = {item["kind"] for item in render()}
    assert not kinds & {*MODELS, "HorizontalPodAutoscaler"}


@pytest.mark.parametrize("kind", ["pod", "service"])
def test_crds_take_what_is_rendered(monitored, kind):
    objects = monitored(set={"monitoring.scrape.kind": kind, "autoscaling.kind": "keda"})
    ours = [item for item in objects if item["kind"] in MODELS]
    assert {"PrometheusRule", "ScaledObject", "PodMonitor"} <= {item["kind"] for item in ours}
    for item in ours:
        check_by_crd(item)


@pytest.mark.parametrize(
    "path", sorted((chart_tools.CHART / "ci").glob("*.yaml")), ids=lambda path: path.stem
)
def test_crds_take_what_the_values_files_make(render, path):
    for item in render([path]):
        if item["kind"] in MODELS:
            check_by_crd(item)


def test_the_crd_check_finds_what_is_wrong(monitored):
    monitor = chart_tools.of_kind(monitored(), "PodMonitor")[0]
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "5s"
    with pytest.raises(AssertionError):
        check_by_crd(monitor)


@pytest.mark.parametrize("kind", ["pod", "service"])
def test_monitors_select_this_release_by_a_port_that_exists(monitored, kind):
    objects = monitored(set={"monitoring.scrape.kind": kind}, release="one")
    monitor = chart_tools.one(
        objects, {"pod": "PodMonitor", "service": "ServiceMonitor"}[kind], "one-infinite-context"
    )
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted["app.kubernetes.io/instance"] == "one"
    (endpoint,) = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
    deployment = chart_tools.one(objects, "Deployment", "one-infinite-context")
    if kind == "pod":
        template = deployment["spec"]["template"]
        assert wanted.items() <= template["metadata"]["labels"].items()
        ports = [port for item in template["spec"]["containers"] for port in item.get("ports", [])]
        assert endpoint["port"] in [port["name"] for port in ports]
    else:
        found = [
            item
            for item in chart_tools.of_kind(objects, "Service")
            if wanted.items() <= item["metadata"]["labels"].items()
        ]
        assert [item["metadata"]["name"] for item in found] == ["one-infinite-context"]
        assert endpoint["port"] in [port["name"] for port in found[0]["spec"]["ports"]]


def test_the_batch_monitor_selects_batch_pods_by_a_port_that_exists(monitored):
    objects = monitored(set={"batch.enabled": True})
    monitor = chart_tools.one(objects, "PodMonitor", "ic-infinite-context-batch")
    template = chart_tools.of_kind(objects, "Job")[0]["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = [port["name"] for item in template["spec"]["containers"] for port in item.get("ports", [])]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports


@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_the_release_label_that_kube_prometheus_stack_selects_by(monitored, kind):
    def labels(**options):
        return chart_tools.of_kind(monitored(set=options), kind)[0]["metadata"]["labels"]

    assert labels()["release"] == "kube-prometheus-stack"
    assert labels(**{"monitoring.prometheusRelease": "prom"})["release"] == "prom"
    assert "release" not in labels(**{"monitoring.prometheusRelease": ""})
    assert labels(**{"monitoring.labels.team": "llm"})["team"] == "llm"


def test_scrapes_are_as_the_values_say(monitored):
    objects = monitored(set={"monitoring.scrape.intervalSeconds": 30, "monitoring.scrape.timeoutSeconds": 25})
    (endpoint,) = chart_tools.one(objects, "PodMonitor", "ic-infinite-context")["spec"]["podMetricsEndpoints"]
    assert (endpoint["interval"], endpoint["scrapeTimeout"], endpoint["path"]) == ("30s", "25s", "/metrics")


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_autoscalers_scale_the_deployment_which_leaves_its_replicas_open(render, kind):
    objects = render(set={"monitoring.enabled": True, "autoscaling.kind": kind})
    deployment = chart_tools.one(objects, "Deployment", "ic-infinite-context")
    assert "replicas" not in deployment["spec"]
    scaler = chart_tools.one(objects, {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}[kind])
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    hpa = scaler["spec"] if kind == "hpa" else scaler["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    (policy,) = hpa["behavior"]["scaleDown"]["policies"]
    assert policy["periodSeconds"] >= grace
    assert policy["value"] == 1


def test_targets_of_the_hpa(render, tmp_path):
    content = {"autoscaling": {"kind": "hpa", "targets": {"waitingRequests": 1.5, "kvCacheUsage": 0.65}}}
    content |= {"monitoring": {"enabled": True}, "model": {"servedName": "org/model"}}
    hpa = chart_tools.one(render(values_files=values(tmp_path, content)), "HorizontalPodAutoscaler")
    found = {}
    for metric in hpa["spec"]["metrics"]:
        external = metric["external"]
        assert external["target"]["type"] == "AverageValue"
        # a slash may not stand in a selector
        assert external["metric"]["selector"]["matchLabels"] == {"job": "ic-infinite-context"}
        found[external["metric"]["name"]] = external["target"]["averageValue"]
    assert found == {"vllm_num_requests_waiting": "1500m", "vllm_kv_cache_usage_perc": "650m"}


def test_triggers_of_keda(render):
    scaled = chart_tools.one(
        render(set={**KEDA, "autoscaling.keda.authenticationRef": "prom"}), "ScaledObject"
    )["spec"]
    assert scaled["fallback"] == {"failureThreshold": 3, "replicas": 4}
    assert "idleReplicaCount" not in scaled
    for trigger in scaled["triggers"]:
        assert trigger["type"] == "prometheus"
        # the fallback counts for this type only, and metricName is no more
        assert trigger["metricType"] == "AverageValue"
        assert "metricName" not in trigger["metadata"]
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        assert trigger["authenticationRef"] == {"name": "prom"}


def test_scale_to_zero_with_what_makes_it_work(render, tmp_path):
    content = {"monitoring": {"enabled": True}, "autoscaling": {"kind": "keda"}}
    content["autoscaling"]["scaleToZero"] = {"enabled": True, "demandQuery": DEMAND}
    scaled = chart_tools.one(render(values_files=values(tmp_path, content)), "ScaledObject")
    check_by_crd(scaled)
    assert scaled["spec"]["idleReplicaCount"] == 0
    assert scaled["spec"]["minReplicaCount"] == 1
    waiting, cache, demand = scaled["spec"]["triggers"]
    assert demand["metadata"]["query"] == DEMAND
    assert demand["metadata"]["activationThreshold"] == "0"
    # without replicas there are no series, which is no error then
    assert waiting["metadata"]["ignoreNullValues"] == cache["metadata"]["ignoreNullValues"] == "true"


WATCHED = {"monitoring.enabled": True}
REFUSED = [
    ({"autoscaling.kind": "vpa"}, r"autoscaling/kind.*must be one of 'none', 'hpa', 'keda'"),
    (
        {"autoscaling.kind": "hpa"},
        'autoscaling.kind is "hpa", which reads what Prometheus scrapes; set monitoring.enabled',
    ),
    ({**KEDA, "monitoring.scrape.kind": "none"}, "monitoring.scrape.kind to pod or service"),
    (
        {**KEDA, "autoscaling.minReplicas": 5},
        "autoscaling.maxReplicas is 4; it must be at least minReplicas, 5",
    ),
    ({**KEDA, "autoscaling.minReplicas": 0}, "autoscaling/minReplicas.*got 0, want 1"),
    (
        {**KEDA, "autoscaling.scaleDown.periodSeconds": 60},
        r"periodSeconds is 60; it must be at least serving.drain.gracePeriodSeconds, \d+",
    ),
    (
        {**KEDA, "autoscaling.keda.fallbackReplicas": 9},
        "fallbackReplicas is 9; it must be 0 or lie between minReplicas, 1, and maxReplicas, 4",
    ),
    (ZERO, "autoscaling.scaleToZero.demandQuery is empty"),
    ({**ZERO, "autoscaling.kind": "hpa"}, 'scaleToZero.enabled needs autoscaling.kind keda, not "hpa"'),
    (
        {**ZERO, "autoscaling.scaleToZero.demandQuery": "sum(vllm:num_requests_waiting)"},
        "metrics of vLLM end with the last replica",
    ),
    (
        {**ZERO, "autoscaling.scaleToZero.demandQuery": "x", "autoscaling.scaleToZero.cooldownSeconds": 100},
        "cooldownSeconds is 100",
    ),
    (
        {**WATCHED, "monitoring.scrape.timeoutSeconds": 20},
        "timeoutSeconds is 20; it must be at most intervalSeconds, 15",
    ),
    ({**WATCHED, "monitoring.scrape.kind": "probe"}, "monitoring/scrape/kind"),
    ({**WATCHED, "monitoring.rules.rateWindow": "soon"}, "monitoring/rules/rateWindow"),
    ({**WATCHED, "monitoring.slo.ttft.seconds": "3.0"}, "monitoring/slo/ttft/seconds"),
    ({**WATCHED, "monitoring.promethusRelease": "x"}, "promethusRelease"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_work_is_refused(render, options, message):
    with pytest.raises(chart_tools.HelmError, match=message):
        render(set=options)


def test_an_objective_whose_burn_rate_cannot_be_reached_is_refused(render, tmp_path):
    content = {"monitoring": {"enabled": True, "slo": {"ttft": {"objective": 0.9}}}}
    with pytest.raises(chart_tools.HelmError, match="monitoring/slo/ttft/objective"):
        render(values_files=values(tmp_path, content))
