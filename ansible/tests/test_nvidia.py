"""Driver and container toolkit, from signed repositories of stand-in packages, on a machine whose GPU is files."""

import json
import subprocess

import nvidia_packages
import pytest
import yaml
from ansible_play import ANSIBLE, command, environment

GROUPS = {"k3s_servers": ["c1"], "k3s_agents": ["n1"]}
# only what concerns GPUs, which is how a driver is installed alone, too
TAGS = ("--tags", "nvidia")


@pytest.fixture(scope="module")
def variables(bed, web, scratch):
    """n1 has an H100 as the kernel would show it; c1 has none."""
    publisher = nvidia_packages.publish_all(web.folder, scratch / "keys")
    for name, text in {"vendor": "0x10de", "class": "0x030200", "device": "0x2330"}.items():
        file = bed.machines["n1"].root / "srv/pci-nvidia/0000:01:00.0" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    # the audio function of a card, and another maker's card
    for slot, vendor, kind in (
        ("0000:01:00.1", "0x10de", "0x040300"),
        ("0000:02:00.0", "0x1002", "0x030000"),
    ):
        folder = bed.machines["c1"].root / "srv/pci-nvidia" / slot
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
        (folder / "device").write_text("0x0001\n")
    return {
        "preflight_pci_path": "/srv/pci-nvidia",
        "preflight_min_free_gib": 1,
        "nvidia_driver_url": f"{web.url}/driver",
        "nvidia_driver_fingerprint": publisher.fingerprint,
        "nvidia_driver_module": "/run/nvidia-module",
        "nvidia_driver_efivars": "/srv/efivars",
        "nvidia_container_toolkit_url": f"{web.url}/toolkit",
        "nvidia_container_toolkit_fingerprint": publisher.fingerprint,
    }


def secure_boot(bed, value):
    """What the firmware of n1 would say: four bytes of attributes, then the value."""
    file = bed.machines["n1"].root / "srv/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes([6, 0, 0, 0, value]))


def installed(bed, host):
    """Packages of NVIDIA with their versions."""
    shown = bed.ssh(host, "dpkg-query -W -f '${Package} ${Version}\\n' '*nvidia*'", check=False).stdout
    return dict(line.split() for line in shown.splitlines() if len(line.split()) == 2)


def test_machine_without_a_gpu_is_refused_where_one_is_required(bed, play, variables):
    refused = play(
        "k3s", GROUPS, {**variables, "preflight_gpu_required": True}, *TAGS, "--limit", "c1", check=False
    )
    assert refused.code != 0
    assert "GPU: no NVIDIA display controller under /srv/pci-nvidia" in " ".join(refused.output.split())


def test_secure_boot_is_refused_before_anything_is_installed(bed, play, variables):
    secure_boot(bed, 1)
    refused = play("k3s", GROUPS, variables, *TAGS, check=False)
    assert refused.code != 0
    assert "n1 has Secure Boot on" in " ".join(refused.output.split())
    assert installed(bed, "n1") == {}
    secure_boot(bed, 0)


def test_other_signing_key_is_refused(bed, play, variables):
    refused = play("k3s", GROUPS, {**variables, "nvidia_driver_fingerprint": "A" * 40}, *TAGS, check=False)
    assert refused.code != 0
    assert f"accepted is {'A' * 40}. The source is not used." in " ".join(refused.output.split())
    assert bed.ssh("n1", "ls /etc/apt/sources.list.d").stdout == ""


def test_dry_run_installs_nothing(bed, play, variables):
    play("k3s", GROUPS, variables, *TAGS, "--check")
    assert installed(bed, "n1") == {}


def test_pinned_versions_one_reboot_and_no_change_after_it(bed, play, variables):
    boots = "cat /proc/sys/kernel/random/boot_id"
    before = {host: bed.ssh(host, boots).stdout for host in ("c1", "n1")}
    play("k3s", GROUPS, variables, *TAGS)
    # the repositories have newer ones
    assert installed(bed, "n1") == {"nvidia-open": "580.95.05-1", "nvidia-container-toolkit": "1.18.2-1"}
    assert bed.ssh("n1", "nvidia-smi").stdout.strip() == "580.95.05"
    after = {host: bed.ssh(host, boots).stdout for host in ("c1", "n1")}
    assert after["n1"] != before["n1"]
    # no GPU, no driver, no reboot
    assert after["c1"] == before["c1"]
    assert installed(bed, "c1") == {}
    assert bed.ssh("n1", "cat /var/log/nvidia-ctk.log").stdout.split() == [
        "cdi",
        "generate",
        "--output=/etc/cdi/nvidia.yaml",
    ]
    again = play("k3s", GROUPS, variables, *TAGS)
    assert again.changed == {"c1": 0, "n1": 0}, again.changed_tasks
    assert bed.ssh("n1", boots).stdout == after["n1"]


# as the distributions have it
UBUNTU = """PRETTY_NAME="Ubuntu 24.04.3 LTS"
NAME="Ubuntu"
VERSION_ID="24.04"
VERSION="24.04.3 LTS (Noble Numbat)"
VERSION_CODENAME=noble
ID=ubuntu
ID_LIKE=debian
UBUNTU_CODENAME=noble
"""


@pytest.fixture
def ubuntu(bed):
    """n2 says that it is Ubuntu: what Ansible makes of that is real, the system below stays Debian."""
    file = bed.machines["n2"].root / "etc/os-release"
    # a link to /usr/lib/os-release, which apt could restore
    link = file.readlink()
    file.unlink()
    file.write_text(UBUNTU)
    yield
    file.unlink()
    file.symlink_to(link)


def test_ubuntu_gets_its_own_repository(bed, play, variables, ubuntu):
    slot = bed.machines["n2"].root / "srv/pci-nvidia/0000:01:00.0"
    slot.mkdir(parents=True)
    for name, text in {"vendor": "0x10de", "class": "0x030200", "device": "0x2330"}.items():
        (slot / name).write_text(text + "\n")
    play("k3s", {"k3s_servers": ["n2"]}, {**variables, "nvidia_driver_reboot": False}, *TAGS)
    source = bed.ssh("n2", "cat /etc/apt/sources.list.d/ic-nvidia-driver.sources").stdout
    assert f"URIs: {variables['nvidia_driver_url']}/ubuntu2404/x86_64/\n" in source
    assert installed(bed, "n2")["nvidia-open"] == "580.95.05-1"


@pytest.mark.parametrize(
    ("distribution", "version", "architecture", "folder"),
    [
        ("Debian", "13.2", "x86_64", "debian13/x86_64"),
        ("Ubuntu", "22.04", "x86_64", "ubuntu2204/x86_64"),
        ("Ubuntu", "24.04", "aarch64", "ubuntu2404/sbsa"),
    ],
)
def test_address_and_acceptance_of_each_distribution(scratch, distribution, version, architecture, folder):
    """What follows from facts, with made-up facts."""
    facts = {
        "distribution": distribution,
        "distribution_version": version,
        "distribution_major_version": version.split(".")[0],
        "architecture": architecture,
    }
    roles = [
        ANSIBLE / "roles" / role / kind
        for role in ("nvidia_driver", "preflight")
        for kind in ("vars", "defaults")
    ]
    files = [ANSIBLE / "playbooks/group_vars/all/versions.yml", *(where / "main.yml" for where in roles)]
    shown = (
        "{{ nvidia_driver_uri }} {{ preflight_release in preflight_supported[ansible_facts.distribution] }}"
    )
    playbook = scratch / "facts.yml"
    task = {"ansible.builtin.debug": {"msg": shown}}
    play = {"hosts": "all", "gather_facts": False, "vars_files": list(map(str, files)), "tasks": [task]}
    playbook.write_text(yaml.safe_dump([play]))
    words = [command("ansible-playbook"), "-i", "localhost,", "-c", "local", playbook]
    done = subprocess.run(
        [*words, "-e", json.dumps({"ansible_facts": facts})],
        env=environment(scratch),
        cwd=ANSIBLE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"https://developer.download.nvidia.com/compute/cuda/repos/{folder} True" in " ".join(
        done.stdout.split()
    )
