"""NFS between machines with kernels of their own: s1 serves, s2 mounts."""

import os
import time

import pytest
import uml
from ansible_play import player
from bed import until

GROUPS = {"storage_servers": ["s1"], "storage_clients": ["s2"]}
VARIABLES = {
    "preflight_min_free_gib": 1,
    # what a restarted server waits for, so that a test can
    "shared_storage_lease_s": 10,
    "shared_storage_mount_timeout_s": 15,
    "shared_storage_folders": [
        {"path": "/srv/shared", "mount": "/shared"},
        {"path": "/srv/slurm-state", "mount": "/var/lib/slurm-state", "root_squash": False, "mode": "0755"},
    ],
}
# what every machine gets, the tests of SLURM play
TAGS = ("--tags", "storage")


def test_kernel_without_nfs_is_refused(bed, play):
    """c1 has the kernel of the machine that runs the tests, and is not shown what that can."""
    groups = {"storage_servers": ["c1"], "storage_clients": ["n1"]}
    bed.ssh("c1", "mount --bind /dev/null /proc/filesystems")
    try:
        refused = play("storage", groups, VARIABLES, *TAGS, "--limit", "c1", check=False)
    finally:
        bed.ssh("c1", "umount /proc/filesystems")
    assert "has no module nfsd: install a kernel that has it" in " ".join(refused.output.split())


def test_dry_run_on_bare_machines_passes(bed, play):
    """As above, with a list that has it: nothing is started in a dry run."""
    for name in ("c1", "n1"):
        bed.ssh(name, "echo nodev nfs nfsd > /run/nfs && mount --bind /run/nfs /proc/filesystems")
    groups = {"storage_servers": ["c1"], "storage_clients": ["n1"]}
    try:
        dry = play("storage", groups, VARIABLES, *TAGS, "--check", "--diff")
    finally:
        for name in ("c1", "n1"):
            bed.ssh(name, "umount /proc/filesystems")
    assert dry.changed == {"c1": 1, "n1": 1}
    assert bed.ssh("c1", "command -v exportfs", check=False).stdout == ""


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (
            [{"path": "/srv/a", "mount": "/a", "clients": ["*"]}],
            "/srv/a would be open to everybody or to nobody",
        ),
        ([{"path": "/srv/a", "mount": "/a/"}], 'shared_storage_folders: "/a/": accepted are absolute paths'),
    ],
    ids=["open", "path"],
)
def test_bad_folders_are_refused(bed, play, folders, reason):
    variables = {**VARIABLES, "shared_storage_folders": folders}
    refused = play("storage", {"storage_servers": ["c1"]}, variables, *TAGS, check=False)
    assert reason in " ".join(refused.output.split())


@pytest.fixture(scope="module")
def machines(base, scratch):
    """Two machines with kernels of their own."""
    folder = scratch / "uml"
    folder.mkdir()
    kept = os.environ.get("IC_BED_CACHE")
    kernel = uml.unpack((base.parent if kept else scratch) / "uml-kernel")
    with uml.UmlBed(
        base=base,
        packages=base.parent / "debian",
        scratch=folder,
        names=["s1", "s2"],
        kernel=kernel,
        ptrace=uml.build_ptrace(folder),
    ) as made:
        yield made


@pytest.fixture(scope="module")
def run(machines):
    """Run a playbook on them."""
    return player(machines)


@pytest.fixture(scope="module")
def storage(run):
    """Both machines as the role makes them of bare ones."""
    run("storage", GROUPS, VARIABLES, *TAGS)


def test_folder_is_the_same_on_both_and_roots_files_are_nobodys(storage, machines):
    machines.ssh("s2", "touch /shared/by-root; runuser -u daemon -- sh -c 'echo hello > /shared/by-daemon'")
    assert machines.ssh("s1", "cat /srv/shared/by-daemon; stat -c %U /srv/shared/by-*").stdout.split() == [
        "hello",
        "daemon",
        "nobody",
    ]
    # where a role writes, root is root
    machines.ssh("s2", "install -d -o daemon /var/lib/slurm-state/jobs")
    assert machines.ssh("s1", "stat -c %U /srv/slurm-state/jobs").stdout.strip() == "daemon"
    assert "nfs4" in machines.ssh("s2", "findmnt -n -t nfs4 -o FSTYPE,OPTIONS /shared").stdout


def test_only_nfs_4_and_only_named_machines(storage, machines):
    assert machines.ssh("s1", "cat /proc/fs/nfsd/versions").stdout.split()[:2] == ["-3", "+4"]
    listening = machines.ssh("s1", "ss -Hltun | awk '{print $5}'").stdout
    assert ":2049" in listening
    assert ":111\n" not in listening
    refused = machines.ssh(
        "s1", f"mount -t nfs4 {machines.machines['s1'].address}:/srv/shared /mnt", check=False
    )
    assert refused.returncode != 0
    assert "access denied by server" in refused.stderr or "not permitted" in refused.stderr, refused.stderr


def test_server_goes_and_comes_back(storage, machines):
    """An open file waits for the server; a client that boots without it boots, and does not write beside it."""
    machines.ssh("s2", "runuser -u daemon -- touch /shared/later")
    machines.kill("s1")
    machines.ssh("s2", "systemd-run --unit=waits --uid=daemon sh -c 'echo later >> /shared/later'")
    time.sleep(3)
    assert machines.ssh("s2", "systemctl is-active waits", check=False).stdout.strip() == "active"
    machines.boot("s1")
    machines.wait("s1")
    until(machines, "s1", "cat /srv/shared/later", "later")
    machines.kill("s1")
    machines.kill("s2")
    machines.boot("s2")
    machines.wait("s2")
    assert machines.ssh("s2", "timeout 60 touch /shared/lost", check=False).returncode != 0
    machines.boot("s1")
    machines.wait("s1")
    until(machines, "s2", "timeout 60 cat /shared/later", "later")
    assert machines.ssh("s1", "ls /srv/shared").stdout.split() == ["by-daemon", "by-root", "later"]


def test_second_run_takes_away_what_is_no_longer_shared_and_changes_nothing_else(storage, machines, run):
    fewer = {**VARIABLES, "shared_storage_folders": VARIABLES["shared_storage_folders"][:1]}
    second = run("storage", GROUPS, fewer, *TAGS)
    assert {name.removeprefix("shared_storage : ") for name in second.changed_tasks} == {
        "Write the exports",
        "Export",
        "Stop those that are not wanted",
        "Remove them",
    }
    assert machines.ssh("s2", "findmnt -n -t nfs4 -o TARGET").stdout.split() == ["/shared"]
    assert "slurm-state" not in machines.ssh("s1", "exportfs -s").stdout


def test_reset_leaves_what_is_in_the_folders(storage, machines, run):
    run("reset", GROUPS, VARIABLES, "-e", "ic_reset=inventory")
    assert machines.ssh("s2", "findmnt -n -o TARGET /shared", check=False).stdout == ""
    for name in machines.machines:
        left = machines.ssh(
            name, "command -v exportfs mount.nfs4; ls /etc/systemd/system/*mount", check=False
        )
        assert left.stdout == ""
    assert machines.ssh("s1", "cat /srv/shared/by-daemon").stdout == "hello\n"
