"""Seeds, and a machine that the real cloud-init sets up from one, so far that Ansible logs in as its new user."""

import subprocess

import pytest
import yaml

GROUPS = {"slurm_nodes": ["n1", "n2"]}


@pytest.fixture(scope="module")
def seeds(bed, play, scratch):
    """Files for two machines, of which n1 boots from the network."""
    folder = scratch / "seeds"
    variables = {
        "provision_folder": str(folder),
        "base_users": [{"name": "admin", "keys": [(scratch / "key.pub").read_text().strip()]}],
        "provision_network": {"version": 2, "ethernets": {"host0": {"dhcp4": False}}},
    }
    play("provision", GROUPS, variables, "-e", '{"provision_dhcp_interface": "lo"}')
    again = play("provision", GROUPS, variables, "-e", '{"provision_dhcp_interface": "lo"}')
    assert again.changed == {"n1": 0, "n2": 0}, again.changed_tasks
    return folder


@pytest.fixture(scope="module")
def cloud_init(bed):
    """The real cloud-init on n2."""
    install = "apt-get update -q && apt-get install -q -y --no-install-recommends cloud-init dnsmasq-base"
    bed.ssh("n2", install, timeout_s=200)


def test_machine_sets_itself_up_and_lets_ansible_in(seeds, cloud_init, bed):
    target = bed.machines["n2"].root / "var/lib/cloud/seed/nocloud"
    target.mkdir(parents=True)
    for name in ("user-data", "meta-data"):
        (target / name).write_text((seeds / "n2/cloud-init" / name).read_text())
    bed.ssh("n2", "cloud-init schema --config-file /var/lib/cloud/seed/nocloud/user-data")
    bed.ssh("n2", "hostnamectl hostname blank")
    # the machine's network is the bed's own, and so is the host key that the bed knows
    own = "network: {config: disabled}\nssh_deletekeys: false\n"
    (bed.machines["n2"].root / "etc/cloud/cloud.cfg.d/99-bed.cfg").write_text(own)
    for stage in ("init --local", "init", "modules --mode=config", "modules --mode=final"):
        bed.ssh("n2", f"cloud-init {stage}", timeout_s=200)
    address = bed.machines["n2"].address
    words = bed.inside(
        "ssh", *bed.ssh_options(), f"admin@{address}", "sudo -n id -un; hostname; passwd -S | cut -d' ' -f2"
    )
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    # root by sudo, the new name, and a locked password
    assert done.stdout.split() == ["root", "n2", "L"], done.stderr


def test_dnsmasq_takes_its_settings(seeds, cloud_init, bed):
    (bed.machines["n2"].root / "srv/dnsmasq.conf").write_text((seeds / "dnsmasq.conf").read_text())
    bed.ssh("n2", "mkdir -p /tmp/tftp && dnsmasq --test --conf-file=/srv/dnsmasq.conf")


def test_autoinstall_carries_the_same_user_and_erases_only_the_named_disk(seeds):
    text = (seeds / "n1/autoinstall/user-data").read_text()
    assert text.startswith("#cloud-config\n")
    install = yaml.safe_load(text)["autoinstall"]
    assert install["version"] == 1
    assert install["storage"]["layout"]["match"] == {"size": "largest"}
    assert install["user-data"]["users"][0]["name"] == "admin"
    assert install["user-data"]["hostname"] == "n1"
    assert "identity" not in install


def test_machine_without_a_key_is_refused(bed, play, scratch):
    refused = play("provision", GROUPS, {"provision_folder": str(scratch / "none")}, check=False)
    assert refused.code != 0
    assert "the machine will take no passwords, so somebody has to have a key" in " ".join(
        refused.output.split()
    )
