"""One bench, inside a lab that runs the agent; prints the rows of its table, for main.py."""

import argparse
import sys
from collections.abc import Callable, Iterator

import archives
import bursts
import clones
import many
import pauses
import starts
from backends import BACKENDS, Backend
from report import Row

BENCHES: dict[str, Callable[[Backend, bool], Iterator[Row]]] = {
    "start": starts.start,
    "unit": starts.unit,
    "burst": bursts.burst,
    "density": bursts.density,
    "clone": clones.clone,
    "clones": clones.clones,
    "pause": pauses.pause,
    "archive": lambda _, long: archives.archive(long),
    "many": lambda _, long: many.many(long),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    for row in BENCHES[options.name](BACKENDS[options.backend], options.long):
        print(row.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
