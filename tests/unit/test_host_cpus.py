"""Lists of CPUs, what a host says of its own, and what a VM is told that wants others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.lifecycle import affinity
from agent.model.config import VmConfig
from agent.model.cpus import parse_cpus, show_cpus
from agent.model.errors import Invalid
from agent.systemd.cpus import HostCpus, host_cpus

V1 = "4:memory:/\n3:cpuset:{}\n0::/\n"
V2 = "0::{}\n"


@given(st.frozensets(st.integers(0, 1023)))
def test_a_list_is_read_as_it_is_written(cpus):
    assert parse_cpus(show_cpus(cpus)) == cpus


@pytest.mark.parametrize(
    ("text", "cpus", "shown"),
    [
        ("\n", [], ""),
        ("0\n", [0], "0"),
        ("0-3,8,10-11\n", [0, 1, 2, 3, 8, 10, 11], "0-3,8,10-11"),
        ("1,0", [0, 1], "0-1"),
    ],
)
def test_a_list_is_as_short_as_it_can_be(text, cpus, shown):
    assert parse_cpus(text) == frozenset(cpus)
    assert show_cpus(cpus) == shown


@pytest.mark.parametrize("text", ["x", "-1", "1,,2", "0-x"])
def test_what_is_no_list_is_no_set(text):
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cpus(text)


@pytest.fixture
def host(tmp_path):
    """`host(cgroup, **files)` writes what the kernel shows, files below /sys/fs/cgroup."""

    def write(cgroup, files):
        system = {"present": "0-7\n", "online": "0-3,5-7\n"}
        for name, text in system.items():
            path = tmp_path / "sys/devices/system/cpu" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (tmp_path / "proc/1").mkdir(parents=True)
        (tmp_path / "proc/1/cgroup").write_text(cgroup)
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return host_cpus(str(tmp_path))

    return write


@pytest.mark.parametrize(
    ("cgroup", "files", "allowed"),
    [
        (V2.format("/init.scope"), {}, "0-3,5-7"),
        (V2.format("/init.scope"), {"cpuset.cpus.effective": "0-5\n"}, "0-5"),
        (
            V2.format("/init.scope"),
            {
                "cpuset.cpus.effective": "0-7\n",
                "cocoon.slice/cpuset.cpus.effective": "0-3\n",
                "cocoon.slice/cocoon-vms.slice/cpuset.cpus.effective": "1-2\n",
            },
            "1-2",
        ),
        (
            V2.format("/init.scope"),
            {
                "cpuset.cpus.effective": "0-7\n",
                "cocoon.slice/cpuset.cpus.effective": "0-3\n",
                "cocoon.slice/cocoon-vms.slice/cgroup.procs": "",
            },
            "0-3",
        ),
        (
            V2.format("/machine/box/init.scope"),
            {"machine/box/cpuset.cpus.effective": "6\n", "cpuset.cpus.effective": "0-7\n"},
            "6",
        ),
        (V1.format("/"), {"cpuset/cpuset.effective_cpus": "0-2\n"}, "0-2"),
        (
            V1.format("/box"),
            {"cpuset/box/cpuset.effective_cpus": "1\n", "cpuset/cpuset.effective_cpus": "0-7\n"},
            "1",
        ),
        (V1.format("/"), {}, "0-3,5-7"),
    ],
)
def test_vms_may_use_what_the_nearest_cpuset_has(host, cgroup, files, allowed):
    found = host(cgroup, files)
    assert found.present == parse_cpus("0-7")
    assert found.online == parse_cpus("0-3,5-7")
    assert found.allowed == parse_cpus(allowed)


def test_this_host_has_a_cpu_and_may_use_it():
    assert host_cpus().usable


@pytest.mark.parametrize(
    ("queues", "words"),
    [
        (((0,), (9, 8)), "names CPU 8, which this host does not have: write others of 0-1"),
        (((2,),), "names CPU 2, which is offline: write 1 to /sys/.*/cpu2/online, or write others"),
        (((3,),), "names CPU 3, which is not in the cpuset .*AllowedCPUs= of cocoon-vms.slice, or"),
    ],
)
def test_a_cpu_that_no_vm_runs_on_is_named_with_why_and_a_remedy(monkeypatch, queues, words):
    here = HostCpus(frozenset(range(4)), frozenset({0, 1, 3}), frozenset({0, 1, 2}))
    monkeypatch.setattr(affinity, "host_cpus", lambda: here)
    with pytest.raises(Invalid, match=f"queue_affinity of VM web {words}"):
        affinity.check_queue_cpus("web", VmConfig(cpu=2, queue_affinity=queues))
    affinity.check_queue_cpus("web", VmConfig(cpu=2, queue_affinity=((0, 1), (), (1,))))


def test_a_vm_that_ties_no_queue_asks_for_no_cpu(monkeypatch):
    monkeypatch.setattr(affinity, "host_cpus", lambda: pytest.fail("asked"))
    affinity.check_queue_cpus("web", VmConfig(queue_affinity=((),)))
