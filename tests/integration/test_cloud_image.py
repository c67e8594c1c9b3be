"""A cloud image of Debian, booted by UEFI, with its cloud-init: with --long only, it takes long."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_tools import archive
from test_firmware import OVMF

BUILD = Path(__file__).parents[1] / "guest/build-debian"
UNREACHED = 77  # what BUILD exits with
LIMIT = 1800.0  # seconds for anything that the guest does, translated and on a busy machine
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ7mYyD9rB0v2cN6y8s8o2n8Jd2f0sQzv0o7v8WkE1aB joe@example"
USER_DATA = """#cloud-config
ssh_genkeytypes: [ed25519]
runcmd:
  - echo "$(cat /run/cloud-init/.instance-id)" >>/var/lib/instances
  - echo "first boot of $(hostname)" >/dev/console
"""


@pytest.fixture(scope="module")
def debian(request: pytest.FixtureRequest) -> Path:
    """The image, built once for each version of what builds it."""
    if not request.config.option.long:
        pytest.skip("builds a Debian and boots it translated, which takes long: --long")
    for program in ("qemu-system-x86_64", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    digest = hashlib.sha256(BUILD.read_bytes()).hexdigest()[:12]
    cache = Path(os.environ["COCOON_TEST_GUESTS"]).parent
    image = cache / f"debian-{digest}/debian.qcow2"
    if not image.exists():
        for old in set(cache.glob("debian-*")) - {image.parent}:
            shutil.rmtree(old)
        words = [BUILD, image.parent]
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode == UNREACHED:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    return image


@pytest.fixture
def image(agent: Any, debian: Path) -> Iterator[Path]:
    image = agent.mount / "images/debian"
    shutil.copyfile(debian, image)
    yield image
    image.unlink()


@pytest.fixture
def name(image: Path, vm_name: Callable[[], str], agent: Any) -> Iterator[str]:
    """The name of a snapshot, removed afterwards."""
    name = f"snap-{vm_name()}"
    yield name
    archive(agent, name).unlink(missing_ok=True)


class Guest:
    """Whoever sits at the console of a VM."""

    def __init__(self, vm: Any, until: Callable[..., Any]) -> None:
        self.vm, self._until = vm, until
        self._seen = 0

    @property
    def said(self) -> str:
        return (self.vm.path / "console").read_bytes().decode(errors="replace")

    def expect(self, pattern: str) -> "re.Match[str]":
        """Wait for the next words that match, and look no more at what came before their end."""
        wanted = re.compile(pattern)
        what = f"{self.vm.name} says {pattern}"
        found = self._until(lambda: wanted.search(self.said, self._seen), LIMIT, what)
        self._seen = found.end()
        return found

    def log_in(self, user: str, password: str) -> None:
        self.vm.write("console", user)
        self.expect("Password: ")
        self.vm.write("console", password)
        self.expect(r"\$ ")
        self.vm.write("console", "stty -echo; exec env PS1='re''ady ' dash")
        self.expect("ready ")
        self.ask("sudo dmesg --console-off")

    def ask(self, command: str) -> str:
        """Return what a command says that succeeds."""
        self.vm.write("console", f"echo '<'; {command}; echo \">$?\"")
        said = self.expect(r"(?s)<\r?\n(.*?)>(\d+)\r?\n")
        assert said[2] == "0", said[1]
        return said[1].replace("\r", "").removesuffix("\n")


@pytest.mark.backends("qemu", core=True)
def test_debian_does_its_first_boot_once_for_each_instance(agent, image, name, make_vm, until):
    vm = make_vm(
        image=image.name,
        storage="3G",
        memory="512M",
        cpu=min(2, os.cpu_count() or 1),
        boot={"firmware": str(OVMF)},
        hostname="first",
        user="joe",
        password="a secret",
        ssh_keys=[KEY],
        user_data=USER_DATA,
        stop_timeout=int(LIMIT),
    )
    seed = agent.root_dir / "vms" / vm.read("id") / "cidata.img"
    vm.verb("start")
    guest = Guest(vm, until)
    guest.expect("first login: ")
    guest.expect("first boot of first")
    guest.expect(r"Cloud-init v\. \S+ finished .* DataSourceNoCloud \[seed=/dev/vdb\]")
    guest.log_in("joe", "a secret")
    assert guest.ask("cloud-init status --wait").endswith("status: done")
    assert json.loads(guest.ask("cat /run/cloud-init/result.json"))["v1"]["errors"] == []
    assert guest.ask("sudo cloud-init schema --system").startswith("Valid cloud-config")
    assert guest.ask("sudo grep WARNING /var/log/cloud-init.log || true") == ""
    assert guest.ask("cat .ssh/authorized_keys") == KEY
    assert "ethernets: {}" in guest.ask("sudo cat /etc/netplan/50-cloud-init.yaml")
    assert int(guest.ask("df --output=size -BM / | tail -n 1").strip("M \n")) > 2500
    host_key = guest.ask("cat /etc/ssh/ssh_host_ed25519_key.pub")
    (instance,) = guest.ask("cat /var/lib/instances").split()
    assert instance.startswith(vm.read("id"))
    guest.ask("echo kept >kept")
    assert seed.exists()

    vm.verb("stop")
    assert vm.state == "stopped"
    guest.expect("reboot: Power down")
    vm.verb("start")
    assert not seed.exists()
    guest.expect("first login: ")
    guest.log_in("joe", "a secret")
    assert guest.ask("cat kept; sudo cat /var/lib/instances") == f"kept\n{instance}"
    assert guest.ask("cat /etc/ssh/ssh_host_ed25519_key.pub") == host_key
    assert guest.ask("lsblk --noheadings --nodeps --output name /dev/vd?") == "vda"

    guest.ask("sync; word=remembered")
    vm.write("snapshot", name)
    guest.ask("echo later >later; sync; word=forgotten")
    vm.write("restore", name)
    assert guest.ask("echo $word; ls") == "remembered\nkept"

    clone = make_vm(hypervisor=None, memory=None, boot=None, stop_timeout=1)
    clone.write("from", name)
    clone.write("hostname", "second")
    clone.write("user_data", USER_DATA)
    clone.verb("start")
    other = Guest(clone, until)
    assert other.ask("echo $word; hostname") == "remembered\nfirst"
    clone.verb("kill")
    vm.verb("kill")
    clone.verb("start")
    other.expect("second login: ")
    other.expect("first boot of second")
    other.expect(r"Cloud-init v\. \S+ finished ")
    other.log_in("joe", "a secret")
    assert other.ask("hostname; cat kept") == "second\nkept"
    before, now = other.ask("sudo cat /var/lib/instances").split()
    assert before == instance
    assert now.startswith(clone.read("id"))
    assert other.ask("cat /etc/ssh/ssh_host_ed25519_key.pub") != host_key
    clone.verb("kill")
