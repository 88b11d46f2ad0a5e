"""Operations with a backward pass of their own, and where PyTorch must differentiate instead."""
