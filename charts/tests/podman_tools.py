"""Pods without Kubernetes: `podman kube play` in its own network namespace: nothing listens outside."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROGRAMS = {
    "podman": "podman",
    "runc": "runc",
    "/usr/lib/podman/netavark": "netavark",
    "/usr/lib/podman/aardvark-dns": "aardvark-dns",
    "/usr/libexec/podman/catatonit": "catatonit",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
# crun, podman's first choice, refuses the hybrid cgroups of some CI machines; the default limit of open files is
# above what a container may set there
CONFIGURATION = """
[containers]
default_ulimits=["nofile=20000:20000","nproc=4096:4096"]
[network]
network_backend="netavark"
network_config_dir="{folder}/networks"
[engine]
cgroup_manager="cgroupfs"
events_logger="file"
runtime="runc"
"""
CLIENT = """
import sys, urllib.request, urllib.error
url, body = sys.argv[1], sys.stdin.buffer.read()
headers = {"Content-Type": "application/json"}
if len(sys.argv) > 3:
    headers["Authorization"] = "Bearer " + sys.argv[3]
request = urllib.request.Request(url, body or None, headers)
try:
    with urllib.request.urlopen(request, timeout=float(sys.argv[2])) as answer:
        status, text = answer.status, answer.read()
except urllib.error.HTTPError as error:
    status, text = error.code, error.read()
except OSError as error:
    status, text = 0, str(error).encode()
sys.stdout.buffer.write(b"%d\\n" % status + text)
"""


POLICY = Path("/usr/sbin/policy-rc.d")


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Packages that are installed meanwhile start no service: Debian asks this program, and 101 means no."""
    if POLICY.exists():
        # a container's image, or somebody else's answer
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def install_packages(programs: Mapping[str, str]) -> None:
    """Install Debian's packages of the programs that this machine lacks; no service is started."""
    missing = [
        package
        for program, package in programs.items()
        if not (shutil.which(program) or Path(program).is_file())
    ]
    if missing:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        with no_services():
            for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *missing]):
                # another one's apt may be running, as at a machine's first start
                options = ["-o", "DPkg::Lock::Timeout=120"]
                subprocess.run(["apt-get", *options, *command], check=True, timeout=300, env=environment)


@dataclass(frozen=True)
class Pod:
    """A pod that was started: its name, its only container, its address."""

    name: str
    container: str
    address: str


class Podman:
    """A storage, a configuration and a network namespace of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespace = f"ic-test-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        configuration = folder / "containers.conf"
        configuration.write_text(CONFIGURATION.format(folder=folder), encoding="utf-8")
        self.environment = os.environ | {"CONTAINERS_CONF": str(configuration)}
        self.inside = ["nsenter", f"--net=/run/netns/{self.namespace}"]
        self._podman = ["podman", "--root", str(folder / "store"), "--runroot", str(folder / "run")]

    def __enter__(self) -> Podman:
        subprocess.run(["ip", "netns", "add", self.namespace], check=True, timeout=30)
        subprocess.run([*self.inside, "ip", "link", "set", "lo", "up"], check=True, timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        # what belongs to this storage only
        self.run("pod", "rm", "--all", "--force", check=False)
        self.run("rm", "--all", "--force", check=False)
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False, timeout=30)
        subprocess.run(
            ["umount", str(self.folder / "store" / "overlay")], check=False, timeout=30, capture_output=True
        )
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *arguments: str) -> list[str]:
        """A podman command inside the namespace."""
        return [*self.inside, *self._podman, *arguments]

    def run(self, *arguments: str, check: bool = True, timeout: float = 300) -> str:
        """What a podman command prints; with check, its failure carries both outputs."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=self.environment,
        )
        assert not check or done.returncode == 0, f"podman {arguments[:3]}: {done.stdout}{done.stderr}"
        return done.stdout

    def inspect(self, name: str) -> dict[str, Any]:
        """Everything about a container or an image."""
        return json.loads(self.run("inspect", name))[0]

    def make_secret(self, name: str, data: Mapping[str, str]) -> None:
        """A Secret for `secretKeyRef`: what `kube play` keeps of one is the JSON of its `data`."""
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(encoded), encoding="utf-8")
        self.run("secret", "create", name, str(file))

    def play(self, *objects: dict[str, Any]) -> Pod:
        """Start the pod of a Deployment or Pod, with the ConfigMaps that it mounts."""
        file = self.folder / "play.yaml"
        file.write_text(yaml.safe_dump_all(objects), encoding="utf-8")
        self.run("kube", "play", str(file))
        (main,) = [item for item in objects if item["kind"] in ("Deployment", "Pod")]
        suffix = "-pod-0" if main["kind"] == "Deployment" else ""
        pod = main["metadata"]["name"] + suffix
        spec = main["spec"]["template"]["spec"] if main["kind"] == "Deployment" else main["spec"]
        container = f"{pod}-{spec['containers'][0]['name']}"
        infra = self.inspect(json.loads(self.run("pod", "inspect", pod))["InfraContainerID"])
        (network,) = infra["NetworkSettings"]["Networks"].values()
        return Pod(pod, container, network["IPAddress"])

    def request(self, url: str, body: Any = None, *, timeout: float = 60, key: str = "") -> tuple[int, bytes]:
        """Status and body of a request from inside the namespace; status 0 where nobody answers."""
        process = self.start_request(url, body, timeout=timeout, key=key)
        output, _ = process.communicate(timeout=timeout + 30)
        return answer_of(output)

    def start_request(
        self, url: str, body: Any = None, *, timeout: float = 60, key: str = ""
    ) -> subprocess.Popen[bytes]:
        """The same, running; its output is for `answer_of`."""
        process = subprocess.Popen(
            [*self.inside, sys.executable, "-c", CLIENT, url, str(timeout), *([key] if key else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(b"" if body is None else json.dumps(body).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def wait_for(self, url: str, *, seconds: float, container: str) -> float:
        """Seconds until a URL answers 200, asked once a second as a probe would."""
        start = time.monotonic()
        while self.request(url, timeout=2)[0] != 200:
            state = self.inspect(container)["State"]["Status"]
            if state != "running" or time.monotonic() - start > seconds:
                raise AssertionError(
                    f"{url} after {time.monotonic() - start:.0f} s, container {state}:\n"
                    + self.run("logs", "--tail", "60", container, check=False)
                )
            time.sleep(1)
        return time.monotonic() - start


def answer_of(output: bytes) -> tuple[int, bytes]:
    """Status and body from what the client printed."""
    status, _, body = output.partition(b"\n")
    return int(status), body
