"""systemd-machined, where it is installed: shows VMs in `machinectl`.

Methods are those of org.freedesktop.machine1(5). A registration ends with the unit.
"""

from .bus import Bus, BusError

_MACHINED = "org.freedesktop.machine1"
_ABSENT = frozenset(
    {
        "org.freedesktop.DBus.Error.ServiceUnknown",
        "org.freedesktop.DBus.Error.NameHasNoOwner",
        "org.freedesktop.systemd1.NoSuchUnit",
        "org.freedesktop.systemd1.LoadFailed",
        "org.freedesktop.systemd1.UnitMasked",
    }
)
_EXISTS = "org.freedesktop.machine1.MachineExists"


async def register_machine(bus: Bus, name: str, identity: bytes, leader: int) -> bool:
    """Register the process `leader`, in its own unit, as VM `name`; return whether it is listed.

    `identity` is 16 bytes, the VM's UUID. A host without machined is no error. Raises BusFailure.
    """
    # Process 0 would be the caller's own: machined would then stop the agent with the VM.
    assert leader > 0
    try:
        await bus.call(
            _MACHINED,
            "/org/freedesktop/machine1",
            f"{_MACHINED}.Manager",
            "RegisterMachine",
            "sayssus",
            [name, identity, "cocoon-host", "vm", leader, ""],
        )
    except BusError as error:
        if error.name in _ABSENT:
            return False
        if error.name != _EXISTS:
            raise
    return True
