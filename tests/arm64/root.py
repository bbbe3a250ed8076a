"""A folder with the files of an arm64 Debian, whose programs run under QEMU.

Packages come from where this machine's apt and pip get theirs. They are unpacked and not installed:
none of their scripts runs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.arm64.logs import run

CHECKOUT = Path(__file__).parents[2]
ENTER = Path(__file__).with_name("enter.sh")
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"

DEBIAN = ("python3", "gcc", "libc6-dev")
"""With all that they depend on; binutils among it."""
PYTHON = (
    "torch",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
    "cuda-python",
    "numpy",
    "safetensors",
    "pytest",
    "hypothesis",
)
"""Those of tests/requirements.txt that are installed, in the versions that stand there."""
GLIBC = range(36, 16, -1)
"""Minor versions of glibc whose wheels run: that of Debian 12, and what is older."""

# torch converts no float16 unless it finds the processor in /sys, and that of the machine is
# another. This one is a Neoverse V2, as in Grace.
PROCESSOR = {
    "possible": "0\n",
    "present": "0\n",
    "cpu0/regs/identification/midr_el1": "0x00000000410fd4f0\n",
}


class Root:
    """The folder, made once.

    Attributes:
        path: of the folder, which is ``/`` to the programs in it.
    """

    def __init__(self, path: Path):
        self.path = path

    def make(self, log: Path) -> str:
        """Make the folder unless it is there, with the same packages.

        Returns:
            What was done.

        Raises:
            subprocess.CalledProcessError: a command failed, as the log says.
        """
        pins = _pins()
        made_of = "\n".join([*DEBIAN, *pins])
        stamp = self.path / "made-of"
        if stamp.exists() and stamp.read_text() == made_of:
            return "made before"
        shutil.rmtree(self.path, ignore_errors=True)
        self._unpack_debian(log)
        self._unpack_wheels(pins, log)
        for name, content in PROCESSOR.items():
            file = self.path / "sys/devices/system/cpu" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        for name in ("proc", "dev", "tmp", "checkout"):
            (self.path / name).mkdir(exist_ok=True)
        stamp.write_text(made_of)
        return f"made in {self.path}"

    def command(self, *command: str) -> list[str]:
        """Return the command that runs one of the folder, in /checkout."""
        namespaces = ["unshare", "--map-root-user", "--mount"]
        return [*namespaces, "sh", str(ENTER), str(self.path), str(CHECKOUT), *command]

    @property
    def site_packages(self) -> Path:
        """Where its Python finds packages that are not Debian's."""
        python = (self.path / "usr/bin/python3").readlink().name
        return self.path / "usr/local/lib" / python / "dist-packages"

    def _unpack_debian(self, log: Path) -> None:
        # All of apt's state is in the folder: the machine's own stays as it is.
        state = self.path / "var/apt"
        for name in ("lists/partial", "cache/archives/partial"):
            (state / name).mkdir(parents=True)
        (state / "status").touch()
        settings = (
            f"Dir::State={state}",
            f"Dir::State::status={state / 'status'}",
            f"Dir::Cache={state / 'cache'}",
            "APT::Architecture=arm64",
            "APT::Architectures=arm64",
            "APT::Install-Recommends=0",
            "APT::Sandbox::User=",
            "Debug::NoLocking=1",
        )
        apt = ["apt-get", *(f"-o={setting}" for setting in settings)]
        run([*apt, "update"], log)
        run([*apt, "--yes", "--download-only", "install", *DEBIAN], log)
        (self.path / "usr").mkdir()
        for name in ("bin", "lib", "sbin"):
            (self.path / "usr" / name).mkdir()
            (self.path / name).symlink_to(f"usr/{name}")
        for package in sorted((state / "cache/archives").glob("*.deb")):
            files = ["dpkg-deb", "--fsys-tarfile", str(package)]
            with subprocess.Popen(files, stdout=subprocess.PIPE) as archive:
                # Packages that have files in /lib would replace the link.
                unpack = ["tar", "--extract", "--keep-directory-symlink", "-C", str(self.path)]
                run(unpack, log, stdin=archive.stdout)
        shutil.rmtree(state)

    def _unpack_wheels(self, pins: Sequence[str], log: Path) -> None:
        version = self.site_packages.parent.name.removeprefix("python")
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC]
        # The files that pip compiles would be its own Python's, and compiling them takes minutes.
        flags = ["--no-cache-dir", "--no-compile", "--only-binary=:all:", "--progress-bar=off"]
        target = [f"--python-version={version}", f"--target={self.site_packages}"]
        pip = [sys.executable, "-m", "pip", "install"]
        run([*pip, *flags, *platforms, "--platform=manylinux2014_aarch64", *target, *pins], log)


def _pins() -> list[str]:
    lines = REQUIREMENTS.read_text().splitlines()
    return [line for line in lines if re.split(r"[^\w-]", line)[0] in PYTHON]
