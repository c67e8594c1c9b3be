"""VMMs made from the API descriptions that they publish, for drivers to be tried on.

Such a one refuses what its description refuses, keeps the rules of the VM's states, words refusals
as the real one does, and fails the test when it would answer otherwise than is described.

usage: described_vmm.py NAME SOCKET STATE

As a program it says `serving`, then `asked` at each request, and never answers any.
"""

import array
import json
import os
import socket
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import h11
import trio
from jsonschema import Draft4Validator
from jsonschema.exceptions import best_match

DATA = Path(__file__).parent / "data"


class Description:
    """A published API description, OpenAPI 3 or Swagger 2.

    Objects have the fields that are described and no more, though the descriptions leave that open.
    """

    def __init__(self, name):
        self.document = _closed(json.loads((DATA / f"{name}.json").read_text()))
        self.paths = self.document["paths"]
        if "servers" in self.document:
            self.root = urlsplit(self.document["servers"][0]["url"]).path
            self.schemas = self.document["components"]["schemas"]
        else:
            self.root = self.document["basePath"].rstrip("/")
            self.schemas = self.document["definitions"]

    def operation(self, method, path):
        """What is described for the path below the root, None for nothing."""
        return self.paths.get(path, {}).get(method.lower())

    def flaw(self, schema, value):
        """What is wrong with the value, "" for nothing; `schema` may be the name of one."""
        if isinstance(schema, str):
            schema = self.schemas[schema]
        error = best_match(Draft4Validator({**self.document, "allOf": [schema]}).iter_errors(value))
        return f"{error.json_path}: {error.message}" if error else ""

    def request_flaw(self, operation, body):
        """What is wrong with the body of a request, "" for nothing."""
        schemas = [
            parameter["schema"]
            for parameter in operation.get("parameters", ())
            if parameter["in"] == "body"
        ] + _schemas_of(operation.get("requestBody", {}))
        if (body is None) != (not schemas):
            return "no body is described" if schemas == [] else "a body is described"
        return self.flaw(schemas[0], body) if schemas else ""

    def response_flaw(self, operation, status, content):
        """What is wrong with a response, "" for nothing; errors may go undescribed."""
        responses = operation["responses"]
        described = responses.get(str(status), responses.get("default", {}))
        if status < 400 and str(status) not in responses:
            return f"the status {status} is not described"
        schemas = [described["schema"]] if "schema" in described else _schemas_of(described)
        if status < 400 and (content is None) != (not schemas):
            return f"content is described for {schemas}, not {content}"
        return self.flaw(schemas[0], content) if schemas else ""


def _schemas_of(described):
    return [content["schema"] for content in described.get("content", {}).values()]


def _closed(value):
    """The document, with no further fields where an object's are listed."""
    if isinstance(value, list):
        return [_closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    listed = {"additionalProperties": False} if isinstance(value.get("properties"), dict) else {}
    return listed | {key: _closed(item) for key, item in value.items()}


@dataclass
class Refusal(Exception):
    """An answer that says no, in the VMM's words."""

    status: int
    words: tuple[str, ...]


class DescribedVmm:
    """A VMM in `state`; `requests` has what it took: method, path and body of each.

    With `refusal` each request gets that one. Replies go out through `send`, which a test replaces.
    `descriptors` is how many came with the last request.
    """

    rules: dict[str, dict[str, str | Refusal]]
    """By command and by state: the state that follows, or a refusal."""

    def __init__(self, name, state):
        self.description = Description(name)
        self.state = state
        self.requests = []
        self.refusal = None
        self.descriptors = 0

    @asynccontextmanager
    async def serving(self, path):
        """Answer on a socket at `path`."""
        with trio.socket.socket(socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen()
            async with trio.open_nursery() as nursery:
                listeners = [trio.SocketListener(listener)]
                nursery.start_soon(trio.serve_listeners, self._converse, listeners)
                yield
                nursery.cancel_scope.cancel()
        os.unlink(path)

    async def send(self, stream, reply):
        """Send a reply, which is ready."""
        await stream.send_all(reply)

    def answer(self, method, target, body):
        """Return status and content of the answer to a request."""
        path = target.removeprefix(self.description.root)
        operation = self.description.operation(method, path)
        if operation is None or not target.startswith(self.description.root):
            return 404, self.show((f"nothing is described for {method} {target}",))
        try:
            if flaw := self.description.request_flaw(operation, body):
                raise Refusal(400, (flaw,))
            self.requests.append((method, path, body))
            if self.refusal:
                raise self.refusal
            content = self.act(path, body or {})
            status = 204 if content is None else 200
        except Refusal as refusal:
            status, content = refusal.status, self.show(refusal.words)
        flaw = self.description.response_flaw(operation, status, content)
        assert not flaw, f"{method} {path} is answered as is not described: {flaw}"
        return status, content

    def act(self, path, body):
        """Do what is asked for and return the content of the answer, or raise Refusal."""
        raise NotImplementedError

    def show(self, words):
        """Return the content of a refusal."""
        raise NotImplementedError

    def step(self, command):
        """Go to the state that the rules have for the command, or raise the refusal."""
        following = self.rules[command][self.state]
        if isinstance(following, Refusal):
            raise following
        self.state = following

    async def _converse(self, stream):
        async with stream:
            protocol = h11.Connection(h11.SERVER)
            request, body, self.descriptors = None, b"", 0
            while not isinstance(event := protocol.next_event(), h11.EndOfMessage):
                match event:
                    case h11.NEED_DATA:
                        protocol.receive_data(await self._receive(stream.socket))
                    case h11.Request():
                        request = event
                    case h11.Data(data=data):
                        body += data
                    case _:
                        return  # it has gone
            method, target = request.method.decode(), request.target.decode()
            status, content = self.answer(method, target, json.loads(body) if body else None)
            shown = b"" if content is None else json.dumps(content).encode()
            headers = [("Content-Length", str(len(shown)))] if shown else []
            parts = (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=shown),
                h11.EndOfMessage(),
            )
            await self.send(stream, b"".join(protocol.send(part) for part in parts))

    async def _receive(self, connection):
        data, ancillary, *_ = await connection.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
        for _, _, rights in ancillary:
            descriptors = array.array("i", rights)
            self.descriptors += len(descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
        return data


EMPTY, CREATED, RUNNING, PAUSED = "Not started", "Created", "Running", "Paused"

_BEFORE = Refusal(400, ("The requested operation is not supported before starting the microVM.",))
_AFTER = Refusal(400, ("The requested operation is not supported after starting the microVM.",))
_UNSAVED = (
    "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore "
    "unavailable while running"
)
FIRECRACKER_RULES = {
    "/vm Paused": {EMPTY: _BEFORE, RUNNING: PAUSED, PAUSED: PAUSED},
    "/vm Resumed": {EMPTY: _BEFORE, RUNNING: RUNNING, PAUSED: RUNNING},
    "/actions SendCtrlAltDel": {EMPTY: _BEFORE, RUNNING: RUNNING, PAUSED: PAUSED},
    "/snapshot/create": {EMPTY: _BEFORE, RUNNING: Refusal(400, (_UNSAVED,)), PAUSED: PAUSED},
    "/snapshot/load": {EMPTY: PAUSED, RUNNING: _AFTER, PAUSED: _AFTER},
}


class DescribedFirecracker(DescribedVmm):
    """Firecracker, as src/vmm/src/rpc_interface.rs of 1.12.1 and 1.16.1 has it."""

    rules = FIRECRACKER_RULES

    def __init__(self, name, state, balloon=None):
        super().__init__(name, state)
        self.config = {"machine-config": {"vcpu_count": 2, "mem_size_mib": 512}}
        if balloon:
            self.config["balloon"] = {"amount_mib": balloon >> 20, "deflate_on_oom": True}

    def act(self, path, body):
        match path:
            case "/":
                version = self.description.document["info"]["version"]
                about = {"app_name": "Firecracker", "id": "a", "vmm_version": version}
                return about | {"state": self.state}
            case "/vm/config":
                return self.config
            case "/vm":
                self.step(f"/vm {body['state']}")
            case "/actions":
                self.step(f"/actions {body['action_type']}")
            case _:
                self.step(path)
                if body.get("resume_vm"):
                    self.step("/vm Resumed")
        return None

    def show(self, words):
        return {"fault_message": ": ".join(words)}


def _refused(status, *words):
    return Refusal(status, ("Error from API", *words))


def _booted(doing, running, paused):
    """The rules of what wants a VM that was booted."""
    refusal = _refused(500, doing, "VM is not running")
    return {EMPTY: refusal, CREATED: refusal, RUNNING: running, PAUSED: paused}


def _created(doing):
    """The rules of what wants a VM, and leaves it in its state."""
    return {
        EMPTY: _refused(404, doing, "VM is not created"),
        CREATED: CREATED,
        RUNNING: RUNNING,
        PAUSED: PAUSED,
    }


_PAUSE, _RESUME = "The VM could not be paused", "The VM could not resume"
_SNAPSHOT, _BOOT = "The VM could not be snapshotted", "The VM could not boot"
_RESIZE, _ADD = "The VM could not be resized", "The disk could not be added to the VM"
_REMOVE = "The device could not be removed from the VM"
_THERE = _refused(500, "The VM could not be restored", "VM is already created")

CLOUD_HYPERVISOR_RULES = {
    "/vm.info": _created("The VM info is not available"),
    "/vm.boot": {
        EMPTY: _refused(404, _BOOT, "VM config is missing"),
        CREATED: RUNNING,
        RUNNING: _refused(500, _BOOT, "VM is already created"),
        PAUSED: _refused(500, _BOOT, "VM is already created"),
    },
    "/vm.pause": _booted(
        _PAUSE,
        PAUSED,
        _refused(
            500,
            _PAUSE,
            "Cannot pause VM",
            "Failed to pause migratable component",
            "Invalid transition: InvalidStateTransition(Paused, Paused)",
        ),
    ),
    "/vm.resume": _booted(
        _RESUME,
        _refused(
            500,
            _RESUME,
            "Cannot resume VM",
            "Failed to resume migratable component",
            "Invalid transition: InvalidStateTransition(Running, Running)",
        ),
        RUNNING,
    ),
    "/vm.snapshot": _booted(
        _SNAPSHOT,
        _refused(
            500,
            _SNAPSHOT,
            "Cannot snapshot VM",
            "Failed to snapshot migratable component",
            "Trying to snapshot while VM is running",
        ),
        PAUSED,
    ),
    "/vm.restore": {EMPTY: PAUSED, CREATED: _THERE, RUNNING: _THERE, PAUSED: _THERE},
    "/vm.power-button": _booted("Error triggering power button", RUNNING, PAUSED),
    "/vm.shutdown": _booted("The VM could not shutdown", CREATED, CREATED),
    "/vm.resize": _created(_RESIZE),
    "/vm.add-disk": _created(_ADD),
    "/vm.remove-device": _created(_REMOVE),
}


class DescribedCloudHypervisor(DescribedVmm):
    """Cloud Hypervisor, as vmm/src/lib.rs and vmm/src/vm.rs of 53.0 have it.

    One that is empty has not even the configuration of a VM; a guest that was shut down leaves it.
    """

    rules = CLOUD_HYPERVISOR_RULES

    def __init__(self, name, state, balloon=None, most_cpus=4, hotplug=0):
        super().__init__(name, state)
        self.config = {
            "cpus": {"boot_vcpus": 2, "max_vcpus": most_cpus},
            "memory": {"size": 64 << 20, "hotplug_size": hotplug},
            "payload": {"kernel": "/kernel"},
            "disks": [],
            "net": [],
        }
        if balloon:
            self.config["balloon"] = {"size": balloon}
        # Of vmm/src/config.rs, and not described.
        counted = {"properties": {"id": {"type": "string"}, "num_fds": {"type": "integer"}}}
        restore = self.description.schemas["RestoreConfig"]["properties"]
        restore["net_fds"] = _closed({"type": "array", "items": counted})
        self.boot()

    def boot(self):
        """Give the guest what is configured; it lets go of that when `let_go` says so."""
        self.cpus = self.config["cpus"]["boot_vcpus"]
        self.owes_cpus = False
        self.memory = self.config["memory"]["size"]
        self.devices = {name: {"id": name} for name in self._configured()}

    def let_go(self):
        """Have the guest let go of all that it was asked for."""
        self.cpus = min(self.cpus, self.config["cpus"]["boot_vcpus"])
        self.owes_cpus = False
        kept = self._configured()
        self.devices = {name: about for name, about in self.devices.items() if name in kept}

    def act(self, path, body):
        if path == "/vmm.ping":
            return {"version": "53.0.0"}
        if sum(nic["num_fds"] for nic in body.get("net_fds", ())) != self.descriptors:
            raise Refusal(400, ("Bad Request",))
        self.step(path)
        match path:
            case "/vm.info":
                info = {"state": self.state, "config": self.config}
                return info if self.state == CREATED else info | {"device_tree": self.devices}
            case "/vm.boot":
                self.boot()
            case "/vm.restore":
                self._restore(**body)
            case "/vm.resize":
                self._resize(**body)
            case "/vm.add-disk":
                return self._add(body)
            case "/vm.remove-device":
                self._remove(body["id"])
        return None

    def show(self, words):
        return list(words)

    def _configured(self):
        return {device["id"] for key in ("disks", "net") for device in self.config[key]}

    def _restore(self, net_fds=(), resume=False, **more):
        self.config["net"] = [
            {"id": nic["id"], "num_queues": 2 * nic["num_fds"]} for nic in net_fds
        ]
        self.boot()
        if resume:
            self.step("/vm.resume")

    def _resize(self, desired_vcpus=None, desired_ram=None, desired_balloon=None):
        cpus, memory = self.config["cpus"], self.config["memory"]
        if self.state != CREATED:
            self._resize_guest(desired_vcpus or self.cpus, desired_ram or self.memory)
        cpus["boot_vcpus"] = desired_vcpus or cpus["boot_vcpus"]
        memory["size"] = desired_ram or memory["size"]
        if desired_balloon is not None:
            self.config["balloon"]["size"] = desired_balloon

    def _resize_guest(self, cpus, memory):
        if cpus != self.cpus and self.owes_cpus:
            raise Refusal(429, ("Too Many Requests",))
        if cpus > self.config["cpus"]["max_vcpus"]:
            words = "Error from CPU manager", "Requested vCPUs exceed maximum"
            raise _refused(500, _RESIZE, *words)
        words = ""
        if memory > self.memory and (memory - self.memory) % (128 << 20):
            words = "The requested hotplug memory addition is not a valid size"
        elif memory - self.memory > self.config["memory"]["hotplug_size"]:
            words = "Not enough space in the hotplug RAM region"
        if words:
            raise _refused(500, _RESIZE, "Memory manager error", words)
        self.owes_cpus |= cpus < self.cpus
        self.cpus = max(self.cpus, cpus)
        self.memory = max(self.memory, memory)

    def _add(self, disk):
        words = ()
        most = self.config["cpus"]["boot_vcpus"]
        queues = [each.get("num_queues", 1) for each in (*self.config["disks"], disk)]
        if wide := [number for number in queues if number > most]:
            many = f"Queue count ({wide[0]}) must not exceed boot vCPUs ({most})"
            words = "Failed to validate config", many
        elif any(disk["id"] == other["id"] for other in self.config["disks"]):
            words = "Failed to validate config", f"Identifier {disk['id']} is not unique"
        elif self.state != CREATED and disk["id"] in self.devices:
            not_unique = f"Invalid identifier as it is not unique: {disk['id']}"
            words = "Error from device manager", not_unique
        if words:
            raise _refused(500, _ADD, *words)
        self.config["disks"].append(disk)
        if self.state == CREATED:
            return None
        self.devices[disk["id"]] = {"id": disk["id"]}
        return {"id": disk["id"], "bdf": f"0000:00:{len(self.devices) + 2:02x}.0"}

    def _remove(self, name):
        if name not in self._configured():
            if self.state == CREATED:
                raise _refused(500, _REMOVE, f'No device with id "{name}" to remove')
            words = f"Failed to find device corresponding to the given identifier: {name}"
            raise _refused(500, _REMOVE, "Error from device manager", words)
        for key in ("disks", "net"):
            self.config[key] = [device for device in self.config[key] if device["id"] != name]


VMMS = {
    "firecracker-1.12": DescribedFirecracker,
    "firecracker-1.16": DescribedFirecracker,
    "cloud-hypervisor-53": DescribedCloudHypervisor,
}
"""By the name of the description."""


async def _main(name, path, state):
    vmm = VMMS[name](name, state)

    async def keep(stream, reply):
        print("asked", flush=True)
        await trio.sleep_forever()

    vmm.send = keep
    async with vmm.serving(path):
        print("serving", flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(_main, *sys.argv[1:])
