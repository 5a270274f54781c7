"""What the serving pods are promised: updates, probes, places, keys, and who may reach them."""

import json

import pytest
from chart_tools import HelmError, of_kind, one, render

NAME = "ic-infinite-context"
LABELS = {
    "app.kubernetes.io/name": "infinite-context",
    "app.kubernetes.io/instance": "ic",
    "app.kubernetes.io/component": "serving",
}
KEY = {"apiKey.enabled": True, "apiKey.existingSecret": "key"}
INGRESS = {**KEY, "ingress.enabled": True, "ingress.host": "ic.example.org"}
DNS = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}
TRAEFIK = {"app.kubernetes.io/name": "traefik"}
PROMETHEUS = {"kubernetes.io/metadata.name": "monitoring"}


def deployment(values_files=(), **values):
    return one(render(values_files, set=values), "Deployment", NAME)["spec"]


def pod(values_files=(), **values):
    return deployment(values_files, **values)["template"]["spec"]


def container(values_files=(), **values):
    return pod(values_files, **values)["containers"][0]


def test_an_update_takes_no_second_gpu_and_keeps_what_rollback_needs():
    spec = deployment()
    assert spec["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1},
    }
    assert spec["revisionHistoryLimit"] >= 1
    assert deployment(**{"serving.strategy.type": "Recreate"})["strategy"] == {"type": "Recreate"}
    spare = deployment(**{"serving.strategy.maxSurge": 1, "serving.strategy.maxUnavailable": "0%"})
    assert spare["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": "0%"}


def test_three_probes_ask_for_health_and_the_first_waits_for_the_model():
    spec = deployment()
    probes = {
        name: spec["template"]["spec"]["containers"][0][f"{name}Probe"]
        for name in ("startup", "readiness", "liveness")
    }
    for probe in probes.values():
        assert probe["httpGet"] == {"path": "/health", "port": "http"}
    start = probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"]
    # minutes for the model, and an update that is given up only after that
    assert 600 <= start <= spec["progressDeadlineSeconds"]
    changed = container(**{"serving.probes.startup.failureThreshold": 7})["startupProbe"]
    assert changed["failureThreshold"] == 7


def test_replicas_keep_apart():
    (term,) = pod()["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"]["labelSelector"]["matchLabels"] == LABELS
    required = pod(**{"serving.antiAffinity": "required"})["affinity"]["podAntiAffinity"]
    (term,) = required["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term == {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": LABELS}}
    assert "affinity" not in pod(**{"serving.antiAffinity": "none"})
    (spread,) = pod()["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == LABELS
    assert spread["topologyKey"] == "topology.kubernetes.io/zone"
    assert "topologySpreadConstraints" not in pod(**{"serving.topologySpread.enabled": False})


def test_nodes_and_taints_are_the_users_choice():
    taint = {"key": "gpu", "operator": "Exists"}
    spec = pod(**{"serving.nodeSelector": {"disk": "fast"}, "serving.tolerations": [taint]})
    assert spec["nodeSelector"] == {"disk": "fast"} and spec["tolerations"] == [taint]


def test_a_priority_class_is_made_or_named():
    assert "priorityClassName" not in pod()
    made = render(set={"serving.priorityClass.create": True, "serving.priorityClass.value": 7})
    own = one(made, "PriorityClass")
    assert own["value"] == 7
    assert one(made, "Deployment")["spec"]["template"]["spec"]["priorityClassName"] == own["metadata"]["name"]
    named = render(set={"serving.priorityClass.name": "high"})
    assert not of_kind(named, "PriorityClass")
    assert one(named, "Deployment")["spec"]["template"]["spec"]["priorityClassName"] == "high"


@pytest.mark.parametrize(
    ("values", "folder", "volume"),
    [
        ({"model.path": "/opt/other"}, "/opt/other", None),
        (
            {"model.source": "pvc", "model.pvc.existingClaim": "claim", "model.path": "a/b/"},
            "/models/volume/a/b",
            {"persistentVolumeClaim": {"claimName": "claim"}},
        ),
        (
            {"model.source": "hostPath", "model.hostPath.path": "/srv/models"},
            "/models/volume",
            {"hostPath": {"path": "/srv/models", "type": "Directory"}},
        ),
    ],
)
def test_the_model_is_where_the_values_say(values, folder, volume):
    spec = pod(**values)
    (vllm,) = spec["containers"]
    assert vllm["command"] == ["vllm", "serve", folder]
    found = {item["name"]: item for item in spec["volumes"]}
    assert ("model" in found) is (volume is not None)
    if volume:
        assert found["model"] == {"name": "model", **volume}
        (mount,) = [item for item in vllm["volumeMounts"] if item["name"] == "model"]
        assert mount == {"name": "model", "mountPath": "/models/volume", "readOnly": True}


def test_compilation_caches_can_stay_on_the_node():
    spec = pod(**{"serving.cacheHostPath": "/var/cache/ic"})
    assert {"name": "cache", "hostPath": {"path": "/var/cache/ic", "type": "Directory"}} in spec["volumes"]
    assert {"name": "cache", "mountPath": "/tmp/cache"} in spec["containers"][0]["volumeMounts"]


def test_the_key_comes_from_a_secret_and_stands_nowhere():
    objects = render(set=KEY)
    reference = {"secretKeyRef": {"name": "key", "key": "api-key"}}
    vllm = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "VLLM_API_KEY", "valueFrom": reference} in vllm["env"]
    assert one(objects, "Pod")["spec"]["containers"][0]["env"] == [
        {"name": "API_KEY", "valueFrom": reference}
    ]
    assert not of_kind(objects, "Secret")
    assert "VLLM_API_KEY" not in json.dumps(render())


@pytest.mark.parametrize("routed", [False, True])
def test_the_ingress_is_tls_for_the_api_only(routed):
    objects = render(set={**INGRESS, "router.enabled": routed})
    ingress = one(objects, "Ingress")
    assert ingress["spec"]["ingressClassName"] == "traefik"
    assert ingress["spec"]["tls"] == [{"hosts": ["ic.example.org"], "secretName": f"{NAME}-tls"}]
    entrypoints = ingress["metadata"]["annotations"]["traefik.ingress.kubernetes.io/router.entrypoints"]
    assert entrypoints == "websecure"
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (rule["host"], path["path"], path["pathType"]) == ("ic.example.org", "/v1", "Prefix")
    entry = f"{NAME}-router" if routed else NAME
    assert path["backend"] == {"service": {"name": entry, "port": {"name": "http"}}}
    assert "http" in [port["name"] for port in one(objects, "Service", entry)["spec"]["ports"]]


def test_clients_come_in_at_one_service():
    values = {"service.type": "LoadBalancer", "service.annotations": {"a": "b"}}
    alone = one(render(set=values), "Service", NAME)
    assert alone["spec"]["type"] == "LoadBalancer" and alone["metadata"]["annotations"] == {"a": "b"}
    routed = render(set={**values, "router.enabled": True})
    kinds = {item["metadata"]["name"]: item["spec"].get("type") for item in of_kind(routed, "Service")}
    assert kinds == {NAME: "ClusterIP", f"{NAME}-replicas": None, f"{NAME}-router": "LoadBalancer"}
    # who comes in there does not reach metrics
    (port,) = one(routed, "Service", f"{NAME}-router")["spec"]["ports"]
    assert port["name"] == "http"


def peers(rule):
    """Who may come in by a rule: labels of namespaces and pods."""
    return [
        (
            peer.get("namespaceSelector", {}).get("matchLabels"),
            peer.get("podSelector", {}).get("matchLabels"),
        )
        for peer in rule["from"]
    ]


def policy(objects, name=NAME):
    spec = one(objects, "NetworkPolicy", name)["spec"]
    # both: what is not named is closed
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    return spec


OWN = {name: LABELS[name] for name in ("app.kubernetes.io/name", "app.kubernetes.io/instance")}
KUBE_SYSTEM = {"kubernetes.io/metadata.name": "kube-system"}


def test_only_traefik_prometheus_and_the_release_reach_the_server():
    (rule,) = policy(render())["ingress"]
    assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert peers(rule) == [(None, OWN), (PROMETHEUS, None), (KUBE_SYSTEM, TRAEFIK)]


def test_behind_a_router_clients_reach_the_router_only():
    objects = render(set={"router.enabled": True})
    (rule,) = policy(objects)["ingress"]
    assert peers(rule) == [(None, OWN), (PROMETHEUS, None)]
    spec = policy(objects, f"{NAME}-router")
    clients, metrics = spec["ingress"]
    assert peers(clients) == [(None, OWN), (KUBE_SYSTEM, TRAEFIK)]
    assert clients["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert peers(metrics) == [(PROMETHEUS, None)]
    dns, replicas = spec["egress"]
    assert dns["to"] == [DNS]
    assert replicas["to"] == [{"podSelector": {"matchLabels": OWN}}]
    assert replicas["ports"] == [{"port": 8000, "protocol": "TCP"}]


def test_a_server_calls_nobody_but_dns_unless_its_model_is_downloaded():
    (dns,) = policy(render())["egress"]
    assert dns["to"] == [DNS] and {port["port"] for port in dns["ports"]} == {53}
    _, download = policy(render(["download"]))["egress"]
    assert {port["port"] for port in download["ports"]} == {80, 443} and "to" not in download
    mirror = [{"ipBlock": {"cidr": "10.0.0.7/32"}}]
    _, download = policy(render(["download"], set={"networkPolicy.egressTo": mirror}))["egress"]
    assert download["to"] == mirror


def test_batches_and_evaluations_let_nobody_in_but_prometheus():
    objects = render(set={"batch.enabled": True, "evaluation.enabled": True})
    (metrics,) = policy(objects, f"{NAME}-batch")["ingress"]
    assert peers(metrics) == [(PROMETHEUS, None)] and metrics["ports"] == [
        {"port": "metrics", "protocol": "TCP"}
    ]
    assert "ingress" not in policy(objects, f"{NAME}-evaluation")


def test_policies_can_be_left_out():
    everything = {"router.enabled": True, "batch.enabled": True, "evaluation.enabled": True}
    assert not of_kind(render(set={**everything, "networkPolicy.enabled": False}), "NetworkPolicy")


def test_the_job_of_a_batch_goes_on_after_a_drain_and_stops_at_dead_letters():
    values = {"batch.enabled": True, "batch.failOnDeadLetters": True}
    job = one(render(set=values), "Job", f"{NAME}-batch-1")["spec"]
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0]["action"] == "FailJob" and rules[0]["onExitCodes"]["values"] == [3]
    assert rules[0]["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert rules[1] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    command = job["template"]["spec"]["containers"][0]["command"]
    assert "--fail-on-dead-letters" in command


def test_a_schedule_makes_a_cron_job_that_never_overlaps():
    objects = render(["batch-only"])
    cron = one(objects, "CronJob")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert (cron["schedule"], cron["timeZone"]) == ("0 22 * * *", "Europe/Berlin")
    claim = one(objects, "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_an_evaluation_is_a_job_or_a_hook():
    job = one(render(set={"evaluation.enabled": True}), "Job")
    assert job["metadata"]["name"].endswith("-evaluation-1") and "annotations" not in job["metadata"]
    hook = one(render(set={"evaluation.enabled": True, "evaluation.hook": True}), "Job")
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "post-upgrade"


def test_a_dead_end_of_steps_is_refused():
    with pytest.raises(HelmError, match=r"engine\.maxNumSeqs is 64; accepted: up to"):
        render(set={"engine.maxNumBatchedTokens": 32, "engine.maxNumSeqs": 64, "engine.maxModelLen": 4096})
    for size, message in ((3, "what divides the 32 attention heads of ic-1b"), (0, "minimum")):
        with pytest.raises(HelmError, match=message):
            render(set={"model.preset": "ic-1b", "engine.tensorParallelSize": size, "gpu.memoryGib": 80})
    with pytest.raises(HelmError, match="pipelineParallelSize is 5; accepted: up to the 4 layers of ic-nano"):
        render(set={"engine.pipelineParallelSize": 5})
