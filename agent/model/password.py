"""Passwords for guests: hashed before they are recorded, never stored plain."""

import ctypes
import re
import secrets

from .errors import Failed

_HASHED = re.compile(r"\$(y|gy|7|2b|6|5)\$[^:\n]{1,400}")  # crypt(5)
_SALT_LETTERS = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def is_hashed(password: str) -> bool:
    """Whether `password` is a crypt(5) hash already."""
    return _HASHED.fullmatch(password) is not None


def hash_password(password: str) -> str:
    """Return the SHA-512 crypt(5) hash of `password`, which any guest's login understands.

    Takes some milliseconds of CPU. The C library's own crypt is used: Python dropped its module.
    """
    try:
        crypt = ctypes.CDLL("libcrypt.so.1").crypt
    except OSError as error:
        raise Failed(f"the password cannot be hashed: {error}: install libcrypt1") from error
    crypt.restype = ctypes.c_char_p
    salt = "$6$" + "".join(secrets.choice(_SALT_LETTERS) for _ in range(16))
    hashed: bytes | None = crypt(password.encode(), salt.encode())
    if hashed is None or not is_hashed(hashed.decode()):
        raise Failed("the password cannot be hashed: crypt(3) refused it")
    return hashed.decode()
