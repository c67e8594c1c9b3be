"""A guest of Cloud Hypervisor's whose hardware changes, for what asks for that without a socket."""

from described_vmm import RUNNING, DescribedCloudHypervisor

from agent.model.errors import Failed
from agent.model.size import MIB


class Guest(DescribedCloudHypervisor):
    """One that lets go of what it is asked for, if it `obeys`.

    `refusals` are calls that fail, by their route.
    """

    def __init__(self, obeys=True):
        super().__init__("cloud-hypervisor-53", RUNNING, hotplug=448 * MIB)
        self.obeys = obeys
        self.refusals = {}
        self.config["cpus"]["boot_vcpus"] = 1
        path = "/var/lib/cocoon/run/vm/cow.raw"
        self.config["disks"] = [{"id": "cow", "path": path, "num_queues": 1}]
        self.boot()

    @property
    def changes(self):
        """The requests that were to change something."""
        return [(path, body) for method, path, body in self.requests if method == "PUT"]

    async def call(self, method, path, body=None, *, timeout):
        """Do as HttpApi."""
        route = path.removeprefix(self.description.root)
        if route in self.refusals:
            raise self.refusals[route]
        status, content = self.answer(method, path, body)
        if status >= 400:
            raise Failed(f"Cloud Hypervisor refused {method} {path}: {': '.join(content)}")
        if self.obeys:
            self.let_go()
        return content
