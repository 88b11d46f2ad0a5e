"""Which method a released checkpoint is of, and what its shapes tell of the options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upt_fast.common.messages import shorten
from upt_fast.methods import find_method
from upt_fast.released.file import RELEASES, ReleasedCheckpoint

TEXT_LAYER, VISION_LAYER = (f"{tower}_encoder.transformer.resblocks." for tower in ("text", "image"))


def describe_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def choose_method(found: ReleasedCheckpoint, given: str | None, vision_layers: int) -> str:
    """The method of a file; a ValueError if there is none, or several and none is given."""
    if given is not None and given not in RELEASES:
        name = find_method(given).name  # says so if there is none
        raise ValueError(f"method={name!r} has no released checkpoints; wanted one of {', '.join(RELEASES)}")
    possible = possible_methods(found, vision_layers)
    keys = f"its trained tensors are {shorten(sorted(found.trained)) or 'none'}"
    if not possible:
        raise ValueError(f"no method of {', '.join(RELEASES)} has such parameters: {keys}")
    if given is not None:
        if given not in possible:
            raise ValueError(f"method={given!r} was given; the file is of {' or '.join(possible)}: {keys}")
        return given
    if len(possible) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.trained.items())
        raise ValueError(f"{shapes} can be {' or '.join(possible)}: say which by method (--method {possible[0]})")
    return possible[0]


def possible_methods(found: ReleasedCheckpoint, vision_layers: int) -> list[str]:
    """Methods that a file's names and shapes allow, for an image tower of so many layers."""
    trained = found.trained
    parts = {name.partition(".")[0] for name in trained}
    if "uni_ctx" in trained:
        return ["upt"]
    if "meta_net" in parts:
        return ["cocoop"]
    if parts & {"proj", "compound_prompts_text", "compound_prompt_projections"}:
        return ["maple"]
    if "visual_ctx" in trained and "ctx" not in trained:
        rows = len(trained["visual_ctx"]) if trained["visual_ctx"].ndim else 0
        deep = rows > 0 and rows % 12 == 0 and rows % vision_layers == 0 and "mlp" not in parts
        return ["vpt_deep", "vpt_shallow"] if deep else ["vpt_shallow"]
    if any(name.startswith(TEXT_LAYER) for name in trained) or ("ctx" in trained and "image_encoder" in parts):
        return ["ivlp"]
    if "image_encoder" in parts:
        return ["mvpt"]
    if "ctx" in trained and "visual_ctx" not in trained:
        return ["coop", "ivlp"] if found.whole and trained["ctx"].ndim == 2 else ["coop"]
    return []


def infer_options(
    method: str,
    trained: Mapping[str, Tensor],
    given: Mapping[str, Any],
    tokens: Mapping[str, Tensor] | None = None,
    context_length: int = 77,
) -> dict[str, Any]:
    """The options that shapes tell.

    Args:
        method: one of RELEASES.
        trained: tensors by their names without ``prompt_learner.``.
        given: options that the user gave; one that is None counts as not given.
        tokens: the file's token buffers.
        context_length: T of the text tower.
    Raises:
        ValueError: a given option contradicts a shape, or a tensor has another number of dimensions.
    """

    def rows(name: str, dimensions: tuple[int, ...] = (2,)) -> int:
        if name not in trained:
            raise ValueError(f"{name} is missing; its trained tensors are {shorten(sorted(trained)) or 'none'}")
        if trained[name].ndim not in dimensions:
            raise ValueError(f"{name} is {tuple(trained[name].shape)}; wanted {' or '.join(map(str, dimensions))} axes")
        return trained[name].shape[-2]

    found: dict[str, Any]
    if method == "upt":
        found = _infer_upt(trained["uni_ctx"], given, tokens or {}, context_length)
    elif method == "coop":
        found = {"n_ctx": rows("ctx", (2, 3)), "class_specific": trained["ctx"].ndim == 3}
    elif method == "cocoop":
        found = {"n_ctx": rows("ctx")}
    elif method == "vpt_shallow":
        found = {"n_ctx": rows("visual_ctx")}
    elif method == "vpt_deep":
        found = {"n_ctx": rows("visual_ctx") // 12}
    elif method == "maple":
        found = {"n_ctx": rows("ctx"), "depth": 2 + _last_index(trained, "compound_prompts_text.", -1)}
    elif method == "ivlp":
        found = {"n_text": rows("ctx"), "depth_text": 1 + _last_index(trained, TEXT_LAYER, 0), "depth_vision": 0}
        if any(name.startswith("image_encoder.") for name in trained):
            found |= {"n_visual": rows("image_encoder.VPT"), "depth_vision": 1 + _last_index(trained, VISION_LAYER, 0)}
    else:
        found = {"n_ctx": rows("image_encoder.VPT"), "depth": 1 + _last_index(trained, VISION_LAYER, 0)}
    for name, value in found.items():
        if given.get(name) is not None and given[name] != value:
            raise ValueError(f"{name}={given[name]!r}; the file's shapes say {value!r}: leave {name} out")
    return found


def _last_index(trained: Mapping[str, Tensor], start: str, none: int) -> int:
    numbers = [name.removeprefix(start).partition(".")[0] for name in trained if name.startswith(start)]
    return max((int(number) for number in numbers if number.isdecimal()), default=none)


def _infer_upt(
    prompts: Tensor, given: Mapping[str, Any], tokens: Mapping[str, Tensor], context_length: int
) -> dict[str, Any]:
    """uni_ctx (1, 2n, d) is the release's; (D, n_text + n_visual, d) with D > 1 the paper's with D prompted layers."""
    shape = tuple(prompts.shape)
    if prompts.ndim != 3 or shape[1] < 2:
        raise ValueError(f"uni_ctx is {shape}; wanted (1, 2n, d), or (depth, n_text + n_visual, d)")
    layers, count = shape[:2]
    if layers > 1 and tokens:
        raise ValueError(
            f"uni_ctx is {shape} beside token buffers: prompts of each class's own, which only forks of the release "
            "have; wanted (1, 2n, d)"
        )
    preset = "paper" if layers > 1 else given.get("preset") or "released"
    suffix = tokens.get("token_suffix")
    if given.get("n_text") is not None:
        n_text = given["n_text"]
    elif given.get("n_visual") is not None:
        n_text = count - given["n_visual"]
    elif suffix is not None and suffix.ndim == 3:
        n_text = context_length - 1 - suffix.shape[1]
    elif count % 2:
        raise ValueError(
            f"uni_ctx is {shape}: {count} prompts are no equal halves; say how many are the text's: n_text"
        )
    else:
        n_text = count // 2
    if not isinstance(n_text, int) or not 1 <= n_text < count:
        raise ValueError(f"uni_ctx is {shape}; n_text={n_text!r} leaves no sense in {count} prompts of both towers")
    found = {"preset": preset, "n_text": n_text, "n_visual": count - n_text}
    if preset == "paper":
        depths = {name: given.get(name) or layers for name in ("depth_text", "depth_vision")}
        if max(depths.values()) != layers:
            raise ValueError(
                f"{describe_options(depths)}; uni_ctx is {shape}: wanted the deeper tower's to be {layers}"
            )
        found |= depths
    return found
