"""Cloud Hypervisor's API, as tests ask it."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any


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
