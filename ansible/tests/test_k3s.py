"""K3s against a stand-in for its binary, k3s_stand_in.py: everything around the binary runs for real."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from bed import GATEWAY

STAND_IN = (Path(__file__).parent / "k3s_stand_in.py").read_text()
TOKEN = "0123456789abcdef-not-for-logs"
OLD, NEW = "v1.33.9+k3s1", "v1.34.2+k3s1"
SERVERS = {"k3s_servers": ["c1", "n1", "n2"]}
GROUPS = {"k3s_servers": ["c1"], "k3s_agents": ["n1", "n2"]}


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
        "preflight_package_lists_age_s": 0,
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
    dry = play("k3s", GROUPS, VARIABLES, "--check", "--diff")
    assert bed.ssh("c1", "ls /usr/local/bin/k3s /etc/rancher", check=False).stdout == ""
    first = play("k3s", GROUPS, VARIABLES, "--diff", "-v")
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
    holders = bed.ssh("n1", f"grep -rlF {TOKEN} /etc /root /tmp /var/log").stdout.split()
    assert holders == ["/etc/rancher/k3s/token"]
    assert bed.ssh("n1", "stat -c '%a %U' /etc/rancher/k3s/token").stdout.strip() == "600 root"
    assert not any(TOKEN in " ".join(words) for words in calls(bed, "c1") + calls(bed, "n1"))


def test_second_run_changes_and_restarts_nothing(cluster, bed, play):
    """k3s-ansible issue 564: every run installed again, and restarted."""
    show = "systemctl show -P MainPID k3s k3s-agent"
    before = [bed.ssh(host, show).stdout for host in bed.machines]
    second = play("k3s", GROUPS, VARIABLES)
    assert second.changed == {"c1": 0, "n1": 0, "n2": 0}, second.changed_tasks
    assert [bed.ssh(host, show).stdout for host in bed.machines] == before


def test_other_version_is_refused_outside_of_an_upgrade(cluster, bed, play):
    refused = play("k3s", GROUPS, variables(NEW), "--tags", "k3s", check=False)
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
    refused = play(
        "k3s", GROUPS, {**variables(NEW), "k3s_common_token": "short"}, "--tags", "k3s", check=False
    )
    assert "k3s_common_token has 5 characters, at least 16 are needed" in " ".join(refused.output.split())
    two = {"k3s_servers": ["c1", "n1"], "k3s_agents": ["n2"]}
    refused = play("k3s", two, variables(NEW), "--tags", "k3s", check=False)
    assert "k3s_servers has 2 machines, accepted are 1, 3, 5 and 7" in " ".join(refused.output.split())
