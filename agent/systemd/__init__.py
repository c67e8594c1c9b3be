"""systemd over D-Bus: the bus, the manager's calls and signals, what a VM's unit is made of."""
