import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.model.config import (
    HYPERVISORS,
    KEYS,
    MINIMUM_MEMORY,
    RESTART,
    VmConfig,
    parse_config,
    parse_line,
    show_config,
    show_line,
)
from agent.model.errors import Invalid
from agent.model.size import GIB, MIB

CPUS = 8


def parse(**changes):
    return parse_config(VmConfig(), changes, CPUS)


names = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,20}", fullmatch=True)
cmdlines = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=200)
disks = st.lists(
    st.builds(
        lambda name, mebibytes, readonly: {
            "name": name,
            "size": mebibytes * MIB,
            "readonly": readonly,
        },
        names,
        st.integers(1, 1 << 20),
        st.booleans(),
    )
    | st.builds(
        lambda name, readonly: {"path": f"/dev/{name}", "readonly": readonly},
        names,
        st.booleans(),
    ),
    max_size=5,
    unique_by=lambda disk: disk.get("name") or disk["path"],
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.integers(1, 4),
        "max_cpu": st.integers(4, CPUS),
        "memory": st.integers(16, 1024).map(lambda mebibytes: mebibytes * MIB),
        "max_memory": st.integers(1024, 4096).map(lambda mebibytes: f"{mebibytes}M"),
        "storage": st.integers(0, 1 << 30).map(lambda sectors: sectors * 512),
        "hypervisor": st.sampled_from([*HYPERVISORS, "auto"]),
        "boot": st.none()
        | st.fixed_dictionaries({"kernel": names}, optional={"initrd": names, "cmdline": cmdlines})
        | st.fixed_dictionaries({"firmware": names}),
        "disks": disks,
        "restart": st.sampled_from(RESTART),
        "autostart": st.booleans() | st.sampled_from(["yes", "no"]),
        "stop_timeout": st.integers(1, 3600) | st.integers(1, 3600).map(str),
        "track_dirty": st.booleans(),
        "queue_affinity": st.lists(
            st.lists(st.integers(0, 1023), max_size=3, unique=True), max_size=1
        ),
        "hostname": names.filter(lambda name: "_" not in name and not name.endswith("-")),
        "user_data": st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")),
        "ssh_keys": st.lists(names, max_size=3),
    },
)


@given(documents)
def test_writing_back_what_is_there_changes_nothing(document):
    config = parse(**{"max_memory": "4G", "max_cpu": CPUS, **document})
    shown = json.loads(json.dumps(show_config(config)))
    assert parse_config(config, shown, CPUS) == config
    assert parse_config(VmConfig(), shown, CPUS) == config


@given(documents)
def test_writing_back_what_a_one_value_file_shows_changes_nothing(document):
    config = parse(**{"max_memory": "4G", "max_cpu": CPUS, **document})
    for name in KEYS:
        # user_data is kept as it was written; its final newline is the file's own.
        line = show_line(name, config) + ("" if name == "user_data" else "\n")
        assert parse_config(config, {name: parse_line(name, line)}, CPUS) == config, name


@given(st.dictionaries(st.text(max_size=10), st.integers() | st.text(max_size=10) | st.none()))
def test_anything_else_is_refused_or_understood_but_never_crashes(document):
    with contextlib.suppress(Invalid):
        parse_config(VmConfig(), document, CPUS)


@given(
    st.sampled_from(sorted(KEYS)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(st.lists(inner, max_size=2), max_size=2)
            | st.dictionaries(st.sampled_from(["kernel", "path", "name", "size", "x"]), inner)
        ),
        max_leaves=6,
    ),
)
def test_any_json_value_of_a_key_is_refused_or_understood(key, value):
    try:
        config = parse_config(VmConfig(), {key: value}, CPUS)
    except Invalid:
        return
    assert parse_config(VmConfig(), show_config(config), CPUS) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, "no key 'colour': the keys are cpu,"),
        ({"cpu": 0}, "cpu 0 is not a whole number from 1"),
        ({"cpu": CPUS + 1}, "more than the 8 of this host"),
        ({"cpu": True}, "cpu 'True' is not"),
        ({"cpu": 1.5}, "cpu '1.5' is not"),
        ({"cpu": "-1"}, "cpu '-1' is not"),
        ({"cpu": 4, "max_cpu": 2}, "max_cpu 2 is not between cpu"),
        ({"memory": "1M"}, "is not between 16M"),
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"memory": 16 * MIB + 1}, "not a multiple of 1M"),
        ({"memory": "1G", "max_memory": "512M"}, "max_memory 512M is below memory 1G"),
        ({"storage": 1}, "not a multiple of 512B"),
        ({"hypervisor": "xen"}, "not one of cloud-hypervisor, firecracker, qemu, auto"),
        ({"boot": {}}, "neither kernel nor firmware"),
        ({"boot": {"kernel": "../x"}}, "not a plain file name"),
        ({"boot": {"kernel": "a/b"}}, "not a plain file name"),
        ({"boot": {"kernel": ".."}}, "not the name of a file"),
        ({"boot": {"kernel": "/a/../b"}}, "leave out '..'"),
        ({"boot": {"kernel": "k", "firmware": "f"}}, "either firmware, or kernel"),
        ({"boot": {"kernel": "k", "cmdline": "a\nb"}}, "one line of printable ASCII"),
        ({"boot": {"kernel": "k", "args": ""}}, "boot has no 'args'"),
        ({"disks": {}}, "not a list of at most 16"),
        ({"disks": [{"name": "a"}]}, "size of disk a"),
        ({"disks": [{"size": "1G"}]}, "a path of the host, or a name and a size"),
        ({"disks": [{"name": True, "size": "1G"}]}, "disk name is not a text"),
        ({"disks": [{"path": "x"}]}, "not absolute"),
        ({"disks": [{"path": "/x", "name": "a"}]}, "path, readonly and serial only"),
        ({"disks": [{"name": "a", "size": "1G"}] * 2}, "two disks have the same name"),
        ({"disks": [{"path": "/x", "serial": "a b"}]}, "serial 'a b' is not"),
        ({"queue_affinity": 0}, "not a list with, for each queue of a disk, a list of CPUs"),
        ({"queue_affinity": {"0": [1]}}, "not a list with"),
        ({"queue_affinity": [0]}, "of queue 0, '0', is not a list of CPUs"),
        ({"queue_affinity": [[], "1"]}, "of queue 1, '1', is not a list of CPUs"),
        ({"queue_affinity": [["1"]]}, "names '1', which is not the number of a CPU"),
        ({"queue_affinity": [[True]]}, "names 'True', which is not the number"),
        ({"queue_affinity": [[1.0]]}, "names '1.0', which is not the number"),
        ({"queue_affinity": [[-1]]}, "names '-1', which is not the number"),
        ({"queue_affinity": [[1024]]}, "names '1024', which is not the number of a CPU, 0 to 1023"),
        ({"queue_affinity": [[1, 2, 1]]}, "of queue 0 names a CPU twice"),
        (
            {"queue_affinity": [[0], [1]]},
            "for 2 queues, and a disk has one for each CPU, 1 at most",
        ),
        ({"cpu": 2, "max_cpu": 3, "queue_affinity": [[], [], [], []]}, "each CPU, 3 at most"),
        ({"restart": "maybe"}, "not one of no, on-failure, always"),
        ({"autostart": "maybe"}, "neither yes nor no"),
        ({"stop_timeout": 0}, "not a whole number from 1 to 3600"),
        ({"hostname": "-a"}, "not a host name"),
        ({"user": "Root"}, "not a user name"),
        ({"ssh_keys": "x"}, "not a list of at most 100"),
        ({"ssh_keys": ["a\nb"]}, "one public key a line"),
        ({"user_data": "\ud800"}, "not a text"),
    ],
)
def test_a_refusal_names_the_key_and_the_rule(changes, words):
    with pytest.raises(Invalid) as refusal:
        parse(**changes)
    assert words in str(refusal.value)


def test_sizes_are_read_as_people_write_them_and_shown_in_bytes():
    for text in ("2G", "2g", "2GiB", " 2048M ", str(2 * GIB)):
        assert show_line("memory", parse(memory=parse_line("memory", text))) == str(2 * GIB)


def test_a_maximum_follows_its_value_until_it_is_set():
    config = parse(cpu=2)
    assert show_config(config)["max_cpu"] == 2
    assert show_config(parse_config(config, {"cpu": 4}, CPUS))["max_cpu"] == 4
    assert parse(memory=MINIMUM_MEMORY).most_memory == MINIMUM_MEMORY


def test_only_paths_of_the_host_are_named_as_such():
    config = parse(
        boot={"kernel": "/boot/vmlinuz", "initrd": "small"},
        disks=[{"path": "/dev/sdb"}, {"name": "d", "size": "1G"}],
    )
    assert config.host_paths() == {"/boot/vmlinuz", "/dev/sdb"}


def test_queues_may_be_as_many_as_the_vm_may_have_cpus():
    config = parse(
        cpu=1, max_cpu=3, queue_affinity=parse_line("queue_affinity", "[[0], [], [2,1]]")
    )
    assert config.queue_affinity == ((0,), (), (2, 1))
    assert show_line("queue_affinity", config) == "[[0], [], [2, 1]]"


def test_queues_of_cpus_that_were_taken_away_stay_tied():
    config = parse(cpu=2, queue_affinity=[[0], [1]])
    fewer = parse_config(config, {"cpu": 1}, CPUS)
    assert fewer.queue_affinity == ((0,), (1,))
    assert parse_config(fewer, show_config(fewer), CPUS) == fewer


@pytest.mark.parametrize(("queues", "ties"), [([], False), ([[]], False), ([[], [0]], True)])
def test_only_a_queue_with_a_cpu_is_tied(queues, ties):
    assert parse(cpu=2, queue_affinity=queues).ties_queues is ties


def test_ssh_keys_may_be_lines_or_json():
    assert parse_line("ssh_keys", "a\n\nb\n") == ["a", "b"]
    assert parse_line("ssh_keys", '["a", "b"]\n') == ["a", "b"]
