"""All benchmarks, or those that are named, each in a process of its own on one thread.

    python benchmarks/run.py [NAMES ...] [--data DIR] [--repeats N] [--json FILE]

Prints what each prints, and gathers their results in one JSON file. The exit status is 1 when one of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("step", "cohort", "bank", "overhead", "whole_search", "peak_memory", "gpu")
OWN_OPTIONS = {"overhead": ["--large"]}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--data", type=Path, help="directory with models/NAME and datasets/NAME/{train,test}.jsonl")
    parser.add_argument("--repeats", type=int, help="interleaved repeats; each benchmark has its own default")
    parser.add_argument("--clock", choices=("cpu", "wall"), help="cpu: of the process; wall: only on an idle machine")
    parser.add_argument("--json", type=Path, help="file for the results of all")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    return given


def options_of(name: str, given: argparse.Namespace, results: Path) -> list[str]:
    """Options of one benchmark: those of this command that it knows, and its own."""
    script = (HERE / f"{name}.py").read_text()
    passed: list[str] = list(OWN_OPTIONS.get(name, []))
    for option in ("data", "repeats", "clock"):
        value = getattr(given, option)
        if value is not None and ("from common import" in script or f'"--{option}"' in script):
            passed.append(f"--{option}={value}")
    written = "--out" if '"--out"' in script else "--json"
    return [*passed, f"{written}={results}"]


def main() -> None:
    """Run them, one after another."""
    given = arguments()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    gathered: dict[str, Any] = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or [name for name in NAMES if (HERE / f"{name}.py").exists()]:
            print(f"\n## {name}\n", flush=True)
            results = Path(folder) / f"{name}.json"
            began = time.monotonic()
            command = [sys.executable, str(HERE / f"{name}.py"), *options_of(name, given, results)]
            status = subprocess.run(command, env=environment, check=False).returncode
            print(f"\n({name}: {time.monotonic() - began:.0f} s)", flush=True)
            if status != 0:
                failed.append(name)
            if results.exists():
                gathered[name] = json.loads(results.read_text())
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(gathered, indent=2) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
