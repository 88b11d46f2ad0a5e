"""``upt-fast verify``: the reference and FastUPT against recorded vectors, outputs and every gradient.

A directory of vectors holds, per method, ``<name>.safetensors`` with its ``<name>.json`` and the CLIP weights the JSON
names as ``clip_file``:

* ``images`` (B, 3, R, R), ``labels`` (B,), ``tokenized_prompts`` (C, T),
* ``param.<name>``: trainable values, named as in the prompt learner's state dict,
* ``out.logits``, ``out.image_features``, ``out.text_features`` (L2-normalised), ``out.loss``: float64 results,
* ``grad.<name>``: float64 gradients of the loss, ``mid.*``: the prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upt_fast.clip.tokens import ClassTokens
from upt_fast.config import UPTConfig, require_choice
from upt_fast.files import load_safetensors
from upt_fast.model import FastUPT, make_config
from upt_fast.reference import ReferenceUPT
from upt_fast.testing import golden_clip, max_error, relative_rms

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# largest error taken; half precision is measured against the reference's own error instead
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}
HALF_FACTOR = 1.5


@dataclasses.dataclass(frozen=True)
class Errors:
    """Largest errors of one implementation on one file.

    In single and double precision the largest entry: of logits, features and loss relative to the larger of 1 and the
    largest entry of each; of all gradients relative to the largest gradient entry of the file. In half precision, where
    one entry says little, the relative root mean square: of the logits and features together, and of all gradients.
    """

    outputs: float
    gradients: float

    @property
    def worst(self) -> float:
        return max(self.outputs, self.gradients)

    def __str__(self) -> str:
        return f"outputs {self.outputs:.1e} gradients {self.gradients:.1e}"


def upt_released(sidecar: dict[str, Any], tensors: dict[str, Tensor]) -> UPTConfig:
    """Options of a file made by the released UPT code."""
    options = sidecar.get("options", {})
    count = tensors["param.uni_ctx"].shape[1]
    n_text = len(tensors["mid.text_ctx"]) if "mid.text_ctx" in tensors else count // 2
    position = options.get("CLASS_TOKEN_POSITION", "end")
    return UPTConfig(preset="released", n_text=n_text, n_visual=count - n_text, class_token_position=position)


def upt_paper(sidecar: dict[str, Any], tensors: dict[str, Tensor]) -> UPTConfig:
    """Options of a file of the preset "paper": named as UPTConfig's fields."""
    return make_config(None, {"preset": "paper", **sidecar.get("options", {})})


METHODS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], UPTConfig]] = {
    "upt": upt_released,
    "upt_paper": upt_paper,
}
MID_NAMES = {"upt": ("text_ctx", "visual_ctx"), "upt_paper": ("text_prompts", "visual_prompts")}


def run_verify(directory: Path | None, device: str = "cpu", dtype: str = "float64", backend: str = "auto") -> int:
    """Check every file of a directory whose method is supported, print a line for each and a summary.

    Args:
        directory: of vectors; None: the small set in the package.
        device: "cpu", "cuda", ...
        dtype: "float64" (errors up to 1e-9 are taken), "float32" (1e-4), "float16" or "bfloat16" (FastUPT's error over
            all files up to 1.5 times the reference's).
        backend: of FastUPT.
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
        if sidecar["method"] not in METHODS:
            skipped.append(f"{path.stem} ({sidecar['method']})")
            continue
        found = _verify_file(path, sidecar, device, dtype, backend)
        ok = not isinstance(found, str) and (
            dtype not in TOLERANCES or all(error.worst <= TOLERANCES[dtype] for error in found.values())
        )
        passed, failed = passed + ok, failed + (not ok)
        line = found if isinstance(found, str) else "   ".join(f"{name}: {error}" for name, error in found.items())
        print(f"{path.stem:<24} {'ok  ' if ok else 'FAIL'}  {line}", flush=True)
        if not isinstance(found, str):
            measured.append(found)
    if dtype not in TOLERANCES and measured:
        # one small file's ratio is chance; all files together are judged
        reference, fast = (_pool([errors[name] for errors in measured]) for name in ("reference", "fast"))
        ok = fast.outputs <= HALF_FACTOR * reference.outputs and fast.gradients <= HALF_FACTOR * reference.gradients
        failed += not ok
        print(f"{'all files':<24} {'ok  ' if ok else 'FAIL'}  reference: {reference}   fast: {fast}")
    if skipped:
        print(f"skipped, methods not supported: {', '.join(skipped)}")
    print(f"{passed} passed, {failed} failed, {len(skipped)} skipped")
    if passed + failed == 0:
        raise ValueError(f"no vectors of a supported method in {folder}; supported: {', '.join(METHODS)}")
    return 1 if failed else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _verify_file(path: Path, sidecar: dict[str, Any], device: str, dtype: str, backend: str) -> dict[str, Errors] | str:
    """Errors of the reference and of FastUPT, or what kept them from being measured."""
    tensors, _ = load_safetensors(path.with_suffix(".safetensors"))
    config = METHODS[sidecar["method"]](sidecar, tensors)
    clip = golden_clip(path.parent / sidecar["clip_file"], DTYPES[dtype]).to(device)
    names = sidecar["classnames"]
    models: dict[str, Any] = {
        "reference": ReferenceUPT(clip, names, config=config),
        "fast": FastUPT(clip, names, config=config, backend=backend),
    }
    problem = _token_problem(models["reference"].tokens, tensors["tokenized_prompts"], config)
    if problem:
        return problem
    errors = {}
    for name, model in models.items():
        model.eval().load_state_dict(_state(tensors, model))
        errors[name] = measure(model, tensors, sidecar["method"], rms=dtype not in TOLERANCES)
    return errors


def _pool(errors: list[Errors]) -> Errors:
    """Root mean square of several files' errors."""
    return Errors(
        (sum(e.outputs**2 for e in errors) / len(errors)) ** 0.5,
        (sum(e.gradients**2 for e in errors) / len(errors)) ** 0.5,
    )


def _state(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    dtype = next(model.parameters()).dtype
    return {f"prompt_learner.{n[6:]}": t.to(dtype) for n, t in tensors.items() if n.startswith("param.")}


def _token_problem(tokens: ClassTokens, wanted: Tensor, config: UPTConfig) -> str | None:
    """What differs between the tokenizer's ids and the recorded ones, the prompts' placeholders aside."""
    keep = torch.ones(wanted.shape[1], dtype=torch.bool)
    keep[1 : 1 + config.n_text] = False
    if tokens.ids.shape == wanted.shape and torch.equal(tokens.ids[:, keep], wanted[:, keep]):
        return None
    return (
        f"the tokenizer gave other ids than the recorded ones (shape {tuple(tokens.ids.shape)}, {tuple(wanted.shape)})"
    )


def measure(model: FastUPT | ReferenceUPT, tensors: dict[str, Tensor], method: str, rms: bool = False) -> Errors:
    """Run a model with its parameters loaded on a file's images and compare everything the file holds."""
    parameter = next(model.parameters())
    images = tensors["images"].to(parameter)
    logits = model(images)
    loss = F.cross_entropy(logits.to(parameter.dtype), tensors["labels"].to(parameter.device))
    loss.backward()
    with torch.no_grad():
        text, visual = model.prompt_learner()
        results = {
            "out.logits": logits,
            "out.loss": loss,
            "out.image_features": model.encode_image(images),
            "out.text_features": model.encode_text(),
            f"mid.{MID_NAMES[method][0]}": text,
            f"mid.{MID_NAMES[method][1]}": visual,
        }
    pairs = {name: _align(got.detach(), tensors[name]) for name, got in results.items() if name in tensors}
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.prompt_learner.named_parameters()
    }
    wanted = {n[5:]: t for n, t in tensors.items() if n.startswith("grad.")}
    if gradients.keys() != wanted.keys() or any(got.shape != t.shape for got, t in pairs.values()):
        return Errors(float("inf"), float("inf"))
    if any(gradients[n].shape != t.shape for n, t in wanted.items()):
        return Errors(float("inf"), float("inf"))
    got_flat, wanted_flat = (
        torch.cat([g[n].double().cpu().flatten() for n in sorted(wanted)]) for g in (gradients, wanted)
    )
    if rms:
        # each output counts alike; the loss, one number, follows from the logits
        squares = [relative_rms(*pair) ** 2 for name, pair in pairs.items() if name != "out.loss"]
        return Errors((sum(squares) / len(squares)) ** 0.5, relative_rms(got_flat, wanted_flat))
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
