"""Bare Debian 12 for the machines of the test bed, and the packages that its roles may install there.

The machines reach nothing outside, so what apt finds is a folder of packages, downloaded once with Debian's
signatures checked, and served as an apt repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUITE = "bookworm"
# what any Debian with ssh has, and nothing that a role installs
BARE = [
    "python3", "python3-apt", "ca-certificates", "systemd", "systemd-sysv", "dbus", "iproute2", "openssh-server",
    "procps", "kmod",
]  # fmt: skip
# what roles install; their dependencies come along
OFFERED = [
    "munge", "slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server", "python3-pymysql",
    "sudo", "chrony", "nftables", "unattended-upgrades", "gnupg", "prometheus-node-exporter", "hwloc-nox",
    "cloud-init", "dnsmasq-base", "nfs-kernel-server", "nfs-common",
]  # fmt: skip
# no documentation, and no fsync while packages are installed: the machines live for minutes
DPKG = ["force-unsafe-io", "path-exclude=/usr/share/doc/*", "path-exclude=/usr/share/man/*"]
# on the machine that runs the tests: command and Debian's packages of it
TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "apt-ftparchive": "apt-utils",
    "dpkg-deb": "dpkg",
    "gpg": "gnupg",
    "mke2fs": "e2fsprogs",
    "cc": "gcc libc6-dev",
}
# a module of the machines' Python, imported as it starts: what it compiles out of zip files is kept for the next
# process. Anything that goes wrong there compiles as before
KEPT_CODE = """
import hashlib, marshal, os, zipimport

FOLDER = "/var/cache/kept-code"
compile_source = zipimport._compile_source


def kept(pathname, source):
    file = os.path.join(FOLDER, hashlib.sha256(source).hexdigest())
    try:
        with open(file, "rb") as stored:
            return marshal.load(stored)
    except Exception:
        code = compile_source(pathname, source)
    try:
        os.makedirs(FOLDER, exist_ok=True)
        part = f"{file}.{os.getpid()}"
        with open(part, "wb") as stored:
            marshal.dump(code, stored)
        os.replace(part, file)
    except Exception:
        pass
    return code


zipimport._compile_source = kept
"""
COMMAND_TIMEOUT_S = 300


class BedError(RuntimeError):
    """The test bed cannot be made; the message says what is missing."""


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; when it fails, say what it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=COMMAND_TIMEOUT_S,
        **options,
    )
    if done.returncode:
        raise BedError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done


def install_tools() -> None:
    """Install with apt what is missing; needs root on a Debian, as the machines themselves do."""
    if os.geteuid() != 0:
        raise BedError(
            "the test bed boots machines with systemd-nspawn, which takes root; run the tests as root"
        )
    missing = sorted(
        {name for tool, names in TOOLS.items() if not shutil.which(tool) for name in names.split()}
    )
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise BedError(f"the test bed needs the commands of {', '.join(missing)}, and there is no apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-q", env=environment)
    run("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing, env=environment)


def mirror() -> str:
    """Where this machine's own apt has Debian from; IC_BED_MIRROR names another."""
    if named := os.environ.get("IC_BED_MIRROR"):
        return named
    listed = run(
        "apt-get",
        "indextargets",
        "--format",
        "$(SITE)",
        "Created-By: Packages",
        f"Codename: {SUITE}",
        "Component: main",
    ).stdout.split()
    if not listed:
        raise BedError(f"this machine's apt has no {SUITE} main: set IC_BED_MIRROR to a mirror of Debian")
    return listed[0]


def build(folder: Path) -> Path:
    """The base system in `folder`/root and the packages in `folder`/debian; made once, or found there."""
    root, packages, done = folder / "root", folder / "debian", folder / "done"
    wanted = "\n".join([SUITE, *BARE, *OFFERED, KEPT_CODE])
    if done.is_file() and done.read_text() == wanted:
        return root
    for old in (root, packages):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    run(
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        *(f"--dpkgopt={option}" for option in DPKG),
        '--aptopt=Acquire::Languages "none"',
        f"--include={','.join(BARE)}",
        # its package lists are used below
        "--skip=cleanup/apt",
        SUITE,
        root,
        mirror(),
    )
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    environment = {"DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    apt = ("chroot", root, "apt-get", "-q", "-y", "--no-install-recommends")
    run(*apt, "clean", env=environment)
    run(*apt, "install", "--download-only", *OFFERED, env=environment)
    packages.mkdir()
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        package.rename(packages / package.name)
    index(packages)
    _finish(root)
    done.write_text(wanted)
    return root


def index(folder: Path) -> None:
    """Make a flat apt repository of a folder of packages."""
    listed = run("apt-ftparchive", "packages", ".", cwd=folder).stdout
    (folder / "Packages").write_text(listed)
    (folder / "Release").write_text(run("apt-ftparchive", "release", ".", cwd=folder).stdout)


def _keep_code(root: Path) -> None:
    """Ansible brings fifty modules in a new zip file with each task; they are compiled once on each machine."""
    for library in (root / "usr/lib").glob("python3.*"):
        folder = root / "usr/local/lib" / library.name / "dist-packages"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kept_code.py").write_text(KEPT_CODE)
        (folder / "kept_code.pth").write_text("import kept_code\n")


def _finish(root: Path) -> None:
    """What a fresh server has: ssh that takes root's key, a network, no first-boot questions."""
    _keep_code(root)
    (root / "etc/apt/sources.list").write_text("deb [trusted=yes] file:/srv/debian ./\n")
    shutil.rmtree(root / "var/lib/apt/lists")
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    # as old as those of an installer's image: the first run reads them anew
    os.utime(root / "var/lib/apt/lists", (0, 0))
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/machine-id").write_text("")
    (root / "srv/debian").mkdir(exist_ok=True)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    for old in (root / "etc/ssh").glob("ssh_host_*"):
        old.unlink()
    run("chroot", root, "ssh-keygen", "-A")
    units = [
        "systemd-firstboot.service",
        "systemd-resolved.service",
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
    ]
    run("chroot", root, "systemctl", "mask", *units)
    run("chroot", root, "systemctl", "enable", "systemd-networkd.service", "ssh.service")
