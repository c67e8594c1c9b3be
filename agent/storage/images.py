"""The base images: a directory each, root's, with one file that all may read and none may write.

All calls block on files: callers run them by `Tree.in_thread`. They raise OSError or CocoonError.
"""

import os
import stat
from array import array

from agent.model.errors import Damaged, Missing
from agent.model.image import Image

from . import directory
from .archive import Layout
from .image_sink import NAME
from .staging import Staged
from .tree import Tree


class ImageStore(Staged):
    """All images' directories."""

    def __init__(self, tree: Tree) -> None:
        super().__init__(tree.images)

    def check(self, image: Image) -> str:
        """Return the path of the image's file; raise Missing or Damaged when it is not there."""
        try:
            with directory.opened(self.directory(image.id)) as own:
                facts = os.lstat(NAME, dir_fd=own)
        except FileNotFoundError:
            raise Missing(
                f"the file of image {image.name} is gone from {self.directory(image.id)}: put it "
                "back, or copy the image to images/ again"
            ) from None
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != image.file_size:
            raise Damaged(
                f"the file of image {image.name} has {facts.st_size} bytes instead of "
                f"{image.file_size}: copy the image to images/ again"
            )
        return f"{self.directory(image.id)}/{NAME}"

    @staticmethod
    def layout(image: Image) -> Layout:
        """Return the layout of an archive that is the file itself."""
        starts = array("q", (0, image.file_size))
        return Layout(image.file_size, (NAME,), starts, array("h", (0,)), array("q", (0,)), b"")
