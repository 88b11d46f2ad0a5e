"""Checkpoints of the released repositories, read and written: Dassl's ``model.pth.tar-<epoch>`` files.

Their trainers save ``{"state_dict", "epoch", "optimizer", "scheduler", "val_result"}`` of one registered object: the
prompt learner (CoOp, CoCoOp, UPT), or the whole model with the frozen CLIP in it (MaPLe, IVLP, both VPTs). Only the
trained tensors matter. The CLIP comes from elsewhere, and the token buffers, the embeddings of the class names, are
computed anew; theirs serve to check that class names, initial words and CLIP are the ones of the file.

Files are read with torch's weights_only. Dassl's schedulers keep their optimizer, so that ordinary checkpoints hold a
few objects of known classes: each is read as an empty placeholder, and nothing that a file names is imported or run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upt_fast.clip.loading import LoadedCLIP, load_clip
from upt_fast.clip.open_clip import frozen_clip
from upt_fast.clip.tokens import ClassTokens, clean_classnames, tokenize_classnames
from upt_fast.config import DEFAULT_TEMPLATE, MethodConfig, UPTConfig, ZeroShotConfig, require_int, split_words
from upt_fast.data.folder import shorten
from upt_fast.files import atomic_path
from upt_fast.methods import find_method
from upt_fast.model import LEARNER_FILE, FastPromptedCLIP
from upt_fast.train.checkpoint import STATE_FILE, is_run, read_json
from upt_fast.train.loop import checkpoint_folder
from upt_fast.verify import RELEASED_OPTIONS


@dataclass(frozen=True)
class Release:
    """A method in its repository.

    Args:
        registered: name of the object that the trainer saves, which is a folder of its output.
        trainer: name of the trainer.
        section: of its options, below cfg.TRAINER.
    """

    registered: str
    trainer: str
    section: str


RELEASES: dict[str, Release] = {
    "upt": Release("prompt_learner", "Unified_v6", "COOP"),
    "coop": Release("prompt_learner", "CoOp", "COOP"),
    "cocoop": Release("prompt_learner", "CoCoOp", "COCOOP"),
    "vpt_shallow": Release("model", "VPT_shallow", "COOP"),
    "vpt_deep": Release("model", "VPT_deep", "COOP"),
    "maple": Release("MultiModalPromptLearner", "MaPLe", "MAPLE"),
    "ivlp": Release("VLPromptLearner", "IVLP", "IVLP"),
    "mvpt": Release("prompt_learner", "VPT", "VPT"),
}
# whose registered object is the prompt learner; of the others it is the whole model
LEARNER_ONLY = ("upt", "coop", "cocoop")
HALF_PROMPTS = "the released code rounds prompts to float16 at any precision; half_prompts=true reproduces it"
PREFIX = "prompt_learner."
TOKEN_NAMES = ("token_prefix", "token_suffix", "tokenized_prompts")
FROZEN = ("image_encoder.", "text_encoder.", "clip_model.")
TEXT_LAYER, VISION_LAYER = (f"{tower}_encoder.transformer.resblocks." for tower in ("text", "image"))


class _Placeholder:
    """Stands for an object of an optimizer's, scheduler's or number's class; keeps nothing."""

    def __new__(cls, *_: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


_OPTIMIZERS = ("torch.optim.sgd.SGD", "torch.optim.adam.Adam", "torch.optim.adamw.AdamW", "torch.optim.rmsprop.RMSprop")
_SCHEDULERS = (
    *(f"torch.optim.lr_scheduler.{name}" for name in ("CosineAnnealingLR", "MultiStepLR", "StepLR")),
    *(f"dassl.optim.lr_scheduler.{name}" for name in ("ConstantWarmupScheduler", "LinearWarmupScheduler")),
)
_NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
_SAFE: list[Any] = [
    *((_Placeholder, name) for name in (*_OPTIMIZERS, "dassl.optim.radam.RAdam", *_SCHEDULERS, *_NUMBERS)),
    (_empty_dict, "collections.defaultdict"),
    (dict, "builtins.dict"),
]


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """What a file holds.

    Args:
        trained: by name without ``prompt_learner.``.
        tokens: of TOKEN_NAMES, what there is.
        frozen: number of tensors of the frozen CLIP.
        whole: the registered object was the whole model.
        epoch: epochs done, if the file says so.
    """

    trained: dict[str, Tensor]
    tokens: dict[str, Tensor]
    frozen: int
    whole: bool
    epoch: int | None


@dataclass(frozen=True)
class Imported:
    """A checkpoint that was read.

    Args:
        model: with the file's values, in eval mode.
        checkpoint: what the file holds.
        inferred: the options that the file tells.
        unused: tensors that no logits depend on.
        checked: whether the file's token buffers were there and are those of the class names.
    """

    model: FastPromptedCLIP
    checkpoint: ReleasedCheckpoint
    inferred: dict[str, Any]
    unused: tuple[str, ...]
    checked: bool

    def describe(self) -> list[str]:
        """Lines that say what was read."""
        model, found = self.model, self.checkpoint
        values = [found.trained[name] for name in found.trained if name not in self.unused]
        others = {name: value for name, value in model.config.to_dict().items() if name not in self.inferred}
        ignored = [
            *found.tokens,
            *self.unused,
            *([f"{found.frozen} tensor(s) of the frozen CLIP"] if found.frozen else []),
        ]
        lines = [
            f"method {model.method}" + ("" if found.epoch is None else f", epoch {found.epoch}"),
            f"from the file: {_options(self.inferred)}",
            f"other options: {_options(others) or 'none'}",
            f"read {len(values)} tensor(s), {sum(v.numel() for v in values)} values",
            f"ignored {', '.join(ignored) or 'nothing'}",
        ]
        if self.checked:
            lines.append("the class names are those of the file's token buffers")
        else:
            lines.append("the file holds no token buffers: class names, their order and the CLIP were not checked")
        if hasattr(model.config, "half_prompts") and not model.config.half_prompts:
            lines.append(HALF_PROMPTS)
        return lines


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


# reading


def import_checkpoint(
    path: str | os.PathLike[str],
    clip: LoadedCLIP,
    classnames: Sequence[str],
    method: str | None = None,
    **options: Any,
) -> FastPromptedCLIP:
    """The model of a released repository's checkpoint, in eval mode.

    Args:
        path: ``model.pth.tar-<epoch>``, ``model-best.pth.tar``, or a torch.save'd state dict.
        clip: the CLIP that it was trained on.
        classnames: the C class names in the order of training; underscores become spaces.
        method: one of RELEASES; None: found from the file's names and shapes.
        options: fields of the method's config that no shape tells: ctx_init, class_token_position, half_prompts,
            templates, attention_heads; n_text of UPT.
    Raises:
        ValueError: no such file, or not one of theirs; objects in it that are not read; several methods possible; an
            option that the file contradicts; other names or shapes; token buffers of other class names, initial words
            or another CLIP.
    """
    return read_released(path, clip, classnames, method, **options).model


def read_released(
    path: str | os.PathLike[str],
    clip: LoadedCLIP,
    classnames: Sequence[str],
    method: str | None = None,
    **options: Any,
) -> Imported:
    """:func:`import_checkpoint`, with what was found in the file."""
    names = clean_classnames(classnames)
    return _fit(Path(path), read_file(Path(path)), clip, names, method, options)


def read_file(path: Path) -> ReleasedCheckpoint:
    """Read and sort a checkpoint file, with torch's weights_only.

    Raises:
        ValueError: no file, another format, a damaged file, or objects in it that are not read.
    """
    values = _load(path)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds {type(values).__name__}; wanted a dict with 'state_dict', or a state dict")
    state, epoch = values.get("state_dict", values), values.get("epoch")
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path}: state_dict is {state!r:.80}; wanted a dict of tensors")
    trained: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    frozen, whole = 0, False
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key!r} is {type(value).__name__}; wanted names with tensors: a state dict")
        name = key
        while name.startswith("module."):  # of DataParallel
            name = name.removeprefix("module.")
        whole |= name.startswith(PREFIX)
        short = name.removeprefix(PREFIX)
        is_prompt = short.rpartition(".")[2] in ("VPT", "VPT_shallow")
        if not is_prompt and (short.startswith(FROZEN) or short == "logit_scale"):
            frozen += 1
            continue
        kind = tokens if short in TOKEN_NAMES else trained
        if short in kind:
            raise ValueError(f"{path} holds {short!r} twice, as {key!r} too; wanted one state dict")
        kind[short] = value.detach()
    for name, value in trained.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} is {value.dtype} or holds NaN or infinity; wanted finite numbers")
    whole |= frozen > 0
    return ReleasedCheckpoint(trained, tokens, frozen, whole, epoch if isinstance(epoch, int) else None)


def _load(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; wanted the file in it, such as prompt_learner/model-best.pth.tar")
    if not path.is_file():
        raise ValueError(f"no file {path}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise ValueError(
            f"{path} is a safetensors file; wanted a released repository's .pth.tar (what this package saved is read "
            "as it is: pass its folder as the checkpoint)"
        )
    try:
        with torch.serialization.safe_globals(_SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise many kinds
        refused = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused is not None:
            raise ValueError(
                f"{path} holds more than tensors: {refused[1]}, which weights_only refuses, for objects can run code; "
                "have whoever trained it save the tensors alone: "
                "torch.save({'state_dict': checkpoint['state_dict'], 'epoch': checkpoint['epoch']}, FILE)"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged or was not written by torch.save ({reason[:120]}); wanted a .pth.tar of a released "
            "repository: copy or download it again"
        ) from error


def _fit(
    path: Path,
    found: ReleasedCheckpoint,
    clip: LoadedCLIP,
    classnames: tuple[str, ...],
    method: str | None,
    options: dict[str, Any],
) -> Imported:
    try:
        return _import(found, clip, classnames, method, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _import(
    found: ReleasedCheckpoint,
    clip: LoadedCLIP,
    classnames: tuple[str, ...],
    method: str | None,
    options: dict[str, Any],
) -> Imported:
    frozen = frozen_clip(clip.model)
    method = _choose_method(found, method, len(frozen.vision.blocks))
    inferred = infer_options(method, found.trained, options, found.tokens, frozen.text.context.length)
    config, checked = _check_texts(found, clip, classnames, method, inferred, options)
    model = FastPromptedCLIP.from_loaded(clip, classnames, method=method, config=config)
    # the release's VPT owns a network of a loss whose weight is 0
    unused = [name for name in found.trained if method == "vpt_shallow" and name.startswith("mlp.")]
    own = {name.removeprefix(PREFIX): value for name, value in model.state_dict().items()}
    _check_names(own, {name: value for name, value in found.trained.items() if name not in unused})
    model.load_state_dict(
        {name: found.trained[name.removeprefix(PREFIX)].to(t) for name, t in model.state_dict().items()}
    )
    return Imported(model.eval(), found, inferred, tuple(unused), checked)


def _choose_method(found: ReleasedCheckpoint, given: str | None, vision_layers: int) -> str:
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
            raise ValueError(f"{_options(depths)}; uni_ctx is {shape}: wanted the deeper tower's to be {layers}")
        found |= depths
    return found


def _check_texts(
    found: ReleasedCheckpoint,
    clip: LoadedCLIP,
    classnames: tuple[str, ...],
    method: str,
    inferred: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[MethodConfig, bool]:
    """The config, with the initial words that the token buffers tell, and whether there were buffers to check."""
    kind = find_method(method).config
    given = {**options, **inferred}
    config: Any = kind.from_options(given)
    if isinstance(config, ZeroShotConfig):
        return config, False
    words = split_words(options.get("ctx_init"))
    if method in ("coop", "cocoop") and words and (found.trained["ctx"].ndim == 3 or len(words) != inferred["n_ctx"]):
        raise ValueError(
            f"ctx_init={options['ctx_init']!r} has {len(words)} words; ctx is {tuple(found.trained['ctx'].shape)}: "
            "wanted as many words as rows, one context for all classes, or no ctx_init"
        )
    candidates = [config]
    if method in ("maple", "ivlp") and "ctx_init" not in options:
        candidates.append(kind.from_options({**given, "ctx_init": None}))  # random start: no words beyond the prompts
    if not found.tokens:
        return config, False
    problems = []
    for candidate in candidates:
        problem = _token_problem(found.tokens, clip, classnames, candidate.n_text, getattr(candidate, "prefix", None))
        if problem is None:
            return candidate, True
        problems.append(problem)
    raise ValueError(problems[0])


def _token_problem(
    buffers: Mapping[str, Tensor], clip: LoadedCLIP, classnames: tuple[str, ...], n_text: int, prefix: str | None
) -> str | None:
    """What tells the file's token buffers from the embeddings of these class names' texts."""
    text = frozen_clip(clip.model).text
    tokens: ClassTokens = tokenize_classnames(classnames, n_text, text.context, clip.tokenizer, prefix)
    count, length, width = len(classnames), text.context.length, text.width
    wanted = {
        "token_prefix": (count, 1, width),
        "token_suffix": (count, length - 1 - n_text, width),
        "tokenized_prompts": (count, length),
    }
    for name, values in buffers.items():
        shape = tuple(values.shape)
        if shape == wanted[name]:
            continue
        if len(shape) == len(wanted[name]) and shape[0] != count:
            return (
                f"{name} is of {shape[0]} classes; {count} class names were given: wanted those of training "
                "(set_classnames takes others afterwards)"
            )
        return f"{name} is {shape}; these class names, options and this CLIP make {wanted[name]}"
    ids, table = tokens.ids.to(text.token_embedding.device), text.token_embedding
    start = buffers.get("token_prefix")
    if start is not None and not all(_close(row, table[ids[0, :1]]) for row in start):
        return "token_prefix is not this CLIP's start token: the file is of another CLIP"

    def same(file_row: int, our_row: int) -> bool:
        kept = ids[our_row, 1 + n_text :]
        listed, suffix = buffers.get("tokenized_prompts"), buffers.get("token_suffix")
        if listed is not None and not torch.equal(listed[file_row, 1 + n_text :].to(kept), kept):
            return False
        return suffix is None or _close(suffix[file_row], table[kept])

    wrong = [i for i in range(count) if not same(i, i)]
    if not wrong:
        return None
    which = f"{len(wrong)} of {count} class names, first {classnames[wrong[0]]!r} (class {wrong[0]})"
    moved = next((i for i in range(count) if same(i, wrong[0])), None)
    if moved is not None:
        return f"the class names stand in another order than in the file: {which}, is class {moved} there"
    return (
        f"the file's token buffers are of other texts than these: {which}; wanted the class names of training in their "
        f"order, its initial words (ctx_init; here {prefix or 'none'!r}) and its CLIP"
    )


def _close(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two embeddings are equal but for rounding to half precision; NaN is equal to nothing."""
    # the release computes them in float16 even where it stores float32
    eps = max(torch.finfo(dtype).eps for dtype in (torch.float16, theirs.dtype, ours.dtype))
    theirs, ours = theirs.to(ours.device).double(), ours.double()
    return bool(((theirs - ours).abs() <= eps * ours.abs() + 1e-7).all())


def _check_names(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)}, wanted {tuple(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    problems = [f"missing: {shorten(missing)}"] if missing else []
    problems += [f"unexpected: {shorten(unexpected)}"] if unexpected else []
    problems += [f"{shorten(shapes, 4)}: another CLIP, or other class names or options"] if shapes else []
    if problems:
        raise ValueError(f"its tensors do not fit: {'; '.join(problems)}")


# writing


def export_checkpoint(model: FastPromptedCLIP, path: str | os.PathLike[str], epoch: int = 1) -> Path:
    """Write the ``.pth.tar`` that the method's released trainer reads, whole or not at all.

    Args:
        model: of one of RELEASES, with values.
        path: the file; its trainer looks for :func:`checkpoint_path`.
        epoch: the number that stands in the file; read by people only.
    Returns:
        path.
    Raises:
        ValueError: their code computes nothing that equals this model; says why.
    """
    require_int("epoch", epoch, 0)
    _refuse(model)
    names = {name: name.removeprefix(PREFIX) if model.method in LEARNER_ONLY else name for name in model.state_dict()}
    state = {names[name]: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    values = {"state_dict": state, "epoch": epoch, "optimizer": None, "scheduler": None, "val_result": None}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        torch.save(values, temporary)
    return file


def checkpoint_path(folder: str | os.PathLike[str], method: str, epoch: int) -> Path:
    """Where the method's released trainer looks for a checkpoint below its --model-dir, with --load-epoch epoch."""
    if method not in RELEASES:
        raise ValueError(f"method={method!r} is not of the released repositories; wanted one of {', '.join(RELEASES)}")
    return Path(folder) / RELEASES[method].registered / f"model.pth.tar-{epoch}"


def _refuse(model: FastPromptedCLIP) -> None:
    """A ValueError where the released code cannot compute what the model does."""
    config, why = model.config, None
    if model.method == "zeroshot":
        why = "zero-shot CLIP has no parameters: there is nothing to write"
    elif model.method not in RELEASES:
        why = f"the released repositories have no such method; wanted one of {', '.join(RELEASES)}"
    elif isinstance(config, UPTConfig):
        if config.preset != "released":
            why = "the released code computes something else than preset 'paper'; wanted preset 'released'"
        elif (config.n_text, config.n_visual) != (4, 4):
            counts = f"n_text={config.n_text} and n_visual={config.n_visual}"
            why = f"{counts}, but the released code runs with 4 and 4 only: its 4 is a literal"
    elif isinstance(config, ZeroShotConfig):
        texts = config.template_texts
        if len(texts) > 1:
            why = f"its text features are the mean of {len(texts)} templates, the released code has one"
        elif model.method == "mvpt" and texts != (DEFAULT_TEMPLATE,):
            why = f"its template is {texts[0]!r}, the released code's {DEFAULT_TEMPLATE!r}"
    if why is not None:
        raise ValueError(f"method {model.method!r} cannot be exported: {why}")


def released_settings(model: FastPromptedCLIP) -> list[str]:
    """Lines that say how to configure the released code for an exported model: the file does not hold it."""
    release, config = RELEASES[model.method], model.config
    trained = {name.removeprefix(PREFIX): value for name, value in model.state_dict().items()}
    values = config.to_dict() | infer_options(model.method, trained, {})
    theirs = {key: values[ours] for key, ours in RELEASED_OPTIONS[model.method].items()}
    if model.method == "upt":
        theirs = {"N_CTX": model.prompt_learner.n_text, "CTX_INIT": "", "CSC": False, **theirs}
    if theirs.get("CTX_INIT", "") is None:
        theirs["CTX_INIT"] = ""
    clip = " ".join(name for name in (model.clip_name, model.clip_pretrained) if name) or "of training"
    lines = [f"trainer {release.trainer}, with the CLIP {clip}"]
    lines.append("set " + " ".join(f"TRAINER.{release.section}.{key} {value!r}" for key, value in theirs.items()))
    if model.method in ("vpt_shallow", "vpt_deep"):
        template = config.template_texts[0] if isinstance(config, ZeroShotConfig) else ""
        lines.append(f"its text is CUSTOM_TEMPLATES[DATASET.NAME], which must be {template!r}")
    if model.method == "vpt_shallow":
        lines.append(
            "as released the trainer calls encode_image_prompt_shallow, which is missing; VPT computes the same"
        )
    if model.method == "maple":
        lines.append("its widths 512 and 768 are literals: CLIPs of other widths than ViT-B's do not fit")
    if hasattr(config, "half_prompts") and not config.half_prompts:
        lines.append("the released code rounds prompts to float16, this model does not: logits differ by that rounding")
    return lines


# the commands


def run_import(
    file: str,
    classnames: str,
    out: str,
    *,
    clip: str,
    pretrained: str | None = None,
    method: str | None = None,
    options: Sequence[str] = (),
) -> Imported:
    """``upt-fast import-checkpoint``: read a released checkpoint, save it as this package does, say what was read.

    Args:
        file: the checkpoint.
        classnames: a file of class names: one a line, or a JSON list.
        out: folder for the model.
        clip: open_clip's name of the CLIP, or "tiny-digits".
        pretrained: its tag, or a file.
        method: one of RELEASES; None: found from the file.
        options: "KEY=VALUE", values as in JSON, anything else a text.
    Raises:
        ValueError: as :func:`import_checkpoint`; a folder that holds a model or a run already; bad class names.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={out!r} is a file; wanted a folder")
    if (folder / LEARNER_FILE).exists() or is_run(folder):
        raise ValueError(f"out={out!r} holds a model already; wanted a new folder")
    names, given = clean_classnames(read_classnames(Path(classnames))), parse_options(options)
    checkpoint = read_file(Path(file))  # before a CLIP is loaded, so that a bad file is told at once
    found = _fit(Path(file), checkpoint, load_clip(clip, pretrained), names, method, given)
    written = found.model.save_pretrained(folder)
    print("\n".join([*found.describe(), f"written to {written}"]))
    return found


def run_export(
    checkpoint: str,
    out: str,
    *,
    epoch: int | None = None,
    clip: str | None = None,
    pretrained: str | None = None,
) -> Path:
    """``upt-fast export-checkpoint``: write a run's or saved model's checkpoint for a released trainer.

    Args:
        checkpoint: RUN, RUN/last, RUN/best or a folder written by save_pretrained.
        out: the trainer's --model-dir.
        epoch: its --load-epoch; None: the run's, or 1.
        clip: open_clip's name of the CLIP; None: the one in the checkpoint.
        pretrained: with clip: its tag, or a file.
    Raises:
        ValueError: as :func:`export_checkpoint`; no checkpoint there; the file exists.
    """
    if pretrained is not None and clip is None:
        raise ValueError(f"pretrained={pretrained!r} without a CLIP's name; wanted --clip too")
    folder = checkpoint_folder(checkpoint)
    if epoch is None:
        state = folder / STATE_FILE if folder.is_dir() else folder.parent / STATE_FILE
        epoch = int(read_json(state)["epoch"]) if state.is_file() else 1
    if clip is None:
        model = FastPromptedCLIP.load(folder)
    else:
        loaded = load_clip(clip, pretrained)
        model = FastPromptedCLIP.load(folder, loaded.model, tokenizer=loaded.tokenizer)
    _refuse(model)
    path = checkpoint_path(out, model.method, epoch)
    if path.exists():
        raise ValueError(f"{path} exists; wanted another --out or --epoch")
    export_checkpoint(model, path, epoch)
    print(
        "\n".join(
            [f"written to {path}", *released_settings(model), f"load it with --model-dir {out} --load-epoch {epoch}"]
        )
    )
    return path


def read_classnames(path: Path) -> list[str]:
    """Class names of a file: a JSON list, or one a line.

    Raises:
        ValueError: no such file, not text, or no list of names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"class names: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"class names: {path} is not UTF-8 text; wanted one name a line, or a JSON list") from error
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json.loads(text)
    except ValueError as error:
        raise ValueError(f"class names: {path} starts as JSON, but is none: {error}") from error
    return [str(name) if isinstance(name, int) else name for name in names]


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Options of "KEY=VALUE" texts; values are JSON (true, 4, null, lists), anything else a text."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"option {text!r}; wanted KEY=VALUE, for example half_prompts=true")
        if name in options:
            raise ValueError(f"option {name} is given twice")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
