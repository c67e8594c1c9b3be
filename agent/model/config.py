"""A VM's configuration: its keys, their defaults, and how each is checked, read and written."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import Invalid
from .names import is_name
from .size import GIB, MIB, parse_size, show_size

HYPERVISORS = ("cloud-hypervisor", "firecracker", "qemu")
"""In the order in which `auto` prefers them."""
RESTART = ("no", "on-failure", "always")
RESTORE_MODES = ("auto", "ondemand", "copy")
MINIMUM_MEMORY = 16 * MIB
MAXIMUM_STORAGE = 64 * 1024 * GIB
MAXIMUM_DISKS = 16
MAXIMUM_HOST_CPU = 1023
"""The last in a cpu_set_t, CPU_SET(3): Cloud Hypervisor panics at one beyond."""
_SERIAL = re.compile(r"[A-Za-z0-9._-]{1,20}")  # virtio-blk: 20 bytes (VIRTIO 1.2, 5.2.6.1)
FILESYSTEMS = ("", "ext4")
"""What the agent makes on its own disks; "" for nothing."""
QueueAffinity = tuple[tuple[int, ...], ...]
"""For each queue of every disk the CPUs of the host that it is tied to, none for any."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What the VM boots: a kernel with initrd and command line, or firmware.

    A plain name is a file in the root directory's `boot/`; only root may name any path of the host.
    """

    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    firmware: str = ""

    def files(self) -> dict[str, str]:
        """The files named, by what they are."""
        names = {"kernel": self.kernel, "initrd": self.initrd, "firmware": self.firmware}
        return {part: name for part, name in names.items() if name}


@dataclass(frozen=True, slots=True)
class Disk:
    """A further disk: one of the agent's own (`name`, `size`) or one of the host's (`path`)."""

    name: str = ""
    size: int = 0
    fstype: str = ""
    path: str = ""
    readonly: bool = False
    serial: str = ""

    @property
    def is_host_path(self) -> bool:
        return bool(self.path)


@dataclass(frozen=True, slots=True)
class BaseImage:
    """The base image behind a VM's own disk, by content, whatever its name is by now.

    `digest` is the SHA-256 of its file, in hex, `format` raw or qcow2, `size` that of the disk in
    it, in bytes. `copied` tells that the VM has a raw copy and needs the base no more: such is made
    at the first start by a backend that has no other disks.
    """

    digest: str
    format: str
    size: int
    copied: bool = False


@dataclass(frozen=True, slots=True)
class VmConfig:
    """The configuration of one VM. `max_cpu` and `max_memory` of 0 follow `cpu` and `memory`.

    `base` is no key: it is what `image` named when that was written.
    """

    cpu: int = 1
    max_cpu: int = 0
    memory: int = 512 * MIB
    max_memory: int = 0
    storage: int = 0
    image: str = ""
    base: BaseImage | None = None
    hypervisor: str = "auto"
    boot: Boot | None = None
    disks: tuple[Disk, ...] = ()
    restart: str = "no"
    autostart: bool = False
    stop_timeout: int = 30
    track_dirty: bool = False
    restore_mode: str = "auto"
    queue_affinity: QueueAffinity = ()
    hostname: str = ""
    user: str = ""
    password: str = field(default="", repr=False)
    ssh_keys: tuple[str, ...] = ()
    user_data: str = field(default="", repr=False)

    @property
    def most_cpu(self) -> int:
        return self.max_cpu or self.cpu

    @property
    def most_memory(self) -> int:
        return self.max_memory or self.memory

    @property
    def ties_queues(self) -> bool:
        """Whether a queue of its disks is tied to CPUs of the host."""
        return any(self.queue_affinity)

    @property
    def is_disk_boot(self) -> bool:
        """Whether what boots, with no kernel named, can only be on a disk that came from elsewhere.

        That is an image or a disk of the host; those that the agent makes hold no system.
        """
        given = self.base is not None or any(disk.is_host_path for disk in self.disks)
        return self.boot is None and given

    @property
    def own_size(self) -> int:
        """Bytes that the VM's own writable disk has, 0 for none."""
        return self.storage or (self.base.size if self.base else 0)

    def host_paths(self) -> frozenset[str]:
        """The paths of the host that this configuration names, which only root may add."""
        boot = self.boot.files().values() if self.boot else ()
        return frozenset(
            [name for name in boot if name.startswith("/")]
            + [disk.path for disk in self.disks if disk.is_host_path]
        )


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration.

    `parse` takes what JSON or a line of text gave and returns the value or raises Invalid;
    `show` returns what JSON shows; `live` keys may change while the VM runs.
    """

    name: str
    help: str
    parse: Callable[[Any], Any]
    show: Callable[[VmConfig], Any]
    live: bool = False


def parse_config(base: VmConfig, changes: Mapping[str, Any], host_cpus: int) -> VmConfig:
    """Return `base` with `changes` merged in; raise Invalid, naming the key, and change nothing."""
    values = {}
    for name, raw in changes.items():
        key = KEYS.get(name)
        if key is None:
            raise Invalid(f"there is no key {name[:40]!r}: the keys are {', '.join(KEYS)}")
        values[name] = key.parse(raw)
    config = dataclasses.replace(base, **values)
    if config.image != base.image:
        # What it names now is not known here.
        config = dataclasses.replace(config, base=None)
    # A maximum that equals the value follows it: writing back what is there changes nothing.
    if config.max_cpu == config.cpu:
        config = dataclasses.replace(config, max_cpu=0)
    if config.max_memory == config.memory:
        config = dataclasses.replace(config, max_memory=0)
    _check_together(config, host_cpus)
    if config.queue_affinity != base.queue_affinity:
        # Those of CPUs that were taken away later wait for them to come back.
        _check_queues(config)
    return config


def parse_line(name: str, text: str) -> Any:
    """Return the raw value that `text`, the content of the one-value file `name`, stands for.

    Lists and objects are JSON; `ssh_keys` may also be lines, as in an authorized_keys file.
    """
    stripped = text.strip()
    if name in ("boot", "disks", "queue_affinity") or (
        name == "ssh_keys" and stripped.startswith("[")
    ):
        try:
            return json.loads(stripped or "null")
        except ValueError as error:
            raise Invalid(f"{name} is not JSON: {error}") from None
    if name == "ssh_keys":
        return [line for line in stripped.splitlines() if line.strip()]
    if name == "user_data":
        return text
    return stripped


def show_line(name: str, config: VmConfig) -> str:
    """Return the content of the one-value file `name`, without the final newline."""
    value = KEYS[name].show(config)
    match value:
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case _:
            return json.dumps(value)


def show_config(config: VmConfig) -> dict[str, Any]:
    """Return the configuration as the `config` file shows it, every key in the table's order."""
    return {name: key.show(config) for name, key in KEYS.items()}


def _check_together(config: VmConfig, host_cpus: int) -> None:
    if config.cpu > host_cpus:
        raise Invalid(f"cpu {config.cpu} is more than the {host_cpus} of this host")
    if config.max_cpu and not config.cpu <= config.max_cpu <= host_cpus:
        raise Invalid(
            f"max_cpu {config.max_cpu} is not between cpu ({config.cpu}) and the host's {host_cpus}"
        )
    if config.max_memory and config.max_memory < config.memory:
        raise Invalid(
            f"max_memory {show_size(config.max_memory)} is below memory {show_size(config.memory)}"
        )
    if config.base is not None and 0 < config.storage < config.base.size:
        raise Invalid(
            f"storage {show_size(config.storage)} is less than the {show_size(config.base.size)} "
            f"of the image {config.image}: write that or more, or 0 for the image's size"
        )
    names = [disk.name for disk in config.disks if disk.name]
    serials = [disk.serial for disk in config.disks if disk.serial]
    for what, values in (("name", names), ("serial", serials)):
        if len(set(values)) != len(values):
            raise Invalid(f"disks: two disks have the same {what}")


def _check_queues(config: VmConfig) -> None:
    queues, most = len(config.queue_affinity), config.most_cpu
    if queues > most:
        raise Invalid(
            f"queue_affinity is for {queues} queues, and a disk has one for each CPU, {most} at "
            "most (max_cpu): write fewer lists, or more CPUs first"
        )


def _whole(name: str, low: int, high: int | None = None) -> Callable[[Any], int]:
    bounds = f"a whole number from {low}" + (f" to {high}" if high is not None else "")

    def parse(raw: Any) -> int:
        if isinstance(raw, str) and re.fullmatch(r"[0-9]{1,9}", raw):
            raw = int(raw)
        if not isinstance(raw, int) or isinstance(raw, bool):
            raise Invalid(f"{name} {str(raw)[:40]!r} is not {bounds}")
        if raw < low or (high is not None and raw > high):
            raise Invalid(f"{name} {raw} is not {bounds}")
        return raw

    return parse


def _size(name: str, low: int, high: int, step: int = 1) -> Callable[[Any], int]:
    def parse(raw: Any) -> int:
        if isinstance(raw, str):
            raw = parse_size(raw, name)
        if not isinstance(raw, int) or isinstance(raw, bool):
            raise Invalid(f"{name} {str(raw)[:40]!r} is not a size: write bytes, or 512M, 2G")
        if not low <= raw <= high:
            raise Invalid(f"{name} {raw} is not between {show_size(low)} and {show_size(high)}")
        if raw % step:
            raise Invalid(f"{name} {raw} is not a multiple of {show_size(step)}")
        return raw

    return parse


def _choice(name: str, choices: tuple[str, ...]) -> Callable[[Any], str]:
    def parse(raw: Any) -> str:
        if raw not in choices:
            raise Invalid(f"{name} {str(raw)[:40]!r} is not one of {', '.join(choices)}")
        return str(raw)

    return parse


def _truth(name: str) -> Callable[[Any], bool]:
    words = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}

    def parse(raw: Any) -> bool:
        if isinstance(raw, str):
            raw = words.get(raw.lower(), raw)
        if not isinstance(raw, bool):
            raise Invalid(f"{name} {str(raw)[:40]!r} is neither yes nor no")
        return raw

    return parse


def _text(name: str, limit: int, pattern: str = "", rule: str = "") -> Callable[[Any], str]:
    def parse(raw: Any) -> str:
        # A lone surrogate, which JSON can spell, is no character.
        if not isinstance(raw, str) or len(raw) > limit or re.search("[\0\ud800-\udfff]", raw):
            raise Invalid(f"{name} is not a text of at most {limit} characters")
        if raw and pattern and re.fullmatch(pattern, raw) is None:
            raise Invalid(f"{name} {raw[:40]!r} is not {rule}")
        return raw

    return parse


def _ssh_keys(raw: Any) -> tuple[str, ...]:
    line = _text("ssh_keys", 16384, r"[^\n\r]+", "one public key a line")
    if not isinstance(raw, list) or len(raw) > 100:
        raise Invalid("ssh_keys is not a list of at most 100 public keys")
    return tuple(line(key) for key in raw)


_path = _text("path", 4095, r"/[^\n\r]*|[^/\n\r]+", "a plain file name or an absolute path")
_cmdline = _text("boot.cmdline", 2048, r"[\x20-\x7e]*", "one line of printable ASCII")


def _host_path(name: str, raw: Any) -> str:
    text = _path(raw)
    if text.startswith("/") and (".." in text.split("/") or text.rstrip("/") == ""):
        raise Invalid(f"{name} {text[:80]!r} is not a plain absolute path: leave out '..'")
    if not text.startswith("/") and text and (text.startswith(".") or len(text) > 255):
        raise Invalid(f"{name} {text[:80]!r} is not the name of a file")
    return text


def is_serial(text: str) -> bool:
    """Whether `text` can be the serial number of a disk."""
    return _SERIAL.fullmatch(text) is not None


def _image(raw: Any) -> str:
    if raw and not (isinstance(raw, str) and is_name(raw)):
        raise Invalid(f"image {str(raw)[:40]!r} is not the name of an image: look into images/")
    return raw or ""


def _object(what: str, raw: Any, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise Invalid(f"{what} is not a JSON object")
    for name in raw:
        if name not in allowed:
            raise Invalid(f"{what} has no {str(name)[:40]!r}: it takes {', '.join(allowed)}")
    return raw


def _boot(raw: Any) -> Boot | None:
    if raw is None:
        return None
    given = _object("boot", raw, ("kernel", "initrd", "cmdline", "firmware"))
    boot = Boot(
        kernel=_host_path("boot.kernel", given.get("kernel") or ""),
        initrd=_host_path("boot.initrd", given.get("initrd") or ""),
        cmdline=_cmdline(given.get("cmdline") or ""),
        firmware=_host_path("boot.firmware", given.get("firmware") or ""),
    )
    if boot.firmware and (boot.kernel or boot.initrd or boot.cmdline):
        raise Invalid("boot takes either firmware, or kernel with initrd and cmdline")
    if not boot.firmware and not boot.kernel:
        raise Invalid("boot names neither kernel nor firmware: write null for none")
    return boot


def _disks(raw: Any) -> tuple[Disk, ...]:
    if not isinstance(raw, list) or len(raw) > MAXIMUM_DISKS:
        raise Invalid(f"disks is not a list of at most {MAXIMUM_DISKS} disks")
    return tuple(_disk(item) for item in raw)


def _disk(raw: Any) -> Disk:
    given = _object("a disk", raw, ("name", "size", "fstype", "path", "readonly", "serial"))
    serial = _text("serial", 20, _SERIAL.pattern, "1 to 20 letters, digits, dots, _ or -")
    disk = Disk(
        name=_text("disk name", 255)(given.get("name") or ""),
        fstype=_choice("fstype", FILESYSTEMS)(given.get("fstype") or ""),
        path=_host_path("disk path", given.get("path") or ""),
        readonly=_truth("readonly")(given.get("readonly", False)),
        serial=serial(given.get("serial") or ""),
    )
    if disk.path:
        if disk.name or disk.fstype or given.get("size"):
            raise Invalid("a disk of the host takes path, readonly and serial only")
        if not disk.path.startswith("/"):
            raise Invalid(f"disk path {disk.path!r} is not absolute")
        return disk
    if not is_name(disk.name):
        raise Invalid("a disk needs either a path of the host, or a name and a size")
    size = _size(f"size of disk {disk.name}", MIB, MAXIMUM_STORAGE, 512)
    return dataclasses.replace(disk, size=size(given.get("size")))


def _queue_affinity(raw: Any) -> QueueAffinity:
    if not isinstance(raw, list):
        raise Invalid(
            "queue_affinity is not a list with, for each queue of a disk, a list of CPUs of the "
            "host, as [[0], [1, 2]]"
        )
    return tuple(_queue_cpus(queue, cpus) for queue, cpus in enumerate(raw))


def _queue_cpus(queue: int, raw: Any) -> tuple[int, ...]:
    if not isinstance(raw, list):
        raise Invalid(
            f"queue_affinity of queue {queue}, {str(raw)[:40]!r}, is not a list of CPUs of the "
            "host: write [] for any"
        )
    for cpu in raw:
        if not isinstance(cpu, int) or isinstance(cpu, bool) or not 0 <= cpu <= MAXIMUM_HOST_CPU:
            raise Invalid(
                f"queue_affinity of queue {queue} names {str(cpu)[:40]!r}, which is not the number "
                f"of a CPU, 0 to {MAXIMUM_HOST_CPU}"
            )
    if len(set(raw)) < len(raw):
        raise Invalid(f"queue_affinity of queue {queue} names a CPU twice")
    return tuple(raw)


def _show_boot(config: VmConfig) -> dict[str, str] | None:
    if config.boot is None:
        return None
    return {name: value for name, value in dataclasses.asdict(config.boot).items() if value}


def _show_disk(disk: Disk) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(disk).items() if value}


_HOST_NAME = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"  # RFC 1123
_USER_NAME = r"[a-z_][a-z0-9_-]{0,31}"  # useradd(8)


def _keys() -> dict[str, Key]:
    def plain(name: str) -> Callable[[VmConfig], Any]:
        return lambda config: getattr(config, name)

    memory = _size("memory", MINIMUM_MEMORY, 16 * 1024 * GIB, MIB)
    most_memory = _size("max_memory", MINIMUM_MEMORY, 16 * 1024 * GIB, MIB)
    keys = [
        Key("cpu", "virtual CPUs", _whole("cpu", 1), plain("cpu")),
        Key("max_cpu", "CPUs it may grow to", _whole("max_cpu", 1), lambda c: c.most_cpu),
        Key("memory", "bytes, or 512M, 2G", memory, plain("memory")),
        Key("max_memory", "memory it may grow to", most_memory, lambda c: c.most_memory),
        Key(
            "storage",
            "size of the writable disk; 0 for none, or the image's",
            _size("storage", 0, MAXIMUM_STORAGE, 512),
            plain("storage"),
        ),
        Key("image", "what the writable disk starts from, of images/", _image, plain("image")),
        Key(
            "hypervisor",
            f"{', '.join(HYPERVISORS)} or auto",
            _choice("hypervisor", (*HYPERVISORS, "auto")),
            plain("hypervisor"),
        ),
        Key("boot", '{"kernel","initrd","cmdline"} or {"firmware"}', _boot, _show_boot),
        Key("disks", "further disks", _disks, lambda c: [_show_disk(d) for d in c.disks]),
        Key(
            "restart", ", ".join(RESTART), _choice("restart", RESTART), plain("restart"), live=True
        ),
        Key("autostart", "yes or no", _truth("autostart"), plain("autostart"), live=True),
        Key(
            "stop_timeout",
            "seconds a guest has to power off",
            _whole("stop_timeout", 1, 3600),
            plain("stop_timeout"),
        ),
        Key(
            "track_dirty",
            "yes: later snapshots write only what changed",
            _truth("track_dirty"),
            plain("track_dirty"),
        ),
        Key(
            "restore_mode",
            ", ".join(RESTORE_MODES),
            _choice("restore_mode", RESTORE_MODES),
            plain("restore_mode"),
            live=True,
        ),
        Key(
            "queue_affinity",
            "[[0],[1,2]]: host CPUs for queue 0, 1 … of disks",
            _queue_affinity,
            lambda c: [list(cpus) for cpus in c.queue_affinity],
        ),
        Key(
            "hostname",
            "first boot: the guest's name",
            _text("hostname", 63, _HOST_NAME, "a host name: letters, digits and -"),
            plain("hostname"),
        ),
        Key(
            "user",
            "first boot: a user to create",
            _text("user", 32, _USER_NAME, "a user name: a-z 0-9 _ -"),
            plain("user"),
        ),
        Key(
            "password",
            "first boot: hashed when written",
            _text("password", 512, r"[^\n\r]*", "one line"),
            plain("password"),
        ),
        Key("ssh_keys", "first boot: public keys", _ssh_keys, lambda c: list(c.ssh_keys)),
        Key("user_data", "first boot: cloud-config", _text("user_data", 65536), plain("user_data")),
    ]
    return {key.name: key for key in keys}


KEYS: Mapping[str, Key] = _keys()
"""Every key, in the order in which `config` shows them."""
