import dataclasses

import pytest

from agent.model.access import Access
from agent.model.config import MAXIMUM_DISKS, VmConfig
from agent.model.launch import Bind, LaunchPlan
from agent.model.vm import Vm
from agent.systemd.unit import (
    Paths,
    environment_file,
    memory_limit,
    running_properties,
    vm_unit,
)

VM = Vm(
    id="abcdefghijklmnopqrstuvwxyz",
    name="web",
    uid=70000,
    access=Access(0, 0),
    config=VmConfig(cpu=2, stop_timeout=7, restart="on-failure"),
    hypervisor="firecracker",
)
PLAN = LaunchPlan(
    binary="/opt/fc/firecracker",
    arguments=("--api-sock", "/sock"),
    boot_arguments=("--config-file", "/vm.json"),
    files={},
    memory=1 << 30,
)
PATHS = Paths(run="/run/cocoon/x", directory="/var/lib/cocoon/vms/x", jail="/run/cocoon/jail")


def values(plan: LaunchPlan = PLAN, vm: Vm = VM, binds=()) -> dict[str, object]:
    return {name: variant.value for name, variant in vm_unit(vm, plan, PATHS, binds)}


def targets(properties: dict[str, object], name: str) -> dict[str, str]:
    return {target: source for source, target, _, _ in properties[name]}


def test_no_property_is_given_twice():
    names = [name for name, _ in vm_unit(VM, PLAN, PATHS)]
    assert len(names) == len(set(names))


def test_the_vms_directory_and_its_sockets_are_all_that_is_bound_writable():
    assert targets(values(), "BindPaths") == {
        "/var/lib/cocoon/run/vm": PATHS.directory,
        "/var/lib/cocoon/run/sock": PATHS.sockets,
    }


def test_the_program_and_its_devices_are_bound_read_only():
    assert targets(values(), "BindReadOnlyPaths") == {
        "/var/lib/cocoon/run/vmm": PLAN.binary,
        "/dev/kvm": "/dev/kvm",
    }


def test_a_dynamic_program_gets_the_hosts_libraries():
    bound = targets(values(dataclasses.replace(PLAN, dynamic=True)), "BindReadOnlyPaths")
    assert {"/usr", "/lib", "/lib64"} <= set(bound)


def test_binds_of_plan_and_caller_keep_their_access():
    plan = dataclasses.replace(PLAN, binds=(Bind("/srv/disk", "/disk", readonly=False),))
    properties = values(plan, binds=[Bind("/kernels/ab", "/kernel")])
    assert targets(properties, "BindPaths")["/disk"] == "/srv/disk"
    assert targets(properties, "BindReadOnlyPaths")["/kernel"] == "/kernels/ab"


def test_only_the_plans_devices_are_allowed():
    plan = dataclasses.replace(PLAN, devices=("/dev/kvm", "/dev/net/tun"))
    assert values(plan)["DeviceAllow"] == [["/dev/kvm", "rw"], ["/dev/net/tun", "rw"]]


@pytest.mark.parametrize("devices", [("/dev/kvm",), ("/dev/kvm", "/dev/sdb")])
def test_a_disk_of_the_host_is_bound_once_and_let_through_as_it_is_lent(devices):
    disk = Bind("/dev/sdb", "/var/lib/cocoon/run/disk/0", readonly=True)
    properties = values(dataclasses.replace(PLAN, devices=devices, binds=(disk,)))
    assert properties["DeviceAllow"] == [["/dev/kvm", "rw"], ["/dev/sdb", "r"]]
    sources = [source for source, *_ in properties["BindReadOnlyPaths"]]
    assert sources.count("/dev/sdb") == 1


def test_limits_follow_the_configuration():
    properties = values()
    assert properties["MemoryMax"] == PLAN.memory
    assert properties["CPUWeight"] == 200
    assert properties["TimeoutStopUSec"] == 12_000_000
    assert properties["Restart"] == "on-failure"
    assert properties["User"] == "70000"


def test_only_a_vmm_that_ties_its_threads_to_cpus_may_do_so():
    assert values()["SystemCallFilter"] == [False, ["sched_setaffinity"]]
    assert "SystemCallFilter" not in values(dataclasses.replace(PLAN, sets_affinity=True))


def test_a_weight_is_one_that_systemd_takes_however_many_cpus():
    many = dataclasses.replace(VM, config=VmConfig(cpu=512))
    assert values(vm=many)["CPUWeight"] == 10_000


def test_the_quota_comes_only_once_the_guest_runs():
    assert "CPUQuotaPerSecUSec" not in values()
    assert dict(running_properties(VM))["CPUQuotaPerSecUSec"].value == 2_500_000


def test_there_may_be_a_thread_for_each_queue_of_each_disk():
    wide = dataclasses.replace(VM, config=VmConfig(cpu=1, max_cpu=32))
    assert values(vm=wide)["TasksMax"] > 32 * (1 + MAXIMUM_DISKS + 2)


def test_the_memory_limit_can_be_another():
    assert dict(memory_limit(1 << 20))["MemoryMax"].value == 1 << 20


def test_the_journal_knows_name_and_id():
    assert values()["LogExtraFields"] == [b"VM_NAME=web", f"VM_ID={VM.id}".encode()]


def test_nothing_that_root_reads_is_bound_into_the_jail():
    properties = values()
    bound = [*targets(properties, "BindPaths").values()]
    bound += targets(properties, "BindReadOnlyPaths").values()
    read_by_root = [
        PATHS.environment,
        PATHS.console_input,
        PATHS.console_output,
        PATHS.exit_record,
        PATHS.run,
    ]
    for path in read_by_root:
        assert not any(path == source or path.startswith(source + "/") for source in bound)


def test_the_environment_file_has_the_words_of_the_units_commands():
    assert environment_file(VM, PLAN, PATHS).decode().splitlines() == [
        'BACKEND="firecracker"',
        'ARGUMENTS="\\"--api-sock\\" \\"/sock\\""',
        'BOOT_ARGUMENTS="\\"--config-file\\" \\"/vm.json\\""',
        'RUN_DIRECTORY="/run/cocoon/x"',
        'VM_UID="70000"',
        'STOP_TIMEOUT="7"',
    ]


def test_a_vmm_that_loads_a_snapshot_gets_no_boot_arguments():
    lines = environment_file(VM, PLAN, PATHS, boot=False).decode().splitlines()
    assert 'BOOT_ARGUMENTS=""' in lines


@pytest.mark.parametrize("argument", ["a\nb", "a\0b", "\x1b[2J"])
def test_an_argument_with_a_control_character_is_refused(argument):
    plan = dataclasses.replace(PLAN, boot_arguments=(argument,))
    with pytest.raises(ValueError, match="control character"):
        environment_file(VM, plan, PATHS)


def test_a_vmm_that_is_started_to_load_gets_its_arguments_for_that():
    plan = dataclasses.replace(PLAN, load_arguments=("-incoming", "defer"))
    text = environment_file(VM, plan, PATHS, boot=False).decode()
    assert 'BOOT_ARGUMENTS="\\"-incoming\\" \\"defer\\""' in text
    assert "--config-file" not in text
