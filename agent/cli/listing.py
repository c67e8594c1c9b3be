"""`cocoon-host list`: the VMs, or the snapshots, as a table or as JSON."""

import argparse
import datetime
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from agent.model.errors import Denied, Failed, Missing
from agent.model.names import is_id
from agent.model.size import show_size
from agent.model.vm import WITH_PROCESS

from .command import add_command
from .mount import Mount, add_mount_option
from .table import show_table

if TYPE_CHECKING:
    from .command import Commands

_VM_TITLES: Final = (
    *("NAME", "STATE", "HYPERVISOR", "CPU", "MEMORY", "IMAGE"),
    *("PID", "UPTIME", "NOTE"),
)
_VM_RIGHT: Final = frozenset({3, 4, 6, 7})
_SNAPSHOT_TITLES: Final = (
    *("NAME", "VM", "HYPERVISOR", "CPU", "MEMORY", "SIZE"),
    *("AGE", "DESCRIPTION"),
)
_SNAPSHOT_RIGHT: Final = frozenset({3, 4, 5, 6})
_UNITS: Final = (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1))
_UNREADABLE: Final = "not yours to read"


def register(commands: "Commands") -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "list",
        _list,
        "list the VMs",
        description="List the VMs by name: their state, size and main process, and an error or why "
        "they are in that state.",
        epilog="Into a pipe it writes whole lines with a tab between columns and - for what is "
        "empty. Of VMs that you may not read there is only the name.",
    )
    parser.add_argument("--snapshots", action="store_true", help="list the snapshots instead")
    parser.add_argument("--json", action="store_true", help="the full records, as a JSON array")
    add_mount_option(parser)


def _list(options: argparse.Namespace) -> int:
    mount = Mount.named_by(options)
    records = read_snapshots(mount) if options.snapshots else read_vms(mount)
    if options.json:
        print(json.dumps(records, indent=2))
        return 0
    now = time.time()
    if options.snapshots:
        rows = [snapshot_row(record, now, mount.name_of) for record in records]
        show_table([_SNAPSHOT_TITLES, *rows], _SNAPSHOT_RIGHT)
    else:
        rows = [vm_row(record, now) for record in records]
        show_table([_VM_TITLES, *rows], _VM_RIGHT)
    return 0


def read_vms(mount: Mount) -> list[dict[str, Any]]:
    """Return the records of all VMs, by name; the name alone of those that may not be read."""
    try:
        index = mount.read_json("index.json")
        return sorted(index["vms"].values(), key=lambda record: str(record["name"]))
    except Denied:
        return _each(mount, [(name, ("vms", name, "info.json")) for name in mount.list("vms")])
    except (KeyError, TypeError, AttributeError) as error:
        raise Failed(f"{mount.path}/index.json has another shape than expected") from error


def read_snapshots(mount: Mount) -> list[dict[str, Any]]:
    """Return what is known of all snapshots, by name; the name alone where that is not allowed."""
    files = mount.list("snapshots")
    names = sorted(file.removesuffix(".json") for file in files if file.endswith(".json"))
    return _each(mount, [(name, ("snapshots", f"{name}.json")) for name in names])


def _each(mount: Mount, files: list[tuple[str, tuple[str, ...]]]) -> list[dict[str, Any]]:
    records = []
    for name, parts in files:
        try:
            records.append(mount.read_json(*parts) | {"name": name})
        except Denied:
            records.append({"name": name})
        except Missing:
            pass  # removed since the directory was read
    return records


def vm_row(record: dict[str, Any], now: float) -> list[str]:
    """Return the columns of a VM's record, as of `now`, seconds since the epoch."""
    if set(record) == {"name"}:
        return [record["name"], *[""] * (len(_VM_TITLES) - 2), _UNREADABLE]
    config = record.get("config", {})
    state = _text(record.get("state"))
    started = record.get("started_at") if state in WITH_PROCESS else None
    return [
        _text(record.get("name")),
        state,
        _text(record.get("hypervisor")),
        _text(config.get("cpu")),
        _size(config.get("memory")),
        _text(config.get("image")),
        _text(record.get("pid") or ""),
        _since(started, now),
        _text(record.get("error") or record.get("reason")),
    ]


def snapshot_row(record: dict[str, Any], now: float, name_of: Callable[[str], str]) -> list[str]:
    """Return the columns of what is known of a snapshot; `name_of` gives the name of a VM's id."""
    if set(record) == {"name"}:
        return [record["name"], *[""] * (len(_SNAPSHOT_TITLES) - 2), _UNREADABLE]
    source = _text(record.get("source_vm_id"))
    return [
        _text(record.get("name")),
        name_of(source) if is_id(source) else "",
        _text(record.get("hypervisor")),
        _text(record.get("cpu")),
        _size(record.get("memory")),
        _size(record.get("archive_size")),
        _since(record.get("created_at"), now),
        _text(record.get("description")),
    ]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _size(value: Any) -> str:
    return show_size(value) if isinstance(value, int) else ""


def _since(moment: Any, now: float) -> str:
    """Return how long ago a time of RFC 3339 is, in its two largest units."""
    if not isinstance(moment, str):
        return ""
    try:
        seconds = int(now - datetime.datetime.fromisoformat(moment).timestamp())
    except ValueError:
        return ""
    for large, factor, small, part in _UNITS:
        if seconds >= factor:
            return f"{seconds // factor}{large}{seconds % factor // part}{small}"
    return f"{max(seconds, 0)}s"
