"""Several models on one backbone in one pass, against each of them alone."""

import contextlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from upt_fast import FastPromptedCLIP, MultiTask
from upt_fast.data.benchmark import bench_classnames
from upt_fast.testing import random_clip

NAMES = bench_classnames(40)
# (method, classes, options); several of one shape, some alone
SPECS = [
    ("upt", NAMES[:5], {}),
    ("upt", NAMES[5:12], {"dropout": 0.3}),
    ("upt", NAMES[:5], {"preset": "released"}),
    ("coop", NAMES[:7], {"n_ctx": 4}),
    ("coop", NAMES[7:9], {"n_ctx": 4}),
    ("coop", NAMES[:6], {"n_ctx": 4, "class_token_position": "middle"}),
    ("coop", NAMES[2:9], {"n_ctx": 4, "class_token_position": "middle"}),
    ("coop", NAMES[:3], {"class_specific": True, "n_ctx": 4}),
    ("coop", NAMES[3:8], {"class_specific": True, "n_ctx": 4}),
    ("kgcoop", NAMES[:6], {}),
    ("kgcoop", NAMES[:9], {}),
    ("cocoop", NAMES[:4], {}),
    ("maple", NAMES[:4], {"depth": 2}),
    ("maple", NAMES[2:9], {"depth": 2}),
    ("vpt_shallow", NAMES[:6], {"n_ctx": 3}),
    ("vpt_shallow", NAMES[:4], {"n_ctx": 3}),
    ("vpt_deep", NAMES[:6], {"n_ctx": 3}),
    ("ivlp", NAMES[:6], {}),
    ("ivlp", NAMES[1:4], {}),
    ("zeroshot", NAMES[:6], {}),
]


@contextlib.contextmanager
def seeded(i):
    torch.manual_seed(i)
    yield


@pytest.fixture(name="make")
def make_models(tokenizer):
    return partial(make, tokenizer)


def make(tokenizer, specs=SPECS, dtype="fp64", layers=3, **options):
    """Siblings, the same models each on towers of its own, and a batch of each."""
    options["tokenizer"] = tokenizer
    torch.manual_seed(0)
    clip = random_clip(vision_layers=layers, text_layers=layers)
    clip = clip.double() if dtype == "fp64" else clip
    base = FastPromptedCLIP(clip, NAMES[:2], method="zeroshot", dtype=dtype, **options)
    tasks, alone, batches = [], [], []
    for i, (method, names, own) in enumerate(specs):
        torch.manual_seed(i)
        tasks.append(base.sibling(names, method=method, **own))
        torch.manual_seed(i)
        alone.append(FastPromptedCLIP(clip, names, method=method, dtype=dtype, **options, **own))
        size = 2 + i % 3
        images = torch.randn(size, 3, *base.vision_tower.image_size, dtype=base.logit_scale.dtype)
        batches.append((images, torch.randint(len(names), (size,))))
    return MultiTask(tasks).train(), [model.train() for model in alone], batches


def check(tasks, alone, batches, bound, found):
    for i, (task, model) in enumerate(zip(tasks.tasks, alone, strict=True)):
        with seeded(i):
            loss, logits = model.loss_and_logits(*batches[i])
        assert (found[i][1] - logits).abs().max() <= bound * logits.abs().max(), i
        assert (found[i][0] - loss).abs() <= bound * loss.abs(), i
        if not loss.requires_grad:
            continue
        loss.backward()
        for (name, p), q in zip(task.named_parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), (i, name)
            if q.grad is not None:
                assert (p.grad - q.grad).abs().max() <= bound * max(1e-3, q.grad.abs().max()), (i, name)


def run(tasks, batches):
    found = tasks.losses(batches, learners=seeded)
    sum(loss for loss, _ in found if loss.requires_grad).backward()
    return found


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_equals_each_alone(make, memory):
    tasks, alone, batches = make(memory=memory)
    check(tasks, alone, batches, 1e-11, run(tasks, batches))


def test_equals_each_alone_by_kernels(make):
    specs = [("upt", NAMES[:2], {}), ("upt", NAMES[5:8], {})]
    tasks, alone, batches = make(specs, dtype="fp32", backend="triton", layers=1)
    check(tasks, alone, batches, 2e-4, run(tasks, batches))


def test_equals_each_alone_in_float32(make):
    tasks, alone, batches = make(dtype="fp32")
    check(tasks, alone, batches, 2e-4, run(tasks, batches))


def test_twenty_steps_of_each_alone(make):
    specs = [("upt", NAMES[:5], {}), ("upt", NAMES[5:12], {}), ("maple", NAMES[:4], {"depth": 2})]
    tasks, alone, batches = make(specs)
    together = [
        torch.optim.SGD(model.parameters(), lr=0.01 * (i + 1), momentum=0.9) for i, model in enumerate(tasks.tasks)
    ]
    apart = [torch.optim.SGD(model.parameters(), lr=0.01 * (i + 1), momentum=0.9) for i, model in enumerate(alone)]
    for step in range(20):
        tasks.zero_grad()
        found = tasks.losses(batches, learners=lambda i, step=step: seeded(100 * step + i))
        sum(loss for loss, _ in found).backward()
        for i, model in enumerate(alone):
            apart[i].zero_grad()
            with seeded(100 * step + i):
                model.loss_and_logits(*batches[i])[0].backward()
            apart[i].step()
            together[i].step()
    for task, model in zip(tasks.tasks, alone, strict=True):
        for p, q in zip(task.parameters(), model.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-10


def test_one_image_tower_pass_for_a_kind(make, monkeypatch):
    tasks, _, batches = make()
    calls = []
    tower = tasks.tasks[0].vision_tower
    forward = type(tower).forward
    monkeypatch.setattr(type(tower), "forward", lambda self, *args: calls.append(len(args[0])) or forward(self, *args))
    tasks([images for images, _ in batches])
    # no prompts; upt's of two presets; maple; vpt shallow and deep; ivlp
    assert len(calls) <= 7 < len(SPECS)
    assert sum(calls) == sum(len(images) for images, _ in batches)


def test_what_is_not_finite_stays_in_its_task(make):
    specs = [("upt", NAMES[:5], {}), ("upt", NAMES[5:12], {}), ("upt", NAMES[:5], {})]
    tasks, alone, batches = make(specs)
    with torch.no_grad():
        tasks.tasks[1].prompt_learner.uni_ctx.fill_(float("nan"))
    found = run(tasks, batches)
    assert not found[1][0].isfinite()
    for i in (0, 2):
        with seeded(i):
            loss, _ = alone[i].loss_and_logits(*batches[i])
        loss.backward()
        assert (found[i][0] - loss).abs() <= 1e-12
        for p, q in zip(tasks.tasks[i].parameters(), alone[i].parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-11


def test_own_losses_and_new_classes(make):
    specs = [("upt", NAMES[:5], {}), ("upt", NAMES[5:12], {})]
    tasks, alone, batches = make(specs)
    run(tasks, batches)
    tasks.zero_grad()
    for model in (tasks.tasks[1], alone[1]):
        model.set_classnames(NAMES[20:32])
    smooth = lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.1)  # noqa: E731
    found = tasks.losses(batches, [F.cross_entropy, smooth], learners=seeded)
    assert found[1][1].shape[1] == 12
    for i, loss in enumerate((F.cross_entropy, smooth)):
        with seeded(i):
            assert (alone[i].loss_and_logits(*batches[i], loss)[0] - found[i][0]).abs() <= 1e-12


def test_peak_memory_is_not_that_of_each_alone(make):
    tasks, alone, _ = make([("upt", NAMES[:5], {}), ("upt", NAMES[5:12], {})])
    each = [model.predict_peak_memory(8) for model in alone]
    assert max(each) < tasks.predict_peak_memory([8, 8]) <= sum(each)


def test_sibling_is_a_model_of_its_own(make, tmp_path):
    tasks, alone, _ = make([("upt", NAMES[:5], {}), ("coop", NAMES[5:12], {"n_ctx": 4})])
    task, model = tasks.tasks[1].eval(), alone[1].eval()
    assert list(task.state_dict()) == list(model.state_dict())
    assert (task.encode_text() - model.encode_text()).abs().max() <= 1e-12
    task.save_pretrained(tmp_path)
    for p in model.parameters():
        p.data.zero_()
    torch.manual_seed(0)
    clip = random_clip(vision_layers=3, text_layers=3).double()
    again = FastPromptedCLIP.load(tmp_path, clip, tokenizer=task.tokenizer)
    assert (again.encode_text() - task.encode_text()).abs().max() <= 1e-12
    assert tasks.tasks[0].method == "upt"


def test_bad_models(make):
    tasks, alone, batches = make([("upt", NAMES[:5], {}), ("upt", NAMES[5:12], {})])
    with pytest.raises(ValueError, match="model 1 is not on the towers of model 0"):
        MultiTask(alone)
    with pytest.raises(ValueError, match="none twice"):
        MultiTask([tasks.tasks[0]] * 2)
    with pytest.raises(ValueError, match="none twice"):
        MultiTask([])
    with pytest.raises(ValueError, match="1 batches for 2 tasks"):
        tasks.losses(batches[:1])
