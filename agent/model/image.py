"""The record of a base image, and the row that the index keeps of it."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .access import Access
from .config import BaseImage

DIGEST = "sha256:"
"""How documents begin that name an image by content, as Cocoon's do."""


class ImageState(StrEnum):
    """`pending` until it is renamed into place, `deleting` until it is gone."""

    PENDING = "pending"
    READY = "ready"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class Image:
    """One base image. Sizes are bytes: of the disk in it, and of its file.

    `digest` is the SHA-256 of the file, in hex, by which VMs and snapshots know it; `format` is raw
    or qcow2. `reason` says how it came into its state, `generation` counts committed transitions.
    Times are seconds since the epoch.
    """

    id: str
    name: str
    access: Access
    format: str = ""
    size: int = 0
    file_size: int = 0
    digest: str = ""
    state: ImageState = ImageState.PENDING
    reason: str = ""
    generation: int = 0
    created_at: float = 0
    updated_at: float = 0
    mtime: float = 0

    @property
    def base(self) -> BaseImage:
        """What a VM has behind its disk that is made from this image."""
        return BaseImage(self.digest, self.format, self.size)


def to_row(image: Image) -> dict[str, Any]:
    """Return the JSON object that the index keeps."""
    return dataclasses.asdict(image)


def from_row(row: dict[str, Any]) -> Image:
    """Return the record of an index row; raise TypeError, KeyError or ValueError on another shape.

    Keys that an older agent did not write take their defaults.
    """
    return Image(**{**row, "access": Access(**row["access"]), "state": ImageState(row["state"])})
