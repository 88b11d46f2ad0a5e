"""What an evaluation measures, against a plain computation in NumPy."""

import csv
import json

import numpy as np
import pytest
import torch
from runs_on_disk import write_dataset

from upt_fast.cli import main
from upt_fast.train import TrainConfig, evaluate_run, train
from upt_fast.train.metrics import MOST_CLASSES, Answers, write_confusion

BINS = 15


def answers_of(logits, labels, size: int) -> Answers:
    answers = Answers(logits.shape[1])
    for some, of_some in zip(logits.split(size), labels.split(size), strict=True):
        answers.add(some, of_some)
    return answers


def plainly(logits: np.ndarray, labels: np.ndarray) -> dict:
    """All metrics by hand, an image at a time."""
    classes = logits.shape[1]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    in_top, loss = 0, 0.0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        order = sorted(range(classes), key=lambda c: -row[c])
        confusion[label, order[0]] += 1
        in_top += label in order[:5]
        weights = np.exp(row - row.max())
        probabilities = weights / weights.sum()
        loss -= np.log(probabilities[label])
        confidence = probabilities[order[0]]
        bins.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, order[0] == label))
    total = len(labels)
    error = sum(
        len(found) / total * abs(np.mean([hit for _, hit in found]) - np.mean([sure for sure, _ in found]))
        for found in bins.values()
    )
    of_class = {c: confusion[c, c] / confusion[c].sum() for c in range(classes) if confusion[c].sum()}
    return {
        "accuracy": np.trace(confusion) / total,
        "mean_class_accuracy": np.mean(list(of_class.values())),
        "loss": loss / total,
        "num_images": total,
        "class_accuracy": {f"class {c}": value for c, value in of_class.items()},
        "top5_accuracy": in_top / total,
        "calibration_error": error,
        "confusion": confusion,
    }


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize(
    ("images", "classes", "scale", "shift"),
    [(100, 10, 3.0, 0.0), (60, 3, 1.0, 0.0), (9, 2, 20.0, 0.0), (40, 12, 0.05, 0.5), (5, 700, 8.0, 0.0)],
    ids=["usual", "few", "sure", "logits_like_probabilities", "many"],
)
def test_equals_a_plain_computation(images, classes, scale, shift, size):
    logits = scale * torch.randn(images, classes) + shift
    labels = torch.randint(classes, (images,))
    labels[::2] = logits[::2].argmax(1)  # half of them right
    names = [f"class {c}" for c in range(classes)]
    evaluation = answers_of(logits, labels, size).evaluation(names)
    wanted = plainly(logits.numpy(), labels.numpy())
    assert np.array_equal(evaluation.confusion.numpy(), wanted.pop("confusion"))
    assert evaluation.confusion.dtype == torch.int64
    found = evaluation.to_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        bound = 1e-6 if key in ("loss", "calibration_error") else 1e-12  # torchmetrics has confidences in float32
        assert found[key] == pytest.approx(value, abs=bound, rel=bound), key
    assert json.loads(json.dumps(found)) == found
    nonzero = [(true, *entry) for true, row in evaluation.confusions().items() for entry in row.items()]
    assert sum(count for _, _, count in nonzero) == images
    assert all(evaluation.confusion[names.index(t), names.index(a)] == count for t, a, count in nonzero)


def test_nothing_of_the_size_of_the_logits_is_kept():
    answers = answers_of(torch.randn(64, 50), torch.randint(50, (64,)), 8)
    kept = [value for values in vars(answers).values() if isinstance(values, list) for value in values]
    kept += [t for state in (answers._calibration.confidences, answers._calibration.accuracies) for t in state]
    assert max(value.numel() for value in kept) == 8


def test_one_class_and_very_many(tmp_path):
    alone = answers_of(torch.randn(3, 1), torch.zeros(3, dtype=torch.long), 2).evaluation(["only"])
    assert (alone.accuracy, alone.top5_accuracy, alone.calibration_error) == (1.0, 1.0, 0.0)
    count = MOST_CLASSES + 1
    many = answers_of(torch.randn(2, count), torch.tensor([0, count - 1]), 2).evaluation(list(map(str, range(count))))
    assert many.confusion is None
    assert many.confusions() == {}
    with pytest.raises(ValueError, match="4097 classes; a confusion matrix is made of up to 4096"):
        write_confusion(tmp_path / "confusion.csv", many)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), ("blue_thing", "green, dark", "red"), train=3, test=3)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    own = {"depth_text": 1, "depth_vision": 1, "shots": 1, "epochs": 1, "batch_size": 2, "progress": False}
    train(TrainConfig.from_dict({"data": str(data), "out": str(out), "clip": "tiny-digits", "device": "cpu", **own}))
    return out


def read_csv(path):
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    return head, {row[0]: list(map(int, row[1:])) for row in rows}


def test_a_run_writes_them(run, data):
    results = json.loads((run / "results.json").read_text())
    head, rows = read_csv(run / "confusion.csv")
    assert head == ["true class", "blue thing", "green, dark", "red"]
    assert list(rows) == head[1:]
    for i, (name, row) in enumerate(rows.items()):
        assert sum(row) == 3
        assert results["test"]["class_accuracy"][name] == row[i] / 3
    assert results["test"]["top5_accuracy"] == 1.0
    assert 0 <= results["test"]["calibration_error"] <= 1
    assert set(results["test_of"]["last"]) == {
        "epoch", "accuracy", "mean_class_accuracy", "loss", "top5_accuracy", "calibration_error"
    }  # fmt: skip
    evaluation, _ = evaluate_run(run, data, device="cpu", progress=False)
    assert evaluation.to_dict() == results["test"]
    assert evaluation.confusion.tolist() == list(rows.values())


def test_eval_tells_them(run, data, tmp_path, capsys):
    command = ["eval", "--checkpoint", str(run), "--data", str(data), "--device", "cpu"]
    assert main([*command, "--json", "--confusion", str(tmp_path / "c.csv")]) == 0
    found = json.loads(capsys.readouterr().out)
    _, rows = read_csv(tmp_path / "c.csv")
    assert rows == read_csv(run / "confusion.csv")[1]
    names = list(rows)
    assert found["confusion"] == {
        name: {names[i]: n for i, n in enumerate(row) if n} for name, row in rows.items() if any(row)
    }
    assert found["top5_accuracy"] == 1.0
    assert main(command) == 0
    printed = capsys.readouterr().out
    for words in ("accuracy ", "among the 3 likeliest 100.00 %", "calibration error ", "9 images: test folder"):
        assert words in printed
    assert main([*command, "--confusion", str(tmp_path / "none" / "c.csv")]) == 2
    assert "no such folder" in capsys.readouterr().err
