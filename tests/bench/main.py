"""Benchmarks: runs each in a lab of its own and prints what it found beside what was wanted.

Nothing fails for being slow: targets stand beside the figures. All figures that are compared come
from one run, taken in turn.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Row, row_of, table

TREE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bench:
    """What is measured, and what the columns of medians are called."""

    what: str
    ours: str = "cocoon-host"
    beside: str = "floor"


BENCHES = {
    "start": Bench("one VM, `echo start > state` until it returns"),
    "unit": Bench("the floor's unit, 8 at once, and what its parts cost each", "time", "CPU time"),
    "burst": Bench("64 VMs started at once, alone and beside 128 others (QEMU: 16, alone)"),
    "density": Bench("200 VMs of 32 MiB, started 16 at a time; then the idle agent"),
    "clone": Bench("one clone of a snapshot, `echo start > state` until it returns"),
    "clones": Bench("as many clones of one snapshot started at once"),
    "pause": Bench("how long a snapshot pauses its VM", beside="beside it"),
    "archive": Bench("snapshots as archives", beside="beside it"),
    "many": Bench("1,000 created VMs (10,000 with --long)", beside="beside it"),
}
BACKENDS = {
    "firecracker": tuple(BENCHES),
    "qemu": ("start", "burst", "clone", "clones", "pause"),
    "cloud-hypervisor": ("start", "burst", "clone", "clones"),
}
"""The benches that are there for each backend."""


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """Run one bench in a lab; raise SystemExit when it does not come to its end."""
    inside = [str(options.python), str(TREE / "tests/bench/inside.py"), name]
    process = subprocess.Popen(
        [
            *(str(TREE / "tests/lab/run"), "--agent", "--python", str(options.python), "--"),
            *inside,
            f"--backend={options.backend}",
            *(["--long"] if options.long else []),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    rows = [row_of(line) for line in process.stdout]
    if process.wait() != 0:
        raise SystemExit(f"tests/bench/run: {name} failed with status {process.returncode}")
    return rows


def parse() -> argparse.Namespace:
    listing = "; ".join(f"{name}: {bench.what}" for name, bench in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="tests/bench/run", description=__doc__.partition("\n")[0], epilog=listing
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)} (all)")
    parser.add_argument("--backend", choices=BACKENDS, default="firecracker", help="what runs VMs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all samples there")
    parser.add_argument("--long", action="store_true", help="more rounds, and 10,000 VMs")
    parser.add_argument(
        "--python", type=Path, default=Path("/usr/bin/python3"), help="what runs the agent"
    )
    options = parser.parse_args()
    for name in options.names:
        if name not in BACKENDS[options.backend]:
            there_are = ", ".join(BACKENDS[options.backend])
            parser.error(f"{options.backend} has no bench {name}: there are {there_are}")
    return options


def main() -> int:
    options = parse()
    results: dict[str, Any] = {}
    for name in options.names or BACKENDS[options.backend]:
        bench, rows = BENCHES[name], measure(name, options)
        results[name] = [row.document() for row in rows]
        lines = table(rows, bench.ours, bench.beside)
        print(f"{name}: {bench.what}", *lines, sep="\n", end="\n\n", flush=True)
        if options.json:
            document = {
                "cpus": os.cpu_count(),
                "kernel": os.uname().release,
                "python": str(options.python),
                "long": options.long,
                "backend": options.backend,
                "benches": results,
            }
            options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
