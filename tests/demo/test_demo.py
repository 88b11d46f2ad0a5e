"""The demo: shipped files, data, pretraining script, and a small run of the whole thing."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.resources import files
from multiprocessing import active_children

import numpy as np
import pytest
import torch

from upt_fast.clip.tiny_clip import (
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    build_tiny_clip,
    load_tiny_clip,
    load_tiny_tokenizer,
    read_tiny_clip_metadata,
)
from upt_fast.demo import choose_lr, digits, pretrain, report
from upt_fast.demo.methods import ALL_METHODS, DEFAULT_METHODS, DEMO_METHODS
from upt_fast.demo.run import run_demo, zero_shot_logits
from upt_fast.demo.training import DemoConfig, Training, accuracy_of, load_digits, predict, run_trainings

ASSETS = files("upt_fast.clip") / "assets"


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


QUICK = {"shots": (1,), "seeds": (2,), "epochs": 2, "max_test_images": 20, "workers": 1, "progress": False}


def test_run_demo(tmp_path, capsys, tiny):
    from upt_fast import FastPromptedCLIP, FastUPT

    run_dir = tmp_path / "run"
    options = {**QUICK, "shots": (1, 2), "seeds": (1, 2), "max_test_images": 40}
    results = run_demo(run_dir, **options)
    printed = capsys.readouterr().out
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    prompts = {f"{method}-2shot-seed1/prompt_learner.safetensors" for method in ("coop", "vpt_deep", "upt")}
    assert names == {"results.json", "table.md", "accuracy.png", "samples.png", *prompts}
    for name in ("accuracy.png", "samples.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")

    table = (run_dir / "table.md").read_text(encoding="utf-8")
    assert table.strip() in printed
    assert str(run_dir) in printed
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {6}
    assert [row[1] for row in rows[2:]] == ["zero-shot CLIP", "CoOp", "VPT-deep", "UPT"]
    assert [row[2] for row in rows[2:]] == ["0", "512", "3,072", "121,216"]
    last = results["summary"][-1]
    assert (last["method"], last["shots"], last["trainings"]) == ("upt", 2, 2)
    gain = last["mean"] - results["zero_shot"]["accuracy"]
    assert rows[-1][4] == f"{last['mean']:.1f} ± {last['std']:.1f} ({gain:+.1f})"
    assert json.loads((run_dir / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(results))
    assert 0 <= results["zero_shot"]["accuracy"] <= 100
    assert len(results["trainings"]) == 3 * 2 * 2
    assert {entry["method"]: entry["lr"] for entry in results["trainings"]} == {
        name: DEMO_METHODS[name].lr for name in ("coop", "vpt_deep", "upt")
    }
    found = results["against_unimodal"]
    assert found["holds"] == (found["upt"] >= found["mean"] - found["std"])
    assert f"UPT's mean is {'not below' if found['holds'] else 'below'} {found['bar']:.1f}" in printed

    model = FastUPT.load(run_dir / "upt-2shot-seed1", clip_model=tiny[0], tokenizer=tiny[1])
    digits_on_notes = load_digits("demo", 40)
    guess = predict(model, digits_on_notes.images)  # the saved prompts are those that were measured
    wanted = next(t for t in results["trainings"] if (t["method"], t["shots"], t["seed"]) == ("upt", 2, 1))
    assert accuracy_of(guess, digits_on_notes.labels) == wanted["accuracy"]
    assert FastPromptedCLIP.load(run_dir / "coop-2shot-seed1").method == "coop"


def test_every_method_trains_and_repeats_itself(tmp_path):
    options = {**QUICK, "methods": ALL_METHODS, "epochs": 1}
    first, second = (run_demo(tmp_path / name, **options) for name in "ab")
    assert list(first["methods"]) == list(ALL_METHODS)
    assert first["summary"] == second["summary"]
    assert first["zero_shot"] == second["zero_shot"]
    assert all(method["parameters"] > 0 for method in first["methods"].values())


def test_the_number_of_workers_changes_nothing(tmp_path):
    options = {**QUICK, "seeds": (1, 2)}
    alone, pair = (run_demo(tmp_path / str(n), **{**options, "workers": n}) for n in (1, 2))
    assert [entry["accuracy"] for entry in alone["trainings"]] == [entry["accuracy"] for entry in pair["trainings"]]
    for method in ("coop", "vpt_deep", "upt"):
        path = f"{method}-1shot-seed1/prompt_learner.safetensors"
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes()


@pytest.mark.parametrize("methods", [("coop",), ("zeroshot", "vpt_shallow", "coop")], ids=["one", "some"])
def test_methods_are_picked(tmp_path, methods, capsys):
    results = run_demo(tmp_path, **QUICK, methods=methods)
    assert set(results["methods"]) == set(methods) - {"zeroshot"}
    assert results["against_unimodal"] is None
    assert "unimodal" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("upt", "seeds", "wanted"),
    [
        (61.0, (1, 2), "UPT's mean is not below 61.0, VPT-deep's mean minus one standard deviation."),
        (60.9, (1, 2), "UPT's mean is below 61.0, VPT-deep's mean minus one standard deviation."),
        (60.9, (1,), "UPT is below VPT-deep; with one training each there is no standard deviation."),
    ],
)
def test_comparison_says_what_came_out(upt, seeds, wanted):
    spread = 2.0 if len(seeds) > 1 else 0.0
    at = {"shots": 16, "trainings": len(seeds)}
    summary = [
        {"method": "coop", "mean": 40.0, "std": 9.0, **at},
        {"method": "vpt_deep", "mean": 63.0, "std": spread, **at},
        {"method": "vpt_deep", "mean": 99.0, "std": 0.0, **at, "shots": 4},
        {"method": "upt", "mean": upt, "std": 0.5, **at},
    ]
    results = {
        "summary": summary,
        "config": {"shots": [4, 16], "seeds": seeds},
        "methods": {"vpt_deep": {"title": "VPT-deep"}},
    }
    results["against_unimodal"] = report.compare_with_unimodal(results)
    text = report.format_comparison(results)
    assert text.splitlines()[1] == wanted
    assert f"a difference of {upt - 63:+.1f}." in text


def test_interrupted_run_leaves_no_half_written_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def interrupted(self, target, **options):
        target.write_bytes(b"\x89PNG half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, **{**QUICK, "methods": ("coop",)})
    assert {path.name for path in tmp_path.iterdir()} == {"table.md"}


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_half_way(tmp_path, workers):
    """A terminal's Ctrl-C reaches every process: all end quickly, and one line says so."""
    command = ["demo", "--out", str(tmp_path / "run"), "--shots", "16", "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-m", "upt_fast", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        # a shell's background job ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        while "trainings" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(2)  # workers are starting; their imports would print tracebacks
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 20
        assert process.returncode == 130, err
        assert err.strip().splitlines() == ["upt-fast: interrupted"]
        deadline = time.monotonic() + 10
        while _group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _group_lives(process.pid)
        assert not any((tmp_path / "run").iterdir())
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_lost_worker_is_an_error():
    config = DemoConfig(methods=("coop",), shots=(16,), seeds=(1, 2), epochs=1000)
    trainings = [Training("coop", 16, seed, 0.03, config) for seed in config.seeds]

    def kill_one():
        while not (found := active_children()):
            time.sleep(0.05)
        os.kill(found[0].pid, signal.SIGKILL)

    threading.Thread(target=kill_one).start()
    with pytest.raises(ValueError, match="a worker process was ended from outside"):
        run_trainings(trainings, workers=2, progress=False)
    assert not active_children()


def test_a_diverged_training_is_an_error():
    config = DemoConfig(methods=("upt",), epochs=3)
    with pytest.raises(ValueError, match=r"loss of upt: got nan in epoch \d+, wanted a finite one; lower lr=inf"):
        run_trainings([Training("upt", 1, 1, float("inf"), config)], workers=1, progress=False)


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ()},
        {"methods": ("zeroshot",)},
        {"methods": ("coop", "coop")},
        {"methods": ("nope",)},
        {"shots": ()},
        {"shots": (0,)},
        {"shots": (99,)},
        {"seeds": (1, 1)},
        {"epochs": 0},
        {"batch_size": 0},
        {"max_test_images": 0},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"got .*, wanted"):
        DemoConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nope"], "methods: got 'nope', wanted some of coop, cocoop, vpt_shallow, vpt_deep"),
        (["--shots", "0"], "shots: got (0,), wanted at least 1 each"),
        (["--shots", "many"], "--shots many: wanted int"),
        (["--all", "--methods", "coop"], "--all and --methods coop; wanted one or the other"),
        (["--workers", "0"], "workers: got 0, wanted at least 1"),
    ],
)
def test_bad_arguments(tmp_path, capfd, arguments, message):
    from upt_fast.cli import main

    assert main(["demo", "--out", str(tmp_path / "run"), *arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_run_demo_refuses_bad_places_and_too_many_shots(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file, wanted a folder"):
        run_demo(tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match="wanted at most 20"):
        run_demo(tmp_path / "run", shots=(99,), progress=False)
    assert not (tmp_path / "run").exists()


def test_learning_rates_are_chosen_on_other_digits(capsys):
    demo, choice = load_digits("demo"), load_digits("choice")
    assert len(demo.pool) == len(choice.pool) == 200
    seen = {image.numpy().tobytes() for part in (demo.pool, demo.images) for image in part}
    assert not seen & {image.numpy().tobytes() for part in (choice.pool, choice.images) for image in part}
    assert len(choice.pool) + len(choice.images) == len(digits.split_indices()["pretrain"])
    with pytest.raises(ValueError, match="got 'test', wanted demo or choice"):
        load_digits("test")

    options = ["--lrs", "0.03", "1", "--shots", "1", "--seeds", "5", "--epochs", "1", "--max-images", "20"]
    choose_lr.main(["coop", *options, "--workers", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| method | 0.03 | 1 |"
    assert rows[2].startswith("| coop |")
    assert rows[2].count("**") == 2


def test_the_recorded_choice_is_the_grid_s_best():
    assert set(DEMO_METHODS) > set(DEFAULT_METHODS)
    for settings in DEMO_METHODS.values():
        assert settings.lr == max(settings.measured, key=lambda lr: settings.measured[lr])


def test_every_caption_token_is_stored():
    from upt_fast.demo.pretrain import caption_token_ids, draw_captions

    stored, tokenizer = set(caption_token_ids().tolist()), load_tiny_tokenizer()
    texts = draw_captions(2000, np.random.default_rng(0)).texts
    assert {token for text in texts for token in tokenizer.encode(text)} <= stored
