"""Cloud Hypervisor, as tests run it and ask it."""

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any

_PRELOADING = Path("/etc/systemd/system/cocoon-vm-.service.d/50-nested-state.conf")


def preloaded() -> Path | None:
    """The library that a lab gives VMMs, for want of which this one fails on the lab's KVM."""
    return (
        Path(os.environ["COCOON_TEST_GUESTS"], "nested_state.so") if _PRELOADING.exists() else None
    )


def environment() -> dict[str, str]:
    """What one that a test starts by itself needs."""
    library = preloaded()
    return {**os.environ, **({"LD_PRELOAD": str(library)} if library else {})}


def ask(api: Path, method: str, command: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(api))
    connection.request(method, f"/api/v1/{command}", json.dumps(body) if body else None)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def info(vm: Any) -> Any:
    """What its VMM says of a VM."""
    _, content = ask(Path(f"/run/cocoon/{vm.read('id')}/sock/api"), "GET", "vm.info")
    return json.loads(content)
