"""`cocoon-host inspect`: all that is known of one VM or snapshot, as JSON."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from agent.model.errors import CocoonError, Missing
from agent.model.names import is_name

from .command import add_command
from .mount import Mount, add_mount_option

if TYPE_CHECKING:
    from .command import Commands


def register(commands: "Commands") -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "show all that is known of a VM",
        description="Show a VM's info.json and, under the key stats, its stats; or what is known "
        "of a snapshot.",
    )
    parser.add_argument("--snapshot", action="store_true", help="NAME is that of a snapshot")
    parser.add_argument("name", metavar="NAME", help="name, id, or the beginning of an id")
    add_mount_option(parser)


def _inspect(options: argparse.Namespace) -> int:
    mount = Mount.named_by(options)
    if options.snapshot:
        record = read_snapshot(mount, options.name)
    else:
        name = mount.find_vm(options.name)
        record = mount.read_json("vms", name, "info.json")
        record["stats"] = read_stats(mount, name)
    print(json.dumps(record, indent=2))
    return 0


def read_snapshot(mount: Mount, name: str) -> Any:
    """Return what is known of the snapshot of that name."""
    try:
        if is_name(name):
            return mount.read_json("snapshots", f"{name}.json")
    except Missing:
        pass
    raise Missing(f"there is no snapshot {name[:80]!r}: cocoon-host list --snapshots shows them")


def read_stats(mount: Mount, name: str) -> dict[str, int | str]:
    """Return a VM's figures; none when they cannot be had now."""
    try:
        lines = mount.read("vms", name, "stats").splitlines()
    except CocoonError:
        return {}
    pairs = (line.partition(" ") for line in lines)
    return {key: int(value) if value.isdecimal() else value for key, _, value in pairs}
