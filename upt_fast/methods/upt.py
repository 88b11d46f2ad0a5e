"""Unified Prompt Tuning (arXiv 2210.07225): one set of prompts per layer, one transform for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upt_fast.common.checks import require_bool, require_choice, require_int
from upt_fast.methods.demo import DemoSettings
from upt_fast.methods.method import Method
from upt_fast.methods.options import CLASS_TOKEN_POSITIONS, MethodConfig, require_depth
from upt_fast.methods.release import Release, ReleasedTensors

if TYPE_CHECKING:
    from torch import Tensor

PRESETS = ("paper", "released")
TRANSFORMS = ("transformer", "mlp", "none")


@dataclass(frozen=True)
class UPTConfig(MethodConfig):
    """Unified Prompt Tuning (arXiv 2210.07225), and the learners that the paper compares it with.

    The last four options are those ablations, of the preset "paper"; their defaults are UPT. They combine as follows, U
    being the prompts of a layer and U^ the transformed ones:

    * ``transform`` makes U^ of U: "transformer" by self-attention and feed-forward; "mlp" by the same without the
      attention, U' = norm1(U); "none" leaves U^ = U. What it does not use has no parameters.
    * ``shared``: U is one set of n_text = n_visual prompts; all of U^ goes to the text tower and all of it, through the
      linear map ``mlp``, to the image tower. Otherwise the first n_text rows are the text's, the others the images'.
    * ``layerwise=False``: one U for all layers instead of one each; each prompted layer gets the same prompts.
    * ``joint``: text prompts (d wide) and visual prompts (w wide) are parameters of their own, trained together and
      not transformed (CoOp with deep VPT, at UPT's places). ``transform`` may then be "none" or left alone;
      ``layerwise=False`` makes one set for all layers of each tower.

    Args:
        preset: "paper": prompts interact by self-attention and enter every prompted layer of both towers;
            "released": the transform of the authors' released code, a map of each prompt on its own, input layer only.
        n_text: prompt tokens of the text tower.
        n_visual: prompt tokens of the image tower.
        depth_text: text layers, counted from the input, that get prompts of their own; None: all ("paper") or 1.
        depth_vision: the same for the image tower.
        class_token_position: where the class name stands among the text prompts: "end", "middle" or "front".
        attention_heads: heads of the transform's self-attention; must divide the text width.
        dropout: probability inside the transform, in training mode; None: 0 ("paper"), 0.1 ("released").
        transform: "transformer", "mlp" or "none".
        shared: one set of prompts for both towers.
        joint: independent prompts of both towers.
        layerwise: whether each prompted layer has prompts of its own.
    """

    preset: str = "paper"
    n_text: int = 4
    n_visual: int = 4
    depth_text: int | None = None
    depth_vision: int | None = None
    class_token_position: str = "end"
    attention_heads: int = 1
    dropout: float | None = None
    transform: str = "transformer"
    shared: bool = False
    joint: bool = False
    layerwise: bool = True

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        require_choice("class_token_position", self.class_token_position, CLASS_TOKEN_POSITIONS)
        for name in ("n_text", "n_visual", "attention_heads"):
            require_int(name, getattr(self, name), 1)
        for name in ("depth_text", "depth_vision"):
            depth = getattr(self, name)
            if depth is None:
                continue
            require_int(name, depth, 1)
            if self.preset == "released" and depth != 1:
                raise ValueError(f"{name}={depth}; the released code prompts the input layer only: wanted 1 or None")
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if self.dropout is not None and not (number and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"dropout={self.dropout!r}; wanted a probability in [0, 1)")
        self._check_ablations()

    def _check_ablations(self) -> None:
        require_choice("transform", self.transform, TRANSFORMS)
        for name in ("shared", "joint", "layerwise"):
            require_bool(name, getattr(self, name))
        for name in ("transform", "shared", "joint", "layerwise"):
            value = getattr(self, name)
            if self.preset == "released" and value != getattr(UPTConfig, name):
                raise ValueError(f"{name}={value!r} with preset='released'; wanted preset='paper'")
        if self.shared and self.n_text != self.n_visual:
            raise ValueError(
                f"n_text={self.n_text} and n_visual={self.n_visual} with shared=True: one set of prompts feeds both "
                "towers; wanted equal numbers"
            )
        if self.joint and self.shared:
            raise ValueError("joint=True and shared=True; wanted one or the other")
        if self.joint and self.transform == "mlp":
            raise ValueError("transform='mlp' with joint=True: independent prompts are not transformed; wanted 'none'")

    @property
    def dropout_p(self) -> float:
        """The dropout probability with the preset's default filled in."""
        if self.dropout is not None:
            return self.dropout
        return 0.1 if self.preset == "released" else 0.0

    def depths(self, text_layers: int, vision_layers: int) -> tuple[int, int]:
        """(depth_text, depth_vision) for towers of so many layers.

        Raises:
            ValueError: a depth is larger than its tower.
        """
        depths = []
        for name, depth, layers in (
            ("depth_text", self.depth_text, text_layers),
            ("depth_vision", self.depth_vision, vision_layers),
        ):
            if depth is None and self.preset == "released":
                depth = 1
            depths.append(require_depth(name, depth, layers))
        return depths[0], depths[1]


def _infer(tensors: ReleasedTensors, given: Mapping[str, Any]) -> dict[str, Any]:
    """uni_ctx (1, 2n, d) is the release's; (D, n_text + n_visual, d) with D > 1 the paper's with D prompted layers."""
    shape = tensors.shapes["uni_ctx"]
    if len(shape) != 3 or shape[1] < 2:
        raise ValueError(f"uni_ctx is {shape}; wanted (1, 2n, d), or (depth, n_text + n_visual, d)")
    layers, count = shape[:2]
    if layers > 1 and tensors.token_shapes:
        raise ValueError(
            f"uni_ctx is {shape} beside token buffers: prompts of each class's own, which only forks of the release "
            "have; wanted (1, 2n, d)"
        )
    preset = "paper" if layers > 1 else given.get("preset") or "released"
    suffix = tensors.token_shapes.get("token_suffix", ())
    if given.get("n_text") is not None:
        n_text = given["n_text"]
    elif given.get("n_visual") is not None:
        n_text = count - given["n_visual"]
    elif len(suffix) == 3:
        n_text = tensors.context_length - 1 - suffix[1]
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
                f"{', '.join(f'{name}={depth!r}' for name, depth in depths.items())}; uni_ctx is {shape}: "
                f"wanted the deeper tower's to be {layers}"
            )
        found |= depths
    return found


def _refuse(config: UPTConfig) -> str:
    if config.preset != "released":
        return "the released code computes something else than preset 'paper'; wanted preset 'released'"
    if (config.n_text, config.n_visual) != (4, 4):
        counts = f"n_text={config.n_text} and n_visual={config.n_visual}"
        return f"{counts}, but the released code runs with 4 and 4 only: its 4 is a literal"
    return ""


def _settings(config: UPTConfig) -> dict[str, Any]:
    return {"N_CTX": config.n_text, "CTX_INIT": "", "CSC": False}


def _recorded_options(name: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The preset of a file of vectors, and the released form's numbers of prompts, which its tensors tell."""
    if "preset" in options:
        return {}
    if name.startswith("upt_paper"):
        return {"preset": "paper"}
    count = tensors["param.uni_ctx"].shape[1]
    n_text = len(tensors["mid.text_ctx"]) if "mid.text_ctx" in tensors else count // 2
    return {"preset": "released", "n_text": n_text, "n_visual": count - n_text}


METHODS = (
    Method(
        "upt",
        "UPT",
        UPTConfig,
        "upt_fast.prompts.upt:UnifiedPromptLearner",
        source="arXiv 2210.07225",
        exact="the paper's equations; preset 'released': the authors' code",
        order=0,
        recipe="upt",
        release=Release(
            trainer="Unified_v6",
            registered="prompt_learner",
            section="COOP",
            options={"CLASS_TOKEN_POSITION": "class_token_position"},
            tensors=("uni_ctx", "self_attn.*", "norm1.*", "norm2.*", "linear1.*", "linear2.*", "mlp.*"),
            marks=("uni_ctx",),
            infer=_infer,
            refusal=_refuse,
            settings=_settings,
        ),
        # as many image tokens as VPT-deep: 65.0; with 4 of them 64.9
        demo=DemoSettings(
            row=8,
            lr=0.02,
            # around the best of the grid for 4 + 4 tokens, which was 0.03: along it those have 54.4, 52.2, 58.3, 60.1,
            # 64.3, 60.7; between its points only UPT was measured
            measured={0.02: 65.0, 0.03: 63.5, 0.05: 64.8},
            options={"n_text": 4, "n_visual": 6},
            default=True,
        ),
        recorded_options=_recorded_options,
    ),
)
