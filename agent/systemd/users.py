"""One user a VM, known to the host by a file that nss-systemd(8) reads.

A unit's numeric `User=` needs a user record: without one it fails with status 217.
"""

import contextlib
import json
import os

USERDB = "/run/userdb"


def write_user(uid: int, directory: str = USERDB) -> None:
    """Make the VM's user known, or leave it as it is; raises OSError."""
    record = json.dumps({"userName": f"cvm-{uid}", "uid": uid, "gid": uid}).encode()
    path = _path(uid, directory)
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        if file.read(len(record) + 1) == record:
            return
    os.makedirs(directory, mode=0o755, exist_ok=True)
    # Not a name that ends in .user: nss-systemd would read it half-written.
    temporary = f"{path}.new"
    with open(temporary, "wb") as file:
        file.write(record)
        os.fchmod(file.fileno(), 0o644)
    os.rename(temporary, path)


def known_users(directory: str = USERDB) -> set[int]:
    """Return the uids of all users that were made known."""
    with contextlib.suppress(FileNotFoundError):
        numbers = (name.removesuffix(".user") for name in os.listdir(directory))
        return {int(number) for number in numbers if number.isdecimal()}
    return set()


def remove_user(uid: int, directory: str = USERDB) -> None:
    """Forget the VM's user; one that is not known is none to forget."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(uid, directory))


def _path(uid: int, directory: str) -> str:
    return f"{directory}/{uid}.user"
