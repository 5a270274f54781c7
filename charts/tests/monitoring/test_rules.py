"""The rules as Helm renders them, checked and unit-tested by the real promtool."""

import re
from collections import defaultdict
from pathlib import Path

import chart_tools
import monitoring_programs
import pytest
import yaml

FOLDER = Path(__file__).parent / "rules"
RUNBOOK = chart_tools.ROOT / "docs" / "runbooks" / "alerts.md"
# which certificate source a file of unit tests needs; the others go with any
SOURCES = {"certificate-cert-manager": "cert-manager"}


def spec(objects):
    return chart_tools.one(objects, "PrometheusRule")["spec"]


def alerts(objects):
    return [rule for group in spec(objects)["groups"] for rule in group["rules"] if "alert" in rule]


def rules_for(monitored, name):
    return spec(monitored(set={"monitoring.certificate.source": SOURCES.get(name, "traefik")}))


@pytest.fixture(scope="module")
def every_alert(monitored):
    found = {}
    for source in ("traefik", "cert-manager"):
        for rule in alerts(monitored(set={"monitoring.certificate.source": source})):
            found.setdefault(rule["alert"], []).append(rule)
    return found


def test_promtool_accepts_the_rules(monitored, programs, tmp_path):
    for source in ("traefik", "cert-manager", "none"):
        path = tmp_path / f"{source}.yaml"
        path.write_text(yaml.safe_dump(spec(monitored(set={"monitoring.certificate.source": source}))))
        assert "SUCCESS" in monitoring_programs.run(programs.promtool, "check", "rules", path)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_rules_by_promtool(monitored, programs, tmp_path, name):
    rules = rules_for(monitored, name)
    for group in rules["groups"]:
        for rule in group["rules"]:
            # promtool compares texts word for word; their labels are checked by a test below
            rule.pop("annotations", None)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    cases = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], **cases}))
    assert "SUCCESS" in monitoring_programs.run(programs.promtool, "test", "rules", tmp_path / "cases.yaml")


def test_every_alert_has_a_test_that_fires_and_one_that_does_not(every_alert):
    outcomes = defaultdict(set)
    for path in FOLDER.glob("*.yaml"):
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case.get("alert_rule_test", []):
                outcomes[check["alertname"]].add(bool(check["exp_alerts"]))
    assert dict(outcomes) == {name: {True, False} for name in every_alert}


def test_texts_use_only_labels_that_the_alert_has(every_alert):
    fired = {}
    for path in FOLDER.glob("*.yaml"):
        for case in yaml.safe_load(path.read_text())["tests"]:
            for check in case.get("alert_rule_test", []):
                for expected in check["exp_alerts"]:
                    fired.setdefault((check["alertname"], path.stem), expected["exp_labels"])
    for (alert, file), labels in fired.items():
        for rule in every_alert[alert]:
            used = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
            if alert != "ICCertificateExpires" or ("traefik" in file) == ("traefik" in rule["expr"]):
                assert used <= set(labels), (alert, used - set(labels))


def test_every_alert_has_severity_summary_description_and_a_runbook_entry(every_alert):
    headings = set(re.findall(r"^## (\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE))
    assert headings == set(every_alert)
    for name, rules in every_alert.items():
        for rule in rules:
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
            assert rule["annotations"]["runbook_url"] == f"docs/runbooks/alerts.md#{name.lower()}"


def test_values_override_and_leave_out_alerts(monitored, tmp_path):
    rules = {
        "for": {"ICTargetDown": "7m"},
        "severity": {"ICTargetDown": "warning"},
        "disabled": ["ICQueueGrowing"],
        "alertLabels": {"team": "llm"},
        "runbookUrl": "https://example.com/runbooks",
        "thresholds": {"kvCacheUsage": 0.5},
    }
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"monitoring": {"rules": rules}}))
    objects = monitored(values_files=[tmp_path / "values.yaml"])
    found = {rule["alert"]: rule for rule in alerts(objects)}
    assert "ICQueueGrowing" not in found
    assert found["ICTargetDown"]["for"] == "7m"
    assert found["ICTargetDown"]["labels"] == {"severity": "warning", "team": "llm"}
    assert found["ICTargetDown"]["annotations"]["runbook_url"] == "https://example.com/runbooks#ictargetdown"
    assert ">= 0.5" in found["ICKvCacheNearlyFull"]["expr"]


@pytest.mark.parametrize(
    "key", ["for.ICTargetDwon=1m", "severity.ICTargetDwon=warning", "disabled[0]=ICTargetDwon"]
)
def test_an_override_of_an_unknown_alert_is_refused(render, key):
    field = key.split(".")[0].split("[")[0]
    with pytest.raises(
        chart_tools.HelmError, match=rf"monitoring.rules.{field} names the alert .*ICTargetDwon.*ICTargetDown"
    ):
        render(set=["monitoring.enabled=true", f"monitoring.rules.{key}"])


def test_two_releases_do_not_share_a_series(monitored):
    for release, namespace in (("a", "x"), ("b", "y")):
        objects = monitored(release=release, namespace=namespace)
        for rule in alerts(objects):
            for selector in re.findall(
                r"(?:vllm:\w+|\bup|http_requests_total|ic:[\w:]+)\{[^}]*\}", rule["expr"]
            ):
                assert f'namespace="{namespace}"' in selector, rule["expr"]
                assert f'"{release}-infinite-context' in selector, rule["expr"]


def test_a_release_without_serving_has_no_alerts_about_it(monitored):
    objects = monitored(set={"serving.enabled": False, "batch.enabled": True})
    names = {rule["alert"] for rule in alerts(objects)}
    assert {"ICEngineStuck", "ICBatchJobFailed"} <= names
    assert not {"ICTargetDown", "ICNoTargets", "ICReplicasMissing", "ICTtftBurnFast"} & names
    assert [item["metadata"]["name"] for item in chart_tools.of_kind(objects, "PodMonitor")] == [
        "ic-infinite-context-batch"
    ]
