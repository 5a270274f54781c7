"""K3s against a stand-in for its binary, k3s_stand_in.py: everything around the binary runs for real."""

import base64
import hashlib
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import chart_tools
import pytest
import yaml
from bed import GATEWAY

STAND_IN = (Path(__file__).parent / "k3s_stand_in.py").read_text()
TOKEN = "0123456789abcdef-not-for-logs"
OLD, NEW = "v1.33.9+k3s1", "v1.34.2+k3s1"
SERVERS = {"k3s_servers": ["c1", "n1", "n2"]}
GROUPS = {"k3s_servers": ["c1"], "k3s_agents": ["n1", "n2"]}
# what both clusters have in common, the tests of SLURM play
TAGS = ("--tags", "k3s")


def binary(version):
    """The stand-in of a version: another file, as another release would be."""
    return STAND_IN.replace("@VERSION@", version).encode()


def variables(version, **more):
    """Settings of the cluster; its files come from a server on the bed's bridge."""
    sums = {"binary": hashlib.sha256(binary(version)).hexdigest(), "images": "0" * 64}
    return {
        "k3s_common_version": version,
        "k3s_common_sha256": sums,
        "k3s_common_url": f"http://{GATEWAY}:8090/k3s",
        "k3s_common_token": TOKEN,
        "preflight_min_free_gib": 1,
        **more,
    }


VARIABLES = variables(OLD)


@pytest.fixture(scope="module")
def releases(web):
    """Two releases to download."""
    for version in (OLD, NEW):
        folder = web.folder / "k3s" / version
        folder.mkdir(parents=True)
        (folder / "k3s").write_bytes(binary(version))


@pytest.fixture(scope="module")
def cluster(bed, play, releases):
    """One server, two agents."""
    dry = play("k3s", GROUPS, VARIABLES, *TAGS, "--check", "--diff")
    left = bed.ssh("c1", "command -v nft k3s; ls -d /etc/rancher", check=False).stdout
    assert left == "", "a dry run has installed something"
    first = play("k3s", GROUPS, VARIABLES, *TAGS, "--diff", "-v")
    return SimpleNamespace(dry=dry, first=first)


def calls(bed, host):
    """How the stand-in was called on a machine."""
    return [
        json.loads(line)["words"]
        for line in bed.ssh(host, "cat /var/log/k3s-stand-in.jsonl").stdout.splitlines()
    ]


def nodes(bed):
    """What the cluster knows of its nodes."""
    return json.loads(bed.ssh("c1", "cat /var/lib/rancher/k3s/server/db/etcd/nodes.json").stdout)


def config(bed, host, name="config.yaml"):
    """K3s' configuration on a machine."""
    return yaml.safe_load(bed.ssh(host, f"cat /etc/rancher/k3s/{name}").stdout)


def test_dry_run_on_bare_machines_passes(cluster):
    assert {host: counts["failed"] for host, counts in cluster.dry.recap.items()} == {
        "c1": 0,
        "n1": 0,
        "n2": 0,
    }


def test_server_and_agents_are_one_cluster(cluster, bed):
    assert nodes(bed) == {
        "c1": {"role": "server", "version": OLD},
        "n1": {"role": "agent", "version": OLD},
        "n2": {"role": "agent", "version": OLD},
    }
    assert bed.ssh("c1", "systemctl is-enabled k3s; systemctl is-active k3s").stdout.split() == [
        "enabled",
        "active",
    ]
    assert bed.ssh("n1", "systemctl is-enabled k3s-agent").stdout.strip() == "enabled"


def test_configuration(cluster, bed):
    server = config(bed, "c1")
    assert server["node-name"] == "c1"
    assert server["node-ip"] == bed.machines["c1"].address
    assert server["secrets-encryption"] is True
    assert server["write-kubeconfig-mode"] == "0600"
    assert config(bed, "c1", "config.yaml.d/10-cluster.yaml") == {"cluster-init": True}
    agent = config(bed, "n1")
    assert agent == {
        "node-name": "n1",
        "node-ip": bed.machines["n1"].address,
        "server": f"https://{bed.machines['c1'].address}:6443",
        "token-file": "/etc/rancher/k3s/token",
    }


def test_token_is_in_one_file_and_in_no_output(cluster, bed):
    assert TOKEN not in cluster.dry.output + cluster.first.output
    # -xdev: these tests themselves are mounted into the machine, and name it
    search = f"find /etc /root /tmp /var/log -xdev -type f -exec grep -lF {TOKEN} {{}} + || true"
    holders = bed.ssh("n1", search).stdout.split()
    assert holders == ["/etc/rancher/k3s/token"]
    assert bed.ssh("n1", "stat -c '%a %U' /etc/rancher/k3s/token").stdout.strip() == "600 root"
    assert not any(TOKEN in " ".join(words) for words in calls(bed, "c1") + calls(bed, "n1"))


def test_second_run_changes_and_restarts_nothing(cluster, bed, play):
    """k3s-ansible issue 564: every run installed again, and restarted."""
    show = "systemctl show -P MainPID k3s k3s-agent"
    before = [bed.ssh(host, show).stdout for host in bed.machines]
    second = play("k3s", GROUPS, VARIABLES, *TAGS)
    assert second.changed == {"c1": 0, "n1": 0, "n2": 0}, second.changed_tasks
    assert [bed.ssh(host, show).stdout for host in bed.machines] == before


def test_other_version_is_refused_outside_of_an_upgrade(cluster, bed, play):
    refused = play("k3s", GROUPS, variables(NEW), *TAGS, check=False)
    assert refused.code != 0
    assert f"n1 runs K3s {OLD}, and k3s_common_version is {NEW}: playbooks/upgrade.yml" in " ".join(
        refused.output.split()
    )
    assert nodes(bed)["c1"]["version"] == OLD


def test_wrong_checksum_is_refused_and_nothing_is_started(cluster, bed, play):
    wrong = variables(NEW)
    wrong["k3s_common_sha256"] = {"binary": "f" * 64, "images": "0" * 64}
    bed.ssh("c1", "truncate -s0 /var/log/k3s-stand-in.jsonl")
    failed = play("upgrade", GROUPS, wrong, check=False)
    assert failed.code != 0
    assert "The checksum for" in failed.output
    assert bed.ssh("c1", "k3s --version").stdout.split()[2] == OLD
    # the machine stays drained, and the others are not touched
    assert [words[1] for words in calls(bed, "c1") if words[0] == "kubectl"] == ["drain"]


def test_failed_drain_stops_the_upgrade(cluster, bed, play):
    bed.ssh("c1", "touch /run/k3s-drain-fails")
    failed = play("upgrade", GROUPS, variables(NEW), check=False)
    bed.ssh("c1", "rm /run/k3s-drain-fails")
    assert failed.code != 0
    assert "disruption budget" in failed.output
    assert {node["version"] for node in nodes(bed).values()} == {OLD}


def test_upgrade_goes_machine_by_machine_with_pods_moved_away(cluster, bed, play):
    bed.ssh("c1", "truncate -s0 /var/log/k3s-stand-in.jsonl")
    play("upgrade", GROUPS, variables(NEW))
    assert {node["version"] for node in nodes(bed).values()} == {NEW}
    order = [
        words[1:3]
        for words in calls(bed, "c1")
        if words[0] == "kubectl" and words[1] in {"drain", "uncordon"}
    ]
    assert order == [[verb, host] for host in ("c1", "n1", "n2") for verb in ("drain", "uncordon")]
    again = play("upgrade", GROUPS, variables(NEW))
    assert again.changed == {"c1": 0, "n1": 0, "n2": 0}, again.changed_tasks


def test_downgrade_is_refused(cluster, play):
    refused = play("upgrade", GROUPS, variables(OLD), check=False)
    assert refused.code != 0
    assert "Downgrades and skipped versions are not supported" in " ".join(refused.output.split())


def test_missing_token_and_even_number_of_servers_are_refused(cluster, play):
    refused = play("k3s", GROUPS, {**variables(NEW), "k3s_common_token": "short"}, *TAGS, check=False)
    assert "k3s_common_token has 5 characters, at least 16 are needed" in " ".join(refused.output.split())
    two = {"k3s_servers": ["c1", "n1"], "k3s_agents": ["n2"]}
    refused = play("k3s", two, variables(NEW), *TAGS, check=False)
    assert "k3s_servers has 2 machines, accepted are 1, 3, 5 and 7" in " ".join(refused.output.split())


def test_files_for_machines_without_the_internet_are_checked_here(cluster, play, scratch):
    folder = scratch / "artefacts"
    folder.mkdir()
    (folder / "k3s").write_bytes(binary(NEW))
    images = folder / "k3s-airgap-images-amd64.tar.zst"
    offline = {
        **variables(NEW),
        "k3s_common_artefacts": str(folder),
        "k3s_common_url": "http://nowhere.invalid",
    }
    refused = play("k3s", GROUPS, offline, *TAGS, check=False)
    assert f"{images} is missing" in " ".join(refused.output.split())
    images.write_bytes(b"other images")
    refused = play("k3s", GROUPS, offline, *TAGS, check=False)
    assert f"{images} has the SHA-256 {hashlib.sha256(b'other images').hexdigest()}" in " ".join(
        refused.output.split()
    )


@pytest.fixture(scope="module")
def three(cluster, bed, play, scratch):
    """Taken away, and made anew with three servers, from files of the machine that runs Ansible."""
    play("reset", GROUPS, VARIABLES, "-e", "ic_reset=inventory")
    for host in bed.machines:
        left = bed.ssh(
            host, "ls -d /etc/rancher /var/lib/rancher /usr/local/bin/k3s; pgrep k3s", check=False
        ).stdout
        assert left == ""
    folder = scratch / "release"
    folder.mkdir()
    (folder / "k3s").write_bytes(binary(NEW))
    (folder / "k3s-airgap-images-amd64.tar.zst").write_bytes(b"images")
    offline = {
        **variables(NEW),
        "k3s_common_artefacts": str(folder),
        "k3s_common_url": "http://nowhere.invalid",
    }
    offline["k3s_common_sha256"]["images"] = hashlib.sha256(b"images").hexdigest()
    play("k3s", SERVERS, offline, *TAGS)
    return offline


def test_three_servers_of_which_the_first_founds_the_cluster(three, bed):
    assert nodes(bed) == {host: {"role": "server", "version": NEW} for host in ("c1", "n1", "n2")}
    assert config(bed, "c1", "config.yaml.d/10-cluster.yaml") == {"cluster-init": True}
    join = {"server": f"https://{bed.machines['c1'].address}:6443"}
    assert config(bed, "n1", "config.yaml.d/10-cluster.yaml") == join
    assert bed.ssh("n2", "cat /var/lib/rancher/k3s/agent/images/*.zst").stdout == "images"


def test_backup_and_restore_of_a_cluster(three, bed, play, scratch):
    backup = scratch / "etcd"
    played = play("backup", SERVERS, three, "-e", f"ic_backup={backup}", "--diff")
    assert TOKEN not in played.output
    assert (backup / "k3s/token").read_text() == TOKEN
    # a majority is lost, and what the last one has is not the cluster's any more
    for host in bed.machines:
        bed.ssh(host, "systemctl stop k3s && echo '{}' > /var/lib/rancher/k3s/server/db/etcd/nodes.json")
        bed.ssh(host, "truncate -s0 /var/log/k3s-stand-in.jsonl")
    played = play("restore", SERVERS, three, "-e", f"ic_backup={backup}", "--diff")
    assert TOKEN not in played.output
    assert set(nodes(bed)) == {"c1", "n1", "n2"}
    reset = [
        "server",
        "--cluster-reset",
        "--cluster-reset-restore-path=/var/lib/rancher/k3s/server/ic-restore",
    ]
    assert calls(bed, "c1") == [reset, ["server"]]
    assert calls(bed, "n1") == [["server"]]


def test_charts_are_handed_over_with_values_for_the_smallest_gpu(three, bed, play, web):
    for host, said in {"n1": "81559, 9.0", "n2": "8192, 7.5"}.items():
        root = bed.machines[host].root
        device = root / "srv/pci-deploy/0000:01:00.0"
        device.mkdir(parents=True)
        for name, text in {"vendor": "0x10de", "class": "0x030200", "device": "0x2330"}.items():
            (device / name).write_text(text + "\n")
        smi = root / "usr/bin/nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho {said}\n")
        smi.chmod(0o755)
    (web.folder / "weights").write_bytes(b"weights")
    file = {
        "name": "ic-1b/model",
        "url": f"{web.url}/weights",
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    given = {**three, "preflight_pci_path": "/srv/pci-deploy", "model_cache_files": [file]}
    play("deploy", SERVERS, {**given, "gpu_runtime_time_slices": 2})
    again = play("deploy", SERVERS, {**given, "gpu_runtime_time_slices": 2})
    assert again.changed == {"c1": 0, "n1": 0, "n2": 0}, again.changed_tasks
    assert bed.ssh("n2", "cat /var/lib/ic-models/ic-1b/model").stdout == "weights"
    charts = {}
    for name in ("ic", "nvidia-device-plugin", "dcgm-exporter", "kube-prometheus-stack"):
        path = f"/var/lib/rancher/k3s/server/manifests/ic-{name}.yaml"
        charts[name] = yaml.safe_load(bed.ssh("c1", f"cat {path}").stdout)["spec"]
    values = yaml.safe_load(charts["ic"]["valuesContent"])
    assert values == {"gpu": {"memoryGib": 8.0}, "engine": {"dtype": "half"}}
    plugin = yaml.safe_load(charts["nvidia-device-plugin"]["valuesContent"])
    assert (
        yaml.safe_load(plugin["config"]["map"]["default"])["sharing"]["timeSlicing"]["resources"][0][
            "replicas"
        ]
        == 2
    )
    assert yaml.safe_load(charts["kube-prometheus-stack"]["valuesContent"])["kubeEtcd"] == {"enabled": False}
    rendered = render(charts["ic"], web.folder)
    engine = next(item for item in rendered if item["kind"] == "Deployment")
    arguments = engine["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "half" in " ".join(map(str, arguments))


def test_verify_runs_a_job_on_a_gpu_and_says_why_it_cannot(three, bed, play):
    none = play("verify", SERVERS, {**three, "preflight_pci_path": "/srv/nothing"})
    assert "no machine of K3s has a GPU" in none.output
    given = {**three, "preflight_pci_path": "/srv/pci-deploy"}
    # the plugin offers fewer GPUs than the bus shows
    missing = play("verify", SERVERS, given, check=False)
    assert missing.recap["c1"]["failed"] == 1
    bed.ssh("c1", """echo '{"n1": 1, "n2": 1}' > /run/k3s-gpus; truncate -s0 /var/log/k3s-stand-in.jsonl""")
    played = play("verify", SERVERS, given)
    assert "n1: NVIDIA H100 80GB HBM3" in played.output
    assert played.changed["c1"] == 0
    verbs = [
        words[1:4] for words in calls(bed, "c1") if words[0] == "kubectl" and words[1:3] != ["get", "node"]
    ]
    assert verbs[-1] == ["delete", "job", "ic-verify-n2"]
    bed.ssh("c1", "echo '0/3 nodes are available: 3 Insufficient nvidia.com/gpu.' > /run/k3s-job-fails")
    failed = play("verify", SERVERS, given, check=False)
    text = " ".join(failed.output.split())
    assert "n1: a pod could not use a GPU (FailureTarget Failed). Log: error: no GPU." in text
    assert "Pod: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu." in text
    # removed also then
    assert bed.ssh("c1", "ls /var/lib/rancher/k3s/server/db/jobs").stdout == ""


def test_lost_first_server_joins_those_that_are_left(three, bed, play):
    bed.ssh("c1", "systemctl stop k3s && rm -rf /etc/rancher /var/lib/rancher /usr/local/bin/k3s")
    play("k3s", SERVERS, three, *TAGS)
    # founding again would have made a second cluster beside the first
    assert config(bed, "c1", "config.yaml.d/10-cluster.yaml") == {
        "server": f"https://{bed.machines['n1'].address}:6443"
    }


def render(spec, folder):
    """The chart in a manifest, rendered by the real Helm with the values in it."""
    packed, values = folder / "chart.tgz", folder / "values.yaml"
    packed.write_bytes(base64.b64decode(spec["chartContent"]))
    values.write_text(spec["valuesContent"])
    helm = str(chart_tools.tools().helm)
    done = subprocess.run(
        [helm, "template", "ic", packed, "-f", values], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]
