"""One operation of a kernel made wrong at a time, each of which the kernel's own tests must catch.

A mutant never writes outside of its tensors: what it breaks is a number. Run by run.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Mutant(NamedTuple):
    """A change of one file.

    Args:
        name: unique.
        file: below kernels/.
        old: the text that is changed, its first occurrence behind `after`.
        new: what takes its place.
        after: a text that the file has once; empty: the file's beginning, and then `old` occurs once.
        tests: below tests/; empty: those of the file.
        select: pytest's -k; empty: all.
    """

    name: str
    file: str
    old: str
    new: str
    after: str = ""
    tests: str = ""
    select: str = ""

    @property
    def compiled(self) -> bool:
        """Whether a compiler has to take it."""
        return self.file.startswith("cpu/")

    @property
    def test_file(self) -> str:
        """Where it must be caught."""
        # _prefix_attention_fwd.py is a part of prefix_attention.py
        stem = re.sub(r"^_|_(fwd|bwd|common)$", "", self.file.rpartition("/")[2].removesuffix(".py"))
        return self.tests or ("engine/test_cpu_ops.py" if self.compiled else f"kernels/test_{stem}.py")

    def apply(self, text: str) -> str:
        """The file's text with the change.

        Raises:
            ValueError: the place is not there, or not the only one.
        """
        start = 0
        if self.after:
            if text.count(self.after) != 1:
                raise ValueError(
                    f"{self.name}: {self.file} has {self.after!r} {text.count(self.after)} times, not once"
                )
            start = text.index(self.after) + len(self.after)
        elif text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.old!r} {text.count(self.old)} times, not once")
        at = text.find(self.old, start)
        if at < 0:
            raise ValueError(f"{self.name}: {self.file} has no {self.old!r} behind {self.after!r}")
        return text[:at] + self.new + text[at + len(self.old) :]


MUTANTS = (
    # activation.py
    Mutant(
        "activation: bias dropped",
        "activation.py",
        "z += tl.load(b_ptr + cols, cols < N, other=0.0).to(tl.float32)",
        "z += 0.0",
    ),
    Mutant("activation: slope of QuickGELU", "activation.py", "s * (1 + z * (1 - s))", "s * (1 + z * s)"),
    Mutant("activation: density of GELU", "activation.py", "+ z * density", "+ density"),
    Mutant(
        "activation: gradient's stride",
        "activation.py",
        "dy_ptr + rows * stride_dy_row",
        "dy_ptr + rows * stride_u_row",
    ),
    # layer_norm.py
    Mutant(
        "layer_norm: columns beyond the row are in the variance",
        "layer_norm.py",
        "tl.where(mask, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)",
        "x - (tl.sum(x, axis=1) / N)[:, None]",
    ),
    Mutant("layer_norm: gradient along h", "layer_norm.py", " - h * mean_dh_h[:, None]", ""),
    Mutant("layer_norm: gradient unscaled", "layer_norm.py", "rstd[:, None] * (dh - mean", "(dh - mean"),
    Mutant("layer_norm: residual's gradient dropped", "layer_norm.py", "dx += load_tile", "dx += 0 * load_tile"),
    Mutant(
        "layer_norm: residual's stride",
        "layer_norm.py",
        "load_tile(y_ptr, stride_y_row",
        "load_tile(y_ptr, N",
    ),
    # _rows.py
    Mutant(
        "rows: rows lie side by side",
        "_rows.py",
        "ptr + rows[:, None] * stride_row",
        "ptr + rows[:, None]",
        after="def load_tile",
        tests="kernels/test_layer_norm.py",
    ),
    # _linear_*.py
    Mutant(
        "linear_gelu: bias dropped",
        "_linear_act.py",
        "z = product + b.to(tl.float32)",
        "z = product",
        tests="kernels/test_linear_gelu.py",
    ),
    Mutant(
        "linear_gelu: u without bias",
        "_linear_act.py",
        "cols, z, mask)",
        "cols, product, mask)",
        tests="kernels/test_linear_gelu.py",
    ),
    Mutant(
        "linear_gelu: slope dropped",
        "_linear_dact.py",
        "product * activation_slope(z, KIND)",
        "product",
        tests="kernels/test_linear_gelu.py",
    ),
    Mutant(
        "linear_gelu: right half's columns",
        "_linear_dact.py",
        "row, col + HALF, stride_u_row, M, N",
        "row, col, stride_u_row, M, N",
        tests="kernels/test_linear_gelu.py",
    ),
    Mutant(
        "linear_gelu: sum begins anew in every block",
        "_linear_product.py",
        "tl.dot(x, w, product, input_precision=PRECISION)",
        "tl.dot(x, w, input_precision=PRECISION)",
        tests="kernels/test_linear_gelu.py",
    ),
    Mutant(
        "linear_gelu: weight's stride",
        "_linear_product.py",
        "ks[:, None].to(tl.int64) * stride_w_k",
        "ks[:, None].to(tl.int64)",
        tests="kernels/test_linear_gelu.py",
    ),
    # _packed_attention_*.py
    Mutant(
        "packed_attention: a row sees the next one",
        "_packed_attention_common.py",
        "(keys[None, :] <= rows[:, None])",
        "(keys[None, :] <= rows[:, None] + 1)",
    ),
    Mutant(
        "packed_attention: classes see the ones before",
        "_packed_attention_common.py",
        " & (keys[None, :] >= starts[:, None])",
        "",
    ),
    Mutant(
        "packed_attention: gradient of the scores",
        "_packed_attention_bwd.py",
        "(dp - tl.sum(p * dp, axis=1)[:, None])",
        "dp",
    ),
    Mutant(
        "packed_attention: prefix of the first set",
        "_packed_attention_common.py",
        "tl.load(tile + 4).to(tl.int64) * P",
        "P * 0",
    ),
    Mutant(
        "packed_attention: what is not finite spreads", "_packed_attention_common.py", "* LOG2E + poison", "* LOG2E"
    ),
    Mutant("packed_attention: keys' gradient as values'", "_packed_attention_bwd.py", "own, dk, K", "own, dv, K"),
    Mutant(
        "packed_attention: keys for values",
        "_packed_attention_fwd.py",
        "softmax(q, k, poison, sees).to(v.dtype), v,",
        "softmax(q, k, poison, sees).to(v.dtype), k,",
    ),
    # _prefix_attention_*.py
    Mutant(
        "prefix_attention: stale sum",
        "_prefix_attention_fwd.py",
        "total = total * scale + tl.sum(p, axis=1)",
        "total = total + tl.sum(p, axis=1)",
    ),
    Mutant(
        "prefix_attention: stale output", "_prefix_attention_fwd.py", "v, out * scale[:, None], input", "v, out, input"
    ),
    Mutant(
        "prefix_attention: a key beyond the last is seen",
        "_prefix_attention_common.py",
        "(keys < P + L)[None, :]",
        "(keys < P + L + 1)[None, :]",
    ),
    Mutant(
        "prefix_attention: gradient of the keys", "_prefix_attention_bwd.py", "(p * (dp - delta[None, :]))", "(p * dp)"
    ),
    Mutant(
        "prefix_attention: sum taken for the peak",
        "_prefix_attention_bwd.py",
        "softmax_ptr + H * M + statistics, mask",
        "softmax_ptr + statistics, mask",
        after="def _prefix_attention_bwd_queries_kernel",
    ),
    Mutant(
        "prefix_attention: prefix of the first set",
        "_prefix_attention_fwd.py",
        "tl.load(set_ptr + number * stride_set).to(tl.int64) * P",
        "P * 0",
        after="def _prefix_attention_fwd_kernel",
    ),
    Mutant(
        "prefix_attention: prefix's gradient under the next sequence",
        "_prefix_attention_bwd.py",
        "(B + number) * P * H + head",
        "(B + B - 1 - number) * P * H + head",
    ),
    # _attention.py
    Mutant(
        "sum_by_set: members of all sets",
        "_attention.py",
        "other=-1) == place % S",
        "other=-1) >= 0",
        tests="kernels/test_prefix_attention.py",
    ),
    # prompt_insert.py
    Mutant("prompt_insert: set's prompts", "prompt_insert.py", "prompt_rows += P * tl.load", "prompt_rows += tl.load"),
    Mutant(
        "prompt_insert: prompt's place in the image",
        "prompt_insert.py",
        "rows = images * T + place % P",
        "rows = images * T + place % P * 0",
    ),
    Mutant(
        "prompt_insert: stream's gradient dropped", "prompt_insert.py", "grad += load_tile", "grad += 0 * load_tile"
    ),
    Mutant("prompt_insert: images of all sets", "prompt_insert.py", "other=-1) == place // P", "other=-1) >= 0"),
    Mutant(
        "prompt_insert: residual into the prompts",
        "prompt_insert.py",
        "stride_y_row, rows, cols, own_mask",
        "stride_y_row, rows, cols, mask",
    ),
    # insert_shared.py
    Mutant("insert_shared: shared row's place", "insert_shared.py", "other=0) + place % P", "other=0)"),
    Mutant("insert_shared: shared rows", "insert_shared.py", "(-1 - source)[:, None]", "(source * 0)[:, None]"),
    # _prompt_transform_*.py
    Mutant(
        "prompt_transform: relu's gate",
        "_prompt_transform_product.py",
        "by_columns, mask, other=0.0) == 0, 0.0, y)",
        "by_columns, mask, other=0.0) == 0, y, y)",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: gradient unscaled",
        "_prompt_transform_attention.py",
        "ds = scale * p * (dp",
        "ds = p * (dp",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: residual dropped",
        "_prompt_transform_product.py",
        "        y += add\n",
        "        y += 0.0 * add\n",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: bias dropped",
        "_prompt_transform_product.py",
        "y += tl.load(bias_ptr",
        "y += 0.0 * tl.load(bias_ptr",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: keys of other heads",
        "_prompt_transform_attention.py",
        "dot_rows(q_ptr, q_ptr + D, rows",
        "dot_rows(q_ptr, qkv_ptr + D, rows",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: 1 / std of the other norm",
        "_prompt_transform_norm.py",
        "tl.store(rstd_ptr + M + rows, rstd2",
        "tl.store(rstd_ptr + rows, rstd2",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: order of prompts",
        "_prompt_transform_common.py",
        "LAYER + n_text + rows %",
        "LAYER + rows %",
    ),
    Mutant(
        "prompt_transform: a split's sums dropped",
        "_prompt_transform_common.py",
        "    return tl.sum(sums, axis=0)",
        "    return tl.max(sums, axis=0)",
    ),
    Mutant(
        "prompt_transform: text rows behind visual ones",
        "_prompt_transform_product.py",
        "y = tl.where((rows < V)[:, None], y, 0.0)",
        "y = tl.where((rows <= V)[:, None], y, 0.0)",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: a row left out of weights",
        "_prompt_transform_weights.py",
        "rows[:, None] + ins[None, :] * LD\n        x = tl.load(x_ptr + x_at, (rows < M)",
        "rows[:, None] + ins[None, :] * LD\n        x = tl.load(x_ptr + x_at, (rows < M - 1)",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: shift of x2",
        "_prompt_transform_weights.py",
        "* gain + shift)",
        "* gain)",
        tests="kernels/test_prompt_transform.py",
    ),
    Mutant(
        "prompt_transform: norm's own mean",
        "_prompt_transform_norm.py",
        "(gain * dy - mean_g - h * mean_gh)",
        "(gain * dy - h * mean_gh)",
        tests="kernels/test_prompt_transform.py",
    ),
    # _contrastive_loss_*.py
    Mutant(
        "contrastive_loss: stale sum", "_contrastive_loss_fwd.py", "total * tl.exp(peak - shift) + tl", "total + tl"
    ),
    Mutant(
        "contrastive_loss: label's logit", "_contrastive_loss_bwd.py", "(tl.exp(z - lse) - onehot)", "tl.exp(z - lse)"
    ),
    Mutant(
        "contrastive_loss: a class behind the range",
        "_contrastive_loss_bwd.py",
        "(c < tl.expand_dims(end, IMAGE_AXIS))",
        "(c <= tl.expand_dims(end, IMAGE_AXIS))",
    ),
    Mutant(
        "contrastive_loss: gradient along the feature",
        "_contrastive_loss_bwd.py",
        "(g - (along * x_inverse)[:, None] * x) * x_inverse",
        "g * x_inverse",
    ),
    Mutant("contrastive_loss: gradient unscaled", "_contrastive_loss_bwd.py", "g *= scale\n", "g *= 1.0\n"),
    Mutant(
        "contrastive_loss: label counted from the first class",
        "_contrastive_loss_common.py",
        "tl.where(good, start + label, -1)",
        "tl.where(good, label, -1)",
    ),
    # cpu/common.h
    Mutant(
        "exponential of bfloat16: log2(e)",
        "cpu/common.h",
        "_mm512_set1_ps(1.44269504088896341f)",
        "_mm512_set1_ps(1.4f)",
    ),
    # cpu/linear.cpp
    Mutant(
        "norm_linear: bias dropped", "cpu/linear.cpp", "if (pb) v = v + read(pb + column + done + i, m);", "(void)pb;"
    ),
    Mutant("norm_linear: stale 1 / std", "cpu/linear.cpp", "rstd[row + r] = s;", "rstd[row + r] = rstd[row];"),
    Mutant(
        "norm_linear: stride between sequences",
        "cpu/linear.cpp",
        "source / length[o] * stride[o] + first[o] + source",
        "source / length[o] * length[o] + first[o] + source",
    ),
    Mutant("norm_linear: slope as value", "cpu/linear.cpp", "inside + i, derivative, m);", "inside + i, value, m);"),
    Mutant("linear: parts of a long sum", "cpu/linear.cpp", "distance, k > 0, a + k", "distance, false, a + k"),
    Mutant("linear: a part's factor", "cpu/linear.cpp", "packed + (j * K + k) * NB", "packed + j * K * NB"),
    Mutant("linear_residual: residual dropped", "cpu/linear.cpp", "if (px) v = v + read(px + at + i, n);", "(void)px;"),
    Mutant("linear_times: slope dropped", "cpu/linear.cpp", " * read(ps + at + i, n), n);", ", n); (void)ps;"),
    Mutant("linear_norm_backward: gradient along h", "cpu/linear.cpp", " - a - h * b);", " - a); (void)h, (void)b;"),
    Mutant("linear_norm_backward: gradient unscaled", "cpu/linear.cpp", "sum(product) * scale", "sum(product)"),
    # cpu/attention.cpp
    Mutant("attention: log of the sum without the peak", "cpu/attention.cpp", "{top + std::log(all)", "{std::log(all)"),
    Mutant(
        "attention: float32 keys' gradient of the last queries",
        "cpu/attention.cpp",
        "multiply(total, K, rows, ds, across, qh, K, dk, K, first > 0)",
        "multiply(total, K, rows, ds, across, qh, K, dk, K, false)",
    ),
    Mutant(
        "attention: float32 gradient of the scores",
        "cpu/attention.cpp",
        "(read(dst, m) - read(delta + i, m))",
        "read(dst, m)",
    ),
    Mutant(
        "attention: bfloat16 gradient of the scores",
        "cpu/attention.cpp",
        "(read(ds + t * across + i, m) - mean)",
        "(read(ds + t * across + i, m) - mean - mean)",
    ),
    Mutant(
        "attention: bfloat16 rows of the block before",
        "cpu/attention.cpp",
        "if (rows < block) {",
        "if (false) {",
    ),
    Mutant(
        "attention: prompts' values' gradient",
        "cpu/attention.cpp",
        "scatter(dv, P, K",
        "scatter(dk, P, K",
        after="void attention_backward_of(\n    const BFloat16*",
    ),
    # cpu/packed_attention.cpp
    Mutant(
        "packed_attention.cpp: a row sees all",
        "cpu/packed_attention.cpp",
        "row, r + 1, p);",
        "row, length, p);",
        after="void forward_of",
    ),
    Mutant(
        "packed_attention.cpp: groups' sum",
        "cpu/packed_attention.cpp",
        "int64_t g = 1; g < GROUPS",
        "int64_t g = 2; g < GROUPS",
    ),
    Mutant(
        "packed_attention.cpp: gradient of the scores",
        "cpu/packed_attention.cpp",
        "(dp[j] - mean)",
        "(dp[j] - 0 * mean)",
    ),
    Mutant(
        "packed_attention.cpp: first class's prompts",
        "cpu/packed_attention.cpp",
        "const int64_t shared = s * P * D + h * K;",
        "const int64_t shared = h * K; (void)s;",
        after="void forward_of",
    ),
)
