"""The disk of a seed: an ISO 9660 image, as large for one VM as for another."""

import io
import os
from collections.abc import Mapping

import pycdlib

from agent.model import canonical
from agent.model.errors import Unsupported
from agent.model.seed import LABEL
from agent.model.size import MIB, show_size

from . import directory
from .reflink import open_owned

SIZE = 16 * MIB
"""Of all seeds, mostly a hole: a guest that goes on from a snapshot must not see it change."""

_INTERCHANGE = 3  # ISO 9660: names of up to 30 characters


def seed_image(files: Mapping[str, bytes]) -> bytes:
    """Return an image with the label CIDATA and `files`, by their names, in its root."""
    image = pycdlib.PyCdlib()
    image.new(interchange_level=_INTERCHANGE, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    for name, content in files.items():
        image.add_fp(
            io.BytesIO(content),
            len(content),
            f"/{name.upper().replace('-', '')}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    written = io.BytesIO()
    image.write_fp(written)
    image.close()
    return written.getvalue()


def write_seed(parent: int, image: bytes, uid: int, *, loads: bool) -> None:
    """Put the image into a VM's directory, which is open as `parent`; the VM has no process.

    One that `loads` a snapshot has the seed of that one: it is written over in its place and keeps
    its size, for the VMM's state relies on both. Raises Unsupported when that has no room.
    """
    if not loads:
        directory.discard(parent, canonical.SEED)
        directory.write_file(parent, canonical.SEED, b"", uid)
    file = open_owned(parent, canonical.SEED, uid, os.O_WRONLY)
    try:
        size = os.fstat(file).st_size if loads else SIZE
        if len(image) > size:
            raise Unsupported(
                f"the first-boot configuration takes {show_size(len(image))}, and the snapshot has "
                f"{show_size(size)} for it: shorten user_data or ssh_keys"
            )
        os.truncate(file, 0)
        os.truncate(file, size)
        with open(file, "wb", closefd=False) as stream:
            stream.write(image)
    finally:
        os.close(file)
