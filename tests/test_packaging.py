"""Wheels: each package builds alone, and its wheel holds what it must and nothing else."""

import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ic-model", "ic-train", "ic-vllm-plugin")
MUST_CONTAIN = {
    "ic-model": (
        "ic_model/presets.toml",
        "ic_model/checkpoints/ic-nano/config.json",
        "ic_model/checkpoints/ic-nano/model.safetensors",
        "ic_model/checkpoints/ic-nano/tokenizer.json",
    ),
    "ic-train": (
        "ic_train/evaluation/haystacks/jargon-4.4.7.txt.gz",
        "ic_train/evaluation/haystacks/README.md",
    ),
    "ic-vllm-plugin": ("ic_vllm_plugin/model.py",),
}
# what a package never imports, it never asks for either
MUST_NOT_REQUIRE = {
    "ic-model": ("vllm", "trl", "accelerate"),
    "ic-train": ("vllm",),
    "ic-vllm-plugin": ("trl",),
}


def _build(folder: Path, into: Path) -> zipfile.ZipFile:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into)],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = into.glob("*.whl")
    return zipfile.ZipFile(wheel)


def _metadata(wheel: zipfile.ZipFile):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel(package, tmp_path):
    wheel = _build(ROOT / "packages" / package, tmp_path)
    names, metadata = wheel.namelist(), _metadata(wheel)
    for wanted in MUST_CONTAIN[package]:
        assert wanted in names
    module = package.replace("-", "_")
    strangers = [name for name in names if not name.startswith((f"{module}/", f"{module}-"))]
    assert strangers == []
    assert [name for name in names if "__pycache__" in name or "/tests/" in name] == []
    required = [
        line.split(";")[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    ]
    for banned in MUST_NOT_REQUIRE[package]:
        assert [line for line in required if line.startswith(banned)] == []
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    (licence,) = [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_versions_go_in_lockstep():
    versions = {}
    for package in PACKAGES:
        project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
        versions[package] = project["version"]
        for requirement in project["dependencies"]:
            if requirement.startswith("ic-model"):
                assert requirement == f"ic-model=={project['version']}"
        module = __import__(package.replace("-", "_"))
        assert getattr(module, "__version__", project["version"]) == project["version"]
    assert len(set(versions.values())) == 1, versions


def test_stand_ins_of_the_cpu_environment_hold_metadata_only(tmp_path):
    folders = sorted(path.parent for path in (ROOT / "tools" / "cpu-env").glob("*/pyproject.toml"))
    assert [folder.name for folder in folders] == ["torchaudio", "torchcodec", "torchvision", "vllm"]
    for folder in folders:
        wheel = _build(folder, tmp_path / folder.name)
        assert all(".dist-info/" in name for name in wheel.namelist())
        assert "Never published" in _metadata(wheel)["Summary"]
