"""All VMs: `vms`, `by-id`, `index.json`."""

import errno
import json
import stat
from collections.abc import Iterator
from typing import Final

import trio

from agent.model.errors import NotPermitted
from agent.model.names import check_name
from agent.model.vm import Vm

from .node import Entry, Node, Place, Refused, link_attributes
from .permissions import FOR_GROUP, MEMBERS_DIRECTORY, Attributes, Opener, directory_of
from .tree import TreeDirectory, TreeFile
from .vm_dir import BY_ID_SLOT, DIRECTORY_SLOT, by_id_link, vm_directory

_BATCH: Final = 50
"""Records that are rendered before others may run."""


class VmsDirectory(TreeDirectory):
    """`vms`: making a directory in it creates a VM."""

    def shown(self) -> Attributes:
        """Return that members of the group may write to it."""
        mode = stat.S_IFDIR | MEMBERS_DIRECTORY
        return Attributes(mode, gid=self.context.host.group, time=self.context.since)

    def child(self, name: str) -> Node:
        """Return the VM of that name."""
        return vm_directory(self.context, self._vm(name).id)

    def entries(self) -> Iterator[Entry]:
        """Return all VMs."""
        number = self.context.objects.number
        for vm in self.context.host.vms():
            place = Place(number(vm.id), DIRECTORY_SLOT)
            yield Entry(vm.name, place.number, directory_of(vm.access, vm.updated_at))

    async def make_directory(self, opener: Opener, name: str, mode: int | None) -> Node:
        """Create a VM."""
        host = self.context.host
        with host.reporting(opener.caller):
            check_name(name)
        await self.context.finish(opener, host.create(opener.caller, name))
        directory = vm_directory(self.context, self._vm(name).id)
        if mode is not None:
            await directory.set_access(opener, None, None, mode)
        return directory

    async def remove_directory(self, opener: Opener, name: str) -> None:
        """Remove a VM with its disks."""
        host, vm = self.context.host, self._vm(name)
        if self.context.walks.get((opener.caller.pid, vm.id)):
            with host.reporting(opener.caller, vm.id):
                raise NotPermitted(
                    f"VM {name} stays: who tries to remove its files, as rm -r and find -delete "
                    "do, may not remove it; use rmdir alone"
                )
        await self.context.finish(opener, host.remove(opener.caller, vm.id))

    async def rename(self, opener: Opener, old: str, new: str) -> None:
        """Rename a VM."""
        host, vm = self.context.host, self._vm(old)
        with host.reporting(opener.caller, vm.id):
            check_name(new)
        await self.context.finish(opener, host.rename(opener.caller, vm.id, new))

    def _vm(self, name: str) -> Vm:
        vm = self.context.host.find_vm(name)
        if vm is None:
            raise Refused(errno.ENOENT)
        return vm


class ByIdDirectory(TreeDirectory):
    """`by-id`: a link for each VM."""

    def child(self, name: str) -> Node:
        """Return the link of the VM with that id."""
        vm = self.context.host.find_vm_by_id(name)
        if vm is None:
            raise Refused(errno.ENOENT)
        return by_id_link(self.context, vm)

    def entries(self) -> Iterator[Entry]:
        """Return a link for each VM."""
        number = self.context.objects.number
        for vm in self.context.host.vms():
            place = Place(number(vm.id), BY_ID_SLOT)
            yield Entry(vm.id, place.number, link_attributes(vm.created_at))


class IndexFile(TreeFile):
    """`index.json`: all records in Cocoon's shape, a line each."""

    def shown(self, size: int = 0) -> Attributes:
        """Return that members of the group may read it."""
        return self.for_group(FOR_GROUP, size)

    async def size(self) -> int:
        """Return the exact size, rendering only what has changed since the last time."""
        before = self.context.index_lengths
        lengths: dict[str, tuple[Vm, int]] = {}
        total = len(_index_text([], []))
        for vm in self.context.host.vms():
            known = before.get(vm.id)
            if known is None or known[0] is not vm:
                known = (vm, len(self._record(vm)) + len(_name(vm)))
                if len(lengths) % _BATCH == 0:
                    await trio.lowlevel.checkpoint()
            lengths[vm.id] = known
            total += known[1]
        self.context.index_lengths = lengths
        # A comma and a newline between two records, and between two names.
        return total + 4 * max(0, len(lengths) - 1)

    async def show(self) -> bytes:
        """Return all records as they are at this moment."""
        vms = sorted(self.context.host.vms(), key=lambda vm: vm.name)
        records = []
        for number, vm in enumerate(vms):
            records.append(self._record(vm))
            if number % _BATCH == 0:
                await trio.lowlevel.checkpoint()
        return _index_text(records, [_name(vm) for vm in vms])

    def _record(self, vm: Vm) -> bytes:
        return f"{json.dumps(vm.id)}: {json.dumps(self.context.host.info(vm))}".encode()


def _name(vm: Vm) -> bytes:
    return f"{json.dumps(vm.name)}: {json.dumps(vm.id)}".encode()


def _index_text(records: list[bytes], names: list[bytes]) -> bytes:
    return b'{"vms": {\n%b\n}, "names": {\n%b\n}}\n' % (b",\n".join(records), b",\n".join(names))
