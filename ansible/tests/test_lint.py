"""What can be checked without a machine: lint at the strictest profile, syntax of all playbooks."""

import subprocess
from pathlib import Path

import pytest
import yaml
from ansible_play import ANSIBLE, command, environment

PLAYBOOKS = sorted(path.stem for path in (ANSIBLE / "playbooks").glob("*.yml"))
INVENTORIES = sorted(path.name for path in (ANSIBLE / "inventories").iterdir())
ROLES = sorted(path.name for path in (ANSIBLE / "roles").iterdir())


def _run(scratch: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ANSIBLE, env=environment(scratch), text=True, capture_output=True, timeout=300
    )


def test_ansible_lint_at_profile_production(scratch):
    done = _run(
        scratch, command("ansible-lint"), "--offline", "--profile", "production", "--strict", "--nocolor"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # the linter says so, too, when it found no files
    assert "Passed: 0 failure(s), 0 warning(s)" in done.stderr


def test_lint_demotes_no_rule():
    settings = yaml.safe_load((ANSIBLE / ".ansible-lint").read_text())
    assert not {"skip_list", "warn_list"} & set(settings)


def test_yamllint(scratch):
    done = _run(scratch, command("yamllint"), "--strict", ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_syntax_of_all_playbooks(scratch, inventory):
    playbooks = [f"playbooks/{name}.yml" for name in PLAYBOOKS]
    done = _run(
        scratch, command("ansible-playbook"), "-i", f"inventories/{inventory}", "--syntax-check", *playbooks
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("role", ROLES)
def test_each_default_is_described(role):
    folder = ANSIBLE / "roles" / role
    specs = yaml.safe_load((folder / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    defaults_file = folder / "defaults/main.yml"
    defaults = yaml.safe_load(defaults_file.read_text()) if defaults_file.exists() else {}
    described = specs["options"]
    assert set(defaults) <= set(described)
    # what has no default must be given
    assert {name for name in described if name not in defaults} == {
        name for name, option in described.items() if option.get("required")
    }
    assert all(option["description"].endswith(".") for option in described.values())
