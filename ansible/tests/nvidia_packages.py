"""Stand-ins for NVIDIA's packages, in signed apt repositories made as NVIDIA's are laid out.

They install nothing of NVIDIA's: a tool that answers, and a "module" whose version becomes the loaded one at boot.
"""

from __future__ import annotations

import platform
from pathlib import Path

from image import run

SMI = "#!/bin/sh\ncat /run/nvidia-module/version\n"
CTK = '#!/bin/sh\necho "$@" >> /var/log/nvidia-ctk.log\necho cdiVersion: 0.6.0 > "${3#--output=}"\n'
LOAD = """[Unit]
Description=Stands in for the kernel loading the driver's module
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'mkdir -p /run/nvidia-module && cp /usr/share/nvidia-stand-in /run/nvidia-module/version'
"""


class Publisher:
    """A key, and repositories signed with it."""

    def __init__(self, folder: Path) -> None:
        """Make the key in the folder."""
        self.home = folder / "gnupg"
        self.home.mkdir(parents=True, mode=0o700)
        who = "Stand-in <stand-in@example.org>"
        self._gpg("--passphrase", "", "--quick-generate-key", who, "ed25519", "sign", "never")
        shown = self._gpg("--list-keys", "--with-colons")
        self.fingerprint = next(line.split(":")[9] for line in shown.splitlines() if line.startswith("fpr"))

    def publish(self, folder: Path, key: Path) -> None:
        """Index and sign a folder of packages; write the public key."""
        (folder / "Packages").write_text(run("apt-ftparchive", "packages", ".", cwd=folder).stdout)
        release = run("apt-ftparchive", "release", ".", cwd=folder).stdout
        (folder / "Release").write_text(release)
        self._gpg("--clearsign", "--output", str(folder / "InRelease"), str(folder / "Release"))
        key.write_text(self._gpg("--armor", "--export"))

    def _gpg(self, *words: str) -> str:
        return run("gpg", "--batch", "--quiet", "--yes", "--homedir", self.home, *words).stdout


def package(
    folder: Path, name: str, version: str, files: dict[str, str], links: dict[str, str] | None = None
) -> None:
    """Build a package of text files; those in bin folders can be run."""
    tree = folder / f"build-{name}-{version}"
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
    control += "Maintainer: stand-in\nDescription: stand-in\n"
    for path, text in {"DEBIAN/control": control, **files}.items():
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755 if "bin/" in path else 0o644)
    for path, target in (links or {}).items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).symlink_to(target)
    run("dpkg-deb", "--root-owner-group", "--build", tree, folder / f"{name}_{version}_all.deb")
    run("rm", "-r", tree)


def publish_all(web: Path, keys: Path) -> Publisher:
    """Driver and toolkit, each in a wanted and in a newer version; the address parts are NVIDIA's."""
    publisher = Publisher(keys)
    driver, toolkit = web / "driver/debian12/x86_64", web / "toolkit/stable/deb/amd64"
    (web / "driver").mkdir()
    # found only where the machine's distribution is in the address
    (web / "driver/ubuntu2404").symlink_to("debian12")
    driver.mkdir(parents=True)
    toolkit.mkdir(parents=True)
    for version in ("580.95.05-1", "590.44.01-1"):
        files = {
            "usr/bin/nvidia-smi": SMI,
            "usr/share/nvidia-stand-in": version.split("-")[0] + "\n",
            "usr/lib/systemd/system/nvidia-stand-in.service": LOAD,
        }
        wants = "usr/lib/systemd/system/multi-user.target.wants/nvidia-stand-in.service"
        package(driver, "nvidia-open", version, files, {wants: "../nvidia-stand-in.service"})
    package(driver, f"linux-headers-{platform.release()}", "1", {})
    for version in ("1.18.2-1", "1.19.0-1"):
        files = {"usr/bin/nvidia-ctk": CTK, "usr/bin/nvidia-container-runtime": "#!/bin/sh\n"}
        package(toolkit, "nvidia-container-toolkit", version, files)
    publisher.publish(driver, driver / "3bf863cc.pub")
    publisher.publish(toolkit, web / "toolkit/gpgkey")
    return publisher
