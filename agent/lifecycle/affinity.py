"""Whether this host has the CPUs that a VM's disks are to be tied to."""

from agent.model.config import VmConfig
from agent.model.cpus import show_cpus
from agent.model.errors import Invalid
from agent.systemd.cpus import HostCpus, host_cpus
from agent.systemd.drop_in import SLICE


def check_queue_cpus(name: str, config: VmConfig) -> None:
    """Raise Invalid for a CPU in `queue_affinity` of the VM `name` that no VM can run on.

    The VMM would go on without, and say so in its log alone.
    """
    if not config.ties_queues:
        return
    host = host_cpus()
    missing = {cpu for cpus in config.queue_affinity for cpu in cpus} - host.usable
    if missing:
        why, remedy = _explain(host, min(missing))
        raise Invalid(
            f"queue_affinity of VM {name} names CPU {min(missing)}, {why}: {remedy}write others of "
            f"{show_cpus(host.usable)}"
        )


def _explain(host: HostCpus, cpu: int) -> tuple[str, str]:
    if cpu not in host.present:
        return "which this host does not have", ""
    if cpu not in host.online:
        online = f"/sys/devices/system/cpu/cpu{cpu}/online"
        return "which is offline", f"write 1 to {online}, or "
    return (
        "which is not in the cpuset that VMs are in",
        f"allow it in AllowedCPUs= of {SLICE}, or ",
    )
