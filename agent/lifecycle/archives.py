"""Archives that come in, and what of them becomes a snapshot."""

import contextlib
import dataclasses
import logging
import re
import time
from typing import Any

from agent.model.access import Access
from agent.model.errors import CocoonError, Invalid, Unsupported
from agent.model.names import check_name, is_name
from agent.model.snapshot import BOOT_FILES, Snapshot, SnapshotState
from agent.storage.importer import ImportSink
from agent.storage.sink import Sink

from . import images, library
from .services import Services
from .steps import step

_SUFFIX = ".tar"
_TEMPORARY = re.compile(r"\.(.+)\.tar\..+")  # rsync's, before it renames
_log = logging.getLogger(__name__)


class Archives:
    """The kind of import that makes snapshots; see Kind."""

    noun = "archive"
    steps = "import"
    ends_unmarked = False

    def __init__(self, services: Services) -> None:
        self.store = services.snapshots
        self.reserved = services.reserved
        self._services = services

    def name_of(self, file_name: str) -> str:
        """Return the snapshot's name; see Kind."""
        temporary = _TEMPORARY.fullmatch(file_name)
        if temporary is not None and is_name(temporary[1]):
            return ""
        name = file_name.removesuffix(_SUFFIX)
        if name == file_name:
            raise Invalid(f"{file_name[:80]} is not the name of an archive: end it in {_SUFFIX}")
        return check_name(name)

    def check_free(self, name: str) -> None:
        """Raise Exists for a name taken; see Kind."""
        library.check_free(self._services, name)

    def sink(self, staging: int) -> Sink:
        """Return what unpacks an archive; see Kind."""
        return ImportSink(staging)

    def finish(self, object_id: str, sink: Sink) -> Snapshot:
        """Return the snapshot in an archive that is whole; see Kind."""
        assert isinstance(sink, ImportSink)
        draft = sink.finish()
        store = self.store
        with contextlib.suppress(Unsupported):  # another host can load it
            state = draft.state_files.state
            library.check_state(self._services, draft, lambda: store.read_staged(object_id, state))
        booted: dict[str, Any] = {
            name: store.digest(object_id, name) for name in BOOT_FILES if draft.has_file(name)
        }
        now = time.time()
        return dataclasses.replace(
            draft,
            id=object_id,
            reason="import",
            created_at=draft.created_at or int(now),
            updated_at=now,
            mtime=now,
            **booted,
        )

    async def publish(self, draft: Snapshot, name: str, access: Access, size: int) -> None:
        """Let the snapshot appear; see Kind."""
        services = self._services
        draft = dataclasses.replace(draft, name=name, access=access)
        try:
            # A directory under its final name has a record from the first moment on.
            await services.index.snapshots.save(draft)
            step("import:recorded")
            layout = await library.published(services, draft)
            step("import:published")
            snapshot = dataclasses.replace(
                draft, state=SnapshotState.READY, archive_size=layout.size, generation=1
            )
            await services.index.snapshots.save(snapshot)
        except CocoonError:
            await services.tree.in_thread("ending an import", self.store.discard, draft.id)
            if services.index.snapshots.get(draft.id) is not None:
                services.index.snapshots.forget(draft)
            raise
        missing = images.missing_base(services, snapshot)
        if missing:
            _log.warning("snapshot %s can be cloned once its base image is here: %s", name, missing)
        details = {"missing_image": missing} if missing else {}
        services.events.happened("ADDED", snapshot, bytes=size, **details)

    def provisional(self, object_id: str, name: str, access: Access, reason: str) -> Snapshot:
        """Return a record to tell of the import by; see Kind."""
        return Snapshot(
            id=object_id,
            name=name,
            access=access,
            hypervisor="",
            reason=reason,
            updated_at=time.time(),
        )
