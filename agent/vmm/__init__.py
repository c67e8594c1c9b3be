"""One module a VMM: what to launch, and how to talk to it once it runs."""
