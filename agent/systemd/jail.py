"""The jail's skeleton: the empty root that every VMM starts in.

Made once and shared by all VMs: directories and empty files, root's, that the bind mounts of units
land on. Nothing in it can be written by a VMM.
"""

import os

from agent.model import canonical

_DIRECTORIES = (canonical.ROOT, "/usr", "/lib", "/lib64")
_DEVICES = ("/dev/kvm", "/dev/net/tun", "/dev/null", "/dev/urandom", "/dev/userfaultfd")
_FILES = (
    *_DEVICES,
    # systemd binds its notify socket there (NotifyAccess=).
    "/run/systemd/notify",
)


def make_jail(path: str) -> None:
    """Make the skeleton at `path`, or what is missing of it; raises OSError.

    Below `canonical.ROOT` each unit has a filesystem of its own (see the drop-in), for what lands
    there may be a path of another host's, named in its snapshot.
    """
    for directory in _DIRECTORIES:
        _make_directory(path + directory)
    for file in _FILES:
        _make_directory(path + os.path.dirname(file))
        os.close(
            os.open(path + file, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444)
        )


def _make_directory(path: str) -> None:
    """Make `path` and its parents, for all to search whatever the umask."""
    if os.path.isdir(path):
        return
    _make_directory(os.path.dirname(path))
    os.mkdir(path)
    os.chmod(path, 0o755)  # noqa: S103 (the VMM, of its own uid, passes through)
