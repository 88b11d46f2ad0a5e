"""The tuner on a simulated device: which candidate wins, who is refused and why, and what a race costs."""

import signal
import subprocess
import sys
import types

import pytest
import torch
from simulated_device import Clock, Simulated, judge, rounded, truth

from upt_fast.engine.tuning import candidates, choices, table
from upt_fast.engine.tuning import machine as machines
from upt_fast.engine.tuning.judge import Judge
from upt_fast.engine.tuning.machine import machine
from upt_fast.engine.tuning.measuring import BrokenDeviceError, measure
from upt_fast.engine.tuning.race import HOPELESS, ROUNDS
from upt_fast.tools.isolated import measure_isolated


def race_of(times, noise=0.0, usual=None, seed=0, **options):
    """The entry that measuring candidates of these milliseconds gives, the candidates, and the seconds it took."""
    clock = Clock()
    found = {name: Simulated(ms, clock, noise, 100 * seed + i) for i, (name, ms) in enumerate(times.items())}
    entry = measure(found, usual or next(iter(times)), judge(), budget=1e9, clock=clock, **options)
    return entry, found, clock.now


@pytest.mark.parametrize("seed", range(20))
def test_the_fastest_wins_through_noise(seed):
    times = {"torch": 100.0, "a": 93.0, "b": 61.0, "c": 63.5, "d": 140.0, "e": 400.0, "f": 99.0}
    entry, _, _ = race_of(times, noise=0.01, seed=seed)
    assert entry["choice"] == "b"
    assert set(entry["ms"]) == set(times)
    assert entry["ms"]["b"] == pytest.approx(61, rel=0.02)
    assert entry["spread"]["b"] <= 0.03


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_within_three_percent_where_times_are_close(seed):
    times = {"torch": 100.0, "a": 98.0, "b": 97.0, "c": 96.5, "d": 99.0}
    entry, _, _ = race_of(times, noise=0.01, seed=seed)
    assert times[entry["choice"]] <= 1.03 * min(times.values())


def test_the_usual_one_stays_where_no_other_is_worth_it():
    assert race_of({"torch": 100.0, "other": 98.5})[0]["choice"] == "torch"
    assert race_of({"torch": 100.0, "other": 97.5})[0]["choice"] == "other"
    assert race_of({"other": 98.5, "torch": 100.0}, usual="torch")[0]["choice"] == "torch"


def test_those_behind_drop_out():
    entry, found, _ = race_of({"torch": 100.0, "a": 60.0, "b": 61.0, "c": 75.0, "slow": 100.0 * HOPELESS})
    # one run before times count, and one round of the hopeless; half of the rest after two
    assert found["slow"].runs == found["torch"].runs == 2
    assert found["c"].runs == 3
    assert found["a"].runs == found["b"].runs == 1 + ROUNDS
    assert entry["rounds"] == {"torch": 1, "a": ROUNDS, "b": ROUNDS, "c": 2, "slow": 1}


def test_those_out_of_the_race_give_their_memory_back():
    """At once, the usual one's as well, to which the others were held before; once each, and none that still runs."""
    clock = Clock()
    found = {name: Simulated(ms, clock) for name, ms in {"torch": 200.0, "a": 60.0, "b": 61.0, "c": 75.0}.items()}
    found["wrong"], found["known"] = Simulated(1, clock, fault="wrong"), Simulated(1, clock)
    open_at = {}

    def tell(event):
        open_at[event.get("stage"), event["candidate"]] = {name for name, c in found.items() if not c.closed}

    entry = measure(found, "torch", judge(), 1e9, tell, {"known": "hung"}, clock=clock)
    assert open_at["prepare", "a"] == set(found)
    assert open_at["round 1", "a"] == set(found) - {"wrong", "known"}
    assert open_at["round 2", "a"] == {"a", "b", "c"}  # torch was hopeless
    assert open_at["round 3", "a"] == {"a", "b"}
    assert {name for name, c in found.items() if not c.closed} == {"a", "b"}
    assert (entry["choice"], entry["ms"]["torch"]) == ("a", 200.0)


def test_many_candidates_cost_little():
    times = {f"route {i}": 50.0 + 5 * i for i in range(30)}
    entry, _, seconds = race_of(times)
    assert entry["choice"] == "route 0"
    assert seconds <= 2.6e-3 * sum(times.values())  # 2 runs of most, 3 of some


def test_a_drift_of_the_machine_hits_all_alike():
    """A processor that slows down while it is measured, by a half in all."""
    clock = Clock()

    class Drifting(Simulated):
        def run(self):
            factor = 1 + 0.5 * min(clock.now, 2.0) / 2.0
            clock.now += factor * self.ms / 1e3
            return factor * self.ms / 1e3

    found = {name: Drifting(ms, clock) for name, ms in {"torch": 100.0, "a": 95.0, "b": 90.0}.items()}
    assert measure(found, "torch", judge(), 1e9, clock=clock)["choice"] == "b"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "not close: gradient of ctx is off by 1.0e-02, plain PyTorch's by "),
        ("wrong at full size", "not close at full size: gradient of proj differs from the usual way's by 1.0e-02"),
        ("memory", "out of memory"),
        ("raises", "NotImplementedError: no kernel for this card"),
        ("raises later", "RuntimeError: launch failure"),
    ],
)
def test_what_fails_is_named_and_never_chosen(fault, reason):
    clock = Clock()
    found = {
        "torch": Simulated(100, clock),
        "quick": Simulated(1, clock, fault=fault),
        "good": Simulated(50, clock, seed=1),
    }
    told = []
    entry = measure(found, "torch", judge(), 1e9, told.append, clock=clock)
    assert entry["choice"] == "good"
    assert entry["refused"]["quick"].startswith(reason)
    assert "quick" not in entry["ms"]
    assert [event["candidate"] for event in told if event.get("refused", "").startswith(reason)] == ["quick"]
    assert entry["details"]["good"]["error"] <= 1.5 * entry["details"]["good"]["plain_error"] + 1e-6
    assert entry["details"]["good"]["peak_mib"] == 150


def test_a_usual_one_that_fails_is_replaced():
    clock = Clock()
    found = {"torch": Simulated(1, clock, fault="raises"), "other": Simulated(50, clock)}
    assert measure(found, "torch", judge(), 1e9, clock=clock)["choice"] == "other"
    with pytest.raises(RuntimeError, match="nothing could be measured: torch: NotImplementedError"):
        measure({"torch": Simulated(1, clock, fault="raises")}, "torch", judge(), 1e9, clock=clock)


def test_the_budget_ends_it():
    clock = Clock()
    found = {"torch": Simulated(100, clock), "compiles": Simulated(1, clock, preparing=50), "late": Simulated(1, clock)}
    entry = measure(found, "torch", judge(), budget=10, clock=clock)
    assert entry["refused"] == {"late": "not tried: the 10 s were over"}
    assert entry["choice"] == "compiles"  # it was measured, at its cost
    assert entry["details"]["compiles"]["prepare_s"] >= 50
    assert entry["rounds"] == {"torch": 1, "compiles": 1}


def test_candidates_that_are_refused_beforehand_are_not_touched():
    clock = Clock()
    found = {"torch": Simulated(100, clock), "known": Simulated(1, clock)}
    entry = measure(found, "torch", judge(), 1e9, refused={"known": "hung"}, clock=clock)
    assert entry["choice"] == "torch"
    assert (entry["refused"], found["known"].runs) == ({"known": "hung"}, 0)


def test_a_broken_device_ends_the_process():
    clock = Clock()
    found = {"torch": Simulated(100, clock), "bad": Simulated(1, clock, fault="raises")}
    with pytest.raises(BrokenDeviceError, match="bad: NotImplementedError"):
        measure(found, "torch", judge(), 1e9, healthy=lambda: False, clock=clock)


# the judge


def test_the_judge_holds_every_tensor():
    ask = judge()
    assert ask(rounded(7)).reason == ""
    for place, name in enumerate(("logits", "gradient of ctx", "gradient of proj")):
        got = rounded(7)
        got[place] = got[place] + 1e-2 * truth()[place].square().mean().sqrt()
        assert f"{name} is off by 1.0e-02" in ask(got).reason
        got[place] = torch.full_like(got[place], float("nan"))
        assert name in ask(got).reason
        got[place] = got[place][:1]
        assert ask(got).reason
    assert "off by" in ask(rounded(7, times=10)).reason


def test_what_rounding_explains_is_not_refused():
    """A plain computation that is right by chance is no yardstick; a wrong one is not explained."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))

    def product(a, b):
        return [a @ b @ a @ b @ a]

    exact = product(a, b)
    lucky = [exact[0].float()]

    def ask(again):
        return Judge(exact, lucky, ["logits"], torch.float32, again)

    honest = product(a.float(), b.float())
    assert ask(None)(honest).reason.startswith("not close")
    assert ask(lambda: product(a, b))(honest).reason == ""
    assert ask(lambda: product(a, b))([honest[0] * (1 + 1e-4)]).reason.startswith("not close")


# other processes


def isolated(declared, patience=20.0, **arguments):
    return measure_isolated("simulated_device:make", {"declared": declared, **arguments}, patience)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hangs", "hung: nothing for 4 s at prepare"),
        ("dies", "its process ended at prepare, by SIGSEGV"),
        ("breaks the device", "bad: NotImplementedError: no kernel for this card"),
    ],
)
def test_who_breaks_the_process_is_refused_and_the_rest_measured(fault, reason):
    declared = {"torch": {"ms": 3}, "bad": {"ms": 1, "fault": fault}, "good": {"ms": 2}}
    entry = isolated(declared, patience=4.0)
    assert entry["choice"] == "good"
    assert entry["refused"]["bad"].startswith(reason)
    assert set(entry["ms"]) == {"torch", "good"}


def test_a_factory_that_refuses():
    with pytest.raises(ValueError, match="wanted a candidate"):
        isolated({})


# what is kept


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("UPT_FAST_MEASURE", "1")
    monkeypatch.setenv("UPT_FAST_CACHE", str(tmp_path))
    known = dict(choices._chosen)
    choices.forget()
    yield tmp_path
    choices.forget()
    choices._chosen.update(known)


ENTRY = {"choice": "a", "usual": "torch", "ms": {"a": 1.0, "torch": 2.0}, "refused": {"b": "out of memory"}}


def test_an_entry_is_found_by_other_processes(folder):
    choices.keep("step", ENTRY)
    choices.forget()
    assert choices.find("step") == "a"
    assert choices.find("another step") is None
    assert choices.record()["choices"] == {"step": "a"}
    choices.forget()
    choices.take("step", "torch")  # of a run that is resumed
    assert choices.find("step") == "torch"


def test_nothing_is_found_where_nothing_is_measured(folder, monkeypatch):
    choices.keep("step", ENTRY)
    choices.forget()
    monkeypatch.setenv("UPT_FAST_MEASURE", "0")
    assert choices.find("step") is None


def foreign(machine_there, entries):
    return table.dump(machine_there, entries)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 0, "machine": {}, "choices": {}}',
        table.dump({"processor": "another"}, {"step": ENTRY}),
        table.dump(machine(), {"step": {**ENTRY, "choice": "b"}}),  # which was refused
        table.dump(machine(), {"step": {**ENTRY, "ms": {"a": -1}}}),
        table.dump(machine(), {"step": {**ENTRY, "ms": {"torch": 1}}}),
    ],
    ids=["empty", "cut", "no object", "older", "foreign", "refused", "negative", "not measured"],
)
def test_a_damaged_or_foreign_table_tells_nothing(folder, text):
    path = table.path(machine())
    path.write_text(text)
    assert choices.find("step") is None
    choices.keep("step", ENTRY)
    choices.forget()
    assert choices.find("step") == "a"


def test_a_table_goes_to_a_machine_of_its_kind_alone(folder, tmp_path):
    here = {"gpu": "NVIDIA H100", "capability": "9.0", "driver": "13000", "torch": "2.11"}
    file = tmp_path / "exported.json"
    file.write_text(table.dump(here, {"step": ENTRY}))
    assert table.load(file, here | {"driver": "13010"}) == {"step": ENTRY}
    with pytest.raises(ValueError, match=r"gpu: 'NVIDIA H100' there, 'NVIDIA A100' here"):
        table.load(file, here | {"gpu": "NVIDIA A100"})
    with pytest.raises(ValueError, match=r"torch: '2\.11' there, '2\.12' here"):
        table.load(file, here | {"torch": "2.12"})
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no table of choices: format None; wanted 1"):
        table.load(file, here)
    with pytest.raises(ValueError, match="No such file"):
        table.load(tmp_path / "missing.json", here)


def test_a_shipped_table_is_read_where_nothing_was_measured(folder, tmp_path, monkeypatch):
    shipped = tmp_path / "tables"
    shipped.mkdir()
    other = ENTRY | {"choice": "torch"}
    (shipped / "card.json").write_text(table.dump(machine() | {"driver": "1"}, {"step": ENTRY, "other": ENTRY}))
    (shipped / "else.json").write_text(table.dump({"gpu": "another"}, {"third": ENTRY}))
    monkeypatch.setattr(table, "SHIPPED", shipped)
    table._shipped.cache_clear()
    try:
        assert choices.find("step") == "a"
        choices.keep("other", other)
        choices.forget()
        assert (choices.find("step"), choices.find("other"), choices.find("third")) == ("a", "torch", None)
    finally:
        table._shipped.cache_clear()


KEEPING = """
import sys
from upt_fast.engine.tuning import choices
for i in range(40):
    choices.keep(f"step {sys.argv[1]} {i}", {"choice": "a", "usual": "a", "ms": {"a": 1.0}, "refused": {}})
    print(i, flush=True)
"""


def test_two_processes_at_once_leave_one_valid_table(folder):
    processes = [subprocess.Popen([sys.executable, "-c", KEEPING, name]) for name in "xy"]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(table.read(machine())) == 80
    assert len(list(folder.glob("*.json"))) == 1


def test_a_process_that_is_killed_leaves_a_valid_table(folder):
    process = subprocess.Popen([sys.executable, "-c", KEEPING, "x"], stdout=subprocess.PIPE, text=True)
    for _ in range(15):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(table.read(machine())) >= 15
    choices.keep("step", ENTRY)  # no lock is left behind
    assert "step" in table.read(machine())


class Properties:
    name, major, minor = "NVIDIA H100 80GB HBM3", 9, 0


def test_a_gpu_is_a_machine_by_card_driver_and_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    found = machines.gpu()
    assert found == {
        "gpu": Properties.name,
        "capability": "9.0",
        "torch": torch.__version__,
        "driver": machines.driver(),
    }
    driver = types.SimpleNamespace(cuDriverGetVersion=lambda place: setattr(place._obj, "value", 13010) or 0)
    monkeypatch.setattr(machines.ctypes, "CDLL", lambda name: driver)
    assert machines.driver() == "13010"
    monkeypatch.setattr(machines.ctypes, "CDLL", lambda name: types.SimpleNamespace(cuDriverGetVersion=lambda place: 3))
    assert machines.driver() == ""


# declarations


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_declared_candidates(device):
    found, left_out = candidates.declared(device, "torch", graphs=device == "cuda")
    assert next(iter(found)) == "torch"
    assert left_out == {}
    assert len({*found}) == len(found) == sum(1 + (device == "cuda") for _ in candidates.BY_DEVICE[device])
    for name, route in found.items():
        assert (route.name, candidates.Route.of(name)) == (name, route)
    quick, left_out = candidates.declared(device, "torch", False, seconds=4)
    assert "inductor/torch" in left_out
    assert "inductor/torch" not in quick
    assert "torch" in quick


def test_size_classes():
    assert [candidates.size_class(n) for n in (1, 2, 3, 8, 9, 100, 128, 1000)] == [
        *("<=1", "<=2", "<=4", "<=8", "<=16", "<=128", "<=128", "<=1024")
    ]
