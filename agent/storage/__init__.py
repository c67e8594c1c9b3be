"""Files below the root directory: VM directories, disks, kernels, snapshots."""
