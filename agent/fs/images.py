"""`images/`: base images to copy out and in."""

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from agent.model.errors import Exists
from agent.model.image import Image
from agent.model.names import check_name

from .arriving import BLOCK, ImportFile, ImportHandle, ViewHandle, arriving_attributes
from .context import Context
from .node import Entry, File, Handle, Node, Place, Refused
from .permissions import MEMBERS_DIRECTORY, Attributes, Opener, file_of
from .tree import TreeDirectory

WHERE: Final = "images"
FILE_SLOT: Final = 1


class ImagesDirectory(TreeDirectory):
    """`images`: a file copied into it becomes an image."""

    lasting = False

    def shown(self) -> Attributes:
        """Return that members of the group may write to it."""
        mode = stat.S_IFDIR | MEMBERS_DIRECTORY
        return Attributes(mode, gid=self.context.host.group, time=self.context.since)

    def child(self, name: str) -> Node:
        """Return the image of that name, or one on its way in."""
        shelf = self.context.host.images
        arriving = shelf.find_import(name)
        if arriving is not None:
            return ImportFile(_place(self.context, arriving.id), self.context, WHERE, arriving)
        image = self._image(name)
        return ImageFile(_place(self.context, image.id), self.context, image.id)

    def entries(self) -> Iterator[Entry]:
        """Return all images, and those on their way in."""
        for image in self.context.host.images.all():
            yield Entry(image.name, _place(self.context, image.id).number, _attributes(image))
        for arriving in self.context.host.images.imports():
            place = _place(self.context, arriving.id)
            yield Entry(arriving.file_name, place.number, arriving_attributes(arriving))

    async def unlink(self, opener: Opener, name: str) -> None:
        """Remove an image, or what has arrived of one."""
        shelf = self.context.host.images
        arriving = shelf.find_import(name)
        if arriving is not None:
            await arriving.discard()
            return
        operation = shelf.remove(opener.caller, self._image(name).id)
        await self.context.finish(opener, operation)

    async def rename(self, opener: Opener, old: str, new: str) -> None:
        """Rename an image, or let a file that has arrived be one."""
        host = self.context.host
        arriving = host.images.find_import(old)
        with host.reporting(opener.caller):
            check_name(new)
            if arriving is not None:
                await arriving.rename(new)
                return
        operation = host.images.rename(opener.caller, self._image(old).id, new)
        await self.context.finish(opener, operation)

    async def create(self, opener: Opener, name: str) -> tuple[File, Handle]:
        """Begin an import."""
        host = self.context.host
        with host.reporting(opener.caller):
            arriving = await host.images.begin_import(opener.caller, name)
        node = ImportFile(_place(self.context, arriving.id), self.context, WHERE, arriving)
        return node, ImportHandle(self.context, opener, arriving)

    def _image(self, name: str) -> Image:
        image = self.context.host.images.find(name)
        if image is None:
            raise Refused(errno.ENOENT)
        return image


@dataclass(frozen=True, slots=True)
class ImageFile(File):
    """An image; it is no more when it was removed."""

    context: Context
    image_id: str

    @property
    def image(self) -> Image:
        """The record as it is now."""
        image = self.context.host.images.get(self.image_id)
        if image is None:
            raise Refused(errno.ENOENT)
        return image

    @property
    def path(self) -> str:
        """Where it is, relative to the mount."""
        return f"{WHERE}/{self.image.name}"

    async def attributes(self) -> Attributes:
        """Return owner, group, mode and size."""
        return _attributes(self.image)

    async def open(self, opener: Opener) -> Handle:
        """Return a reader; nobody writes to an image."""
        host = self.context.host
        with host.reporting(opener.caller):
            if opener.writes:
                raise Exists(
                    f"there is an image {self.image.name} already: choose another name or remove "
                    "that one"
                )
            return ViewHandle(await host.images.open_file(self.image_id))

    async def set_access(
        self, opener: Opener, uid: int | None, gid: int | None, mode: int | None
    ) -> None:
        """Delegate the image."""
        shelf = self.context.host.images
        operation = shelf.set_access(opener.caller, self.image_id, uid, gid, mode)
        await self.context.finish(opener, operation)


def image_node(context: Context, object_id: str, place: Place) -> Node | None:
    """Return the node of an image that stands at `place`, None when there is none of that id."""
    shelf = context.host.images
    if place.slot == FILE_SLOT:
        if shelf.get(object_id) is not None:
            return ImageFile(place, context, object_id)
        for arriving in shelf.imports():
            if arriving.id == object_id:
                return ImportFile(place, context, WHERE, arriving)
    return None


def _place(context: Context, object_id: str) -> Place:
    return Place(context.objects.number(object_id), FILE_SLOT)


def _attributes(image: Image) -> Attributes:
    attributes = file_of(image.access, False, image.file_size, image.mtime)
    return replace(attributes, block=BLOCK)
