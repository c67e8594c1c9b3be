"""The agent's settings: defaults, then `/etc/cocoon/agent.toml`, then `COCOON_*`, then flags."""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .model import canonical
from .model.errors import Invalid
from .model.size import KIB, MIB, parse_size

CONFIG_FILE = "/etc/cocoon/agent.toml"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Settings:
    """Values that an administrator may set; the names are the keys of the TOML file.

    `console_limit` and `events_limit` are bytes of log kept on disk; `cloud_hypervisor`,
    `firecracker` and `qemu` name the programs, found on PATH unless they are paths.
    """

    root_dir: str = "/var/lib/cocoon"
    run_dir: str = "/run/cocoon"
    mount: str = "/cocoon"
    group: str = "cocoon"
    log_level: str = "info"
    console_limit: int = MIB
    events_limit: int = MIB
    cloud_hypervisor: str = "cloud-hypervisor"
    firecracker: str = "firecracker"
    qemu: str = "qemu-system-x86_64"


_PATHS = ("root_dir", "run_dir", "mount")
_SIZES = ("console_limit", "events_limit")


def load_settings(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> Settings:
    """Return the settings in force; raise Invalid, naming file and key, for what cannot be.

    `flags` maps setting names (and `config`, the TOML file) to what the command line gave.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    named = given.pop("config", None) or environment.get("COCOON_CONFIG")
    values: dict[str, Any] = _read_file(named or CONFIG_FILE, required=named is not None)
    for field in dataclasses.fields(Settings):
        variable = f"COCOON_{field.name.upper()}"
        if variable in environment:
            values[field.name] = _checked(field.name, environment[variable], variable)
    for name, value in given.items():
        values[name] = _checked(name, value, f"--{name.replace('_', '-')}")
    return Settings(**values)


def _read_file(path: str, required: bool) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError:
        if required:
            raise Invalid(f"the settings file {path} does not exist") from None
        return {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise Invalid(f"the settings file {path} cannot be read: {error}") from None
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in content:
        if name not in names:
            raise Invalid(f"{path}: there is no setting {name!r}; there are {', '.join(names)}")
    return {name: _checked(name, value, f"{path}: {name}") for name, value in content.items()}


def _checked(name: str, value: Any, where: str) -> Any:
    if name in _SIZES:
        size = parse_size(str(value), where)
        if size < 64 * KIB:
            raise Invalid(f"{where}: {value} is below 64K")
        return size
    if not isinstance(value, str) or not value or "\0" in value:
        raise Invalid(f"{where}: {value!r} is not a text")
    if name == "log_level" and value not in LOG_LEVELS:
        raise Invalid(f"{where}: {value!r} is not one of {', '.join(LOG_LEVELS)}")
    if name in _PATHS:
        path = os.path.normpath(value)
        if not path.startswith("/") or path == "/":
            raise Invalid(f"{where}: {value!r} is not an absolute path below /")
        if name == "run_dir" and f"{path}/".startswith(f"{canonical.ROOT}/"):
            # What stops a VM finds the jail's files there instead.
            raise Invalid(f"{where}: {value!r} is below {canonical.ROOT}: name another place")
        return path
    return value
