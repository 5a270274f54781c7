"""Every values file: both Helms, Kubernetes' own schemas, and what those do not see."""

import itertools
import re

import chart_tools
import kubernetes_validate
import pytest
from chart_tools import CHART, HELM3, HELM4, HelmError, of_kind, one, render

FILES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
# what K3s supported when this was written, and the oldest that the chart accepts
KUBERNETES = ("1.30", "1.33", "1.34", "1.35", "1.36", "1.37")
POD_KINDS = ("Deployment", "Job", "CronJob", "Pod")
EVERYTHING = {
    "router.enabled": True,
    "batch.enabled": True,
    "evaluation.enabled": True,
    "ingress.enabled": True,
    "ingress.host": "ic.example.org",
    "apiKey.enabled": True,
    "apiKey.existingSecret": "key",
    "serving.priorityClass.create": True,
    "monitoring.enabled": True,
}


def pod_spec(item):
    """The pod of an object that has one."""
    if item["kind"] == "Pod":
        return item["spec"]
    spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
    return spec["template"]["spec"]


def pods(objects):
    return [(item["metadata"]["name"], pod_spec(item)) for item in objects if item["kind"] in POD_KINDS]


def containers(spec):
    return [*spec.get("initContainers", []), *spec["containers"]]


# what no file of ci/ has, or none together
VARIANTS = {
    "everything": EVERYTHING,
    "hpa": {"monitoring.enabled": True, "autoscaling.kind": "hpa"},
    "pipeline": {
        "evaluation.enabled": True,
        "evaluation.hook": True,
        "evaluation.resultsClaim": "results",
        "evaluation.pipeline.enabled": True,
        "evaluation.pipeline.thresholds": [{"task": "niah", "context_tokens": 16384, "most_loss": 0.03}],
        "evaluation.pipeline.base.existingClaim": "results",
        "networkPolicy.evaluationTo": [{"ipBlock": {"cidr": "10.0.0.7/32"}}],
    },
}


@pytest.fixture(scope="module", params=[*FILES, *VARIANTS])
def objects(request):
    return render(set=VARIANTS[request.param]) if request.param in VARIANTS else render([request.param])


def test_the_files_that_the_documentation_names_are_there():
    assert {"one-8gb-gpu", "four-a100", "cpu", "batch-only"} <= set(FILES)


@pytest.mark.parametrize(("name", "package"), [*itertools.product(FILES, (HELM3, HELM4))])
def test_lint_strict(name, package):
    file = str(CHART / "ci" / f"{name}-values.yaml")
    assert "0 chart(s) failed" in chart_tools.run_helm(
        "lint", "--strict", str(CHART), "-f", file, package=package
    )


@pytest.mark.parametrize("name", FILES)
def test_both_helms_render_the_same(name):
    assert render([name], package=HELM3) == render([name], package=HELM4)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_schemas(objects, version):
    for item in objects:
        if "monitoring.coreos.com" not in item["apiVersion"] and "keda" not in item["apiVersion"]:
            kubernetes_validate.validate(item, version, strict=True)


def test_every_kind_of_the_chart_is_in_one_of_the_files_or_variants():
    kinds = {item["kind"] for values in VARIANTS.values() for item in render(set=values)}
    kinds |= {item["kind"] for name in FILES for item in render([name])}
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*.yaml"))
    assert set(re.findall(r"^kind: (\w+)$", templates, re.MULTILINE)) - {"ServiceMonitor"} == kinds


def test_the_schemas_do_refuse():
    deployment = one(render(), "Deployment")
    deployment["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


def test_every_container_is_locked_down(objects):
    for name, spec in pods(objects):
        assert spec["automountServiceAccountToken"] is False, name
        context = spec["securityContext"]
        assert context["runAsNonRoot"] and context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in containers(spec):
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] and own["runAsNonRoot"], (name, container["name"])
            assert own["allowPrivilegeEscalation"] is False, (name, container["name"])
            assert own["capabilities"] == {"drop": ["ALL"]}, (name, container["name"])


def test_every_container_has_memory_limits_and_a_pinned_image(objects):
    for name, spec in pods(objects):
        for container in containers(spec):
            assert container["resources"]["limits"]["memory"], (name, container["name"])
            repository, _, tag = container["image"].rpartition(":")
            assert repository and re.fullmatch(r"[\w.-]+", tag), container["image"]
            assert tag not in ("latest", "nightly", "main")


def test_every_mount_has_its_volume_and_tmp_is_writable_where_vllm_runs(objects):
    for name, spec in pods(objects):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for container in containers(spec):
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= set(volumes), (name, container["name"])
            if "vllm" in [*container.get("command", []), *container.get("args", [])]:
                assert "emptyDir" in volumes[mounts["/tmp"]["name"]], name
                assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory", name


def test_config_maps_secrets_and_claims_that_pods_mount_are_in_the_release_or_named_by_the_user(objects):
    rendered = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for name, spec in pods(objects):
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in rendered, (name, volume)
            claim = volume.get("persistentVolumeClaim", {}).get("claimName", "")
            if claim.startswith("ic-infinite-context"):
                assert ("PersistentVolumeClaim", claim) in rendered, (name, volume)


def test_disruption_budgets_have_one_field_and_select_pods(objects):
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert len({"minAvailable", "maxUnavailable"} & budget["spec"].keys()) == 1
        assert selected(budget["spec"]["selector"]["matchLabels"], objects) == [budget["metadata"]["name"]]


def test_services_and_policies_select_exactly_their_pods(objects):
    for service in of_kind(objects, "Service"):
        assert len(selected(service["spec"]["selector"], objects)) == 1, service["metadata"]["name"]
    for policy in of_kind(objects, "NetworkPolicy"):
        found = selected(policy["spec"]["podSelector"]["matchLabels"], objects)
        assert len(found) == 1, (policy["metadata"]["name"], found)


def selected(labels, objects):
    """Names of the objects whose pods have these labels; a Job's number of the revision is left out."""
    names = []
    for item in objects:
        if item["kind"] in ("Deployment", "Job", "CronJob"):
            spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
            own = spec["template"]["metadata"]["labels"]
        elif item["kind"] == "Pod":
            own = item["metadata"]["labels"]
        else:
            continue
        if labels.items() <= own.items():
            names.append(re.sub(r"-\d+$", "", item["metadata"]["name"]))
    return names


def test_two_releases_in_one_namespace_do_not_touch_each_other(objects):
    del objects
    first, second = render(set=EVERYTHING, release="blue"), render(set=EVERYTHING, release="green")
    names = [{(item["kind"], item["metadata"]["name"]) for item in side} for side in (first, second)]
    assert not names[0] & names[1]
    for kind, path in (
        ("Service", ("spec", "selector")),
        ("Deployment", ("spec", "selector", "matchLabels")),
    ):
        for item in of_kind(first, kind):
            labels = item
            for key in path:
                labels = labels[key]
            assert selected(labels, second) == [], item["metadata"]["name"]


def test_grace_covers_pre_stop_and_shutdown(objects):
    for item in of_kind(objects, "Deployment"):
        spec = pod_spec(item)
        container = spec["containers"][0]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        args = container.get("args", [])
        timeout = int(args[args.index("--shutdown-timeout") + 1]) if "--shutdown-timeout" in args else 0
        assert spec["terminationGracePeriodSeconds"] >= pause + timeout + 10


def test_names_fit_however_long_the_release_is():
    for item in render(set=EVERYTHING | {"batch.schedule": "0 1 * * *"}, release="r" * 53):
        limit = 52 if item["kind"] == "CronJob" else 63
        assert len(item["metadata"]["name"]) <= limit, item["kind"]


def test_replicas_are_an_autoscalers_where_there_is_one():
    assert one(render(), "Deployment")["spec"]["replicas"] == 1
    scaled = render(set={"autoscaling.kind": "hpa", "monitoring.enabled": True})
    assert "replicas" not in one(scaled, "Deployment")["spec"]


def test_gpus_and_runtime_class_follow_the_values():
    spec = pod_spec(one(render(["download"]), "Deployment"))
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert spec["initContainers"][0]["command"][-1] == "/models/volume"
    cpu = pod_spec(one(render(["cpu"]), "Deployment"))
    assert "runtimeClassName" not in cpu
    assert list(cpu["containers"][0]["resources"]["limits"]) == ["memory"]


def test_nodes_are_selected_by_the_memory_of_their_gpus():
    affinity = pod_spec(one(render(["four-a100"]), "Deployment", "ic-infinite-context"))["affinity"]
    (term,) = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["81919"]}
    ]


def test_the_digest_decides():
    digest = "sha256:" + "0" * 64
    image = pod_spec(one(render(set={"image.digest": digest}), "Deployment"))["containers"][0]["image"]
    assert image.endswith(f":0.1.0-vllm0.32.0@{digest}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serving.drain.gracePeriodSeconds": 60}, r"gracePeriodSeconds is 60.*make 145.*at least 145"),
        ({"serving.podDisruptionBudget.minAvailable": 1}, "exactly one of them"),
        (
            {"serving.podDisruptionBudget.minAvailable": 1, "serving.podDisruptionBudget.maxUnavailable": ""},
            "no node could ever be drained",
        ),
        ({"serving.strategy.maxUnavailable": 0}, "no update could ever go on"),
        ({"serving.replicas": -1}, "serving.replicas|/serving/replicas"),
        ({"serving.replica": 1}, "replica"),
        ({"image.tag": "latest"}, "image.tag|/image/tag"),
        ({"image.digest": "sha256:abc"}, "digest"),
        ({"model.preset": "ic-1b"}, "images of images/ hold ic-nano only.*model.path to the folder"),
        ({"model.source": "pvc"}, "model.pvc.existingClaim is empty"),
        ({"model.source": "hostPath"}, "model.hostPath.path is empty"),
        ({"model.source": "download"}, "model.download.files is empty"),
        ({"model.preset": "ic-2b"}, r'model.preset is "ic-2b"; accepted: ic-135m, ic-1b, ic-nano, or custom'),
        ({"model.preset": "custom"}, "model.size.weightBytes is 0"),
        ({"apiKey.enabled": True}, "kubectl -n default create secret"),
        ({"ingress.enabled": True}, "ingress.host is empty"),
        ({"ingress.enabled": True, "ingress.host": "a.b"}, "apiKey.enabled is false"),
        ({"gpu.enabled": False, "engine.kvCacheDtype": "fp8"}, "accepted on a CPU: auto"),
        ({"gpu.enabled": False, "engine.tensorParallelSize": 2}, "accepted on a CPU: 1"),
        ({"router.enabled": True, "serving.enabled": False}, "nothing to route to"),
        ({"router.enabled": True, "serving.replicas": 17}, "up to router.maxReplicas"),
        ({"batch.enabled": True, "batch.objectStore.enabled": True}, "both are needed"),
    ],
)
def test_wrong_values_are_refused_with_a_sentence(values, message):
    # on a CPU the memory check comes first: let it pass
    base = {"engine.maxModelLen": 16384}
    with pytest.raises(HelmError) as refusal:
        render(set=base | values)
    assert re.search(message, str(refusal.value), re.DOTALL), str(refusal.value)


@pytest.mark.parametrize("name", FILES)
def test_the_notes_name_objects_that_are_there(name):
    file = str(CHART / "ci" / f"{name}-values.yaml")
    output = chart_tools.run_helm("install", "ic", str(CHART), "--dry-run=client", "-n", "ns", "-f", file)
    notes = output.split("NOTES:")[1]
    rendered = {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in render([name])}
    named = set(re.findall(r"(?:deployment|service|cronjob|job)/[a-z0-9-]+", notes))
    assert named and named <= rendered, (named, rendered)
    assert "<no value>" not in notes and "%!" not in notes
