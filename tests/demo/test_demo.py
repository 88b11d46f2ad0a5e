"""The demo: shipped files, data, pretraining script, and a small run of the whole thing."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from upt_fast.demo import digits, pretrain
from upt_fast.demo.run import DemoConfig, run_demo, zero_shot_logits
from upt_fast.demo.tiny_clip import (
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    build_tiny_clip,
    load_tiny_clip,
    load_tiny_tokenizer,
    read_tiny_clip_metadata,
)

ASSETS = files("upt_fast.demo") / "assets"


@pytest.fixture(scope="module")
def tiny():
    return load_tiny_clip()


def test_assets_are_small_and_load(tiny):
    sizes = [len((ASSETS / name).read_bytes()) for name in (WEIGHTS_FILE, VOCABULARY_FILE)]
    assert sum(sizes) < 3_000_000
    model, tokenizer, preprocess_cfg = tiny
    assert preprocess_cfg["size"] == 32
    assert len(preprocess_cfg["mean"]) == len(preprocess_cfg["std"]) == 3
    assert model.vocab_size == tokenizer.vocab_size
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_zero_shot_works_on_paper(tiny):
    model, tokenizer, preprocess_cfg = tiny
    pixels, labels = digits.load_split("test", "paper")
    images = digits.to_model_input(pixels, preprocess_cfg["mean"], preprocess_cfg["std"])
    logits = zero_shot_logits(model, tokenizer, images, digits.CLASS_NAMES)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.9


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 5e-2), ("fp16", 5e-3)], ids=["bf16", "fp16"])
def test_half_precision(tiny, precision, tolerance):
    images = digits.to_model_input(digits.load_split("test", "paper")[0][:8], (0.5,) * 3, (0.35,) * 3)
    model = load_tiny_clip(precision)[0]
    dtype = model.visual.conv1.weight.dtype
    got, wanted = model.encode_image(images.to(dtype)).float(), tiny[0].encode_image(images)
    assert (got - wanted).norm() / wanted.norm() < tolerance


def test_unknown_precision():
    with pytest.raises(ValueError, match="got 'int8', wanted one of fp32"):
        load_tiny_clip("int8")


@pytest.mark.parametrize("text", ["a photo of the digit seven.", "żółw", "日本の数字", "🙂 emoji", "Ärger_7"])
def test_tokenizer_spells_anything_and_ends_in_the_largest_id(text):
    tokenizer = load_tiny_tokenizer()
    row = tokenizer(text)[0]
    assert tokenizer.eot_token_id == tokenizer.vocab_size - 1 == max(tokenizer.encoder.values())
    assert row[0] == tokenizer.sot_token_id
    assert row.argmax() == len(tokenizer.encode(text)) + 1
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.lower().replace(" ", "")


def test_caption_words_are_single_tokens():
    tokenizer = load_tiny_tokenizer()
    assert all(len(tokenizer.encode(word)) == 1 for word in pretrain.caption_words())


def test_vocabulary_file_is_the_scripts(tmp_path):
    pretrain.write_vocabulary(tmp_path / "bpe.txt.gz")
    written, shipped = (tmp_path / "bpe.txt.gz").read_bytes(), (ASSETS / VOCABULARY_FILE).read_bytes()
    assert gzip.decompress(written) == gzip.decompress(shipped)


def test_pretraining_never_saw_the_demos_digits():
    metadata = read_tiny_clip_metadata()
    seen = set(metadata["pretrain_indices"])
    splits = digits.split_indices(metadata["split_seed"])
    assert metadata["domain"] == "paper"
    assert "seed" in metadata
    assert seen == set(splits["pretrain"].tolist())
    assert not seen & set(splits["train"].tolist())
    assert not seen & set(splits["test"].tolist())
    assert not set(splits["train"].tolist()) & set(splits["test"].tolist())
    assert sum(len(index) for index in splits.values()) == len(digits.raw_digits()[1])


@pytest.mark.parametrize("domain", digits.DOMAINS)
def test_domains_are_deterministic(domain):
    first, labels = digits.load_domain(domain)
    again, _ = digits.load_domain(domain)
    other, _ = digits.load_domain(domain, seed=1)
    assert first.shape == (1797, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert len(labels) == 1797
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_domains_differ():
    paper, notes = (digits.load_domain(domain)[0].float() for domain in ("paper", "notes"))
    assert paper.median() > notes.median() + 20  # brighter
    assert paper[..., 0, :].std(dim=1).mean() < notes[..., 0, :].std(dim=1).mean()  # plain against coloured edges


def test_shots_are_nested_and_balanced():
    labels = digits.load_split("train", "notes")[1]
    few, many = digits.sample_shots(labels, 4, seed=1), digits.sample_shots(labels, 16, seed=1)
    assert set(few.tolist()) <= set(many.tolist())
    assert torch.bincount(labels[many]).tolist() == [16] * 10
    with pytest.raises(ValueError, match="got 21, wanted at most 20"):
        digits.sample_shots(labels, 21, seed=1)


def test_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder

    root = digits.write_image_folder(tmp_path / "notes", "train", "notes")
    folder = ImageFolder(str(root))
    assert sorted(folder.classes) == sorted(digits.CLASS_NAMES)
    assert len(folder) == 200
    assert not [path for path in root.rglob("*") if path.is_file() and path.suffix != ".png"]
    pixels, labels = digits.load_split("train", "notes")
    image, label = folder[0]
    place = next(i for i, y in enumerate(labels.tolist()) if digits.CLASS_NAMES[y] == folder.classes[label])
    assert np.array_equal(np.asarray(image), pixels[place].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("split", "domain"), [("dev", "notes"), ("test", "sand")])
def test_unknown_split_or_domain(split, domain):
    with pytest.raises(ValueError, match="wanted one of"):
        digits.load_split(split, domain)


def test_short_text_equals_the_full_context():
    torch.manual_seed(0)
    model, tokens = build_tiny_clip().eval(), load_tiny_tokenizer()(["a photo of the digit two.", "7"])
    with torch.no_grad():
        short, full = pretrain.encode_short_text(model, tokens), model.encode_text(tokens)
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-5)


def test_contrastive_loss_counts_every_true_caption():
    positive = torch.tensor([[True, True, False], [False, False, True]])
    perfect = torch.where(positive, 50.0, -50.0)
    entropy = torch.tensor(2.0).log() / 2 / 2  # two equal positives for one of two images, one of two directions
    torch.testing.assert_close(pretrain.contrastive_loss(perfect, positive), entropy)
    assert pretrain.contrastive_loss(-perfect, positive) > 50


def test_pretraining_is_reproducible(tmp_path):
    config = pretrain.PretrainConfig(seed=3, steps=3, batch_size=16, captions=10)
    torch.manual_seed(1)
    first = pretrain.pretrain(config)
    torch.manual_seed(2)  # the global generator must not matter
    second = pretrain.pretrain(config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    pretrain.save_weights(first, tmp_path / "a.safetensors", config)
    pretrain.save_weights(second, tmp_path / "b.safetensors", config)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_pretraining_script(tmp_path, capsys):
    pretrain.main(["--out", str(tmp_path / "w.safetensors"), "--seed", "1", "--steps", "2"])
    assert "accuracy" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("options", [{"steps": 0}, {"captions": 9}])
def test_bad_pretraining_options(options):
    with pytest.raises(ValueError, match="wanted at least"):
        pretrain.PretrainConfig(**options)


def test_run_demo(tmp_path, capsys, tiny):
    from upt_fast import FastUPT

    run_dir = tmp_path / "run"
    results = run_demo(run_dir, shots=(2,), seeds=(1,), epochs=2, max_test_images=40, progress=False)
    printed = capsys.readouterr().out
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    assert {"results.json", "table.md", "accuracy.png", "samples.png"} <= names
    assert any(name.startswith("upt-2shot-seed1/") for name in names)
    assert not [n for n in names if "tmp" in n]
    for name in ("accuracy.png", "samples.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")

    table = (run_dir / "table.md").read_text(encoding="utf-8")
    assert table.strip() in printed
    assert str(run_dir) in printed
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 4
    assert f"{results['summary'][0]['mean']:.1f}" in rows[3]
    assert json.loads((run_dir / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert 0 <= results["zero_shot"]["accuracy"] <= 100
    assert len(results["upt"]) == 1

    model = FastUPT.load(run_dir / "upt-2shot-seed1", clip_model=tiny[0], tokenizer=tiny[1])
    images = F.interpolate(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=32)
    assert model(images).shape == (2, 10)


def test_run_demo_repeats_itself(tmp_path):
    options = {"shots": (1,), "seeds": (2,), "epochs": 2, "max_test_images": 20, "progress": False}
    first, second = (run_demo(tmp_path / name, **options) for name in "ab")
    assert first["upt"][0]["accuracy"] == second["upt"][0]["accuracy"]
    assert first["zero_shot"] == second["zero_shot"]


def test_interrupted_run_leaves_no_half_written_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def interrupted(self, target, **options):
        target.write_bytes(b"\x89PNG half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, shots=(1,), seeds=(1,), epochs=1, max_test_images=30, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "upt-1shot-seed1"}


@pytest.mark.parametrize(
    "options",
    [{"shots": ()}, {"shots": (0,)}, {"seeds": (1, 1)}, {"epochs": 0}, {"batch_size": 0}, {"max_test_images": 0}],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"got .*, wanted"):
        DemoConfig(**options)


def test_run_demo_refuses_bad_places_and_too_many_shots(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file, wanted a folder"):
        run_demo(tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match="wanted at most 20"):
        run_demo(tmp_path / "run", shots=(99,), progress=False)
    assert not (tmp_path / "run").exists()


def test_every_caption_token_is_stored():
    from upt_fast.demo.pretrain import caption_token_ids, draw_captions

    stored, tokenizer = set(caption_token_ids().tolist()), load_tiny_tokenizer()
    texts = draw_captions(2000, np.random.default_rng(0)).texts
    assert {token for text in texts for token in tokenizer.encode(text)} <= stored
