"""Ansible as its users run it, on inventories of the bed's machines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from bed import Bed

ANSIBLE = Path(__file__).parents[1]
PLAYBOOK_TIMEOUT_S = 600
RECAP = re.compile(r"^(\S+)\s+: (ok=\d+.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Played:
    """What a run of ansible-playbook printed and did."""

    code: int
    output: str

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        """Counts per host: ok, changed, unreachable, failed, skipped."""
        return {
            host: {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", counts)}
            for host, counts in RECAP.findall(self.output)
        }

    @property
    def why(self) -> str:
        """The first error, for the message of a failed test."""
        return self.output[max(0, self.output.find("[ERROR]:") - 300) :][:4000]

    @property
    def changed(self) -> dict[str, int]:
        """Number of changes per host."""
        return {host: counts["changed"] for host, counts in self.recap.items()}

    @property
    def changed_tasks(self) -> list[str]:
        """Names of the tasks that changed something, for the message of a failed test."""
        parts = re.split(r"^(?:TASK|RUNNING HANDLER) \[(.*?)\].*$", self.output, flags=re.MULTILINE)
        return [name for name, body in zip(parts[1::2], parts[2::2], strict=True) if "changed: [" in body]


def command(name: str) -> str:
    """Path of a program of the environment that runs the tests."""
    found = Path(sys.executable).parent / name
    assert found.exists(), f"{name} is not installed beside {sys.executable}"
    return str(found)


def environment(scratch: Path) -> dict[str, str]:
    """Ansible's own settings from the project's file and no user's; times of the tasks in the output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', os.defpath)}",
        "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
        "ANSIBLE_HOME": str(scratch / "ansible"),
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(scratch / "cp"),
        "ANSIBLE_NOCOLOR": "1",
        "LC_ALL": "C.UTF-8",
    }


def inventory(bed: Bed, groups: dict[str, list[str]], variables: dict[str, object]) -> dict[str, object]:
    hosts = sorted({host for members in groups.values() for host in members})
    return {
        "all": {
            "hosts": {host: {"ansible_host": bed.machines[host].address} for host in hosts},
            "vars": {
                "ansible_user": "root",
                "ansible_ssh_extra_args": " ".join(bed.ssh_options()),
                **variables,
            },
            "children": {group: {"hosts": dict.fromkeys(members)} for group, members in groups.items()},
        }
    }


Play = Callable[..., Played]


def player(bed: Bed) -> Play:
    """What runs playbooks on a bed."""

    def run(
        playbook: str,
        groups: dict[str, list[str]],
        variables: dict[str, object],
        *arguments: str,
        check: bool = True,
    ) -> Played:
        hosts = bed.scratch / "inventory.yml"
        hosts.write_text(yaml.safe_dump(inventory(bed, groups, variables)))
        done = subprocess.run(
            bed.inside(
                command("ansible-playbook"),
                "-i",
                hosts,
                ANSIBLE / "playbooks" / f"{playbook}.yml",
                *arguments,
            ),
            env=environment(bed.scratch),
            cwd=ANSIBLE,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PLAYBOOK_TIMEOUT_S,
        )
        played = Played(done.returncode, done.stdout)
        assert not check or played.code == 0, played.why
        return played

    return run
