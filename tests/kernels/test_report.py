"""Every kernel compiles for every target without a GPU, spills nothing and fits; and the report says so truly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from upt_fast.kernels import _compile, _instructions, _targets, _workloads, report

ROOT = Path(__file__).parents[2]
# tiles were chosen so that no kernel spills with triton 3.8; with the compilers before it some do (docs/kernels.md)
SPILLS = Version(triton.__version__) < Version("3.8")


def run(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in its own process, with the tests' setting of the interpreter."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    env.pop("TRITON_CACHE_DIR", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "upt_fast.kernels.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.slow
def test_all_kernels(tmp_path):
    """The ahead-of-time check of the whole package, in one run because compiling takes a while."""
    done = run("--json", tmp_path / "report.json", "--markdown", tmp_path / "report.md")
    found = json.loads((tmp_path / "report.json").read_text())
    rows, failures = found["rows"], found["failures"]
    if SPILLS:
        failures = [failure for failure in failures if not re.search(r": spills \d+ bytes$", failure)]
    assert failures == [], done.stderr
    assert done.returncode == bool(found["failures"]), done.stderr
    assert found["triton"] == triton.__version__
    assert found["torch"] == torch.__version__
    assert found["targets"].keys() == _targets.TARGETS.keys()

    kernels, shared, files = set(), set(), set()
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        defined = re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", text)
        if re.search(r"^def workloads\(", text, re.MULTILINE):
            files.add(path.name)
            kernels |= {(path.name, name) for name in defined}
        else:
            shared |= set(defined)
    assert "layer_norm.py" in files
    assert {row["file"] for row in rows} == files
    # a kernel that no workload launches would not be checked
    launched = {(row["file"], row["kernel"]) for row in rows}
    assert kernels <= launched
    assert {name for _, name in launched - kernels} == shared
    workloads = {(row["file"], row["kernel"], row["workload"]) for row in rows}
    for target, limits in found["targets"].items():
        own = [row for row in rows if row["target"] == target]
        assert {(row["file"], row["kernel"], row["workload"]) for row in own} == workloads
        for row in own:
            spills = [f"spills {row['spill_bytes']} bytes"] if row["spill_bytes"] else []
            assert row["problems"] == spills
            assert SPILLS or spills == []
            assert 0 <= row["shared_bytes"] <= row["shared_limit"] == limits["shared_limit"]
            assert 0 < row["resident_warps"] <= row["max_warps"]
            assert row["resident_warps"] % row["num_warps"] == 0
            assert 0 < row["registers"] <= _targets.LANE_REGISTERS
            assert row["seconds"] > 0
            if (instructions := row["instructions"]) is None:
                assert target.startswith("gfx")
                continue
            assert instructions["load_bytes"] in (8, 16)
            assert instructions["local"] == row["stack_bytes"] == 0
            assert len(instructions["products"]) >= len(set(instructions["dots"]) & set(_instructions.HALF))
    products = {}
    for row in rows:
        if row["instructions"] is not None and "bf16" in row["instructions"]["dots"]:
            products.setdefault((row["kernel"], row["target"]), set()).update(row["instructions"]["products"])
    assert {kernel for kernel, _ in products} >= {"_linear_act_kernel", "_packed_attention_bwd_kernel"}
    assert "wgmma bf16" in products["_linear_act_kernel", "sm_90"]
    assert "tcgen05 f16" in products["_linear_act_kernel", "sm_100"]
    assert found["compilations"] < len(rows)  # B/16 and L/14 share some

    for text in (done.stdout, (tmp_path / "report.md").read_text()):
        for file, kernel, workload in workloads:
            lines = [line for line in text.splitlines() if {file, kernel} <= set(line.split()) and workload in line]
            assert len(lines) >= len(_targets.TARGETS)
        assert all(heading in text for heading in report.HEADINGS)


BAD_KERNELS = """
import torch
import triton
import triton.language as tl

from upt_fast.kernels._launch import launch


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    x = tl.load(x_ptr + cols)
    y = x / tl.sum(x)
    tl.store(y_ptr + cols, x - tl.sum(y * y))


@triton.jit
def _large_kernel(x_ptr, y_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, cols, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, BLOCK_K)
    y = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(x_ptr + rows * K + k[None, :] + start)
        y = tl.dot(a, tl.load(x_ptr + (k[:, None] + start) * N + cols), y)
    tl.store(y_ptr + rows * N + cols, y)


@triton.jit
def _wrong_kernel(x_ptr, y_ptr):
    tl.store(y_ptr + tl.arange(0, 3), tl.load(x_ptr + tl.arange(0, 3)))


@triton.jit
def _narrow_kernel(x_ptr, y_ptr):
    cols = tl.arange(0, 512)
    tl.store(y_ptr + cols, tl.load(x_ptr + 2 * cols))


@triton.jit
def _good_kernel(x_ptr, y_ptr):
    cols = tl.arange(0, 512)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols))


def workloads():
    x = torch.empty(4096, dtype=torch.float32, device="meta")
    h = torch.empty(128, 128, dtype=torch.float16, device="meta")
    yield "registers", lambda: launch(_spilling_kernel, (1,), x_ptr=x, y_ptr=x, N=16384, num_warps=1)
    tile = {"M": 64, "N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 8}
    yield "memory", lambda: launch(_large_kernel, (1,), x_ptr=h, y_ptr=h, K=1024, **tile)
    yield "shape", lambda: launch(_wrong_kernel, (1,), x_ptr=x, y_ptr=x, num_warps=1)
    yield "loads", lambda: launch(_narrow_kernel, (1,), x_ptr=x, y_ptr=x, num_warps=4)
    for name in ("one", "two"):
        yield name, lambda: launch(_good_kernel, (1,), x_ptr=x, y_ptr=x, num_warps=4)
    yield "empty", lambda: None
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    (path / "bad_kernels.py").write_text(BAD_KERNELS)
    files = ("--json", path / "report.json", "--markdown", path / "report.md")
    done = run("--module", "bad_kernels", "--target", "sm_80", *files, path=path)
    return done, json.loads((path / "report.json").read_text()), (path / "report.md").read_text()


def test_failures_are_named(bad):
    done, found, markdown = bad
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = {row["workload"]: row for row in found["rows"]}
    spilled, shared = rows["registers"]["spill_bytes"], rows["memory"]["shared_bytes"]
    assert spilled > 0
    assert shared > rows["memory"]["shared_limit"] == 163 * 1024
    assert rows["memory"]["resident_warps"] == 0
    for message in (
        f"bad_kernels.py _spilling_kernel sm_80 (registers): spills {spilled} bytes",
        f"bad_kernels.py _large_kernel sm_80 (memory): needs {shared} bytes of shared memory, a block may use 166912",
        "bad_kernels.py _wrong_kernel sm_80 (shape): does not compile: ",
        "bad_kernels.py _narrow_kernel sm_80 (loads): loads 4 bytes at once, and never more",
        "bad_kernels.py empty: RuntimeError: launches no kernel",
    ):
        assert f"failed: {message}" in done.stdout
        assert f"- {message}" in markdown
        assert any(failure.startswith(message) for failure in found["failures"])
    assert "power of 2" in done.stdout
    assert not any("_good_kernel" in failure for failure in found["failures"])


def test_a_kernel_that_does_not_compile_has_no_figures(bad):
    (row,) = (row for row in bad[1]["rows"] if row["kernel"] == "_wrong_kernel")
    assert row["problems"]
    assert {row[name] for name in ("registers", "spill_bytes", "shared_bytes", "resident_warps", "seconds")} == {None}


def test_the_same_compilation_is_made_once(bad):
    one, two = (row for row in bad[1]["rows"] if row["kernel"] == "_good_kernel")
    assert (one["workload"], two["workload"]) == ("one", "two")
    assert one["seconds"] == two["seconds"]
    assert bad[1]["compilations"] == len(bad[1]["rows"]) - 1


def test_a_pattern_without_match():
    done = run("--kernel", "no_such_kernel")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("upt_fast.kernels.report: --kernel no_such_kernel: wanted a part of one of ")
    assert "layer_norm.py _layer_norm_fwd_kernel" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_target(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--target", "sm_90", "sm_12"])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--target" in err
    assert "sm_12" in err
    assert all(name in err for name in _targets.TARGETS)


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--json", str(tmp_path / "none" / "report.json")])
    assert stopped.value.code == 2
    assert f"{tmp_path / 'none'} is not a directory" in capsys.readouterr().err


def test_modules_without_workloads():
    with pytest.raises(_workloads.NothingToCompileError, match="no workloads in json, string"):
        report.compile_workloads(["json", "string"], ["sm_90"], "", 1)


def test_a_module_that_fails_to_import():
    found, failures, _ = _workloads.collect(["no_such_module"], ["sm_90"], "")
    assert found == []
    assert failures == ["no_such_module.py import: ModuleNotFoundError: No module named 'no_such_module'"]
    assert _workloads.collect(["no_such_module"], ["sm_90"], "layer_norm")[1] == []


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_occupancy_of_a_kernel_that_needs_little(warps):
    for name, limit in (("sm_80", 64), ("sm_90", 64), ("sm_100", 64), ("gfx942", 32)):
        held = _targets.TARGETS[name].resident_warps(warps, 32, 0)
        assert held == min(limit, 32 * warps)  # 32 blocks


# in the order of CUDA's occupancy calculator: what limits is registers in all but the last four
@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "held"),
    [
        ("sm_90", 4, 33, 0, 48),
        ("sm_90", 4, 64, 0, 32),
        ("sm_80", 8, 72, 0, 24),
        ("sm_80", 4, 96, 0, 20),
        ("sm_100", 4, 168, 0, 12),
        ("sm_90", 4, 255, 0, 8),
        ("sm_90", 8, 255, 0, 8),
        ("sm_90", 16, 255, 0, 0),
        ("gfx942", 4, 128, 0, 16),
        ("gfx942", 4, 129, 0, 12),
        ("gfx942", 4, 272, 0, 4),
        ("gfx942", 8, 512, 0, 0),
        ("sm_90", 4, 32, 100 * 1024, 8),
        ("sm_80", 4, 32, 81 * 1024, 8),
        ("sm_80", 4, 32, 81 * 1024 + 1, 4),
        ("gfx942", 4, 32, 32 * 1024, 8),
    ],
)
def test_occupancy(target, warps, registers, shared, held):
    assert _targets.TARGETS[target].resident_warps(warps, registers, shared) == held


def test_problems():
    def problems(target: str, **changes: int) -> list[str]:
        kernel = {"num_warps": 4, "registers": 32, "spill_bytes": 0, "sgpr_spills": 0, "shared_bytes": 0}
        return _targets.Resources(**{**kernel, **changes}, seconds=1.0).problems(_targets.TARGETS[target])

    for target, limit in (("sm_80", 163), ("sm_90", 227), ("sm_100", 227), ("gfx942", 64)):
        assert problems(target, shared_bytes=limit * 1024) == []
        (problem,) = problems(target, shared_bytes=limit * 1024 + 1)
        assert "shared memory" in problem
        assert problems(target, spill_bytes=8) == ["spills 8 bytes"]
    assert problems("gfx942", sgpr_spills=9) == []
    assert problems("sm_90", num_warps=32) == []
    assert problems("gfx942", num_warps=32) == ["has 2048 threads a block, at most 1024 can be launched"]
    assert problems("sm_90", num_warps=16, registers=255) == ["16 warps of 255 registers do not fit"]


def test_read_ptxas():
    log = """ptxas info    : Compiling entry function '_kernel' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 616 bytes cmem[0]"""
    assert _compile.read_ptxas(log) == (168, 20, 0)
    assert _compile.read_ptxas(log.replace(" 0 bytes stack", " 24 bytes stack")) == (168, 20, 0)  # the spills'
    log = re.sub(r"\d+ bytes spill", "0 bytes spill", log.replace(" 0 bytes stack", " 24 bytes stack"))
    assert _compile.read_ptxas(log) == (168, 0, 24)
    with pytest.raises(RuntimeError, match="ptxas told no registers or spills: nothing"):
        _compile.read_ptxas("")


DOT = (
    "%s = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32x{0}> * tensor<32x64x{0}> -> tensor<64x64xf32> loc(#1)"
)
VECTOR = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];"


@pytest.mark.parametrize(
    ("dtype", "ptx", "products", "problems"),
    [
        ("bf16", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }", ["mma bf16"], []),
        ("bf16", "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {", ["wgmma bf16"], []),
        ("bf16", "tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd2", ["tcgen05 f16"], []),
        ("f16", "tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd2", ["tcgen05 f16"], []),
        ("f32", "fma.rn.f32 %f1, %f2, %f3, %f4;", [], []),
        ("f32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {", ["mma tf32"], []),
        ("f16", "fma.rn.f32 %f1, %f2, %f3, %f4;", [], ["multiplies f16 without a matrix instruction"]),
        (
            "bf16",
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {",
            ["mma tf32"],
            ["multiplies bf16 without a matrix instruction"],
        ),
        (
            "f32",
            "st.local.b32 [%rd3], %r1; ld.local.b32 %r1, [%rd3];",
            [],
            ["has 2 loads and stores of memory of its own"],
        ),
    ],
)
def test_instructions(dtype, ptx, products, problems):
    found = _instructions.read_instructions(DOT.format(dtype), f"{VECTOR}\n{ptx}")
    assert found.dots == (dtype,)
    assert list(found.products) == products
    assert found.load_bytes == 16
    assert found.problems == problems


@pytest.mark.parametrize(
    ("ptx", "width", "fine"),
    [
        ("ld.global.b32 { %r1 }, [ %rd1 + 0 ];", 4, False),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];\nld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", 8, True),
        ("ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16, True),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16, True),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4;", 4, False),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", 0, True),
    ],
)
def test_widths_of_loads(ptx, width, fine):
    found = _instructions.read_instructions("", ptx)
    assert found.load_bytes == width
    assert (found.problems == []) == fine


@pytest.mark.parametrize(
    ("vgpr", "sgpr", "private", "spilled"), [(0, 0, 0, 0), (0, 0, 64, 0), (3, 0, 16, 12), (0, 9, 0, 0), (0, 9, 40, 40)]
)
def test_read_amdgcn(vgpr, sgpr, private, spilled):
    assembly = f"""
amdhsa.kernels:
  - .agpr_count:     16
    .group_segment_fixed_size: 128
    .private_segment_fixed_size: {private}
    .sgpr_count:     106
    .sgpr_spill_count: {sgpr}
    .vgpr_count:     272
    .vgpr_spill_count: {vgpr}
"""
    assert _compile.read_amdgcn(assembly) == (272, spilled, sgpr, 128)
    with pytest.raises(RuntimeError, match=r"no \.vgpr_count"):
        _compile.read_amdgcn(assembly.replace(".vgpr_count", ".vgprs"))


def test_a_compiler_that_dies_takes_one_kernel(monkeypatch):
    def compile_kernel(compilation: _compile.Compilation) -> _targets.Resources:
        if compilation.target == "sm_90":
            os._exit(6)
        if compilation.target == "sm_100":
            raise ValueError("for a test")
        return _targets.Resources(4, 32, 0, 0, 0, 1.0)

    monkeypatch.setattr(_compile, "compile_kernel", compile_kernel)
    compilations = [_compile.Compilation(None, {}, {}, {}, {}, target) for target in _targets.TARGETS]
    found = dict(zip(_targets.TARGETS, _compile.compile_all(compilations, 2), strict=True))
    assert found.pop("sm_90") == "does not compile: the compiler died"
    assert found.pop("sm_100") == "does not compile: ValueError: for a test"
    assert set(found.values()) == {_targets.Resources(4, 32, 0, 0, 0, 1.0)}


def arguments_of_many_kinds(
    x_ptr, y_ptr, half_ptr, brain_ptr, double_ptr, index_ptr, int_ptr, byte_ptr, bool_ptr, nothing,
    zero, one, two, sixteen, large, huge, negative, wide: tl.int64, eps, flag, plain, HAS_X: tl.constexpr,
    BLOCK: tl.constexpr = 64,
):  # fmt: skip
    pass


@pytest.mark.parametrize("target", _targets.TARGETS)
def test_specialisation_is_tritons_own(target):
    """On real tensors, for alignment and storage size are what Triton looks at."""
    kernel = JITFunction(arguments_of_many_kinds, do_not_specialize=["plain"])
    x = torch.zeros(64)
    tensors = {"x_ptr": x, "y_ptr": x[1:], "half_ptr": x.half(), "brain_ptr": x.bfloat16(), "double_ptr": x.double()}
    tensors |= {"index_ptr": x.long(), "int_ptr": x.int(), "byte_ptr": x.byte(), "bool_ptr": x.bool(), "nothing": None}
    numbers = {"zero": 0, "one": 1, "two": 2, "sixteen": 48, "large": 2**31, "huge": 2**63, "negative": -(2**31)}
    numbers |= {"wide": 32, "eps": 1e-5, "flag": True, "plain": 16, "HAS_X": False}
    chosen = _targets.TARGETS[target]
    backend = make_backend(GPUTarget(chosen.backend, chosen.arch, chosen.warp_size))
    assert x.data_ptr() % 16 == 0
    _, expected, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**tensors, **numbers)

    signature, constants, attributes = _compile.specialise(kernel, {**tensors, **numbers}, chosen.backend)
    assert list(signature) == kernel.arg_names
    assert list(signature.values()) == [kind for kind, _ in expected]
    assert constants == {"nothing": None, "one": 1, "HAS_X": False, "BLOCK": 64}
    hints = {(n,): backend.parse_attr(text) for n, (_, text) in enumerate(expected) if isinstance(text, str)}
    assert attributes == {n: found for n, found in hints.items() if found}


def test_tensors_beyond_two_gib_are_not_read_through_buffers():
    kernel = JITFunction(arguments_of_many_kinds)
    rest = dict.fromkeys(kernel.arg_names[1:], 2)
    for numbers, hints in ((2**29 - 1, ["tt.divisibility", "tt.pointer_range"]), (2**29, ["tt.divisibility"])):
        x = torch.empty(numbers, device="meta")
        attributes = _compile.specialise(kernel, {"x_ptr": x, **rest}, "hip")[2]
        assert [name for name, _ in attributes[0,]] == hints


def test_arguments_that_do_not_fit():
    kernel = JITFunction(arguments_of_many_kinds)
    given = dict.fromkeys(kernel.arg_names, 2)
    with pytest.raises(TypeError, match="missing a required argument: 'x_ptr'"):
        _compile.specialise(kernel, {"y_ptr": 2}, "cuda")
    with pytest.raises(TypeError, match="unexpected keyword argument 'z_ptr'"):
        _compile.specialise(kernel, {**given, "z_ptr": 2}, "cuda")
    with pytest.raises(TypeError, match="x_ptr: tensor of complex64"):
        _compile.specialise(kernel, {**given, "x_ptr": torch.empty(1, dtype=torch.complex64)}, "cuda")
    with pytest.raises(TypeError, match="eps: str"):
        _compile.specialise(kernel, {**given, "eps": "1e-5"}, "cuda")
