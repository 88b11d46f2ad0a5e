"""Who computes an operation: PyTorch, the compiled CPU operations, Triton or xformers; and why another does not."""
