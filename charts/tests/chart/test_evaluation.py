"""The evaluation Job's pipeline: what is rendered, what is refused, and its own command run with its own files."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import openai_server
import pytest
import yaml
from chart_tools import HELM3, HELM4, ROOT, HelmError, of_kind, one, render
from ic_model import checkpoint_path

NAME = "ic-infinite-context-evaluation"
MIB_TOKENS = 1_048_576
LIMIT = {"task": "niah", "context_tokens": MIB_TOKENS, "least": 0.95}
PIPELINE = {
    "evaluation.enabled": True,
    "evaluation.pipeline.enabled": True,
    "evaluation.pipeline.thresholds": [LIMIT],
}
BASE = {"evaluation.pipeline.base.existingClaim": "results"}
JUDGE = {"evaluation.pipeline.config.judge.server": "http://judge:8000"}
DOCKERFILE = ROOT / "images" / "vllm" / "Dockerfile"


def parts(**options):
    """The Job's pod and the files of its ConfigMap."""
    objects = render(**options)
    return one(objects, "Job")["spec"]["template"]["spec"], one(objects, "ConfigMap", NAME)["data"]


@pytest.fixture(scope="module")
def serve_parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(exit_on_error=False))


@pytest.mark.parametrize("package", [HELM3, HELM4])
def test_the_files_are_what_the_pipeline_reads(tmp_path, package):
    from ic_train.evaluation.pipeline import load_config
    from ic_train.evaluation.thresholds import load_thresholds

    words = {"evaluation.pipeline.config.evaluate": ["--suite", "niah", "--questions", "200"]}
    judge = {**JUDGE, "networkPolicy.evaluationTo": [{"podSelector": {}}]}
    values = {"model.path": "/models/own", **PIPELINE, **words, **judge}
    _, files = parts(set=values, package=package)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    config = load_config(tmp_path / "pipeline.yaml")
    assert config["evaluate"] == ["--tokenizer", "/models/own", "--suite", "niah", "--questions", "200"]
    assert config["judge"] == {"server": "http://judge:8000", "arguments": []}
    assert config["start_timeout_s"] == 900
    (threshold,) = load_thresholds(tmp_path / config["thresholds"])
    assert (threshold.context_tokens, threshold.limit, threshold.value) == (MIB_TOKENS, "least", 0.95)


@pytest.mark.parametrize("name", ["one-8gb-gpu", "four-a100", "cpu"])
def test_the_jobs_server_has_the_flags_of_the_deployments(name, serve_parser):
    objects = render([name], set=PIPELINE)
    config = yaml.safe_load(one(objects, "ConfigMap", NAME)["data"]["pipeline.yaml"])
    words = config["serve"]
    assert words[:7] == ["vllm", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}"]
    assert serve_parser.parse_args([word.replace("{port}", "8000") for word in words[2:]])
    (vllm,) = one(objects, "Deployment", "ic-infinite-context")["spec"]["template"]["spec"]["containers"]
    assert words[7:] and " ".join(words[7:]) in " ".join(vllm["args"])
    assert "judge" not in config


def test_the_pipeline_gets_the_model_its_files_and_a_folder_of_its_own():
    values = {**PIPELINE, **BASE, "evaluation.pipeline.base.path": "/last/evaluation/"}
    spec, _ = parts(set=values)
    (container,) = spec["containers"]
    assert container["command"] == ["ic-train", "evaluate", "pipeline"]
    config = ["--config", "/pipeline/pipeline.yaml"]
    out = ["--out", "/results/$(JOB_UID)", "--base", "/base/last/evaluation"]
    assert container["args"] == ["/models/ic-nano", *config, *out]
    # Kubernetes fills it in from a variable that is defined before
    (uid,) = [variable for variable in container["env"] if variable["name"] == "JOB_UID"]
    label = "metadata.labels['batch.kubernetes.io/controller-uid']"
    assert uid["valueFrom"] == {"fieldRef": {"fieldPath": label}}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["pipeline"]["configMap"] == {"name": NAME}
    assert volumes["base"]["persistentVolumeClaim"] == {"claimName": "results"}
    read_only = {mount["name"] for mount in container["volumeMounts"] if mount.get("readOnly")}
    assert read_only == {"pipeline", "base"}


def test_a_missed_threshold_is_not_tried_again_and_a_drained_node_is():
    from ic_train.evaluation.pipeline import BELOW_THRESHOLDS

    failed, drained = one(render(set=PIPELINE), "Job")["spec"]["podFailurePolicy"]["rules"]
    assert failed["action"] == "FailJob" and drained["action"] == "Ignore"
    assert failed["onExitCodes"]["values"] == [2, BELOW_THRESHOLDS]
    assert failed["onExitCodes"]["containerName"] == "evaluation"


def test_another_program_is_run_as_before():
    objects = render(set={"evaluation.enabled": True})
    assert NAME not in [item["metadata"]["name"] for item in of_kind(objects, "ConfigMap")]
    spec = one(objects, "Job")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["ic-train", "evaluate", "passkey"]
    assert container["args"][:4] == ["--model", "/models/ic-nano", "--results", "/results"]
    assert "podFailurePolicy" not in spec


def test_only_named_peers_are_reached_and_keys_come_from_secrets():
    peers = [{"ipBlock": {"cidr": "10.0.0.7/32"}}]
    key = {"name": "OPENAI_API_KEY", "valueFrom": {"secretKeyRef": {"name": "judge", "key": "api-key"}}}
    values = {**PIPELINE, **JUDGE, "networkPolicy.evaluationTo": peers, "evaluation.extraEnv": [key]}
    objects = render(set=values)
    _, judge = one(objects, "NetworkPolicy", NAME)["spec"]["egress"]
    assert judge == {"to": peers}
    (container,) = one(objects, "Job")["spec"]["template"]["spec"]["containers"]
    assert container["env"][-1] == key
    (_,) = one(render(set=PIPELINE), "NetworkPolicy", NAME)["spec"]["egress"]


def limits(**fields):
    return {"evaluation.pipeline.thresholds": [fields]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluation.pipeline.thresholds": []}, "thresholds is empty: every model would pass"),
        (limits(task="judge", least=0.9), r"one on judge and .*judge\.server is empty"),
        (limits(task="niah", least=0.9), "one on niah without context_tokens"),
        (limits(**LIMIT, most_loss=0.03), r"most_loss on niah and .*base\.existingClaim is empty"),
        ({"evaluation.pipeline.base.path": "last"}, "accepted: a folder below the root of a claim"),
        (
            {**BASE, "evaluation.pipeline.base.path": "../x"},
            'base has path "../x" and existingClaim "results"',
        ),
        (JUDGE, r"server is http://judge:8000 and networkPolicy\.evaluationTo is empty"),
        ({"evaluation.pipeline.config.judge.arguments": ["--seed", "1"]}, r"judge\.arguments has no effect"),
        # the schema's
        (limits(task="niah", context_tokens=4096, least=90), "less than or equal to 1|maximum"),
        (limits(task="niah", context_tokens=4096, leats=0.9), "leats"),
        (limits(task="niah", context_tokens=4096), "least"),
        ({"evaluation.pipeline.config.evaluate": ["--questions", 200]}, "evaluate.1.*string"),
        ({"evaluation.pipeline.config.speed": 1}, "speed"),
    ],
)
def test_what_would_fail_after_hours_or_hold_nothing_is_refused_at_once(values, message):
    with pytest.raises(HelmError, match=message):
        render(set={**PIPELINE, **values})


@pytest.fixture(scope="module")
def run_job(tmp_path_factory):
    """Runs the Job's container here, with its mounts below a folder of ours: exit status and output."""
    root = tmp_path_factory.mktemp("job")

    def run(threshold, base=None):
        served = [sys.executable, openai_server.__file__, "{port}"]
        asked = ["--suite", "niah", "--lengths", "2k", "--questions", "60", "--keys-per-context", "20"]
        values = {
            "model.path": str(checkpoint_path("ic-nano")),
            "evaluation.pipeline.config.serve": served,
            "evaluation.pipeline.config.evaluate": asked,
            "evaluation.pipeline.thresholds": [{"task": "niah", "context_tokens": 2048, **threshold}],
        }
        if base:
            values |= {**BASE, "evaluation.pipeline.base.path": base}
        spec, files = parts(set={**PIPELINE, **values})
        (container,) = spec["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        # the claim of the results is the base's, too
        places = {mounts["pipeline"]: root / "pipeline", mounts["results"]: root / "results"}
        places[mounts.get("base", "/base")] = root / "results"
        places[mounts["pipeline"]].mkdir(exist_ok=True)
        for name, text in files.items():
            (places[mounts["pipeline"]] / name).write_text(text)
        words = [*container["command"], *container["args"]]
        for mount, place in places.items():
            words = [
                str(place) + word[len(mount) :] if word.startswith(f"{mount}/") else word for word in words
            ]
        words = [word.replace("$(JOB_UID)", "job-1") for word in words]
        # as in the pod, `ic-train` is the one beside the interpreter
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=300, env=environment
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_exit_status_says_whether_the_thresholds_are_held(run_job):
    status, output = run_job({"least": 0.9})
    assert status == 0, output
    assert "passed: niah at 2,048 tokens: least 0.9, found 0.9398" in output
    # 60 of 60 do not show 97 %; the same Job's next pod asks nothing again, so the base is the run itself
    status, output = run_job({"least": 0.97, "most_loss": 0.1}, base="job-1/evaluation")
    assert status == 4, output
    assert "FAILED: niah at 2,048 tokens: least 0.97, found 0.9398" in output
    assert "passed: niah at 2,048 tokens: most_loss 0.1" in output


def evaluation_step():
    """The command that installs ic-train into the target `evaluation`, and its build arguments' defaults."""
    lines = DOCKERFILE.read_text().partition("AS evaluation\n")[2].splitlines()
    defaults = dict(line.removeprefix("ARG ").split("=") for line in lines if line.startswith("ARG "))
    joined = "\n".join(lines).replace("\\\n", "")
    (command,) = [line for line in joined.splitlines() if line.startswith("RUN ")]
    return command.partition("python3 ")[2], defaults


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    packages = [str(ROOT / "packages" / name) for name in ("ic-model", "ic-train")]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), *packages], check=True, timeout=120, capture_output=True)
    return folder


@pytest.mark.parametrize("extras", [None, ""])
def test_the_image_has_ruler_and_the_trackers_unless_they_are_left_out(wheels, tmp_path, extras):
    """The step resolved by pip with what is installed here; the image test has no way to a package index."""
    command, defaults = evaluation_step()
    report = tmp_path / "report.json"
    script = f'"$PYTHON" {command.replace("/wheels/", f"{wheels}/")} --dry-run --no-index --report {report}'
    environment = {**os.environ, **defaults, "PYTHON": sys.executable}
    if extras is not None:
        environment["EXTRAS"] = extras
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    installed = json.loads(report.read_text())["install"]
    (asked,) = [item for item in installed if item["metadata"]["name"] == "ic-train"]
    project = tomllib.loads((ROOT / "packages" / "ic-train" / "pyproject.toml").read_text())["project"]
    wanted = ["ruler", "tracking"] if extras is None else []
    assert set(wanted) <= project["optional-dependencies"].keys()
    assert sorted(asked.get("requested_extras", [])) == wanted
