"""SLURM for real: from bare Debian to jobs, killed machines and accounts."""

import json
import shutil
import subprocess

import pytest
import training
from bed import until

GROUPS = {"slurm_controllers": ["c1"], "slurm_accounting": ["c1"], "slurm_nodes": ["n1", "n2"]}
VARIABLES = {
    # nspawn gives its machines no cgroups that SLURM could divide
    "slurm_common_cgroups": False,
    # seconds instead of minutes, so that a test can wait for them
    "slurm_common_timeout_s": 10,
    "slurm_common_credential_s": 10,
    "slurm_common_health_interval_s": 5,
    "slurm_common_extra": ["MessageTimeout=5"],
    "slurm_accounting_buffer_pool": "64M",
    # on n1 and n2 a folder as the kernel would show it with one H100
    "preflight_pci_path": "/srv/pci",
    "nvidia_driver_manage": False,
    "preflight_min_free_gib": 1,
}


# stands in for the driver's tool where the GPU is made up: one GPU, and on it the processes that /run/gpu lists
NVIDIA_SMI = """#!/bin/bash
case "$*" in
  # as the real one does, it makes the device file: the numbers of /dev/null, which a container may make
  *--list-gpus*) [ -e /dev/nvidia0 ] || mknod -m 666 /dev/nvidia0 c 1 3 ;;
  *--query-gpu=uuid*) [ -e /run/gpu-lost ] || echo GPU-0 ;;
  *--query-compute-apps=pid*)
    for pid in $(cat /run/gpu 2> /dev/null); do kill -0 $pid 2> /dev/null && echo $pid; done ;;
esac
true
"""


@pytest.fixture(scope="module")
def cluster(bed, play):
    """Dry run on the bare machines, then the real one; the nodes have GPUs of files."""
    for root in (bed.machines[name].root for name in GROUPS["slurm_nodes"]):
        for name, text in {"vendor": "0x10de", "class": "0x030200", "device": "0x2330"}.items():
            file = root / "srv/pci/0000:01:00.0" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        smi = root / "usr/bin/nvidia-smi"
        smi.write_text(NVIDIA_SMI)
        smi.chmod(0o755)
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
    printed = bed.ssh("c1", "srun -w n2 --gres=gpu:1 bash -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'").stdout
    assert printed.split() == ["n2", "0"]
    refused = bed.ssh("c1", "srun --gres=gpu:2 true", check=False)
    assert "Requested node configuration is not available" in refused.stderr


def test_firewall_takes_the_cluster_and_ssh_and_nothing_else(cluster, bed):
    bed.ssh("n1", "systemd-run --unit=listener python3 -m http.server 8123")
    probe = "import socket, sys; socket.create_connection((sys.argv[1], 8123), 3)"
    address = bed.machines["n1"].address
    until(bed, "c1", f"python3 -c '{probe}' {address} && echo open", "open")
    # the bridge's own address is no machine of the inventory
    outside = subprocess.run(bed.inside("python3", "-c", probe, address), capture_output=True, text=True)
    assert "timed out" in outside.stderr
    bed.ssh("n1", "systemctl stop listener")


def test_epilog_ends_what_a_job_left_on_its_gpu(cluster, bed):
    # a process that has left its session and its parent: SLURM without cgroups loses sight of it
    script = "setsid --fork tail -f /dev/null &> /dev/null\nuntil pgrep -x tail > /run/gpu; do :; done\n"
    submit(bed, script, "-w n2", "--gres=gpu:1", "--wait")
    assert bed.ssh("n2", "cat /run/gpu").stdout.strip().isdigit()
    until(bed, "n2", "pgrep -x tail || echo none", "none")
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
        until(bed, "c1", "scontrol show node n2", f"Reason={reason} [")
        assert "DRAIN" in bed.ssh("c1", "scontrol show node n2 | grep State").stdout
    finally:
        bed.ssh("n2", mend_it)
    until(bed, "c1", "sinfo -h -n n2 -o %T", "idle")


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
    until(bed, "c1", "sinfo -h -n n1 -o %T", "down")
    until(bed, "c1", shown(bed, job), "Restarts=1")
    bed.boot("n1")
    bed.wait("n1")
    until(bed, "c1", shown(bed, job), "JobState=COMPLETED")
    assert bed.ssh("n1", "cat /srv/starts").stdout.split() == ["start", "start", "1"]
    until(bed, "c1", "sinfo -h -o '%D %T'", "2 idle")


def test_projects_own_job_trains_on_two_machines(cluster, bed):
    """FSDP2 over gloo, by the batch script that trains on GPUs; its only difference is the launcher's settings."""
    training.make_toys(bed.shared / "toys")
    environment = {
        "IC_PYTHON": training.python(),
        "IC_SLURM": training.PACKAGE / "slurm",
        "IC_LAUNCHER": training.PACKAGE / "accelerate/cpu.yaml",
        "GLOO_SOCKET_IFNAME": "host0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    sizes = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")
    words = [
        *("sbatch", "--parsable", "--wait", "--output=/shared/log", *sizes),
        *(training.PACKAGE / "slurm/several-nodes.sbatch", training.PACKAGE / "tests/recipes/text.yaml"),
        *("--model", "/shared/toys/model", "--corpora", "/shared/toys/corpus", "--output_dir", "/shared/run"),
        *("--max_steps", "5", "--save_strategy", "no"),
    ]
    settings = " ".join(f"{name}={value}" for name, value in environment.items())
    command = f"cd /shared && {settings} {' '.join(map(str, words))}"
    job = bed.ssh("c1", command, check=False, timeout_s=900).stdout.strip()
    log = (bed.shared / "log").read_text()
    assert (
        "COMPLETED|2|n[1-2]" in bed.ssh("c1", f"sacct -X -n -P -j {job} -o State,NNodes,NodeList").stdout
    ), log
    steps = [json.loads(line) for line in (bed.shared / "run/metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 5, log
    assert losses[-1] < losses[0]


def test_accounts_show_the_jobs(cluster, bed):
    job = submit(bed, "srun true\n", "-N2", "--wait")
    until(bed, "c1", f"sacct -X -n -P -j {job} -o State,NNodes,NodeList", "COMPLETED|2|n[1-2]")
    # the database takes its user by the socket only: nobody else is that user
    assert (
        "Access denied"
        in bed.ssh("c1", "runuser -u nobody -- mariadb -u slurm -e 'SELECT 1'", check=False).stderr
    )


def test_numbers_of_slurm_are_scraped(cluster, bed):
    job = submit(bed, "sleep 600\n", "--gres=gpu:1")
    until(bed, "c1", shown(bed, job), "JobState=RUNNING")
    bed.ssh("c1", "systemctl start ic-slurm-metrics.service")
    fetch = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9100/metrics').read().decode())"
    shown_metrics = bed.ssh("c1", f'python3 -c "{fetch}"').stdout
    bed.ssh("c1", f"scancel {job}")
    for line in (
        'slurm_gpus{kind="offered"} 2',
        'slurm_gpus{kind="used"} 1',
        'slurm_jobs{state="running"} 1',
        'slurm_nodes{state="idle"} 1',
    ):
        assert line in shown_metrics


def test_verify_runs_jobs_and_fails_when_a_gpu_is_missing(cluster, bed, play):
    until(bed, "c1", "sinfo -h -o '%D %T'", "2 idle")
    play("verify", GROUPS, VARIABLES)
    second = bed.machines["n2"].root / "srv/pci/0000:02:00.0"
    shutil.copytree(second.parent / "0000:01:00.0", second)
    try:
        failed = play("verify", GROUPS, VARIABLES, check=False)
    finally:
        shutil.rmtree(second)
    assert failed.code != 0
    assert "Requested node configuration is not available" in " ".join(failed.output.split())


def test_backup_and_restore_bring_a_lost_queue_back(cluster, bed, play, scratch):
    job = submit(bed, "true\n", "--hold", "--job-name=precious")
    # on a busy machine slurmctld takes longer than the seconds for which the role waits
    until(bed, "c1", "grep -q precious /var/lib/slurm/slurmctld/job_state && echo saved", "saved")
    backup = scratch / "before"
    play("backup", GROUPS, VARIABLES, "-e", f"ic_backup={backup}")
    assert sorted(path.name for path in (backup / "slurm").iterdir()) == ["accounts.sql.gz", "controller.tgz"]
    again = play("backup", GROUPS, VARIABLES, "-e", f"ic_backup={backup}", check=False)
    assert f"{backup} exists already" in again.output
    # a lost disk
    bed.ssh(
        "c1", "systemctl stop slurmctld && rm -rf /var/lib/slurm/slurmctld/* && systemctl start slurmctld"
    )
    until(bed, "c1", f"squeue -h -j {job} -o %j; scontrol ping", "UP")
    assert "precious" not in bed.ssh("c1", "squeue -h -o %j").stdout
    play("restore", GROUPS, VARIABLES, "-e", f"ic_backup={backup}")
    until(bed, "c1", "squeue -h -o %j", "precious")
    until(bed, "c1", "sacct -X -n -o JobName%20", "hostname")
    bed.ssh("c1", f"scancel {job}")


def test_machine_that_is_down_is_named_and_a_rerun_completes(cluster, bed, play):
    bed.kill("n1")
    more = {**VARIABLES, "slurm_common_max_time": "2-00:00:00"}
    failed = play("slurm", GROUPS, more, "--tags", "slurm", "-e", "ansible_ssh_timeout=20", check=False)
    assert failed.recap["n1"]["unreachable"] == 1
    assert "slurm_nodes has machines that did not answer in this run: n1." in " ".join(failed.output.split())
    assert "MaxTime=7-00:00:00" in bed.ssh("c1", "grep PartitionName /etc/slurm/slurm.conf").stdout
    bed.boot("n1")
    bed.wait("n1")
    play("slurm", GROUPS, more, "--tags", "slurm")
    for name in bed.machines:
        assert "MaxTime=2-00:00:00" in bed.ssh(name, "grep PartitionName /etc/slurm/slurm.conf").stdout
    until(bed, "c1", "sinfo -h -o '%D %T %l'", "2 idle 2-00:00:00")


def test_backup_controller_takes_over_and_gives_back(cluster, bed, play):
    """State on a folder of the host, which both machines see as they would see NFS."""
    groups = {**GROUPS, "slurm_controllers": ["c1", "n1"]}
    refused = play("slurm", groups, VARIABLES, "--tags", "slurm", check=False)
    assert "a backup controller needs slurm_common_state_dir on storage that both see" in " ".join(
        refused.output.split()
    )
    shared = {
        **VARIABLES,
        "slurm_common_state_dir": "/shared/slurmctld",
        "slurm_common_state_shared": True,
    }
    play("slurm", groups, shared, "--tags", "slurm")
    until(bed, "n2", "scontrol ping", "Slurmctld(backup) at n1 is UP")
    until(bed, "c1", "sinfo -h -o '%D %T'", "2 idle")
    held = submit(bed, "true\n", "--hold", "--job-name=precious")
    until(bed, "c1", "grep -q precious /shared/slurmctld/job_state && echo saved", "saved")
    # without the database, which is c1's, too, the backup reads what the primary knew of the accounts: that is
    # written every few minutes, and when slurmctld ends
    bed.ssh("c1", "systemctl restart slurmctld")
    until(bed, "c1", "scontrol ping", "Slurmctld(primary) at c1 is UP")
    assert "last_tres" in bed.ssh("c1", "ls /shared/slurmctld").stdout
    bed.kill("c1")
    until(bed, "n2", "squeue -h -o %j", "precious")
    assert "Slurmctld(primary) at c1 is DOWN" in bed.ssh("n2", "scontrol ping", check=False).stdout
    # the backup is no mere reader: it starts jobs
    assert bed.ssh("n2", "srun -w n2 hostname", timeout_s=180).stdout.strip() == "n2"
    later = bed.ssh("n2", "sbatch --parsable --hold --job-name=later --wrap=true").stdout.strip()
    bed.boot("c1")
    bed.wait("c1")
    until(bed, "n2", "scontrol ping", "Slurmctld(primary) at c1 is UP")
    until(bed, "c1", "squeue -h -S i -o %i", f"{held}\n{later}")
    again = play("slurm", groups, shared, "--tags", "slurm")
    assert again.changed == {"c1": 0, "n1": 0, "n2": 0}, again.changed_tasks


def test_reset_asks_twice_and_takes_all_away(cluster, bed, play):
    refused = play("reset", GROUPS, VARIABLES, check=False)
    assert refused.code != 0
    assert "say -e ic_reset=inventory" in " ".join(refused.output.split())
    play("reset", GROUPS, VARIABLES, "-e", "ic_reset=inventory")
    for name in bed.machines:
        left = bed.ssh(
            name, "command -v slurmctld slurmd munged; ls -d /etc/slurm /etc/munge", check=False
        ).stdout
        assert left == ""
