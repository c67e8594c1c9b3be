"""What a VM can do, and what is recorded before and after."""
