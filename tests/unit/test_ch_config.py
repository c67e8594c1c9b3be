"""What becomes of another host's `config.json`, and what does not."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.model import canonical
from agent.model.access import Access
from agent.model.ch_config import Nic, localised, nics, untied
from agent.model.errors import CocoonError, Damaged, Missing, Unsupported
from agent.model.snapshot import BoundFile, Snapshot, SnapshotFile

ELSEWHERE = "/var/lib/cocoon/run/cloudhypervisor/X"
SNAPSHOT = Snapshot(
    id="b" * 26,
    name="nightly",
    access=Access(0, 0),
    hypervisor="cloud-hypervisor",
    files=(SnapshotFile("cow.raw", 1), SnapshotFile("data-a.raw", 1), SnapshotFile("mem", 1)),
    binds=(BoundFile("cow.raw", f"{ELSEWHERE}/root.raw"),),
    host_disks={f"{canonical.DISKS}/0": "/dev/sdb"},
)
# As Cloud Hypervisor 53 writes it, but for what no test is about.
OWN = {
    "cpus": {"boot_vcpus": 1, "max_vcpus": 1, "nested": True},
    "memory": {"size": 64 << 20, "hugepages": False},
    "payload": {"kernel": canonical.KERNEL, "initramfs": canonical.INITRD, "cmdline": "a"},
    "disks": [
        {"id": "cow", "path": f"{canonical.VM}/cow.raw", "queue_size": 512},
        {"id": "data-a", "path": f"{canonical.VM}/data-a.raw", "readonly": True},
        {"id": "disk-0", "path": f"{canonical.DISKS}/0", "readonly": True},
    ],
    "rng": {"pci_segment": 0, "src": "/dev/urandom"},
    "serial": {"mode": "Socket", "socket": canonical.CONSOLE_SOCKET},
    "console": {"mode": "Off", "pci_segment": 0},
    "debug_console": {"mode": "Off", "iobase": 233},
    "landlock_enable": False,
}


def changed(**changes):
    return localise({**OWN, **changes})


def localise(config, snapshot=SNAPSHOT):
    return json.loads(localised(json.dumps(config).encode(), snapshot))


def with_nics(*net):
    return localise({**OWN, "net": net}, dataclasses.replace(SNAPSHOT, nics=len(net)))["net"]


def test_what_was_taken_here_stays_byte_for_byte():
    data = json.dumps(OWN, indent=3).encode()
    assert localised(data, SNAPSHOT) is data


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        ("serial", {"mode": "Tty"}, OWN["serial"]),
        ("serial", {"mode": "File", "file": "/x", "socket": None}, OWN["serial"]),
        ("serial", {"mode": "Socket", "socket": f"{ELSEWHERE}/console.sock"}, OWN["serial"]),
        ("serial", {"mode": "Off"}, OWN["serial"]),
        ("serial", None, OWN["serial"]),
        ("console", {"mode": "Pty", "file": "/dev/pts/7", "id": "c"}, {"mode": "Null", "id": "c"}),
        ("console", {"mode": "Socket", "socket": "/x"}, {"mode": "Null"}),
        ("console", None, {"mode": "Null"}),
        (
            "debug_console",
            {"mode": "File", "file": "/x", "iobase": 1},
            {"mode": "Off", "iobase": 1},
        ),
        ("payload", {"kernel": "/x", "cmdline": "b"}, {"kernel": canonical.KERNEL, "cmdline": "b"}),
        ("payload", {"firmware": "/x"}, {"firmware": canonical.FIRMWARE}),
        ("payload", {"kernel": None, "initramfs": ""}, {"kernel": None, "initramfs": ""}),
        ("rng", {"src": "/dev/hwrng", "id": "r"}, {"src": "/dev/urandom", "id": "r"}),
        ("cpus", {"boot_vcpus": 2, "affinity": [{"vcpu": 0}]}, {"boot_vcpus": 2}),
        (
            "memory",
            {"hugepages": True, "hugepage_size": 2, "size": 1},
            {"hugepages": False, "size": 1},
        ),
        ("memory", {"size": 1, "zones": None}, {"size": 1, "zones": None}),
    ],
)
def test_what_belongs_to_the_other_host_is_changed_alone(key, theirs, ours):
    assert changed(**{key: theirs}) == {**OWN, key: ours}


def test_a_disk_is_looked_for_where_it_is_here():
    theirs = {"id": "_disk0", "path": f"{ELSEWHERE}/./root.raw", "direct": True}
    affinity = {"queue_affinity": [{"queue_index": 0, "host_cpus": [40]}]}
    (disk,) = changed(disks=[theirs | affinity])["disks"]
    assert disk == theirs | {"path": f"{canonical.VM}/cow.raw"}


TIED = [{"queue_index": 0, "host_cpus": [40]}, {"queue_index": 2, "host_cpus": [3, 1]}]


@pytest.mark.parametrize("theirs", [{}, {"queue_affinity": None}, {"queue_affinity": TIED}])
@pytest.mark.parametrize(
    ("affinity", "ours"),
    [((), {}), (((), ()), {}), (((40,), (), (3, 1)), {"queue_affinity": TIED})],
)
def test_disks_are_tied_to_the_cpus_that_their_vm_names(theirs, affinity, ours):
    config = {**OWN, "disks": [disk | theirs for disk in OWN["disks"]]}
    data = json.dumps(config).encode()
    loaded = json.loads(localised(data, SNAPSHOT, affinity))
    assert loaded == {**OWN, "disks": [disk | ours for disk in OWN["disks"]]}
    assert json.loads(untied(data)) == OWN


@pytest.mark.parametrize("data", [b"", b"[]", b'{"disks": 1}', b'{"disks": [1]}', b'{"disks": ['])
def test_what_is_no_configuration_is_untied_from_nothing(data):
    with pytest.raises(Damaged):
        untied(data)


def test_rules_for_paths_of_the_other_host_go():
    theirs = {"landlock_enable": True, "landlock_rules": [{"path": "/x", "access": "rw"}]}
    assert changed(**theirs) == OWN


def test_a_network_interface_waits_for_descriptors_and_is_to_the_guest_what_it_was():
    ours = {"id": "_net0", "mac": "52:54:00:00:00:01", "num_queues": 6, "queue_size": 256, "x": 1}
    theirs = {"tap": "tap0", "ip": "10.0.0.1", "mask": "255.0.0.0", "host_mac": "a", "mtu": 1400}
    more = {"id": "_net1", "num_queues": 2, "fds": [7], "vhost_user": False, "vhost_socket": None}
    assert with_nics(ours | theirs, more) == [
        ours | {"fds": [-1, -1, -1]},
        more | {"fds": [-1]},
    ]
    data = json.dumps({"net": [ours, more]}).encode()
    assert nics(data) == (Nic("_net0", 3), Nic("_net1", 1))
    assert nics(b"{}") == nics(b'{"net": null}') == ()


@pytest.mark.parametrize("hostile", [{"vhost_user": True}, {"vhost_socket": "/x"}])
def test_a_network_interface_of_another_process_is_refused(hostile):
    with pytest.raises(Unsupported, match="a network interface of another process"):
        with_nics({"id": "a", "num_queues": 2} | hostile)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        ([{}], "no id or no queues"),
        ([{"id": "", "num_queues": 2}], "no id"),
        ([{"id": "a", "num_queues": "2"}], "no queues"),
        ([{"id": "a", "num_queues": 1}], "no queues"),
        ([{"id": "a", "num_queues": -2}], "no queues"),
        ([{"id": "a", "num_queues": 2}] * 2, "same id"),
        ([{"id": "a", "num_queues": 1 << 60}], "more than 253"),
        ([{"id": str(number), "num_queues": 2} for number in range(254)], "more than 253"),
    ],
)
def test_network_interfaces_that_cannot_be_are_damage(net, words):
    with pytest.raises(Damaged, match=words):
        with_nics(*net)


def test_network_interfaces_that_are_not_recorded_ask_for_another_import():
    with pytest.raises(Damaged, match="with 0 network interfaces and has 1: import it again"):
        changed(net=[{"id": "a", "num_queues": 2}])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fs": [{"tag": "x"}]}, "shared directories"),
        ({"vsock": {"cid": 3}}, "a vsock"),
        ({"devices": [{"path": "/sys/x"}]}, "devices of the host"),
        ({"user_devices": [{"socket": "/x"}]}, "devices of another process"),
        ({"generic-vhost-user": [{}]}, "devices of another process"),
        ({"vdpa": [{}]}, "vDPA"),
        ({"pmem": [{}]}, "persistent memory"),
        ({"tpm": {"socket": "/x"}}, "a TPM"),
        ({"disks": [{"vhost_user": True, "vhost_socket": "/x"}]}, "a disk of another process"),
        ({"disks": [{"path": f"{canonical.VM}/cow.raw", "vhost_socket": "/x"}]}, "another process"),
        ({"memory": {"zones": [{"id": "a", "file": "/x"}]}}, "memory in zones"),
        ({"payload": {"igvm": "/x"}}, "an IGVM file"),
    ],
)
def test_what_vms_have_not_here_is_refused(changes, words):
    with pytest.raises(Unsupported, match=f"snapshot nightly has .*{words}.* without"):
        changed(**changes)


def test_nothing_of_what_they_might_have_is_no_obstacle():
    theirs = {"net": None, "fs": [], "devices": None, "vsock": None, "tpm": None}
    assert changed(**theirs) == {**OWN, **theirs}
    assert changed(disks=None)["disks"] is None


@pytest.mark.parametrize(
    "path", [f"{canonical.VM}/data-b.raw", f"{canonical.VM}/mem", "/etc/shadow", "cow.raw", ""]
)
def test_a_disk_that_did_not_travel_is_named(path):
    with pytest.raises(Missing, match="which did not travel"):
        changed(disks=[{"path": path}])


@pytest.mark.parametrize(
    "changes",
    [{"disks": {"a": 1}}, {"disks": [1]}, {"serial": "Tty"}, {"payload": [1]}, {"cpus": 1}],
)
def test_values_of_another_type_are_damage(changes):
    with pytest.raises(Damaged, match=r"config\.json: \w+ is not"):
        changed(**changes)


LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
VALUE = LEAF | st.lists(LEAF, max_size=2) | st.dictionaries(st.text(max_size=5), LEAF, max_size=2)
UNKNOWN = st.dictionaries(st.sampled_from(["x", "later", "disk", "Mode", ""]), VALUE, max_size=2)
slowly = settings(suppress_health_check=[HealthCheck.too_slow])


@slowly
@given(UNKNOWN, UNKNOWN, UNKNOWN)
def test_unknown_fields_survive_wherever_they_are(top, disk, console):
    theirs = {
        **OWN,
        **top,
        "disks": [{"path": f"{ELSEWHERE}/root.raw", **disk}],
        "serial": {"mode": "Tty", **console},
        "console": {"mode": "Tty", **console},
    }
    ours = localise(theirs)
    assert ours == {
        **theirs,
        "disks": [{"path": f"{canonical.VM}/cow.raw", **disk}],
        "serial": {**OWN["serial"], **console},
        "console": {"mode": "Null", **console},
    }


KEYS = st.sampled_from([*OWN, "net", "landlock_rules", "vsock"])
FIELDS = st.sampled_from(["path", "mode", "file", "socket", "src", "kernel", "zones", "affinity"])
OBJECT = st.dictionaries(FIELDS, VALUE, max_size=3)
NIC = st.fixed_dictionaries(
    {"id": st.sampled_from(["a", "b"]), "num_queues": st.integers(1, 5)},
    optional={"tap": VALUE, "vhost_user": VALUE, "fds": VALUE},
)
HOSTILE = VALUE | OBJECT | st.lists(OBJECT | NIC, max_size=2)


@slowly
@given(st.dictionaries(KEYS, HOSTILE, max_size=3) | st.binary(), st.integers(0, 2))
def test_whatever_comes_is_refused_or_names_nothing_but_what_is_here(content, count):
    snapshot = dataclasses.replace(SNAPSHOT, nics=count)
    data = content if isinstance(content, bytes) else json.dumps({**OWN, **content}).encode()
    try:
        ours = localised(data, snapshot)
    except CocoonError:
        return
    config = json.loads(ours)
    here = {f"{canonical.VM}/{file.name}" for file in SNAPSHOT.files} | SNAPSHOT.host_disks.keys()
    assert {disk["path"] for disk in config["disks"] or []} <= here
    assert config["serial"].items() >= OWN["serial"].items()
    assert config["console"]["mode"] in ("Off", "Null")
    assert all("tap" not in nic and nic["fds"] for nic in config.get("net") or [])
    assert localised(ours, snapshot) is ours


def test_a_document_as_deep_as_it_may_be_is_no_trouble():
    deep = b'{"x":' * 100_000 + b"1" + b"}" * 100_000
    with pytest.raises(Damaged):
        localised(deep, SNAPSHOT)


def test_what_is_written_anew_is_bound_nowhere():
    assert SNAPSHOT.bound == ()
    assert dataclasses.replace(SNAPSHOT, hypervisor="firecracker").bound == SNAPSHOT.binds
