"""`hypervisor: auto` takes the first backend that runs guests here, and says why none does."""

import dataclasses

import pytest

from agent.lifecycle.start import plan_launch
from agent.model.access import Access
from agent.model.config import BaseImage, Boot, VmConfig
from agent.model.errors import Missing, Unsupported
from agent.model.launch import LaunchPlan
from agent.model.vm import BootFiles, Vm
from agent.vmm.driver import Capabilities, Version

pytestmark = pytest.mark.anyio


class Backend:
    """A backend that has an obstacle, is missing, or refuses what is asked of it."""

    def __init__(self, name, obstacle="", missing="", refusal="", **capabilities):
        self.name = name
        self.capabilities = Capabilities(**capabilities)
        self._obstacle, self._missing, self._refusal = obstacle, missing, refusal

    async def obstacle(self):
        return self._obstacle

    async def version(self):
        if self._missing:
            raise Missing(self._missing)
        return Version(f"/usr/bin/{self.name}", "1.0", (1, 0))

    def plan(self, vm, version, *, loads=False, nics=0):
        if self._refusal:
            raise Unsupported(self._refusal)
        return LaunchPlan(version.binary, (), (), {}, 1)


async def chosen(*backends, hypervisor="auto"):
    drivers = {backend.name: backend for backend in backends}
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), VmConfig(hypervisor=hypervisor))
    vm, plan = await plan_launch(drivers, vm)
    assert plan.binary == f"/usr/bin/{vm.hypervisor}"
    return vm.hypervisor


async def test_firecracker_comes_first_where_kvm_works():
    assert await chosen(Backend("qemu"), Backend("firecracker")) == "firecracker"


@pytest.mark.parametrize(
    "hindered", [{"obstacle": "no KVM"}, {"missing": "no program"}, {"refusal": "no serials"}]
)
async def test_qemu_is_taken_where_firecracker_cannot_be(hindered):
    assert await chosen(Backend("firecracker", **hindered), Backend("qemu")) == "qemu"


async def test_a_backend_with_an_obstacle_is_better_than_none():
    firecracker = Backend("firecracker", obstacle="no KVM")
    assert await chosen(firecracker, Backend("qemu", missing="no program")) == "firecracker"


async def test_who_names_a_backend_gets_it():
    firecracker = Backend("firecracker", obstacle="no KVM")
    assert await chosen(firecracker, Backend("qemu"), hypervisor="firecracker") == "firecracker"


async def test_network_interfaces_of_a_snapshot_are_for_who_can_take_them_out():
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), VmConfig(hypervisor="firecracker"))
    for nics, changes in ((0, False), (2, True)):
        drivers = {"firecracker": Backend("firecracker", live_changes=changes)}
        await plan_launch(drivers, vm, loads=True, nics=nics)
    with pytest.raises(Unsupported, match="2 network interfaces.* firecracker cannot take them"):
        await plan_launch({"firecracker": Backend("firecracker")}, vm, loads=True, nics=2)


async def test_when_none_can_each_says_why():
    with pytest.raises(Unsupported, match="firecracker: no serials; qemu: no program"):
        await chosen(
            Backend("firecracker", refusal="no serials"), Backend("qemu", missing="no program")
        )


async def test_a_firmware_is_for_who_boots_its_format():
    backends = {
        each.name: each
        for each in (
            Backend("cloud-hypervisor", firmware="elf"),
            Backend("firecracker"),
            Backend("qemu", firmware="flash"),
        )
    }
    config = VmConfig(boot=Boot(firmware="OVMF.fd"))
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config, booted=BootFiles(firmware_format="flash"))
    chosen, _ = await plan_launch(backends, vm)
    assert chosen.hypervisor == "qemu"
    for name in ("firecracker", "cloud-hypervisor"):
        named = dataclasses.replace(vm, config=dataclasses.replace(config, hypervisor=name))
        with pytest.raises(Unsupported, match=rf"{name} cannot boot OVMF\.fd \(.*\): qemu can"):
            await plan_launch(backends, named)
    del backends["qemu"]
    with pytest.raises(Unsupported, match=r"firecracker: .*no backend can"):
        await plan_launch(backends, vm)


async def test_queues_are_tied_by_who_has_a_thread_for_each():
    backends = {
        each.name: each
        for each in (Backend("cloud-hypervisor", queue_affinity=True), Backend("qemu"))
    }
    config = VmConfig(hypervisor="qemu", queue_affinity=((), (1,)))
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    with pytest.raises(Unsupported, match="qemu ties no queues .*, cloud-hypervisor does: write"):
        await plan_launch(backends, vm)
    for changes in ({"hypervisor": "auto"}, {"queue_affinity": ((), ())}):
        able = dataclasses.replace(vm, config=dataclasses.replace(config, **changes))
        chosen, _ = await plan_launch(backends, able)
        assert chosen.hypervisor == ("cloud-hypervisor" if "hypervisor" in changes else "qemu")


@pytest.mark.parametrize("qcow2", [True, False])
async def test_what_is_made_from_a_raw_image_is_settled_by_the_first_backend(qcow2):
    backend = Backend("qemu")
    backend.capabilities = Capabilities(qcow2=qcow2)
    config = VmConfig(image="debian", base=BaseImage("ab" * 32, "raw", 1 << 30))
    vm = Vm("a" * 26, "web", 70000, Access(0, 0), config)
    vm, _ = await plan_launch({"qemu": backend}, vm)
    assert vm.config.base.copied is not qcow2
    backend.capabilities = Capabilities(qcow2=not qcow2)
    again, _ = await plan_launch({"qemu": backend}, dataclasses.replace(vm, started_at=1))
    assert again.config.base == vm.config.base
