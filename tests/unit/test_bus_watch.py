"""What consumers of changes are told, signal by signal."""

from typing import Any

from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from agent.systemd.watch import Resync, UnitChange, UnitState, Watch, unit_name, unit_path
from agent.systemd.wire import Framer, Received

UNIT = "cocoon-vm-a.service"
RUNNING = UnitState("active", "running", "success", 42, 0, 0, 0, "ab" * 16)


def changed(unit: str, interface: str, **values: Variant) -> Received:
    message = Message(
        path=unit_path(unit),
        interface="org.freedesktop.DBus.Properties",
        member="PropertiesChanged",
        message_type=MessageType.SIGNAL,
        signature="sa{sv}as",
        body=[f"org.freedesktop.systemd1.{interface}", values, ["Conditions"]],
    )
    message.serial = 1
    marshal: Any = message._marshall
    (received,) = Framer().feed(bytes(marshal()))
    return received


def service_part(unit: str = UNIT, pid: int = 42, code: int = 0, status: int = 0) -> Received:
    return changed(
        unit,
        "Service",
        Result=Variant("s", "success"),
        MainPID=Variant("u", pid),
        ExecMainCode=Variant("i", code),
        ExecMainStatus=Variant("i", status),
        NRestarts=Variant("u", 0),
        StatusText=Variant("s", "ignored"),
    )


def unit_part(
    active: str, sub: str, unit: str = UNIT, ended_at: int = 0, invocation: int = 0xAB
) -> Received:
    return changed(
        unit,
        "Unit",
        ActiveState=Variant("s", active),
        SubState=Variant("s", sub),
        InvocationID=Variant("ay", bytes([invocation] * 16)),
        InactiveEnterTimestampMonotonic=Variant("t", ended_at),
        Job=Variant("(uo)", [1, "/job/1"]),
    )


def told(*signals: Received | str) -> list[UnitChange | Resync]:
    """What a consumer of cocoon-vm-* gets from these signals; a string is a unit removed."""
    changes: list[UnitChange | Resync] = []
    watch = Watch("cocoon-vm-", changes.append)
    for signal in signals:
        if isinstance(signal, str):
            watch.unit_removed(signal, unit_path(signal))
        else:
            watch.properties_changed(signal)
    return changes


def test_both_parts_make_one_change() -> None:
    changes = told(service_part(), unit_part("active", "running"))
    assert changes == [UnitChange(UNIT, RUNNING)]


def test_a_part_alone_makes_none() -> None:
    assert told(service_part(), service_part()) == []
    assert told(unit_part("active", "running")) == []


def test_what_was_told_is_not_told_again() -> None:
    both = [service_part(), unit_part("active", "running")]
    assert told(*both, *both) == [UnitChange(UNIT, RUNNING)]


def test_other_units_do_not_matter() -> None:
    other = "cocoon-host.service"
    assert told(service_part(other), unit_part("active", "running", other), other) == []


def test_units_do_not_mix() -> None:
    other = "cocoon-vm-b.service"
    assert told(service_part(), unit_part("active", "running", other)) == []
    both = [service_part(), service_part(other), unit_part("active", "running", other)]
    assert told(*both) == [UnitChange(other, RUNNING)]


def test_a_unit_about_to_start_has_not_ended() -> None:
    before = [service_part(), unit_part("inactive", "dead")]
    start = [service_part(), unit_part("active", "running")]
    assert told(*before, *start) == [UnitChange(UNIT, RUNNING)]


def test_a_failed_unit_about_to_start_again_has_not_failed_again() -> None:
    failed = [service_part(pid=0), unit_part("failed", "failed", ended_at=5)]
    again = [service_part(pid=0), unit_part("failed", "failed", ended_at=5, invocation=0xCD)]
    assert len(told(*failed, *again)) == 1


def test_a_unit_that_ends_is_told_each_time() -> None:
    first = [service_part(pid=0), unit_part("inactive", "dead", ended_at=5)]
    second = [service_part(pid=0), unit_part("inactive", "dead", ended_at=9, invocation=0xCD)]
    assert len(told(*first, *second)) == 2


def test_only_units_that_were_told_of_are_told_to_be_gone() -> None:
    assert told(UNIT) == []
    changes = told(service_part(), unit_part("active", "running"), UNIT, UNIT)
    assert changes[1:] == [UnitChange(UNIT, None)]


def test_after_a_gap_everything_is_news_again() -> None:
    changes: list[UnitChange | Resync] = []
    watch = Watch("cocoon-vm-", changes.append)
    for _ in range(2):
        watch.properties_changed(service_part())
        watch.properties_changed(unit_part("active", "running"))
        watch.resynchronise()
    assert changes == [UnitChange(UNIT, RUNNING), Resync()] * 2


def test_unit_names_survive_their_object_paths() -> None:
    for name in (UNIT, "0ad.service", "a@b\\x2d.service", "-.slice"):
        assert unit_name(unit_path(name)) == name
    assert unit_path("0-a.service") == "/org/freedesktop/systemd1/unit/_30_2da_2eservice"
