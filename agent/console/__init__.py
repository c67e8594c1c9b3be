"""A VM's console: its FIFOs, its log, and everyone who listens."""
