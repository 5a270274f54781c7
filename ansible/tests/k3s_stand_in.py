#!/usr/bin/python3
"""Stands in for the binary `k3s`, which cannot be had where these tests run. It is NOT Kubernetes.

It writes down how it was called, and behaves as the roles rely on: it reads K3s' configuration files, refuses a
wrong token, cannot join a server that is not there, tells systemd when it is ready, and knows its nodes.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import socketserver
import sys
import time
from pathlib import Path

VERSION = "@VERSION@"
CONFIG = Path("/etc/rancher/k3s")
DATA = Path("/var/lib/rancher/k3s/server")
NODES = DATA / "db/etcd/nodes.json"
JOBS = DATA / "db/jobs"
CALLS = Path("/var/log/k3s-stand-in.jsonl")
PORT = 6443


def settings() -> dict[str, str]:
    """Flat `key: value` lines of config.yaml and of config.yaml.d, later files winning; lists are left out."""
    found = {}
    for file in [CONFIG / "config.yaml", *sorted((CONFIG / "config.yaml.d").glob("*.yaml"))]:
        for line in file.read_text().splitlines() if file.exists() else []:
            if ": " in line and not line.startswith((" ", "-")):
                key, value = line.split(": ", 1)
                found[key] = value.strip("'\"")
    return found


def token() -> str:
    """The shared secret; as the real one, refuses a file that others may read."""
    file = Path(settings()["token-file"])
    if file.stat().st_mode & 0o077:
        sys.exit(f"{file} is readable by others")
    return file.read_text().strip()


def ask(address: str, **request: object) -> dict:
    """One request to a server."""
    with socket.create_connection((address, PORT), timeout=5) as link:
        link.sendall(json.dumps(request).encode() + b"\n")
        return json.loads(link.makefile().readline())


class Api(socketserver.StreamRequestHandler):
    """Joins nodes and answers `kubectl`."""

    def handle(self) -> None:
        """Answer one request."""
        request = json.loads(self.rfile.readline())
        if request["token"] != token():
            answer = {"error": "token is not the cluster's"}
        else:
            nodes = json.loads(NODES.read_text())
            nodes.setdefault(request["name"], {}).update(request["set"])
            NODES.write_text(json.dumps(nodes))
            answer = {"nodes": nodes}
        self.wfile.write(json.dumps(answer).encode() + b"\n")


def join(role: str) -> None:
    """Be known to the cluster: to the server named in the configuration, and to this one."""
    mine = settings()
    me = {"name": mine["node-name"], "set": {"role": role, "version": VERSION}, "token": token()}
    targets = ["127.0.0.1"] if role == "server" else []
    if "server" in mine:
        targets.append(mine["server"].removeprefix("https://").rsplit(":", 1)[0])
    for target in targets:
        answer = ask(target, **me)
        if "error" in answer:
            sys.exit(answer["error"])


def ready() -> None:
    """Tell systemd, as Type=notify wants it."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(b"READY=1", address)


def serve() -> None:
    """`k3s server`."""
    NODES.parent.mkdir(parents=True, exist_ok=True)
    if not NODES.exists():
        if "cluster-init" not in settings() and "server" not in settings():
            sys.exit("neither cluster-init nor server is configured")
        NODES.write_text("{}")
    (DATA / "token").write_text(token())
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("", PORT), Api) as api:
        import threading

        threading.Thread(target=api.serve_forever, daemon=True).start()
        join("server")
        ready()
        while True:
            time.sleep(3600)


def kubectl(*words: str) -> None:
    """The few commands that the roles use."""
    nodes = json.loads(NODES.read_text())
    if words[:2] == ("get", "node"):
        if words[2] not in nodes:
            sys.exit(f'Error from server (NotFound): nodes "{words[2]}" not found')
        gpus = Path("/run/k3s-gpus")
        allocatable = json.loads(gpus.read_text()).get(words[2], "") if gpus.exists() else ""
        print("True", allocatable if "allocatable" in words[-1] else nodes[words[2]]["version"], end="")
    elif words[0] == "drain" and Path("/run/k3s-drain-fails").exists():
        sys.exit("error when evicting pods: Cannot evict pod as it would violate the pod's disruption budget")


def job(*words: str) -> None:
    """Jobs: still running when first asked for, ended the second time, and failed where /run/k3s-job-fails is."""
    JOBS.mkdir(parents=True, exist_ok=True)
    fails = Path("/run/k3s-job-fails")
    if words[0] == "create":
        manifest = json.load(sys.stdin)
        (JOBS / manifest["metadata"]["name"]).write_text(json.dumps(manifest))
        return
    name = next(word.split("/")[-1].split("=")[-1] for word in words if "ic-verify-" in word)
    file, asked = JOBS / name, JOBS / f"{name}-asked"
    if words[0] == "delete":
        file.unlink(missing_ok=True)
        asked.unlink(missing_ok=True)
    elif not file.exists():
        sys.exit(f'Error from server (NotFound): jobs.batch "{name}" not found')
    elif words[:2] == ("get", "job"):
        print("" if not asked.exists() else "FailureTarget Failed" if fails.exists() else "Complete", end="")
        asked.touch()
    elif words[0] == "logs":
        print("error: no GPU" if fails.exists() else "NVIDIA H100 80GB HBM3")
    elif words[:2] == ("get", "pods"):
        print(fails.read_text() if fails.exists() else "", end="")


def etcd_snapshot(*words: str) -> None:
    """`k3s etcd-snapshot save --name NAME`."""
    folder = DATA / "db/snapshots"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(
        NODES, folder / f"{words[words.index('--name') + 1]}-{settings()['node-name']}-{int(time.time())}"
    )


def main(*words: str) -> None:
    """Write down the call, then do it."""
    if words != ("--version",):
        with CALLS.open("a") as file:
            file.write(json.dumps({"time": time.time(), "version": VERSION, "words": words}) + "\n")
    if words == ("--version",):
        print(f"k3s version {VERSION} (stand-in)")
    elif words[0] == "server" and "--cluster-reset" in words:
        path = next(
            word.split("=", 1)[1] for word in words if word.startswith("--cluster-reset-restore-path=")
        )
        shutil.rmtree(DATA / "db/etcd", ignore_errors=True)
        NODES.parent.mkdir(parents=True)
        shutil.copy(path, NODES)
    elif words[0] == "server":
        serve()
    elif words[0] == "agent":
        join("agent")
        time.sleep(1e6)
    elif words[0] == "kubectl" and any("ic-verify-" in word or word == "create" for word in words):
        job(*words[1:])
    elif words[0] == "kubectl":
        kubectl(*words[1:])
    elif words[0] == "etcd-snapshot":
        etcd_snapshot(*words[1:])
    else:
        sys.exit(f"the stand-in knows no {words[0]}")


main(*sys.argv[1:])
