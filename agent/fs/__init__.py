"""The FUSE tree: file operations into calls, errors into errnos."""
