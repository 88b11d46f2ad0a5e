"""``upt-fast verify``: the reference and the engine against recorded vectors, outputs and every gradient.

A directory of vectors holds, per file, ``<name>.safetensors`` with its ``<name>.json`` and the CLIP weights the JSON
names as ``clip_file``:

* ``images`` (B, 3, R, R), ``labels`` (B,), ``tokenized_prompts`` (C, T),
* ``param.<name>``: trainable values, named as in the state dict, with or without ``prompt_learner.``,
* ``out.logits``, ``out.image_features``, ``out.text_features`` (L2-normalised), ``out.loss``: float64 results,
* ``grad.<name>``: float64 gradients of the loss, ``mid.*``: the prompts,
* ``half.out.*`` and ``half.grad.*``: the same with prompts rounded to float16 (half_prompts); compared in float64.

The JSON's ``method`` says which method, its ``options`` are the fields of the method's config, or those of the
released code in capitals, and its ``templates`` the fixed texts of methods that have them.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upt_fast.common.checks import require_choice
from upt_fast.common.closeness import RoundingErrors, max_error, relative_rms
from upt_fast.common.files import load_safetensors
from upt_fast.engine import fp8
from upt_fast.methods import find_recorded, list_methods
from upt_fast.model import FastPromptedCLIP
from upt_fast.reference import ReferencePromptedCLIP
from upt_fast.reference.zeroshot import ReferenceZeroShot
from upt_fast.testing import golden_clip

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": fp8.DTYPE,
}
# largest error taken; half precision and fp8 are measured against what rounding does to the reference instead
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}
HALF_FACTOR = 1.5
FP8_FACTOR = 16.0  # see run_verify
Model = FastPromptedCLIP | ReferencePromptedCLIP


@dataclasses.dataclass(frozen=True)
class Errors:
    """Largest errors of one implementation on one file.

    In single and double precision the largest entry: of logits, features and loss relative to the larger of 1 and the
    largest entry of each; of all gradients relative to the largest gradient entry of the file. In half precision and in
    fp8, where one entry says little, the relative root mean square: of the logits and features together, and of all
    gradients.
    """

    outputs: float
    gradients: float

    @property
    def worst(self) -> float:
        return max(self.outputs, self.gradients)

    def worse(self, other: Errors) -> Errors:
        """The larger of each."""
        return Errors(max(self.outputs, other.outputs), max(self.gradients, other.gradients))

    def within(self, factor: float, other: Errors) -> bool:
        """Whether each is finite and at most factor times the other's."""
        limits = factor * other.outputs, factor * other.gradients
        return self.worst < float("inf") and self.outputs <= limits[0] and self.gradients <= limits[1]

    def over(self, other: Errors) -> str:
        """Each over the other's, in words; a dash where that is zero."""
        pairs = (self.outputs, other.outputs), (self.gradients, other.gradients)
        return " ".join(f"{mine / theirs:.1f}" if theirs else "-" for mine, theirs in pairs)

    def __str__(self) -> str:
        return f"outputs {self.outputs:.1e} gradients {self.gradients:.1e}"


def method_of(sidecar: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]] | None:
    """The method of a file and its options, or None where the method is not known.

    Args:
        sidecar: the file's JSON.
        tensors: its tensors; the released UPT's prompt counts are read off them.
    """
    method = find_recorded(sidecar["method"])
    if method is None:
        return None
    given = sidecar.get("options", {})
    theirs = method.release.options if method.release is not None else {}
    options = {theirs.get(key, key): value for key, value in given.items() if key in theirs or not key.isupper()}
    if sidecar.get("templates") and any(f.name == "templates" for f in dataclasses.fields(method.config)):
        options["templates"] = sidecar["templates"]
    if method.recorded_options is not None:
        options |= method.recorded_options(sidecar["method"], options, tensors)
    return method.name, options


def run_verify(directory: Path | None, device: str = "cpu", dtype: str = "float64", backend: str = "auto") -> int:
    """Check every file of a directory whose method is supported, print a line for each and a summary.

    What half precision does to the few numbers of a small file is chance, and hangs on the processor's order of sums.
    So the reference is also computed in float64 with random rounding errors in it (common/closeness.py), the same ones
    on every machine: those errors are what an honest computation has.

    fp8 (engine/fp8.py) is no exact mode: its errors are reported, with their ratio to the reference's by rounding to
    bfloat16, and only a ratio beyond 16 over all files fails. That is the largest to be had by rounding: e4m3 rounds to
    4 significant bits, off by at most 2^-4, bfloat16 to 8, off by at most 2^-8; both factors of a product are rounded,
    and both are in the reference too, since it holds its weights and every product's input in bfloat16. So each error
    in fp8 has one in the reference, 16 times as small, that passes through the same layers. Errors add up in
    proportion, to first order, and as random numbers do; the reference has others besides (sums, residuals, softmax),
    so ratios lie below 16. A scale off by two is an error as large as the numbers themselves: more than 17 times the
    reference's on the package's vectors. What is wrong by less is found by the tests of the products, not here.

    Args:
        directory: of vectors; None: the small set in the package.
        device: "cpu", "cuda", ...
        dtype: "float64" (errors up to 1e-9 are taken), "float32" (1e-4), "float16" or "bfloat16" (the engine's error
            over all files up to 1.5 times the reference's, or what rounding does to that), or "fp8" (up to 16 times
            what rounding to bfloat16 does).
        backend: of the engine.
    Returns:
        0, or 1 where an error was too large.
    Raises:
        ValueError: bad option, or no vectors there.
    """
    require_choice("dtype", dtype, tuple(DTYPES))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    folder = Path(str(resources.files("upt_fast"))) / "vectors" if directory is None else Path(directory)
    if not folder.is_dir():
        raise ValueError(f"no directory {folder}")
    sidecars = {}
    for path in sorted(folder.glob("*.json")):
        sidecar = _read_json(path)
        if "method" in sidecar and "clip_file" in sidecar:
            sidecars[path] = sidecar
    if not sidecars:
        raise ValueError(
            f"no vectors in {folder}: wanted <name>.json with 'method' and 'clip_file', and <name>.safetensors"
        )

    print(f"vectors in {folder}, {dtype} on {device}")
    passed, failed, skipped = 0, 0, []
    measured: list[dict[str, Errors]] = []
    for path, sidecar in sidecars.items():
        found = _verify_file(path, sidecar, device, dtype, backend)
        if found is None:
            skipped.append(f"{path.stem} ({sidecar['method']})")
            continue
        ok = not isinstance(found, str) and (
            dtype not in TOLERANCES or all(error.worst <= TOLERANCES[dtype] for error in found.values())
        )
        passed, failed = passed + ok, failed + (not ok)
        print(f"{path.stem:<24} {'ok  ' if ok else 'FAIL'}  {_line(found, dtype)}", flush=True)
        if not isinstance(found, str):
            measured.append(found)
    if dtype not in TOLERANCES and measured:
        # one small file's ratio is chance; all files together are judged
        pooled = {name: _pool([errors[name] for errors in measured]) for name in measured[0]}
        allowed = pooled["rounding"] if dtype == "fp8" else pooled["rounding"].worse(pooled["reference"])
        ok = pooled["fast"].within(FP8_FACTOR if dtype == "fp8" else HALF_FACTOR, allowed)
        failed += not ok
        print(f"{'all files':<24} {'ok  ' if ok else 'FAIL'}  {_line(pooled, dtype)}")
    if skipped:
        print(f"skipped, methods not supported: {', '.join(skipped)}")
    print(f"{passed} passed, {failed} failed, {len(skipped)} skipped")
    if passed + failed == 0:
        raise ValueError(f"no vectors of a supported method in {folder}; supported: {', '.join(list_methods())}")
    return 1 if failed else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _verify_file(
    path: Path, sidecar: dict[str, Any], device: str, dtype: str, backend: str
) -> dict[str, Errors] | str | None:
    """Errors of the reference and of the engine, or what kept them from being measured; None: an unknown method."""
    tensors, _ = load_safetensors(path.with_suffix(".safetensors"))
    known = method_of(sidecar, tensors)
    if known is None:
        return None
    method, options = known
    file = path.parent / sidecar["clip_file"]
    # fp8 is quantised from float32, and compared with the reference in the dtype of its rows
    clip = golden_clip(file, fp8.ROWS if dtype == "fp8" else DTYPES[dtype]).to(device)
    fast_clip = golden_clip(file, torch.float32).to(device) if dtype == "fp8" else clip
    rms = dtype not in TOLERANCES
    errors: dict[str, Errors] = {}
    # rounding to float16 is compared in float64 alone: near a tie a smaller precision rounds to the other side
    kinds = (
        {"": {}, "half.": {"half_prompts": True}} if "half.out.logits" in tensors and dtype == "float64" else {"": {}}
    )
    for kind, more in kinds.items():
        arguments: dict[str, Any] = {"method": method, **options, **more}
        reference = ReferencePromptedCLIP(clip, sidecar["classnames"], **arguments)
        if problem := _token_problem(reference, tensors["tokenized_prompts"]):
            return problem
        fast = FastPromptedCLIP(fast_clip, sidecar["classnames"], dtype=DTYPES[dtype], backend=backend, **arguments)
        models: dict[str, Model] = {"reference": reference, "fast": fast}
        for name, model in models.items():
            model.eval().load_state_dict(_state(tensors, model))
            error = measure(model, tensors, kind, rms, device)
            errors[name] = error if name not in errors else errors[name].worse(error)
    if rms:
        rows = fp8.ROWS if dtype == "fp8" else DTYPES[dtype]
        errors["rounding"] = _rounding(
            file, sidecar["classnames"], {"method": method, **options}, tensors, rows, device
        )
    return errors


def _rounding(
    file: Path,
    classnames: list[str],
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    device: str,
) -> Errors:
    """Errors that rounding to a dtype leads to be expected of the reference, its weights in that dtype."""
    clip = golden_clip(file, dtype).to(device).double()
    model = ReferencePromptedCLIP(clip, classnames, **arguments).eval().double()
    model.load_state_dict(_state(tensors, model))
    with RoundingErrors(dtype, seed=0):  # the same on every machine
        return measure(model, tensors, rms=True, device=device)


def _line(found: dict[str, Errors] | str, dtype: str) -> str:
    """What :func:`_verify_file` found, in words."""
    if isinstance(found, str):
        return found
    if dtype != "fp8":
        return "   ".join(f"{name}: {error}" for name, error in found.items())
    rounding, fast = found["rounding"], found["fast"]
    return f"rounding (bfloat16): {rounding}   fast (fp8): {fast}   ratio {fast.over(rounding)}"


def _pool(errors: list[Errors]) -> Errors:
    """Root mean square of several files' errors."""
    return Errors(
        (sum(e.outputs**2 for e in errors) / len(errors)) ** 0.5,
        (sum(e.gradients**2 for e in errors) / len(errors)) ** 0.5,
    )


def _state(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """A file's parameters under the model's names."""
    own = model.state_dict()
    values = {n[6:]: t for n, t in tensors.items() if n.startswith("param.")}
    return {name: values.get(name, values.get(_short(name), t)).to(t) for name, t in own.items()}


def _short(name: str) -> str:
    return name.removeprefix("prompt_learner.")


def _token_problem(model: ReferencePromptedCLIP, wanted: Tensor) -> str | None:
    """What differs between the tokenizer's ids and the recorded ones, the prompts' placeholders aside."""
    if isinstance(model, ReferenceZeroShot):
        got = torch.stack([tokens.ids for tokens in model.template_tokens])
        wanted = wanted if wanted.ndim == 3 else wanted[None]
    else:
        got = model.tokens.ids
    keep = torch.ones(wanted.shape[-1], dtype=torch.bool)
    keep[1 : 1 + model.n_text] = False
    if got.shape == wanted.shape and torch.equal(got[..., keep], wanted[..., keep]):
        return None
    return f"the tokenizer gave other ids than the recorded ones (shape {tuple(got.shape)}, {tuple(wanted.shape)})"


def measure(model: Model, tensors: dict[str, Tensor], kind: str = "", rms: bool = False, device: str = "cpu") -> Errors:
    """Run a model with its parameters loaded on a file's images and compare everything the file holds.

    Args:
        model: with the file's parameters.
        tensors: the file's.
        kind: "" or "half.", which of the recorded results.
        rms: measure errors as in half precision.
        device: the model's.
    """
    wanted = {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith((f"{kind}out.", f"{kind}grad."))}
    if not kind:
        wanted |= {n: t for n, t in tensors.items() if n.startswith("mid.")}
    images, labels = (tensors[name].to(device) for name in ("images", "labels"))
    loss, logits = model.loss_and_logits(images, labels)
    if loss.requires_grad:
        loss.backward()
    with torch.no_grad():
        results = {
            "out.logits": logits,
            "out.loss": loss,
            "out.image_features": model.encode_image(images),
            "out.text_features": model.encode_text(images=images),
            **{f"mid.{name}": prompts for name, prompts in model.prompts(images).items()},
        }
    pairs = {name: _align(got.detach(), wanted[name]) for name, got in results.items() if name in wanted}
    # by the names of the state dict, which are those of the files
    parameters = {_short(n): p for n, p in model.state_dict(keep_vars=True).items()}
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    model.zero_grad(set_to_none=True)
    expected = {_short(n[5:]): t for n, t in wanted.items() if n.startswith("grad.")}
    missing = [n for n in wanted if n.startswith("out.") and n not in pairs]
    if gradients.keys() != expected.keys() or missing or any(got.shape != t.shape for got, t in pairs.values()):
        return Errors(float("inf"), float("inf"))
    if any(gradients[n].shape != t.shape for n, t in expected.items()):
        return Errors(float("inf"), float("inf"))
    got_flat, wanted_flat = (
        torch.cat([torch.zeros(0, dtype=torch.float64), *(g[n].double().cpu().flatten() for n in sorted(expected))])
        for g in (gradients, expected)
    )
    if rms:
        # each output counts alike; the loss, one number, follows from the logits
        squares = [relative_rms(*pair) ** 2 for name, pair in pairs.items() if name != "out.loss"]
        return Errors((sum(squares) / len(squares)) ** 0.5, relative_rms(got_flat, wanted_flat))
    gradient_error = 0.0
    if expected:
        gradient_error = float((got_flat - wanted_flat).abs().max()) / (float(wanted_flat.abs().max()) or 1.0)
    return Errors(max(max_error(*pair) for pair in pairs.values()), _inf_if_nan(gradient_error))


def _align(got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts without their leading dimensions of one set or layer; recorded ones cut to the layers the tower uses."""
    while got.ndim > wanted.ndim and got.shape[0] == 1:
        got = got[0]
    if got.ndim == wanted.ndim > 1 and len(got) < len(wanted):
        wanted = wanted[: len(got)]
    return got, wanted


def _inf_if_nan(value: float) -> float:
    return float("inf") if value != value else value
