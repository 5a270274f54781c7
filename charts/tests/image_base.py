"""A base image without a registry: this machine's Python and vLLM, as `FROM` finds them in the official images.

Nothing of the project is in it: that comes from the Dockerfile under test. The root file system is put together
from files of this machine: the interpreter, the environment's packages, a shell with a few commands, and the
shared libraries that all of these need.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

# lscpu: vLLM's CPU worker asks it for the cores
COMMANDS = (
    "sh",
    "cat",
    "chmod",
    "chown",
    "cp",
    "env",
    "grep",
    "id",
    "ln",
    "ls",
    "lscpu",
    "mkdir",
    "rm",
    "sleep",
    "test",
    "touch",
)
# the project itself; and what training, evaluation, tests or a GPU need, and no server on a CPU: most of the bytes
LEFT_OUT = re.compile(
    r"^(_?ic_|_editable|trl|datasets|pyarrow|pandas|matplotlib|fontTools|triton|accelerate|pyrefly|ruff|hatch|"
    r"bitsandbytes|kubernetes_validate|lm_eval|mlflow|wandb|sklearn|scikit_learn|nltk|databricks|cloudcoil|"
    r"sqlalchemy|wonderwords|peft|gguf)"
)
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "tkinter", "ensurepip", "site-packages", "dist-packages"}
PREFIX = "usr/local"
LINE = re.compile(r"=> (/\S+) \(|^\s*(/\S+) \(", re.MULTILINE)
# as pip writes it; vLLM's processes import it again, so the guard is needed
VLLM_SCRIPT = """import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
ENVIRONMENT = (
    f"PATH=/{PREFIX}/bin:/usr/bin:/bin",
    f"LD_LIBRARY_PATH=/{PREFIX}/lib",
    # a Python of Debian looks elsewhere by itself
    f"PYTHONPATH=/{PREFIX}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages",
)


def write_base(stream: IO[bytes]) -> None:
    """Write the root file system as an uncompressed tar archive."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = f"{PREFIX}/lib/{version}"
    stdlib, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    interpreter = Path(os.path.realpath(sys.executable))
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        for folder, mode in (
            ("tmp", 0o1777),
            ("dev/shm", 0o1777),
            ("root", 0o700),
            ("proc", 0o555),
            ("sys", 0o555),
        ):
            _folder(archive, folder, mode)
        for name in ("bin", "sbin", "lib", "lib64"):
            _link(archive, name, f"usr/{name}")
        for name, text in ACCOUNTS.items():
            _text(archive, name, text)
        _file(archive, interpreter, f"{PREFIX}/bin/{version}", mode=0o755)
        for name in ("python3", "python"):
            _link(archive, f"{PREFIX}/bin/{name}", version)
        _text(archive, f"{PREFIX}/bin/vllm", f"#!/{PREFIX}/bin/python3\n{VLLM_SCRIPT}", mode=0o755)
        _tree(archive, stdlib, library)
        for entry in sorted(packages.iterdir()):
            if not LEFT_OUT.match(entry.name):
                _tree(archive, entry, f"{library}/site-packages/{entry.name}")
        binaries = [
            Path(found) for command in COMMANDS if (found := shutil.which(command, path="/usr/bin:/bin"))
        ]
        for binary in binaries:
            _file(archive, Path(os.path.realpath(binary)), f"usr/bin/{binary.name}", mode=0o755)
        objects = [interpreter, *binaries, *(stdlib / "lib-dynload").glob("*.so")]
        objects += [*(packages / "torch" / "lib").glob("*.so*"), *(packages / "vllm").glob("*.so")]
        for library_path in sorted(_needed(objects, packages)):
            _file(archive, Path(os.path.realpath(library_path)), _library_place(library_path, interpreter))


def _needed(objects: Iterable[Path], packages: Path) -> set[Path]:
    """Shared libraries of the machine that some objects need, by the dynamic linker's own account."""
    done = subprocess.run(
        ["ldd", *map(str, objects)], capture_output=True, text=True, check=False, timeout=120
    )
    found = {Path(a or b) for a, b in LINE.findall(done.stdout)}
    return {path for path in found if not path.is_relative_to(packages)}


def _library_place(path: Path, interpreter: Path) -> str:
    """libpython lies beside the interpreter, wherever that is; the rest where it was, below /usr."""
    if path.is_relative_to(interpreter.parents[1]) and interpreter.parents[1] != Path("/usr"):
        return f"{PREFIX}/lib/{path.name}"
    name = str(path).lstrip("/")
    return name if name.startswith("usr/") else f"usr/{name}"


def _tree(archive: tarfile.TarFile, source: Path, target: str) -> None:
    if source.is_file():
        _file(archive, source, target)
        return
    for path in _files(source):
        _file(archive, path, f"{target}/{path.relative_to(source)}")


def _files(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        # only the standard library's own tests and packages; a package's `tests` may be imported
        if Path(here) == folder and (folder / "os.py").is_file():
            folders[:] = [
                name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("config-")
            ]
        # Debian's own Python says so; that of an image takes packages
        yield from (Path(here) / name for name in names if name != "EXTERNALLY-MANAGED")


def _file(archive: tarfile.TarFile, source: Path, name: str, *, mode: int | None = None) -> None:
    info = archive.gettarinfo(str(source), name)
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mode = mode or (info.mode | 0o444)
    if info.isreg():
        with source.open("rb") as file:
            archive.addfile(info, file)
    else:
        archive.addfile(info)


def _text(archive: tarfile.TarFile, name: str, text: str, *, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(text.encode()), mode
    archive.addfile(info, io.BytesIO(text.encode()))


def _folder(archive: tarfile.TarFile, name: str, mode: int) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, mode
    archive.addfile(info)


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    archive.addfile(info)
