"""cocoon-host: a host agent that shows microVMs as systemd units and directories."""

__version__ = "0.1.0"
