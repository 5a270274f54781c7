"""SLURM for real: from bare Debian to jobs, killed machines and accounts."""

import subprocess
import time

import pytest

GROUPS = {"slurm_controllers": ["c1"], "slurm_accounting": ["c1"], "slurm_nodes": ["n1", "n2"]}
VARIABLES = {
    # nspawn gives its machines no cgroups that SLURM could divide
    "slurm_common_cgroups": False,
    # seconds instead of minutes, so that a test can wait for them
    "slurm_common_timeout_s": 10,
    "slurm_common_health_interval_s": 5,
    "slurm_common_extra": ["MessageTimeout=5"],
    "slurm_accounting_buffer_pool": "64M",
    # on n2 a folder as the kernel would show it with one H100
    "preflight_pci_path": "/srv/pci",
    "nvidia_driver_manage": False,
    "preflight_min_free_gib": 1,
    "preflight_package_lists_age_s": 0,
}


def until(bed, name, command, wanted, timeout_s=60):
    """Run a command until it prints what is wanted; fail with the last output."""
    deadline = time.monotonic() + timeout_s
    while True:
        printed = bed.ssh(name, command, check=False).stdout.strip()
        if wanted in printed:
            return printed
        assert time.monotonic() < deadline, f"{command} on {name} after {timeout_s} s: {printed}"
        time.sleep(1)


# stands in for the driver's tool where the GPU is made up: one GPU, and on it the processes that /run/gpu lists
NVIDIA_SMI = """#!/bin/bash
case "$*" in
  *--query-gpu=uuid*) [ -e /run/gpu-lost ] || echo GPU-0 ;;
  *--query-compute-apps=pid*)
    for pid in $(cat /run/gpu 2> /dev/null); do kill -0 $pid 2> /dev/null && echo $pid; done ;;
esac
true
"""


@pytest.fixture(scope="module")
def cluster(bed, play):
    """Dry run on the bare machines, then the real one; n2 has a GPU of files."""
    root = bed.machines["n2"].root
    for name, text in {"vendor": "0x10de", "class": "0x030200", "device": "0x2330"}.items():
        file = root / "srv/pci/0000:01:00.0" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    smi = root / "usr/bin/nvidia-smi"
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    # the numbers of /dev/null, which is the device that a container may make
    bed.ssh("n2", "mknod /dev/nvidia0 c 1 3 && chmod 666 /dev/nvidia0")
    dry = play("slurm", GROUPS, VARIABLES, "--check", "--diff")
    assert bed.ssh("c1", "command -v slurmctld munged nft", check=False).stdout == "", (
        "a dry run has installed something"
    )
    first = play("slurm", GROUPS, VARIABLES)
    until(bed, "c1", "sinfo -h -o '%D %T'", "2 idle")
    return dry, first


def submit(bed, script, *options):
    """Submit a batch script from c1; its number."""
    path = bed.machines["c1"].root / "srv/job.sh"
    path.write_text("#!/bin/bash\n" + script)
    return bed.ssh("c1", f"cd /tmp && sbatch --parsable {' '.join(options)} /srv/job.sh").stdout.strip()


def shown(bed, job):
    """What the controller knows about a job."""
    return f"scontrol show job {job} --oneliner"


def test_dry_run_on_bare_machines_passes(cluster):
    dry, _ = cluster
    assert all(counts["failed"] == 0 and counts["changed"] > 0 for counts in dry.recap.values())


def test_second_run_changes_nothing(cluster, play):
    second = play("slurm", GROUPS, VARIABLES)
    assert second.changed == {"c1": 0, "n1": 0, "n2": 0}, second.changed_tasks


def test_key_is_on_all_machines_and_in_no_output(cluster, bed):
    keys = {bed.ssh(name, "base64 -w0 /etc/munge/munge.key").stdout for name in bed.machines}
    assert len(keys) == 1
    for name in bed.machines:
        assert bed.ssh(name, "stat -c '%a %U' /etc/munge/munge.key").stdout.strip() in {
            "400 munge",
            "600 munge",
        }
    dry, first = cluster
    assert keys.pop()[:40] not in dry.output + first.output


def test_machines_run_a_job_together(cluster, bed):
    assert sorted(bed.ssh("c1", "srun -N2 -l hostname").stdout.splitlines()) == ["0: n1", "1: n2"]


def test_gpu_found_on_the_bus_can_be_asked_for(cluster, bed):
    printed = bed.ssh("c1", "srun --gres=gpu:1 bash -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'").stdout
    assert printed.split() == ["n2", "0"]
    refused = bed.ssh("c1", "srun --gres=gpu:2 true", check=False)
    assert "Requested node configuration is not available" in refused.stderr


def test_firewall_takes_the_cluster_and_ssh_and_nothing_else(cluster, bed):
    bed.ssh("n1", "systemd-run --unit=listener python3 -m http.server 8123")
    probe = "import socket, sys; socket.create_connection((sys.argv[1], 8123), 3)"
    address = bed.machines["n1"].address
    until(bed, "c1", f"python3 -c '{probe}' {address} && echo open", "open", timeout_s=15)
    # the bridge's own address is no machine of the inventory
    outside = subprocess.run(bed.inside("python3", "-c", probe, address), capture_output=True, text=True)
    assert "timed out" in outside.stderr
    bed.ssh("n1", "systemctl stop listener")


def test_epilog_ends_what_a_job_left_on_its_gpu(cluster, bed):
    # a process that has left its session and its parent: SLURM without cgroups loses sight of it
    submit(
        bed,
        "setsid --fork sleep 600 < /dev/null &> /dev/null; pgrep -x sleep > /run/gpu\n",
        "--gres=gpu:1",
        "--wait",
    )
    until(bed, "n2", "pgrep -x sleep || echo none", "none", timeout_s=20)
    assert "IDLE" in bed.ssh("c1", "scontrol show node n2 | grep State").stdout


@pytest.mark.parametrize(
    ("break_it", "mend_it", "reason"),
    [
        ("touch /run/gpu-lost", "rm /run/gpu-lost", "health: 0 of 1 GPUs"),
        (
            "mount -t tmpfs -o size=1m tmpfs /tmp; head -c 2m /dev/zero > /tmp/full",
            "umount /tmp",
            "health: /tmp is full",
        ),
    ],
    ids=["lost GPU", "full disk"],
)
def test_sick_machine_is_drained_and_taken_back(cluster, bed, break_it, mend_it, reason):
    bed.ssh("n2", break_it, check=False)
    try:
        until(bed, "c1", "scontrol show node n2", f"Reason={reason} [", timeout_s=30)
        assert "DRAIN" in bed.ssh("c1", "scontrol show node n2 | grep State").stdout
    finally:
        bed.ssh("n2", mend_it)
    until(bed, "c1", "sinfo -h -n n2 -o %T", "idle", timeout_s=30)


def test_what_a_person_drained_stays_drained(cluster, bed):
    bed.ssh("c1", "scontrol update nodename=n2 state=drain reason=memory")
    bed.ssh("n2", "/usr/local/sbin/ic-slurm-health")
    assert "drained" in bed.ssh("c1", "sinfo -h -n n2 -o %T").stdout
    bed.ssh("c1", "scontrol update nodename=n2 state=resume")


def test_job_of_a_killed_machine_starts_again(cluster, bed):
    script = (
        'echo start $SLURM_RESTART_COUNT >> /srv/starts\n[ -n "$SLURM_RESTART_COUNT" ] || srun sleep 300\n'
    )
    job = submit(bed, script, "-N2", "--requeue")
    until(bed, "c1", shown(bed, job), "JobState=RUNNING")
    until(bed, "n1", "cat /srv/starts", "start")
    bed.kill("n1")
    until(bed, "c1", "sinfo -h -n n1 -o %T", "down", timeout_s=60)
    until(bed, "c1", shown(bed, job), "Restarts=1")
    bed.boot("n1")
    bed.wait("n1")
    until(bed, "c1", shown(bed, job), "JobState=COMPLETED", timeout_s=120)
    assert bed.ssh("n1", "cat /srv/starts").stdout.split() == ["start", "start", "1"]
    until(bed, "c1", "sinfo -h -o '%D %T'", "2 idle")


def test_accounts_show_the_jobs(cluster, bed):
    job = submit(bed, "srun true\n", "-N2", "--wait")
    until(bed, "c1", f"sacct -X -n -P -j {job} -o State,NNodes,NodeList", "COMPLETED|2|n[1-2]")
    # the database takes its user by the socket only: nobody else is that user
    assert (
        "Access denied"
        in bed.ssh("c1", "runuser -u nobody -- mariadb -u slurm -e 'SELECT 1'", check=False).stderr
    )
