"""What is frozen and fast: towers that take prompts in every layer, their operations, and who computes them.

Give it a FrozenCLIP (upt_fast/clip), prompts and packed class names; get features. It knows nothing of methods, data,
names of models or commands, and imports nothing of the package above it.

    towers/     text and image encoder, class names packed, frozen blocks, and the routes through them
    ops.py      one public function per operation
    weights.py  a block's frozen weights, which act themselves: plain, packed, in float8
    backends/   who computes an operation, a file each, and why another does not
    autograd/   functions with a backward of their own
    cpu/        the compiled operations' library, and ways to compute that are timed
    layout.py   where packed rows are
    memory.py   peak memory by formula; workspace.py: memory that steps reuse
    graphs.py   a step as one CUDA graph; fp8.py: products with frozen weights in float8
"""
