"""Runs mkfs.ext4 and qemu-img on one file: without privileges, and within bounds.

What they work on may have been written by anyone. So they are given a descriptor instead of a path,
a uid that may open nothing else of value, and no other name to follow: a qcow2 is opened without
whatever its header wants opened with it.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Sequence

from agent.model.errors import CocoonError, Damaged, Failed, NoSpace, TimedOut, Unsupported

_PACKAGES = {"mkfs.ext4": "e2fsprogs", "qemu-img": "qemu-utils"}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LIMIT = 60.0  # seconds
_BOUNDS = ("--cpu=60", "--as=4294967296", "--core=0", "--nofile=64")
_WORDS = 64 * 1024  # bytes of a tool's messages that are kept
_CORRUPT = 2  # qemu-img(1), check
_LEAKS_ONLY = 3  # the same: clusters that nobody refers to, which harm nobody
_NOBODY = 65534


def missing_programs() -> dict[str, str]:
    """Return which of the programs this host lacks, and the package that each is in."""
    return {
        program: package
        for program, package in _PACKAGES.items()
        if shutil.which(program, path=_PATH) is None
    }


def make_ext4(file: int, uid: int) -> None:
    """Make an ext4 filesystem, the guest root's, on the new file of `uid`'s open as `file`.

    It takes a few milliseconds and the room of its metadata, and leaves nothing for the guest to
    write later: all else of a new file is zeros. Raises NoSpace or Failed.
    """
    features = "nodiscard,assume_storage_prezeroed=1,root_owner=0:0"
    status, words = _run("mkfs.ext4", ("-q", "-F", "-E", features, _path(file)), file, uid)
    if status:
        raise _failure("mkfs.ext4", words)


def make_overlay(file: int, uid: int, size: int, base: str, kind: str) -> None:
    """Make an empty qcow2 of `size` bytes on top of `base`, a path that need not be there.

    `file` is open on a new file of `uid`'s, `kind` the format of the base. Raises NoSpace or
    Failed.
    """
    options = ("create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", kind)
    status, words = _run("qemu-img", (*options, _path(file), str(size)), file, uid)
    if status:
        raise _failure("qemu-img", words)


def grow_overlay(file: int, uid: int, size: int) -> None:
    """Give the disk in a qcow2, `uid`'s and open for writing, `size` bytes; its header is checked.

    Raises NoSpace or Failed, and Damaged when the file is no good any more.
    """
    status, words = _run("qemu-img", ("resize", "-q", _alone(file), str(size)), file, uid)
    if status:
        failure = _failure("qemu-img", words)
        raise failure if isinstance(failure, NoSpace) else Damaged(str(failure))


def check_qcow2(file: int) -> None:
    """Raise Damaged when the tables of the qcow2 open as `file`, which all may read, are broken."""
    status, words = _run("qemu-img", ("check", "-q", _alone(file)), file, _NOBODY)
    if status not in (0, _LEAKS_ONLY):
        what = "has broken tables" if status == _CORRUPT else "cannot be read"
        raise Damaged(f"{what}: qemu-img check says {_first(words) or f'status {status}'}")


def _alone(file: int) -> str:
    """Name a qcow2 in a way by which nothing else is opened: its header may name any path."""
    inner = {"driver": "file", "filename": _path(file)}
    return "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": inner})


def _path(file: int) -> str:
    return f"/proc/self/fd/{file}"


def _run(program: str, arguments: Sequence[str], file: int, uid: int) -> tuple[int, str]:
    """Return exit status (negative for a signal) and messages; raise Unsupported or TimedOut."""
    path = shutil.which(program, path=_PATH)
    if path is None:
        raise Unsupported(f"there is no {program} on this host: install {_PACKAGES[program]}")
    command = ["prlimit", *_BOUNDS, "--", path, *arguments]
    if os.geteuid() == 0:
        identity = (f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
        rights = ("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all")
        command = ["setpriv", *identity, *rights, "--", *command]
    words = _words_file()
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            pass_fds=(file,),
            cwd="/",
            env={"PATH": _PATH, "LC_ALL": "C"},
            timeout=_LIMIT,
            check=False,
        )
        text = os.pread(words, _WORDS, 0).rstrip(b"\0").decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise TimedOut(f"{program} did not end within {_LIMIT:.0f} seconds") from None
    finally:
        os.close(words)
    return ended.returncode, text


def _words_file() -> int:
    """Return a file that takes so many bytes and no more, however much a tool has to say."""
    words = os.memfd_create("words", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(words, _WORDS)
    fcntl.fcntl(words, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return words


def _first(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return "".join(char for char in lines[0] if char.isprintable())[:200] if lines else ""


def _failure(program: str, words: str) -> CocoonError:
    kind = NoSpace if "No space left" in words or "Disk quota" in words else Failed
    return kind(f"{program} failed: {_first(words) or 'it said nothing'}")
