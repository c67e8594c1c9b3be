"""What a guest is told at its first boot: the documents of a cloud-init NoCloud seed, and when.

The keys `hostname`, `user`, `password`, `ssh_keys` and `user_data` are untrusted text: they get
into a document as JSON strings, which are YAML too, or encoded in base64, never as bare text.
https://cloudinit.readthedocs.io, "NoCloud" and "User data formats".
"""

import hashlib
import json
import re
from collections.abc import Mapping
from email import message_from_bytes
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from typing import Any

from .config import VmConfig
from .vm import Vm

LABEL = "CIDATA"
"""The volume label by which cloud-init finds the disk."""

_MIME_HEAD = 4096  # where cloud-init looks for "mime-version:"


def seed_for_boot(vm: Vm) -> str:
    """Return the instance id of the seed that the VM's next cold boot gets, "" for none.

    A VM gets one that has any of the keys, an image, or had one before.

    The id says who the guest is: another VM (a clone), or other keys, make another one, at which
    cloud-init does all that belongs to a first boot again. A seed that a guest has seen already
    does no harm, so in doubt it is there: until the guest has powered off when it was asked to, and
    after whatever may have brought back an older disk.
    """
    if not (vm.seed or vm.config.base or _has_keys(vm.config)):
        return ""
    instance = instance_id(vm)
    return "" if instance == vm.seeded else instance


def instance_id(vm: Vm) -> str:
    """Return the id of the instance that the VM is with the keys it has now."""
    config = vm.config
    keys = [host_name(vm), config.user, config.password, config.ssh_keys, config.user_data]
    return f"{vm.id}-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]}"


def host_name(vm: Vm) -> str:
    """Return the guest's host name: the key's, or the VM's name as far as it can be one."""
    return vm.config.hostname or re.sub("[^a-zA-Z0-9]+", "-", vm.name).strip("-")


def seed_files(vm: Vm) -> Mapping[str, bytes]:
    """Return the files of the seed with the instance id `vm.seed`, by name."""
    return {
        "meta-data": _json({"instance-id": vm.seed, "local-hostname": host_name(vm)}),
        "user-data": _user_data(vm.config),
        # No VM has a network card yet; without the file cloud-init would look for some.
        "network-config": _json({"version": 2, "ethernets": {}}),
    }


def _has_keys(config: VmConfig) -> bool:
    return bool(
        config.hostname or config.user or config.password or config.ssh_keys or config.user_data
    )


def _user_data(config: VmConfig) -> bytes:
    """Return what the user wrote, what follows from the other keys, or both in a multipart."""
    own = _cloud_config(config)
    if not config.user_data:
        return b"#cloud-config\n" + _json(own)
    if not own:
        return config.user_data.encode()
    both = MIMEMultipart()
    both.attach(MIMEText("#cloud-config\n" + _json(own).decode(), "cloud-config", "utf-8"))
    if "mime-version:" in config.user_data[:_MIME_HEAD].lower():
        both.attach(message_from_bytes(config.user_data.encode()))
    else:
        # Of plain text cloud-init finds out by itself what it is. Its words come last: they count.
        both.attach(MIMEText(config.user_data, "plain", "utf-8"))
    return both.as_bytes()


def _cloud_config(config: VmConfig) -> dict[str, Any]:
    """Return what cloud-init is to do for `user`, `password` and `ssh_keys`.

    They change the image's default user, so that what it gives that one (sudo, shell, groups) is
    kept.
    """
    user: dict[str, Any] = {}
    if config.user:
        user["name"] = config.user
    if config.password:
        user |= {"hashed_passwd": config.password, "lock_passwd": False}
    if config.ssh_keys:
        user["ssh_authorized_keys"] = list(config.ssh_keys)
    if not user:
        return {}
    return {"user": user, "disable_root": False} if config.user == "root" else {"user": user}


def _json(value: Mapping[str, Any]) -> bytes:
    """Return JSON that is YAML as well, in one line.

    YAML takes some characters only escaped, and no surrogate pairs, which JSON escapes others with.
    """
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"
