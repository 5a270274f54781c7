"""A real vLLM server, scraped by a real Prometheus as the chart says, its rules, and a real Alertmanager.

The tests run in this order, on one stack: what a working server shows comes before what a broken one does.
"""

import math
import re
import signal
import threading
import time

import chart_tools
import monitoring_expressions
import monitoring_programs
import monitoring_stack
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

CONTRACT = yaml.safe_load((chart_tools.CHART / "dashboards" / "metrics.yaml").read_text())["sources"]
# series that a healthy server does not have, with the reason
ABSENT = {
    'status="5xx"': "http_requests_total has a series for a class of status after its first answer",
    "ic:http_errors:ratio": "needs requests within the last seconds; asked over the whole run instead",
}
# what the long prompt takes at least; rateWindow is 8 s
LONG_PROMPT_S = 14
# one token a byte
LETTERS = "".join(chr(97 + (index * index // 7) % 26) for index in range(48_000))


@pytest.fixture(scope="module")
def served(stack):
    """The stack after some traffic: short answers, waiting ones, a long prompt, one that is refused."""
    # long enough for several scrapes to see them wait
    assert stack.complete_many(5, tokens=250) == [200] * 5
    assert stack.complete(prompt="x" * 70_000) == 400
    # longer and longer, until one took long enough: how fast the machine is changes with what else it does
    for tokens in (8_000, 16_000, 32_000, len(LETTERS)):
        stack.long_prompt_began = time.time()
        began = time.monotonic()
        # another beginning each time: nothing of it is in the prefix cache
        long_prompt = f"{tokens} {LETTERS}"[:tokens]
        assert stack.complete(prompt=long_prompt, tokens=5, timeout_s=300) == 200
        if time.monotonic() - began >= LONG_PROMPT_S:
            break
    # now it is
    assert stack.complete(prompt=long_prompt, tokens=5, timeout_s=300) == 200
    assert stack.complete_many(3, tokens=30) == [200] * 3
    # once two scrapes and two evaluations have come after the last answer, Prometheus has seen it all
    done = time.time()
    stack.wait_for(
        lambda: stack.query(f"timestamp(vllm:num_requests_running) > {done + 2}"), "scrapes of it all", 60
    )
    time.sleep(2)
    return stack


@pytest.fixture(scope="module")
def expressions(monitored, served):
    live = {**monitoring_stack.LIVE_VALUES, "monitoring.certificate.source": "traefik"}
    objects = monitored(set={**live, "autoscaling.kind": "keda"})
    hpa = monitored(set={**live, "autoscaling.kind": "hpa"})
    cert_manager = monitored(set={**live, "monitoring.certificate.source": "cert-manager"})
    # as prometheus-adapter does: it asks which series there are, and makes its metrics of them
    (rule,) = monitoring_expressions.adapter_rules(hpa)
    names = sorted({series["__name__"] for series in served.series(rule["seriesQuery"])})
    return {
        "rules": [*monitoring_expressions.of_rules(objects), *monitoring_expressions.of_rules(cert_manager)],
        "dashboards": list(monitoring_expressions.of_dashboards(objects)),
        "scalers": [
            *monitoring_expressions.of_scaled_objects(objects),
            *monitoring_expressions.of_autoscalers(hpa, names),
        ],
    }


def numbers(result):
    return [
        float(value) for element in result for _, value in element["values"] if not math.isnan(float(value))
    ]


def test_configurations_are_accepted(stack, programs):
    monitoring_programs.run(programs.promtool, "check", "config", stack.folder / "prometheus.yaml")
    monitoring_programs.run(programs.amtool, "check-config", stack.folder / "alertmanager.yaml")


def test_vllm_exposes_every_name_of_the_contract_with_its_type_and_labels(served):
    families = {family.name: family for family in text_string_to_metric_families(served.exposition())}
    for source in ("vllm", "vllm-frontend"):
        about = CONTRACT[source]
        for name, entry in about["metrics"].items():
            family = families.get(name.removesuffix("_total")) or families.get(name)
            assert family is not None, f"vLLM has no {name} any more"
            assert family.type == entry["type"], f"{name} is a {family.type} now"
            wanted = {*about["labels"], *entry.get("labels", [])} - {*entry.get("without", [])}
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    assert wanted <= set(sample.labels), (
                        f"{sample.name} has the labels {sorted(sample.labels)}"
                    )
                    if "model_name" in wanted:
                        assert sample.labels["model_name"] == monitoring_stack.MODEL


def test_a_bound_of_an_objective_is_a_bucket_of_vllm(served):
    schema = yaml.safe_load((chart_tools.CHART / "values.schema.json").read_text())
    objectives = schema["properties"]["monitoring"]["properties"]["slo"]["properties"]
    text = served.exposition()
    for key, metric in (
        ("ttft", "time_to_first_token_seconds"),
        ("interToken", "inter_token_latency_seconds"),
    ):
        buckets = set(re.findall(rf'vllm:{metric}_bucket{{[^}}]*le="([^"]+)"', text))
        assert set(objectives[key]["properties"]["seconds"]["enum"]) <= buckets


def test_created_series_are_dropped_and_targets_are_named_as_the_rules_ask(served):
    assert not served.series('{__name__=~".+_created", job=~"ic-.+"}')
    labels = {"namespace": "default", "job": "ic-infinite-context", "pod": monitoring_stack.POD}
    (target,) = served.query('up{job="ic-infinite-context"}')
    assert labels.items() <= target["metric"].items()
    assert target["value"][1] == "1"


def test_every_selector_finds_series(served, expressions):
    for item in (item for group in expressions.values() for item in group):
        for found in monitoring_expressions.selectors(item.text):
            if not any(part in found.text for part in ABSENT):
                assert served.query(f"last_over_time({found.text}[1h])"), (
                    f"{item.where}: {found.text} finds nothing"
                )


def test_every_rule_runs(served, expressions):
    for item in expressions["rules"]:
        served.query(item.text)
    # and Prometheus, which runs them all the time, has no complaint
    groups = served._api("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}


def test_every_panel_and_variable_shows_something(served, expressions):
    for item in expressions["dashboards"]:
        result = served.query_range(item.text)
        empty_when_healthy = 'status="5xx"' in item.text
        assert numbers(result) or empty_when_healthy, f"{item.where}: {item.text} shows nothing"
        for label in re.findall(r"{{(\w+)}}", item.legend):
            assert all(label in element["metric"] for element in result), f"{item.where}: no label {label}"


def test_every_scaler_gets_one_element(served, expressions):
    assert len(expressions["scalers"]) == 4
    for item in expressions["scalers"]:
        result = served.query(item.text)
        assert len(result) == 1, f"{item.where}: {item.text} gives {result}"
        assert result[0]["metric"] == {}


def test_scalers_see_the_queue(served, expressions):
    results = {item.where: numbers(served.query_range(item.text)) for item in expressions["scalers"]}
    # five at once, two run
    assert max(results["ScaledObject waiting-requests"]) == 3
    assert max(results["HorizontalPodAutoscaler vllm_num_requests_waiting"]) == 3
    assert 0 < max(results["ScaledObject kv-cache-usage"]) <= 1


def test_a_long_prefill_looks_stuck_by_its_tokens_and_is_not(served, expressions):
    stuck = next(item.text for item in expressions["rules"] if item.where == "ICEngineStuck")
    by_tokens, by_cache = stuck.split("\nand changes")
    since = served.long_prompt_began
    assert numbers(served.query_range(by_tokens, since=since)), "the long prompt was read too fast to show it"
    assert not served.query_range(f"{by_tokens}\nand changes{by_cache}", since=since)


def test_a_working_server_raises_no_alert(served):
    assert not served.http.alerts
    states = served._api("alerts")["alerts"]
    assert [alert["labels"]["alertname"] for alert in states if alert["state"] == "firing"] == []


def test_an_engine_that_froze_while_idle_is_seen_when_clients_give_up(served):
    engine = served.engine()
    engine.send_signal(signal.SIGSTOP)
    try:
        # nothing of vLLM's own metrics moves, and its health is as good as ever
        waited = threading.Event()

        def impatient_clients():
            while not waited.wait(0.1):
                served.complete_many(2, timeout_s=0.5)

        clients = threading.Thread(target=impatient_clients)
        clients.start()
        try:
            served.wait_for(lambda: served.alerts("ICEngineSilent", "firing"), "ICEngineSilent", 45)
        finally:
            waited.set()
            clients.join()
        assert served._answers(f"{served.vllm.url}/health")
        assert (
            served.query("sum(vllm:num_requests_running + vllm:num_requests_waiting)")[0]["value"][1] == "0"
        )
    finally:
        engine.send_signal(signal.SIGCONT)
    served.wait_for(lambda: served.alerts("ICEngineSilent", "resolved"), "ICEngineSilent resolved", 45)


def test_an_engine_that_froze_with_work_waiting_is_seen(served):
    threads = [
        threading.Thread(target=served.complete, kwargs={"tokens": 2000, "timeout_s": 20}) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    served.wait_for(lambda: served.query("sum(vllm:num_requests_waiting) > 0"), "requests that wait", 30)
    engine = served.engine()
    engine.send_signal(signal.SIGSTOP)
    try:
        (alert, *_) = served.wait_for(lambda: served.alerts("ICEngineStuck", "firing"), "ICEngineStuck", 45)
        assert served._answers(f"{served.vllm.url}/health")
        assert alert["labels"]["severity"] == "critical"
        assert alert["annotations"]["runbook_url"].endswith("#icenginestuck")
        assert re.fullmatch(r"The engine of ic-infinite-context-\S+ has [2-4] requests and makes no progress",
                            alert["annotations"]["summary"])  # fmt: skip
    finally:
        engine.send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join()
    served.wait_for(lambda: served.alerts("ICEngineStuck", "resolved"), "ICEngineStuck resolved", 45)


def test_a_killed_server_raises_an_alert_which_ends_when_it_is_back(served):
    # a server that was stopped for a while, as those before, may have been missed, too
    before = {status: len(served.alerts("ICTargetDown", status)) for status in ("firing", "resolved")}

    def since(status):
        return served.alerts("ICTargetDown", status)[before[status] :]

    served.kill_vllm()
    fired = served.wait_for(lambda: since("firing"), "ICTargetDown", 60)
    assert fired[0]["labels"]["pod"] == monitoring_stack.POD
    assert fired[0]["annotations"]["summary"] == f"{monitoring_stack.POD} does not answer on /metrics"
    assert not since("resolved")
    served.start_vllm()
    served.wait_for(lambda: since("resolved"), "ICTargetDown resolved", 120)
    assert served.complete() == 200


def test_a_server_under_another_name_is_noticed_by_the_scalers(served, render):
    # what the chart would ask for if the server had been started under another name than the values say
    objects = render(
        set={"monitoring.enabled": True, "autoscaling.kind": "keda", "model.servedName": "another"}
    )
    for item in monitoring_expressions.of_scaled_objects(objects):
        assert served.query(item.text) == []
    for scaled in chart_tools.of_kind(objects, "ScaledObject"):
        assert {trigger["metadata"]["ignoreNullValues"] for trigger in scaled["spec"]["triggers"]} == {
            "false"
        }


def test_everything_listens_on_loopback_only(stack):
    own = {process.pid for process in psutil.Process().children(recursive=True)} | {psutil.Process().pid}
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in own
    }
    assert listening <= {"127.0.0.1", "::1"}
