"""Machines with systemd, booted by systemd-nspawn and joined by a bridge in a network namespace of their own.

Each machine is an overlay over one bare Debian, so it boots in seconds and is thrown away whole. Nothing of it is
reachable from outside of the namespace, and nothing outside can be reached from it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from image import BedError, run

SUBNET = "10.99.0"
GATEWAY = f"{SUBNET}.1"
# waits end when what they wait for is there; these are for a machine that has much else to do
BOOT_TIMEOUT_S = 400
UNTIL_TIMEOUT_S = 180
REBOOT_CODE = 133


@dataclass
class Machine:
    """One machine of the bed."""

    name: str
    address: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def root(self) -> Path:
        """Its file system, as the machine that runs the tests sees it."""
        return self.folder / "mnt"

    @property
    def log(self) -> str:
        """What its console said."""
        return (self.folder / "console.log").read_text(errors="replace")


@dataclass
class Bed:
    """A bridge and its machines. Use it as a context manager: leaving it ends and removes everything."""

    base: Path
    packages: Path
    scratch: Path
    names: list[str]
    binds: list[Path] = field(default_factory=list)
    shared: Path | None = None
    machines: dict[str, Machine] = field(default_factory=dict)
    namespace: str = field(default_factory=lambda: f"icbed{os.getpid()}")

    def __enter__(self) -> Bed:
        """Make the network, boot all machines, wait until they answer."""
        try:
            self._make_network()
            key = self.scratch / "key"
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
            for number, name in enumerate(self.names):
                machine = Machine(name, f"{SUBNET}.{11 + number}", self.scratch / name)
                self.machines[name] = machine
                self._make_root(machine)
                self.boot(name)
            self._write_known_hosts()
            for name in self.names:
                self.wait(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the machines, unmount their file systems, remove the network and all files."""
        for name in self.machines:
            self.kill(name)
        for machine in self.machines.values():
            subprocess.run(["umount", "-l", str(machine.root)], check=False, capture_output=True)
            shutil.rmtree(machine.folder, ignore_errors=True)
            for group in self._own_cgroups(machine.name):
                _remove_cgroup(group)
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False, capture_output=True)

    def _own_cgroups(self, name: str) -> list[Path]:
        """Control groups of a machine, below this process's own: of systemd's hierarchy and of the unified one."""
        mounted = {}
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, folder, kind, options, *_ = line.split()
            if kind == "cgroup2":
                mounted[""] = folder
            elif kind == "cgroup" and "name=systemd" in options.split(","):
                mounted["name=systemd"] = folder
        found = []
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, hierarchy, own = line.split(":", 2)
            if hierarchy in mounted and os.access(parent := mounted[hierarchy] + own, os.W_OK):
                found.append(Path(parent) / f"{self.namespace}-{name}")
        return found

    def inside(self, *command: str | Path) -> list[str]:
        """The command, run in the bed's network. `ip netns exec` would hide the cgroups from nspawn."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *map(str, command)]

    def boot(self, name: str) -> None:
        """Start a machine, the first time or after it was killed."""
        machine = self.machines[name]
        binds = [f"--bind-ro={folder}" for folder in self.binds]
        if self.shared:
            # stands in for storage that all machines mount
            binds.append(f"--bind={self.shared}:/shared")
        # machines in one control group would take each other's services for their own
        groups = self._own_cgroups(name)
        for group in groups:
            group.mkdir(exist_ok=True)
        command = self.inside(
            "sh", "-c", 'for group; do [ "$group" = -- ] && break; echo $$ > "$group/cgroup.procs"; shift; done; '
            'shift; exec "$@"', "sh", *groups, "--",
            "systemd-nspawn", "-q", "-D", machine.root, "-M", name,
            "--register=no", "--keep-unit", "--network-bridge=br-ic", "--resolv-conf=off", "--console=pipe",
            f"--bind-ro={self.packages}:/srv/debian", *binds, "-b",
        )  # fmt: skip
        with (machine.folder / "console.log").open("ab") as log:
            machine.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        threading.Thread(target=self._reboot, args=(machine, machine.process), daemon=True).start()

    def _reboot(self, machine: Machine, process: subprocess.Popen[bytes]) -> None:
        """Boot a machine again that asked for it: nspawn ends with 133 and leaves the rest to its caller."""
        if process.wait() == REBOOT_CODE and machine.process is process:
            self.boot(machine.name)

    def kill(self, name: str) -> None:
        """Take a machine's power away: its init is killed, and all that runs in it with it."""
        machine = self.machines[name]
        if machine.process is None:
            return
        self._disconnect(name)
        for child in _children(machine.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            machine.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            machine.process.kill()
            machine.process.wait(timeout=20)
        machine.process = None

    def wait(self, name: str) -> None:
        """Return when the machine takes commands."""
        machine = self.machines[name]
        deadline, said = time.monotonic() + BOOT_TIMEOUT_S, ""
        while time.monotonic() < deadline:
            if machine.process is None or machine.process.poll() is not None:
                raise BedError(f"machine {name} ended while it booted:\n{machine.log[-3000:]}")
            # a machine that is booting may also take the connection and then say nothing
            try:
                done = self.ssh(
                    name, "systemctl is-system-running --wait", check=False, timeout_s=60, connect_s=3
                )
                if done.stdout.strip() in {"running", "degraded"}:
                    return
                said = done.stdout + done.stderr
            except subprocess.TimeoutExpired as error:
                said = str(error)
            time.sleep(0.3)
        raise BedError(
            f"machine {name} has not booted within {BOOT_TIMEOUT_S} s; it said last: {said}\n{machine.log[-3000:]}"
        )

    def ssh(
        self, name: str, command: str, *, check: bool = True, timeout_s: float = 120, connect_s: int = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a machine as root."""
        done = subprocess.run(
            self.inside(
                "ssh",
                *self.ssh_options(),
                *("-o", f"ConnectTimeout={connect_s}"),
                *self._one_connection(name),
                f"root@{self.machines[name].address}",
                command,
            ),
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{name}: {command}\nended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def _one_connection(self, name: str) -> list[str]:
        """Options by which all commands for a machine go through one connection, for as long as that lives."""
        path = self.scratch / f"ssh-{name}"
        alive = ("-o", "ServerAliveInterval=2", "-o", "ServerAliveCountMax=15")
        return ["-o", "ControlMaster=auto", "-o", f"ControlPath={path}", "-o", "ControlPersist=60", *alive]

    def _disconnect(self, name: str) -> None:
        """End that connection: the machine is about to go."""
        words = ("ssh", *self.ssh_options(), *self._one_connection(name), "-O", "exit")
        target = f"root@{self.machines[name].address}"
        subprocess.run(self.inside(*words, target), check=False, capture_output=True, timeout=60)

    def ssh_options(self) -> list[str]:
        """Key and known hosts of the bed, and nothing of the user's own."""
        known = f"UserKnownHostsFile={self.scratch / 'known_hosts'}"
        return ["-F", "none", "-i", str(self.scratch / "key"), "-o", known, "-o", "BatchMode=yes"]

    def _make_network(self) -> None:
        run("ip", "netns", "add", self.namespace)
        for words in (
            "link set lo up",
            "link add br-ic type bridge",
            f"addr add {GATEWAY}/24 dev br-ic",
            "link set br-ic up",
        ):
            run("ip", "-n", self.namespace, *words.split())

    def _make_root(self, machine: Machine) -> None:
        for folder in ("up", "work", "mnt"):
            (machine.folder / folder).mkdir(parents=True)
        layers = f"lowerdir={self.base},upperdir={machine.folder / 'up'},workdir={machine.folder / 'work'}"
        run("mount", "-t", "overlay", "overlay", "-o", layers, machine.root)
        (machine.root / "etc/hostname").write_text(machine.name + "\n")
        (machine.root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        (machine.root / "etc/systemd/network/10-bed.network").write_text(
            f"[Match]\nName=host0\n[Network]\nAddress={machine.address}/24\nGateway={GATEWAY}\n"
        )
        authorized = machine.root / "root/.ssh/authorized_keys"
        shutil.copy(self.scratch / "key.pub", authorized)
        authorized.chmod(0o600)

    def _write_known_hosts(self) -> None:
        public = (self.base / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
        lines = [f"{machine.address} {' '.join(public)}\n" for machine in self.machines.values()]
        (self.scratch / "known_hosts").write_text("".join(lines))


def _children(pid: int) -> list[int]:
    """Children of a process: of nspawn, the machine's init."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def _remove_cgroup(group: Path) -> None:
    """Remove a control group and those below it, all of them empty or soon to be."""
    for folder, _, _ in os.walk(group, topdown=False):
        for _ in range(50):
            try:
                Path(folder).rmdir()
            except FileNotFoundError:
                break
            except OSError:
                # the kernel is still taking away what ran in it
                time.sleep(0.1)
            else:
                break


def until(bed: Bed, name: str, command: str, wanted: str, timeout_s: float = UNTIL_TIMEOUT_S) -> str:
    """Run a command on a machine until it prints what is wanted; fail with the last output."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            printed = bed.ssh(name, command, check=False).stdout.strip()
        except subprocess.TimeoutExpired as error:
            printed = str(error)
        if wanted in printed:
            return printed
        assert time.monotonic() < deadline, f"{command} on {name} after {timeout_s} s: {printed}"
        time.sleep(1)
