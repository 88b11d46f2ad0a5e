"""What the engine has for CPUs alone: the compiled operations (kernels/cpu), and ways to compute that are timed."""
