"""Many tasks, of datasets, shots, seeds and methods, on one frozen backbone."""
