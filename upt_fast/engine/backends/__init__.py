"""Who computes operations: a file per backend, dispatch.py chooses."""
