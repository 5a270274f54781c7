"""Machines with a kernel of their own: Debian's user-mode Linux, which is a program and needs no virtualization.

The machines of bed.py share the host's kernel, so what a kernel does, as serving and mounting NFS, is the host's.
Here it is Debian's, with Debian's modules. Such a machine is slower: each new process costs it some milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from bed import Bed, Machine
from image import run

PACKAGE = "user-mode-linux"
MEMORY = "512M"
DISK = "3G"
# without udev, networkd would wait for the card for ever
INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t hostfs -o ro,{modules} none /lib/modules
mount -t hostfs -o ro,{packages} none /srv/debian
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec /lib/systemd/systemd
"""


def unpack(folder: Path) -> Path:
    """The kernel and its modules from Debian's package, in the folder; made once, or found there."""
    kernel = folder / "usr/bin/linux.uml"
    if not kernel.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # apt checks the signature; installing it here would serve nobody
        run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", PACKAGE, cwd=folder)
        (package,) = folder.glob("*.deb")
        run("dpkg-deb", "--extract", package, folder)
        package.unlink()
    return kernel


def build_ptrace(folder: Path) -> Path:
    """The library of uml_ptrace.c, in the folder: without it Debian's kernel runs on no processor with AMX."""
    library = folder / "uml_ptrace.so"
    options = ("-O2", "-Wall", "-Werror", "-shared", "-fPIC")
    run("cc", *options, Path(__file__).with_name("uml_ptrace.c"), "-o", library)
    return library


@dataclass(kw_only=True)
class UmlBed(Bed):
    """The same bed, with a kernel in each machine. Its disk is a file."""

    kernel: Path
    ptrace: Path
    namespace: str = field(default_factory=lambda: f"icuml{os.getpid()}")

    def boot(self, name: str) -> None:
        """Start a machine, the first time or after it was killed."""
        machine = self.machines[name]
        command = self.inside(
            "env", f"LD_PRELOAD={self.ptrace}", self.kernel, f"mem={MEMORY}",
            f"umid={name}", f"uml_dir={machine.folder}/",
            f"ubd0={machine.folder / 'disk'}", "root=/dev/ubda", "rw", "init=/sbin/bed-init",
            f"eth0=tuntap,tap-{name}", "con=null", "con0=fd:0,fd:1",
        )  # fmt: skip
        with (machine.folder / "console.log").open("ab") as log:
            machine.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        """Take a machine's power away: the kernel is a process, and so is each of the machine's own."""
        machine = self.machines[name]
        if machine.process:
            self._disconnect(name)
            # one that ended by itself and was waited for is no process any more, and its log says why it ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.process.pid, signal.SIGKILL)
            machine.process.wait(timeout=20)
            machine.process = None

    def _make_root(self, machine: Machine) -> None:
        super()._make_root(machine)
        modules = self.kernel.parents[1] / "lib/uml/modules"
        text = INIT.format(modules=modules, packages=self.packages, address=machine.address)
        (machine.root / "usr/lib/modules").mkdir(exist_ok=True)
        for unit in ("systemd-networkd", "systemd-networkd-wait-online"):
            masked = machine.root / f"etc/systemd/system/{unit}.service"
            masked.unlink(missing_ok=True)
            masked.symlink_to("/dev/null")
        init = machine.root / "sbin/bed-init"
        init.write_text(text)
        init.chmod(0o755)
        disk = machine.folder / "disk"
        run("mke2fs", "-q", "-t", "ext4", "-d", machine.root, disk, DISK)
        run("umount", machine.root)
        for words in (
            f"tuntap add tap-{machine.name} mode tap",
            f"link set tap-{machine.name} master br-ic up",
        ):
            run("ip", "-n", self.namespace, *words.split())
