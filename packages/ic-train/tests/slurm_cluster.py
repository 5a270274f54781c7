"""A real SLURM cluster on this machine: a controller and two nodes, each its own slurmd, all on the loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
# requeued jobs wait for a credential to expire; the default is two minutes. Nodes are as large as said here,
# whatever the machine has, so that no job waits for another's end
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=3
MinJobAge=600
JobRequeue=1
GresTypes=gpu
MailProg=/bin/true
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=8 Gres=gpu:8
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=8 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    """Debian's SLURM, where it is missing."""
    if all(shutil.which(name, path=_path()) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(command, env=environment, capture_output=True, check=False).returncode:
        subprocess.run(["apt-get", "update", "-q"], env=environment, capture_output=True, check=False)
        subprocess.run(command, env=environment, capture_output=True, check=True)


class Cluster:
    """Starts in `__init__`, ends with `close`; nothing of it outlives that."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.chmod(0o755)
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._silent: list[int] = []
        self._buried: list[subprocess.Popen[bytes]] = []
        ports = free_ports(3)
        host = socket.gethostname().split(".")[0]
        config = CONFIG.format(root=root, host=host, controller_port=ports[0], port1=ports[1], port2=ports[2])
        (root / "slurm.conf").write_text(config)
        # SLURM wants a device file for each GPU, whatever the device is: these are /dev/null
        for number in range(8):
            os.mknod(root / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        gres = f"AutoDetect=off\nNodeName=node[1-2] Name=gpu File={root}/nvidia[0-7]\n"
        (root / "gres.conf").write_text(gres)
        (root / "state").mkdir()
        try:
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in ("node1", "node2"):
                self.start_node(node)
            self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%D %t") == "2 idle", "two idle nodes", 120)
        except BaseException:
            self.close()
            raise

    def run(self, *command: str) -> str:
        finished = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert finished.returncode == 0, f"{command}: {finished.stderr}{finished.stdout}"
        return finished.stdout.strip()

    def start_node(self, node: str) -> None:
        (self.root / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, ["slurmd", "-D", "-N", node])

    def silence_node(self, node: str) -> None:
        """As if its power went: nothing there answers any more, and nothing closes a connection either.

        Killing it would: SLURM would then hear of the step's end, try to tell the node to end the rest, and after
        60 s try again, on the job's next start, which has the same number.
        """
        daemon = self._daemons.pop(node)
        steps = [pid for pid, words in _processes() if "slurmstepd: [" in words and self._is_of(pid, node)]
        self._silent = [daemon.pid, *(pid for step in steps for pid in (step, *_descendants(step)))]
        for pid in self._silent:
            _signal(pid, signal.SIGSTOP)
        self._buried.append(daemon)

    def replace_node(self, node: str) -> None:
        """The machine is back, with nothing of before running on it."""
        self._bury()
        self.start_node(node)

    def state_of(self, job: str) -> str:
        """Such as RUNNING, PENDING, COMPLETED; NODE_FAIL and so on."""
        return self._field(job, "JobState")

    def restarts_of(self, job: str) -> int:
        return int(self._field(job, "Restarts"))

    def wait_for(self, condition, what: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} after {seconds} s\n{self.logs()}"
            # most conditions start a program, whose seconds the jobs would have used
            time.sleep(0.5)

    def wait_until_done(self, job: str, seconds: float) -> None:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE")
        self.wait_for(lambda: self.state_of(job) in ends, f"end of job {job}", seconds)
        assert self.state_of(job) == "COMPLETED", self.logs()

    def logs(self) -> str:
        """What the jobs and the daemons said last."""
        files = [*self.root.glob("*.log"), *self.root.glob("**/slurm-*.out")]
        return "\n".join(f"== {file.name}\n" + file.read_text()[-2500:] for file in files)

    def close(self) -> None:
        """End the jobs, then the daemons, then whatever is left of either."""
        self._bury()
        if "slurmctld" in self._daemons:
            subprocess.run(
                ["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=30, check=False
            )
        for name in ("node1", "node2", "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        # steps outlive their daemon, and srun its step; all of them were told of this configuration
        told = f"SLURM_CONF={self.root / 'slurm.conf'}".encode()
        deadline = time.monotonic() + 20
        while left := [pid for pid, _ in _processes() if told in _environment(pid)]:
            assert time.monotonic() < deadline, left
            for pid in left:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _bury(self) -> None:
        for pid in self._silent:
            _signal(pid, signal.SIGKILL)
        for daemon in self._buried:
            daemon.wait(timeout=10)
        self._silent, self._buried = [], []

    def _field(self, job: str, name: str) -> str:
        words = self.run("scontrol", "show", "job", job).split()
        return next(word.split("=", 1)[1] for word in words if word.startswith(f"{name}="))

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        options = [f"--key-file={key}", f"--socket={self.root / 'munge.socket'}", "--force"]
        options += [f"--pid-file={self.root / 'munge.pid'}", f"--log-file={self.root / 'munge.log'}"]
        options += [f"--seed-file={self.root / 'munge.seed'}"]
        self._start("munged", ["munged", "--foreground", *options])
        self.wait_for(lambda: (self.root / "munge.socket").exists(), "munge socket", 10)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.root / f"{name}-start.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _is_of(self, step: int, node: str = "") -> bool:
        """Whether a step daemon belongs to this cluster and node: by the files that it has open."""
        try:
            opened = [str(entry.readlink()) for entry in Path(f"/proc/{step}/fd").iterdir()]
        except OSError:
            return False
        return any(str(self.root / (f"slurmd-{node}" if node else "slurmd-")) in file for file in opened)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _processes() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found.append((int(entry.name), words))
    return found


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, children) for one in (child, *_descendants(child))]


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
