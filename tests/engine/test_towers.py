"""The prompted towers alone: several prompt sets in one run, packing, what the vision tower refuses."""

from functools import cache

import pytest
import torch

from upt_fast.clip.open_clip import frozen_clip
from upt_fast.clip.tokens import tokenize_classnames
from upt_fast.common.closeness import relative_rms
from upt_fast.engine.towers import TextTower, VisionTower, routes
from upt_fast.engine.towers.blocks import MEMORY_LEVELS, FrozenBlocks
from upt_fast.engine.towers.folding import fold_norm
from upt_fast.testing import random_clip

NAMES = ["cat", "hard-leaved pocket orchid", "dog", "Boeing 747-400", "cat", "snow leopard"]
POSITIONS = ("end", "middle", "front")


@cache
def clip():
    model = random_clip(
        embed_dim=48,
        image_size=(16, 24),
        vision_layers=3,
        vision_width=64,
        vision_head_width=32,
        text_layers=3,
        text_width=64,
        text_heads=2,
    )
    return frozen_clip(model.double())


def text_tower(memory: str = "fast") -> TextTower:
    return TextTower(clip().text, torch.float64, memory)


def vision_tower(memory: str = "fast") -> VisionTower:
    return VisionTower(clip().vision, torch.float64, memory)


def tokens_of(names, n_text, tokenizer):
    return tokenize_classnames(names, n_text, clip().text.context, tokenizer)


def gradient(features, prompts):
    weights = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).sin().view_as(features)
    return torch.autograd.grad((features * weights).sum(), prompts)[0]


@pytest.mark.parametrize(
    ("backend", "route"),
    [
        ("auto", routes.Rows),
        ("torch", routes.Rows),
        ("triton", routes.Streams),
        ("torch,triton", routes.Streams),
        ("xformers", routes.ReservedStreams),
        ("triton,xformers", routes.ReservedStreams),
    ],
)
def test_the_route_follows_from_the_backends(backend, route):
    for kind, weights in ((TextTower, clip().text), (VisionTower, clip().vision)):
        assert type(kind(weights, torch.float32, backend=backend).route) is route


@pytest.mark.parametrize("memory", MEMORY_LEVELS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("position", POSITIONS)
def test_text_sets_equal_single_runs(position, depth, memory, tokenizer):
    n, sets = 3, [1, 0, 1, 1, 0, 0]
    tower = text_tower(memory)
    prompts = torch.randn(2, depth, n, 64, dtype=torch.float64, requires_grad=True)
    packed = tower.pack(tokens_of(NAMES, n, tokenizer), n, position, class_sets=sets)
    got = tower(prompts, packed)

    wanted = torch.empty_like(got)
    for s in range(2):
        members = [c for c, of in enumerate(sets) if of == s]
        alone = tower.pack(tokens_of([NAMES[c] for c in members], n, tokenizer), n, position)
        wanted[members] = tower(prompts[s : s + 1], alone)
    assert relative_rms(got, wanted) <= 1e-12
    assert relative_rms(gradient(got, prompts), gradient(wanted, prompts)) <= 1e-12


@pytest.mark.parametrize("memory", MEMORY_LEVELS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_vision_sets_equal_single_runs(depth, memory):
    tower = vision_tower(memory)
    images = torch.randn(5, 3, 16, 24, dtype=torch.float64)
    prompts = torch.randn(3, depth, 2, 64, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 2, 2, 0])  # the second set has no image
    got = tower(images, prompts, index)
    wanted = torch.cat([tower(images[i : i + 1], prompts[s : s + 1]) for i, s in enumerate(index.tolist())])
    assert relative_rms(got, wanted) <= 1e-12
    grad = gradient(got, prompts)
    assert relative_rms(grad, gradient(wanted, prompts)) <= 1e-12
    assert grad[1].eq(0).all()


def test_one_set_per_image():
    """As in CoCoOp: as many sets as images."""
    tower = vision_tower()
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64)
    prompts = torch.randn(3, 2, 2, 64, dtype=torch.float64)
    got = tower(images, prompts, torch.arange(3))
    for i in range(3):
        assert relative_rms(got[i : i + 1], tower(images[i : i + 1], prompts[i : i + 1])) <= 1e-12


@pytest.mark.parametrize("depth", [1, 3])
def test_no_visual_prompts_is_the_plain_clip(depth):
    model = random_clip(vision_width=64, text_width=64, vision_layers=3, image_size=16).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    tower = VisionTower(frozen_clip(model).vision, torch.float64)
    got = tower(images, torch.empty(1, depth, 0, 64, dtype=torch.float64))
    assert relative_rms(got, model.encode_image(images)) <= 1e-12


@pytest.mark.parametrize("position", POSITIONS)
def test_words_as_prompts_are_the_plain_clip(position, tokenizer):
    """Prompts that are the embeddings of words give the features of the text with those words."""
    model = random_clip(vision_width=64, text_width=64).double()
    tower = TextTower(frozen_clip(model).text, torch.float64)
    words = ["a", "photo", "of"]
    ids = tokenizer([" ".join(words)])[0, 1:4]
    packed = tower.pack(tokens_of(NAMES, 3, tokenizer), 3, position)
    got = tower(model.token_embedding.weight[ids][None, None].detach(), packed)
    texts = {
        "end": [f"a photo of {name}." for name in NAMES],
        "middle": [f"a {name} photo of." for name in NAMES],
        "front": [f"{name} a photo of." for name in NAMES],
    }[position]
    assert relative_rms(got, model.encode_text(tokenizer(texts))) <= 1e-12


def test_packing_keeps_the_order_of_the_classes(tokenizer):
    tower = text_tower()
    prompts = torch.randn(1, 2, 3, 64, dtype=torch.float64)
    pack = lambda names: tower.pack(tokens_of(names, 3, tokenizer), 3)  # noqa: E731
    got = tower(prompts, pack(NAMES))
    assert relative_rms(tower(prompts, pack(NAMES[::-1])), got.flip(0)) <= 1e-12
    assert relative_rms(got[0], got[4]) <= 1e-12  # the same name twice
    assert relative_rms(got[0], got[2]) > 1e-3


def test_packing_runs_only_what_a_class_adds(tokenizer):
    """Rows from the name to the end token, sorted by their number: nothing of the 77 is padding."""
    packed = text_tower().pack(tokens_of(["dog", "snow leopard", "cat"], 4, tokenizer), 4)
    assert packed.layout.sets == (((2, 3), (1, 4)),)
    assert (packed.layout.num_classes, packed.layout.num_rows) == (3, 10)
    assert packed.inverse.tolist() == [0, 2, 1]
    front = text_tower().pack(tokens_of(["dog", "snow leopard", "cat"], 4, tokenizer), 4, "front")
    assert front.layout.sets == (((2, 7), (1, 8)),)


@pytest.mark.parametrize("tower", [text_tower, vision_tower])
def test_towers_have_no_parameters_and_no_state(tower):
    assert list(tower().parameters()) == []
    assert tower().state_dict() == {}


def test_folding_leaves_the_weights_of_the_clip(tokenizer):
    before = [t.clone() for t in tensors_of(clip())]
    text_tower().pack(tokens_of(NAMES, 2, tokenizer), 2)
    vision_tower()
    assert all(map(torch.equal, tensors_of(clip()), before))


def tensors_of(frozen) -> list[torch.Tensor]:
    found = []
    for tower in (frozen.text, frozen.vision):
        parts = [tower, *tower.blocks, *(norm for b in tower.blocks for norm in (b.ln_1, b.ln_2))]
        found += [t for part in parts for t in vars(part).values() if isinstance(t, torch.Tensor)]
    return found


def test_fold_norm():
    norm = clip().text.blocks[1].ln_1
    weight, bias, n = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 64), (5,), (7, 64)))
    w, b = fold_norm(weight, bias, norm)
    wanted = (n * norm.weight + norm.bias) @ weight.t() + bias
    assert relative_rms(n @ w.t() + b, wanted) <= 1e-14
    w, b = fold_norm(weight, None, None)
    assert torch.equal(w, weight)
    assert b.eq(0).all()


def test_float32_blocks_are_folded_in_float64():
    """The weights are rounded once, after folding."""
    text = clip().text
    single = FrozenBlocks(text.blocks, text.num_heads, text.activation, torch.float32)
    double = FrozenBlocks(text.blocks, text.num_heads, text.activation, torch.float64)
    for name, weight in single.named_buffers():
        assert torch.equal(weight, double.get_buffer(name).float())


@pytest.mark.parametrize("memory", MEMORY_LEVELS[1:])
def test_memory_levels_keep_less(memory):
    def kept(level: str) -> int:
        sizes: dict[int, int] = {}  # by storage, which views share

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        tower = vision_tower(level)
        weights = {b.untyped_storage().data_ptr() for b in tower.buffers()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            features = tower(images, prompts)
        del features
        return sum(size for pointer, size in sizes.items() if pointer not in weights)

    images = torch.randn(4, 3, 16, 24, dtype=torch.float64)
    prompts = torch.randn(1, 3, 2, 64, dtype=torch.float64, requires_grad=True)
    assert kept(memory) < 0.8 * kept(MEMORY_LEVELS[MEMORY_LEVELS.index(memory) - 1])


@pytest.mark.parametrize(
    ("images", "wanted"),
    [
        (torch.zeros(2, 3, 16, 16), ["(2, 3, 16, 16)", "(B, 3, 16, 24)"]),
        (torch.zeros(2, 3, 24, 16), ["(2, 3, 24, 16)", "(B, 3, 16, 24)"]),
        (torch.zeros(2, 1, 16, 24), ["(2, 1, 16, 24)", "(B, 3, 16, 24)"]),
        (torch.zeros(3, 16, 24), ["(3, 16, 24)", "(B, 3, 16, 24)"]),
        (torch.zeros(2, 3, 16, 24, dtype=torch.uint8), ["torch.uint8", "floating-point"]),
    ],
    ids=["square", "turned", "grey", "no_batch", "uint8"],
)
def test_bad_images(images, wanted):
    with pytest.raises(ValueError) as error:
        vision_tower()(images, torch.zeros(1, 1, 2, 64))
    assert all(part in str(error.value) for part in wanted), error.value


def test_no_images():
    prompts = torch.randn(1, 2, 2, 64, dtype=torch.float64, requires_grad=True)
    features = vision_tower()(torch.zeros(0, 3, 16, 24), prompts)
    assert features.shape == (0, 48)
