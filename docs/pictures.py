"""The pictures of architecture.md: ``python docs/pictures.py`` writes house.svg and data_way.svg beside this file."""

from __future__ import annotations

from pathlib import Path

from drawing import Arrow, Box, Picture, draw

BLUE, GREEN, YELLOW, RED, VIOLET = "#d9e6f7", "#dff0dc", "#fcefc9", "#f8dedd", "#e8e1f4"
GREY, WHITE = "#ececec", "#ffffff"

HOUSE = Picture(
    "house.svg",
    (960, 1032),
    "The house: each part stands on those below it; an arrow goes to what is imported",
    (
        Box("cli", (20, 20, 940, 68), BLUE, ("the command line, one file per command",)),
        Box("demo", (20, 104, 190, 170), GREEN, ("a tiny CLIP on", "handwritten digits")),
        Box("tasks", (210, 104, 380, 170), GREEN, ("many runs", "as one job")),
        Box("released", (400, 104, 570, 170), GREEN, ("checkpoints of", "published code")),
        Box("tools", (590, 104, 940, 170), GREEN, ("what runs here, whether it is right,", "what a step costs")),
        Box("train", (20, 206, 600, 254), GREEN, ("set-up, epochs, recording, evaluation",)),
        Box("testing", (700, 206, 940, 254), GREY, ("shared by tests and bench",), modules=("testing", "testing_ops")),
        Box("distributed", (210, 290, 600, 338), GREEN, ("a step divided over processes",)),
        Box("model", (210, 362, 600, 410), YELLOW, ("learner and towers: logits, loss",)),
        Box("features", (210, 434, 330, 482), YELLOW, ("texts, images",)),
        Box("steps", (345, 434, 465, 482), YELLOW, ("in parts",)),
        Box("saving", (480, 434, 600, 482), YELLOW, ("learner files",)),
        Box("prompts", (210, 506, 600, 554), YELLOW, ("the learners: parameters to prompts",)),
        Box("data", (20, 578, 170, 664), GREEN, ("image folders,", "class names,", "few-shot draws")),
        Box("engine", (210, 578, 600, 774), RED, ("frozen, fast; knows no method",), frame=True),
        Box("engine/towers", (222, 628, 392, 660), WHITE, title="towers", modules=("engine/towers",)),
        Box("engine/memory", (418, 628, 588, 660), WHITE, title="memory", modules=("engine/memory",)),
        Box("engine/ops", (222, 680, 588, 712), WHITE, title="ops", modules=("engine/ops",)),
        Box("engine/backends", (222, 732, 332, 764), WHITE, title="backends", modules=("engine/backends",)),
        Box("engine/autograd", (354, 732, 464, 764), WHITE, title="autograd", modules=("engine/autograd",)),
        Box("engine/cpu", (486, 732, 588, 764), WHITE, title="cpu", modules=("engine/cpu",)),
        Box("kernels", (210, 798, 430, 846), RED, ("Triton; C++ in kernels/cpu",), modules=("kernels", "kernels/cpu")),
        Box(
            "reference",
            (700, 578, 940, 664),
            GREY,
            ("the papers in plain PyTorch;", "stands apart,", "imports nothing fast"),
        ),
        Box("clip", (420, 882, 940, 930), VIOLET, ("models of libraries as one FrozenCLIP; tokens",)),
        Box("methods", (20, 882, 400, 930), VIOLET, ("a method's options and names; no torch",)),
        Box("common", (20, 966, 940, 1014), VIOLET, ("checks, files, closeness",), modules=("common", "version")),
    ),
    (
        Arrow("cli", "demo"),
        Arrow("cli", "tasks"),
        Arrow("cli", "released"),
        Arrow("cli", "tools"),
        Arrow("demo", "train"),
        Arrow("tasks", "train"),
        Arrow("released", "train"),
        Arrow("tools", "testing"),
        Arrow("train", "distributed"),
        Arrow("distributed", "model"),
        Arrow("train", "data"),
        Arrow("testing", "reference"),
        Arrow("model", "features"),
        Arrow("model", "steps"),
        Arrow("model", "saving"),
        Arrow("features", "prompts"),
        Arrow("steps", "prompts"),
        Arrow("saving", "prompts"),
        Arrow("prompts", "engine"),
        Arrow("prompts", "methods", turn=190),
        Arrow("engine/towers", "engine/memory"),
        Arrow("engine/towers", "engine/ops"),
        Arrow("engine/ops", "engine/backends"),
        Arrow("engine/backends", "engine/autograd"),
        Arrow("engine/autograd", "engine/cpu"),
        Arrow("engine/backends", "kernels"),
        Arrow("engine", "clip", at=540),
        Arrow("reference", "clip"),
        Arrow("reference", "engine", label="judges,|in verify|and tests", dashed=True),
        Arrow("clip", "common"),
        Arrow("methods", "common"),
    ),
    imports=True,
)

DATA_WAY = Picture(
    "data_way.svg",
    (960, 700),
    "The data's way: class names and images through two prompted towers to logits",
    (
        Box("classnames", (20, 20, 310, 76), BLUE, ("C names",), "classnames"),
        Box("learner", (330, 20, 630, 76), YELLOW, ("prompts",), "prompt learner", ("prompts",)),
        Box("images", (650, 20, 940, 76), BLUE, ("(B, 3, H, W)",), "images"),
        Box("tokens", (20, 112, 310, 184), VIOLET, ("(C, T)", "clip/tokens"), "token ids", ("clip/tokens",)),
        Box("text", (330, 220, 475, 276), YELLOW, ("[S, depth, n, d]",), "text prompts"),
        Box("visual", (485, 220, 630, 276), YELLOW, ("[S, depth, n, w]",), "visual prompts"),
        Box(
            "packed",
            (20, 220, 310, 308),
            RED,
            ("(N, d)", "no padding, sorted by length", "engine/towers"),
            "packed class rows",
            ("engine/towers",),
        ),
        Box(
            "embed",
            (650, 220, 940, 308),
            RED,
            ("(B, 1 + G, w)", "class token, G patches, positions", "engine/towers"),
            "embed",
            ("engine/towers",),
        ),
        Box(
            "text tower",
            (20, 344, 475, 416),
            RED,
            ("rows of each class, prompts once per set", "engine/towers"),
            "text tower",
            ("engine/towers",),
        ),
        Box(
            "image tower",
            (485, 344, 940, 416),
            RED,
            ("each image reads the prompts of its set", "engine/towers"),
            "image tower",
            ("engine/towers",),
        ),
        Box("classes", (20, 452, 475, 508), YELLOW, ("(C, e)",), "class features, L2 norm 1"),
        Box("features", (485, 452, 940, 508), YELLOW, ("(B, e)",), "image features, L2 norm 1"),
        Box(
            "logits",
            (190, 544, 770, 616),
            YELLOW,
            ("(B, C)", "model"),
            "logits = exp(logit_scale) · image features · class features^T",
            ("model",),
        ),
        Box(
            "loss",
            (190, 640, 770, 688),
            YELLOW,
            ("()",),
            "loss: cross-entropy with labels (B,), and the method's terms",
        ),
    ),
    (
        Arrow("classnames", "tokens"),
        Arrow("tokens", "packed"),
        Arrow("learner", "text"),
        Arrow("learner", "visual"),
        Arrow("images", "embed"),
        Arrow("packed", "text tower"),
        Arrow("text", "text tower"),
        Arrow("visual", "image tower"),
        Arrow("embed", "image tower"),
        Arrow("text tower", "classes"),
        Arrow("image tower", "features"),
        Arrow("classes", "logits"),
        Arrow("features", "logits"),
        Arrow("logits", "loss"),
    ),
)

PICTURES = (HOUSE, DATA_WAY)


def main() -> None:
    """Write the pictures beside this file."""
    for picture in PICTURES:
        Path(__file__).with_name(picture.name).write_text(draw(picture), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
