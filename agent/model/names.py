"""Names that users choose, ids that the agent chooses."""

import base64
import re
import secrets

from .errors import Invalid

NAME_LENGTH = 63
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}")
_ID = re.compile(r"[a-z2-7]{26}")

# systemd.unit(5): `systemctl status cocoon-vm-x.timer` would look for another unit.
_UNIT_TYPES = "service|socket|device|mount|automount|swap|target|path|timer|slice|scope"
_UNIT_SUFFIX = re.compile(rf"\.({_UNIT_TYPES})$")


def is_name(text: str) -> bool:
    """Whether `text` may name a VM, a snapshot or an image."""
    return _NAME.fullmatch(text) is not None and _UNIT_SUFFIX.search(text) is None


def check_name(text: str) -> str:
    """Return `text`; raise Invalid, with the rule, when it is no name."""
    if not is_name(text):
        raise Invalid(
            f"{text[:80]!r} is not a name: use 1 to {NAME_LENGTH} of a-z A-Z 0-9 . _ -, "
            "starting with a letter or digit and not ending in a unit suffix such as .service"
        )
    return text


def new_id() -> str:
    """Return a fresh id of 26 base32 characters, the shape of Cocoon's ids (130 random bits)."""
    return base64.b32encode(secrets.token_bytes(17)).decode().lower()[:26]


def is_id(text: str) -> bool:
    """Whether `text` has the shape of an id."""
    return _ID.fullmatch(text) is not None
