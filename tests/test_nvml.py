"""Watching a GPU: the real pynvml on a stand-in library, the sampler, and the arithmetic."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from peftbench.measuring.energy import energy_in
from peftbench.measuring.gpu import gpu_readings
from peftbench.measuring.nvml import find_uuid, throttle_names
from peftbench.measuring.sampler import (
    Baseline,
    DeviceTrace,
    MemorySamples,
    ProcessSeen,
    Sampler,
    SlowSamples,
    Trace,
)
from peftbench.rounds import add_infer_gpu_readings

SOURCE = Path(__file__).parent / "fake_nvml" / "nvml.c"
ROOT = Path(__file__).parent.parent

CARD = """\
driver 575.57.08
cuda 12090
count 1
0.uuid GPU-aaaa1111-0000
0.name NVIDIA Fake A
0.bus 65
0.total 80000
0.reserved 500
0.used 1000
0.processes 4242:700,77:N/A
0.energy 123456
0.power 251500
0.power_limit 400000
0.sm_clock 1410
0.memory_clock 1593
0.temperature 61
0.throttle 0x44
"""
# card 1 comes first on the bus: NVML's order is not CUDA's
SECOND = """\
1.uuid GPU-bbbb2222-0000
1.name NVIDIA Fake B
1.bus 23
1.total 40000
1.used 300
1.processes none
"""
TWO = CARD.replace("count 1", "count 2") + SECOND

# reads the scene anew for every line of its input
PROBE = """
import json, sys
from peftbench.measuring.nvml import open_devices, select

for line in sys.stdin:
    visible, order, pid = json.loads(line)
    devices, note = open_devices(visible, order)
    found = []
    for d in devices:
        memory = d.memory()
        found.append({
            "info": d.info(),
            "is_mig": d.is_mig,
            "is_selected": select(devices, d.uuid[4:]) is d,
            "used": memory and memory.used_bytes,
            "processes": d.processes(),
            "process": d.process_bytes(pid),
            "slow": [d.energy_j(), d.power_w(), d.sm_clock_mhz(), d.memory_clock_mhz(),
                     d.temperature_c(), d.throttle_reasons()],
            "reasons": d.reasons, "lost": d.lost,
        })
    print(json.dumps([found, note]), flush=True)
"""


def build(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler: apt-get install gcc")
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, *flags, "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    return folder


def environment(library: Path, scene: Path) -> dict[str, str]:
    """Of a process that finds this library where the driver's would be."""
    places = {"LD_LIBRARY_PATH": library, "FAKE_NVML_SCENE": scene, "PYTHONPATH": ROOT}
    return {**os.environ, **{name: str(place) for name, place in places.items()}}


class Prober:
    """A process that has the library in place of the driver's, and what it reads of a scene."""

    def __init__(self, library: Path) -> None:
        self._scene = library / "scene"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROBE],
            env=environment(library, self._scene),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, scene, visible=None, order=None, pid=4242):
        self._scene.write_text(scene)
        self.process.stdin.write(json.dumps([visible, order, pid]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def prober(library: Path):
    probe = Prober(library)
    yield probe
    probe.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def probe(library):
    yield from prober(library)


@pytest.fixture(scope="module")
def probe_old_driver(tmp_path_factory):
    yield from prober(build(tmp_path_factory.mktemp("old_nvml"), "-DOLD_DRIVER"))


def without(text: str, *keys: str) -> str:
    """The scene without these lines: the driver does not support what they answer."""
    return "".join(line for line in text.splitlines(keepends=True) if line.split()[0] not in keys)


# one device, read through pynvml


def test_a_plain_card_gives_every_reading(probe):
    [card], note = probe(CARD)
    assert note is None
    assert card["info"] == {
        "name": "NVIDIA Fake A",
        "uuid": "GPU-aaaa1111-0000",
        "driver_version": "575.57.08",
        "cuda_driver_version": "12.9",
        "total_bytes": 80000,
        "memory_api": "v2",
        "power_limit_w": 400.0,
        "mig": None,
    }
    assert card["used"] == 1000  # v2: without the driver's 500
    assert card["processes"] == {"4242": 700, "77": None}
    assert card["process"] == 700
    # 123456 mJ, 251500 mW, and bits 2 and 6 of the mask
    reasons = ["sw_power_cap", "hw_thermal_slowdown"]
    assert card["slow"] == [123.456, 251.5, 1410, 1593, 61, reasons]
    assert card["lost"] is None
    assert card["is_selected"] is True
    assert card["reasons"] == {
        "mig_mode": "NVML gives no mig mode: not supported by this device",
        "process_memory": "NVML gives no process memory: the driver answers N/A for it",
    }


def test_an_old_driver_is_read_through_its_first_functions(probe_old_driver):
    [card], _ = probe_old_driver(CARD)
    assert card["info"]["memory_api"] == "v1"
    assert card["used"] == 1500  # v1 counts what the driver reserves
    assert card["process"] == 700
    assert card["info"]["cuda_driver_version"] == "12.9"
    assert card["slow"][4:] == [61, ["sw_power_cap", "hw_thermal_slowdown"]]


@pytest.mark.parametrize("code", [13, 25], ids=["not found", "version mismatch"])
def test_memory_falls_back_to_v1_where_v2_is_refused(probe, code):
    [card], _ = probe(CARD + f"0.memory_v2 !{code}\n")
    assert (card["info"]["memory_api"], card["used"]) == ("v1", 1500)
    assert "memory" not in card["reasons"]


def test_what_a_card_does_not_support_is_none_with_its_reason(probe):
    silent = ("energy", "power", "power_limit", "sm_clock", "memory_clock", "temperature")
    keys = [f"0.{key}" for key in (*silent, "throttle", "used", "processes")]
    [card], _ = probe(without(CARD, *keys))
    assert card["slow"] == [None] * 6
    assert card["used"] is card["processes"] is card["process"] is None
    assert card["info"]["total_bytes"] is card["info"]["power_limit_w"] is None
    for quantity in ("energy_counter", "power", "throttle_reasons", "memory", "process_list"):
        words = quantity.replace("_", " ")
        assert card["reasons"][quantity] == f"NVML gives no {words}: not supported by this device"


def test_n_a_values_are_none_and_not_huge_numbers(probe):
    text = without(CARD, "0.power", "0.energy", "0.used")
    text += "0.power 0xFFFFFFFF\n0.energy 0xFFFFFFFFFFFFFFFF\n0.used 0xFFFFFFFFFFFFFFFF\n"
    [card], _ = probe(text)
    assert card["slow"][:2] == [None, None]
    assert card["used"] is None
    for quantity in ("power", "energy_counter", "memory"):
        assert card["reasons"][quantity].endswith(": the driver answers N/A")


def test_no_permission_for_processes_leaves_the_rest(probe):
    [card], _ = probe(without(CARD, "0.processes") + "0.processes !4\n")
    assert card["processes"] is card["process"] is None
    assert card["reasons"]["process_list"] == "NVML gives no process list: no permission"
    assert card["used"] == 1000


@pytest.mark.parametrize(
    ("listed", "bytes_", "why"),
    [
        ("4242:N/A", None, "the driver answers N/A for it"),
        ("4242:0", None, "the driver lists the process with 0 bytes"),
        ("999:700", None, "no process 4242 on this device"),
        ("4242:700,4242:50", 750, None),  # two instances of one card
    ],
)
def test_process_memory(probe, listed, bytes_, why):
    [card], _ = probe(without(CARD, "0.processes") + f"0.processes {listed}\n")
    assert card["process"] == bytes_
    expected = None if why is None else f"NVML gives no process memory: {why}"
    assert card["reasons"].get("process_memory") == expected


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (9, "NVML: driver not loaded"),
        (4, "NVML: no permission"),
        (999, "NVML: Unknown Error"),
    ],
)
def test_init_that_fails_gives_no_devices_and_the_reason(probe, code, why):
    assert probe(CARD + f"init !{code}\n") == [[], why]


def test_a_library_that_cannot_be_loaded_gives_the_reason(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_text("found first, and no library")
    probe = Prober(tmp_path)
    assert probe(CARD) == [[], "NVML: library libnvidia-ml.so.1 not found"]
    probe.process.communicate(timeout=60)


def test_cards_that_may_not_be_opened_are_left_out(probe):
    found, note = probe(TWO + "0.handle !4\n")
    assert [d["info"]["name"] for d in found] == ["NVIDIA Fake B"]
    assert note is None
    assert probe(CARD + "0.handle !4\n") == [[], "NVML: GPU 0: no permission"]


def test_a_lost_card_answers_nothing_and_says_so(probe):
    [card], _ = probe(without(CARD, "0.sm_clock") + "0.sm_clock !15\n")
    assert card["slow"] == [123.456, 251.5, None, None, None, None]
    assert card["lost"] == card["reasons"]["device"]
    assert card["lost"] == "NVML: the GPU is lost (it fell off the bus or cannot be reached)"


MIG = (
    without(CARD, "0.processes")
    + """\
0.mig_mode 1
0.mig_slots 3
0.mig0 10
0.mig2 12
0.processes !4
10.uuid MIG-cccc3333-0000
10.name NVIDIA Fake A MIG 1g.10gb
10.total 10000
10.used 40
10.processes 4242:N/A
12.uuid MIG-dddd4444-0000
12.name NVIDIA Fake A MIG 2g.20gb
12.total 20000
12.used 90
12.processes 4242:60
"""
)


def test_a_card_in_mig_mode_gives_its_instances(probe):
    found, note = probe(MIG)
    assert note is None
    assert [(d["info"]["uuid"], d["info"]["total_bytes"], d["used"]) for d in found] == [
        ("MIG-cccc3333-0000", 10000, 40),
        ("MIG-dddd4444-0000", 20000, 90),
    ]
    assert [d["is_mig"] for d in found] == [d["is_selected"] for d in found] == [True, True]
    assert [d["info"]["mig"] for d in found] == ["instance", "instance"]
    assert [d["process"] for d in found] == [None, 60]
    assert found[0]["slow"] == [None] * 6  # energy and clocks are the card's, not an instance's


@pytest.mark.parametrize("visible", ["MIG-dddd4444-0000", "mig-dddd"])
def test_cuda_visible_devices_names_a_mig_instance(probe, visible):
    [instance], note = probe(MIG, visible=visible)
    assert (instance["info"]["uuid"], note) == ("MIG-dddd4444-0000", None)


def test_an_index_among_several_instances_takes_them_all_with_a_note(probe):
    found, note = probe(MIG, visible="0", order="PCI_BUS_ID")
    assert [d["info"]["uuid"] for d in found] == ["MIG-cccc3333-0000", "MIG-dddd4444-0000"]
    assert note.startswith("CUDA_VISIBLE_DEVICES=0 counts in CUDA's own order")


# CUDA_VISIBLE_DEVICES

A, B = "GPU-aaaa1111-0000", "GPU-bbbb2222-0000"


@pytest.mark.parametrize(
    ("visible", "order", "uuids"),
    [
        (None, None, [A, B]),
        ("GPU-bbbb", None, [B]),
        ("gpu-BBBB2222-0000,GPU-aaaa", None, [B, A]),
        ("0", "PCI_BUS_ID", [B]),  # bus 23 before bus 65, whatever NVML's index
        ("1", "PCI_BUS_ID", [A]),
        (" 1 , 0 ", "PCI_BUS_ID", [A, B]),
        ("1,-1,0", "PCI_BUS_ID", [A]),  # CUDA stops at the first entry that it cannot use
        ("1,7,0", "PCI_BUS_ID", [A]),
        ("1,0", None, [A, B]),  # both, in whatever order
    ],
)
def test_visible_devices_are_mapped_by_uuid(probe, visible, order, uuids):
    found, note = probe(TWO, visible=visible, order=order)
    assert [d["info"]["uuid"] for d in found] == uuids
    assert note is None


@pytest.mark.parametrize("order", [None, "FASTEST_FIRST"])
def test_an_index_in_cudas_own_order_takes_all_devices_with_a_note(probe, order):
    found, note = probe(TWO, visible="1", order=order)
    assert [d["info"]["uuid"] for d in found] == [A, B]
    assert note == (
        "CUDA_VISIBLE_DEVICES=1 counts in CUDA's own order, which NVML does not know, so all 2 "
        "devices are watched; set CUDA_DEVICE_ORDER=PCI_BUS_ID or give UUIDs"
    )


@pytest.mark.parametrize("visible", ["-1", "7", "none", "GPU-", "GPU-eeee"])
def test_entries_that_name_no_device_leave_none(probe, visible):
    assert probe(TWO, visible=visible, order="PCI_BUS_ID") == [
        [],
        f"CUDA_VISIBLE_DEVICES={visible} names no device that NVML lists",
    ]


def test_empty_cuda_visible_devices_leaves_none(probe):
    assert probe(CARD, visible=" ") == [[], "CUDA_VISIBLE_DEVICES is empty: no GPU is visible"]


def test_index_0_of_a_single_card_is_clear(probe):
    [card], note = probe(CARD, visible="0")
    assert (card["info"]["uuid"], note) == (A, None)


def test_a_child_names_its_device_without_the_prefix():
    cards = [(A, None), (B, None)]
    assert find_uuid(cards, "bbbb2222-0000") == 1
    assert find_uuid(cards, "GPU-BBBB2222-0000") == 1
    assert find_uuid(cards, "bbbb2222") is None  # a child's UUID is whole
    instances = [("MIG-cccc-0", A), ("MIG-dddd-0", A), ("MIG-eeee-0", B)]
    assert find_uuid(instances, "dddd-0") == 1
    assert find_uuid(instances, "bbbb2222-0000") == 2  # the only instance of its card
    assert find_uuid(instances, "aaaa1111-0000") is None  # two: which one cannot be told


def test_throttle_bits_have_names_and_unknown_ones_their_value():
    assert throttle_names(0) == ()
    assert throttle_names(0x1 | 0x20 | 0x80 | 0x800) == (
        "gpu_idle",
        "sw_thermal_slowdown",
        "hw_power_brake_slowdown",
        "0x800",
    )


# the sampler, on a scene that changes while it runs

LIVE = """
import json, os, subprocess, sys, time
from pathlib import Path
from peftbench.measuring.gpu import gpu_readings
from peftbench.measuring.nvml import open_devices
from peftbench.measuring.sampler import Sampler

path = Path(os.environ["FAKE_NVML_SCENE"])
base = path.read_text()

def scene(**values):
    lines = [l for l in base.splitlines() if l.split()[0][2:] not in values]
    new = path.with_suffix(".new")
    new.write_text("\\n".join(lines + [f"0.{k} {v}" for k, v in values.items()]) + "\\n")
    new.replace(path)

def readings(wanted):
    # counted, not timed: on a loaded machine the sampler's thread may stand still for long
    goal = {name: done + wanted for name, done in counts.items()}
    deadline = time.monotonic() + 30
    while any(counts[name] < goal[name] for name in goal):
        assert time.monotonic() < deadline
        time.sleep(0.002)

def phase(name, **values):
    scene(**values)
    readings(2)  # a pass that had begun on the old scene ends
    start = time.monotonic()
    readings(4)
    windows[name] = (start, time.monotonic())
    readings(2)  # a pass that is stamped in this window has read this scene

def counted(device, name):
    method = getattr(device, name)
    def call():
        answer = method()
        counts[name] += 1
        return answer
    counts[name] = 0
    setattr(device, name, call)

counts = {}
windows = {}
devices, note = open_devices(None)
counted(devices[0], "memory")
counted(devices[0], "throttle_reasons")
sampler = Sampler(devices, 0.005, slow_interval_s=0.02, note=note)
sampler.start()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
try:
    pid = child.pid
    sampler.set_pid(pid)
STEPS
finally:
    child.kill()
    child.wait()
trace = sampler.stop()
result = gpu_readings(trace, windows, ("warmup", "train"), "aaaa1111-0000")
print(json.dumps([trace.to_dict(), result.to_dict(), child.pid, windows]))
"""


@pytest.fixture
def live(library, tmp_path):
    """Run the sampler beside a real child; `steps` call phase(name, key=value of the card)."""

    def run(text, steps):
        scene = tmp_path / "scene"
        scene.write_text(text)
        code = LIVE.replace("STEPS", textwrap.indent(textwrap.dedent(steps), "    "))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(library, scene),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


EMPTY = without(CARD, "0.processes", "0.throttle") + "0.processes none\n0.throttle 0x4\n"


def test_sampler_sees_a_real_child_and_its_peaks_fall_into_the_right_phases(live):
    trace, readings, pid, windows = live(
        EMPTY,
        """
        phase("load", used=9000, processes=f"{pid}:7900")
        phase("train", used=5000, processes=f"{pid}:3900")
        phase("evaluate", used=8000, processes=f"{pid}:6900")
        """,
    )
    [device] = readings["devices"]
    peaks = {
        name: (p["nvml_process_peak_bytes"], p["nvml_device_peak_bytes"])
        for name, p in device["phases"].items()
    }
    # the reading before the child started was 1000
    assert peaks == {"load": (7900, 8000), "train": (3900, 4000), "evaluate": (6900, 7000)}
    assert readings["peak_gpu_memory_bytes"] == 3900
    assert readings["peak_gpu_memory_source"] == "memory of the child's process, from NVML"
    assert readings["device_uuid"] == A
    assert readings["invalid"] == []
    assert (device["foreign_processes"], device["is_shared"]) == (0, False)
    assert device["conditions"]["throttle_reasons"] == ["sw_power_cap"]
    assert (device["conditions"]["throttled_ratio"], device["is_throttled"]) == (0.0, False)
    assert trace["pid"] == pid
    assert trace["devices"][0]["baseline"] == {"used_bytes": 1000, "pids": []}
    [seen] = trace["devices"][0]["processes"]
    assert (seen["pid"], seen["peak_bytes"]) == (pid, 7900)
    times = trace["devices"][0]["memory"]["times_s"]
    assert times[0] < windows["load"][0] < windows["evaluate"][1] < times[-1]
    assert trace["interval_asked_s"] == 0.005
    assert trace["interval_s"] == pytest.approx((times[-1] - times[0]) / (len(times) - 1))
    assert trace["interval_s"] >= 0.004  # no catching up after a late pass
    assert trace["pass_s"] > 0
    slow = trace["devices"][0]["slow"]["times_s"]
    assert slow[0] < windows["load"][0]
    assert windows["evaluate"][1] < slow[-1]
    assert len(slow) < len(times)


def test_in_a_container_the_growth_of_the_device_is_used(live):
    _, readings, _, _ = live(EMPTY, 'phase("train", used=5000, processes=f"{pid + 100000}:3900")')
    [device] = readings["devices"]
    assert readings["peak_gpu_memory_bytes"] == 4000
    assert readings["peak_gpu_memory_source"] == (
        "growth of the device's use, from NVML: the child's pid is not in NVML's list, "
        "which holds the host's pids: a container sees others"
    )
    assert device["phases"]["train"]["nvml_process_peak_bytes"] is None
    assert device["foreign_processes"] is device["is_shared"] is None
    assert device["reasons"]["foreign_processes"].startswith("cannot be told: ")
    assert readings["invalid"] == []


def test_a_card_lost_in_mid_run_keeps_what_was_read_and_says_why(live):
    trace, readings, _, windows = live(
        EMPTY,
        """
        phase("warmup", used=6000, processes=f"{pid}:4900")
        phase("train", error=15)
        """,
    )
    lost = "NVML: the GPU is lost (it fell off the bus or cannot be reached)"
    [device] = trace["devices"]
    assert device["reasons"]["device"] == lost
    assert device["memory"]["times_s"][-1] < windows["train"][0]
    assert None not in device["memory"]["used_bytes"]
    assert readings["peak_gpu_memory_bytes"] == 4900
    phases = readings["devices"][0]["phases"]
    assert phases["warmup"]["nvml_process_peak_bytes"] == 4900
    assert phases["train"]["nvml_process_peak_bytes"] is None
    assert phases["train"]["reasons"]["nvml_process_peak_bytes"] == (
        f"a peak needs 2 readings, 0 came; {lost}"
    )
    assert phases["train"]["energy_j"] is None
    assert lost in phases["train"]["reasons"]["energy_j"]


def test_a_process_that_appears_is_foreign_and_makes_the_round_invalid(live):
    _, readings, _, _ = live(
        EMPTY, 'phase("train", used=5000, processes=f"{pid}:3900,{os.getpid()}:50")'
    )
    assert readings["peak_gpu_memory_bytes"] == 3900
    assert readings["devices"][0]["foreign_processes"] == 1
    assert readings["invalid"] == ["another process used the GPU"]


def test_a_throttled_round_is_invalid(live):
    _, readings, _, _ = live(EMPTY, 'phase("train", processes=f"{pid}:3900", throttle=0x4C)')
    assert readings["devices"][0]["is_throttled"] is True
    assert readings["invalid"] == [
        "the GPU was throttled for 100% of the train phase: hw_slowdown, hw_thermal_slowdown"
    ]


def test_a_sampler_without_devices_gives_the_note_as_reason():
    sampler = Sampler([], note="NVML: driver not loaded")
    sampler.start()
    sampler.set_pid(1)
    trace = sampler.stop()
    assert (trace.devices, trace.interval_s, trace.pass_s) == ((), None, None)
    readings = gpu_readings(trace, {"train": (0.0, 1.0)}, ("train",), None)
    assert readings.peak_gpu_memory_bytes is None
    assert readings.reasons == {"peak_gpu_memory_bytes": "NVML: driver not loaded"}


# the arithmetic, on traces written by hand

CHILD = 50
NOTHING_SLOW = SlowSamples((), (), (), (), (), (), ())


def device(
    memory, *, uuid=A, used_before=1000, pids_before=(), pids=(CHILD,), slow=NOTHING_SLOW, **reasons
):
    """`memory`: (time, used, process) triples."""
    columns = tuple(zip(*memory, strict=True)) or ((), (), ())
    seen = tuple(ProcessSeen(pid, 0.0, 9.0, None) for pid in pids)
    before = Baseline(used_before, pids_before)
    return DeviceTrace(
        uuid, None, {"name": "Fake"}, before, MemorySamples(*columns), slow, seen, reasons
    )


def trace_of(*devices, pid=CHILD):
    return Trace(pid, 0.01, 0.011, 0.001, devices, None)


def slow_samples(times, energy=None, power=None, throttle=None, clock=None, celsius=None):
    none = (None,) * len(times)
    return SlowSamples(
        times,
        energy or none,
        power or none,
        clock or none,
        none,
        celsius or none,
        throttle or none,
    )


def test_a_sample_on_a_border_belongs_to_the_later_phase():
    memory = [(1.0, 2000, 900), (1.5, 2100, 950), (2.0, 9000, 8000), (2.5, 2200, 940)]
    readings = gpu_readings(trace_of(device(memory)), {"a": (1.0, 2.0), "b": (2.0, 3.0)}, ("a",), A)
    phases = readings.devices[0].phases
    assert (phases["a"].nvml_process_peak_bytes, phases["a"].nvml_device_peak_bytes) == (950, 1100)
    assert (phases["b"].nvml_process_peak_bytes, phases["b"].nvml_device_peak_bytes) == (8000, 8000)
    assert (readings.peak_gpu_memory_bytes, readings.samples, readings.interval_s) == (
        950,
        2,
        0.011,
    )


def test_samples_between_two_windows_belong_to_none():
    memory = [
        (1.0, 2000, 900),
        (1.1, 2000, 910),
        (1.5, 9999, 9000),
        (2.0, 3000, 920),
        (2.1, 1, 930),
    ]
    readings = gpu_readings(
        trace_of(device(memory)),
        {"warmup": (1.0, 1.2), "train": (2.0, 2.2)},
        ("warmup", "train"),
        A,
    )
    assert readings.peak_gpu_memory_bytes == 930
    assert readings.devices[0].phases["train"].nvml_device_peak_bytes == 2000


def test_one_reading_is_no_peak_but_counts_in_the_headline():
    memory = [(1.0, 7000, 5000), (2.0, 4000, 2000), (2.5, 4100, 2100)]
    windows = {"warmup": (0.5, 1.5), "train": (1.9, 3.0), "load": (8.0, 9.0)}
    readings = gpu_readings(trace_of(device(memory)), windows, ("warmup", "train"), A)
    short = readings.devices[0].phases["warmup"]
    assert short.samples == 1
    assert short.nvml_process_peak_bytes is short.nvml_device_peak_bytes is None
    assert short.reasons["nvml_process_peak_bytes"] == "a peak needs 2 readings, 1 came"
    assert short.reasons["nvml_device_peak_bytes"] == "a peak needs 2 readings, 1 came"
    assert (readings.peak_gpu_memory_bytes, readings.samples) == (5000, 3)
    alone = gpu_readings(trace_of(device(memory)), windows, ("warmup",), A)
    assert alone.peak_gpu_memory_bytes is None
    assert "a peak needs 2 readings, 1 came" in alone.reasons["peak_gpu_memory_bytes"]


def test_headline_leaves_out_phases_that_it_does_not_name_or_that_were_not_run():
    memory = [(1.0, 7000, 5000), (1.1, 7000, 5000), (2.0, 4000, 2000), (2.5, 4100, 2100)]
    windows = {"evaluate": (0.5, 1.5), "train": (1.9, 3.0)}
    readings = gpu_readings(trace_of(device(memory)), windows, ("reference", "train"), A)
    assert readings.peak_gpu_memory_bytes == 2100


GROWN = [(1.0, 3000, None), (1.1, 4500, None)]
TRAIN = {"train": (0.9, 2.0)}


@pytest.mark.parametrize(
    ("pids", "reasons", "why"),
    [
        ((CHILD,), {"process_memory": "N/A here"}, "N/A here"),
        ((), {"process_list": "no permission here"}, "no permission here"),
        ((999,), {}, "a container sees others"),
    ],
)
def test_without_the_processs_memory_the_growth_counts_and_the_source_says_why(pids, reasons, why):
    readings = gpu_readings(trace_of(device(GROWN, pids=pids, **reasons)), TRAIN, ("train",), A)
    assert readings.peak_gpu_memory_bytes == 3500
    assert readings.peak_gpu_memory_source.startswith("growth of the device's use, from NVML: ")
    assert readings.peak_gpu_memory_source.endswith(why)


def test_no_growth_and_no_process_is_not_zero_but_none():
    still = [(1.0, 1000, None), (1.1, 1000, None)]
    readings = gpu_readings(trace_of(device(still, pids=())), TRAIN, ("train",), A)
    assert readings.peak_gpu_memory_bytes is None
    assert readings.reasons["peak_gpu_memory_bytes"].endswith("; the device's use did not grow")
    freed = [(1.0, 400, None), (1.1, 300, None)]
    readings = gpu_readings(trace_of(device(freed, pids=())), TRAIN, ("train",), A)
    assert readings.devices[0].phases["train"].nvml_device_peak_bytes is None
    assert readings.peak_gpu_memory_bytes is None


def test_no_baseline_leaves_the_process_and_no_growth():
    seen = [(1.0, 3000, 800), (1.1, 4500, 700)]
    readings = gpu_readings(trace_of(device(seen, used_before=None)), TRAIN, ("train",), A)
    assert readings.peak_gpu_memory_bytes == 800
    train = readings.devices[0].phases["train"]
    assert train.nvml_device_peak_bytes is None
    assert train.reasons == {
        "nvml_device_peak_bytes": "no reading before the child was started",
        "energy_j": "no reading of energy counter; no reading of power",
    }


def test_a_foreign_process_from_before_spoils_a_growth_even_in_a_container():
    shared = device(GROWN, pids_before=(7, 8), pids=(7, 8, 999))
    readings = gpu_readings(trace_of(shared), TRAIN, ("train",), A)
    assert readings.devices[0].foreign_processes == 2
    assert readings.invalid == (
        "2 other processes used the GPU, and may have grown on it in the child's stead",
    )


def test_foreign_processes_are_all_pids_but_the_childs():
    seen = [(1.0, 3000, 800), (1.1, 4500, 700)]
    shared = device(seen, pids_before=(7,), pids=(CHILD, 8, 9))
    readings = gpu_readings(trace_of(shared), TRAIN, ("train",), A)
    assert (readings.devices[0].foreign_processes, readings.devices[0].is_shared) == (3, True)
    assert readings.invalid == ("3 other processes used the GPU",)


def test_foreign_processes_are_unknown_where_none_are_listed():
    unlisted = device(GROWN, pids_before=None, pids=(), process_list="no permission here")
    readings = gpu_readings(trace_of(unlisted), TRAIN, ("train",), A)
    assert readings.devices[0].is_shared is None
    assert readings.reasons["foreign_processes"] == "no permission here"


def test_of_several_devices_the_childs_is_the_headline_and_the_largest_stands_beside_it():
    small = device([(1.0, 3000, 800), (1.1, 4500, 700)])
    large = device([(1.0, 3000, 900), (1.1, 9500, 1700)], uuid=B)
    both = trace_of(small, large)
    readings = gpu_readings(both, TRAIN, ("train",), "aaaa1111-0000")
    assert (readings.device_uuid, readings.peak_gpu_memory_bytes) == (A, 800)
    assert readings.all_devices_peak_bytes == 1700
    assert [d.peak_gpu_memory_bytes for d in readings.devices] == [800, 1700]
    unnamed = gpu_readings(both, TRAIN, ("train",), None)
    assert (unnamed.device_uuid, unnamed.peak_gpu_memory_bytes) == (B, 1700)
    assert unnamed.peak_gpu_memory_source.endswith(
        "the largest of 2 devices, as the child named none"
    )
    other = gpu_readings(both, TRAIN, ("train",), "eeee")
    assert other.peak_gpu_memory_bytes is None
    assert other.reasons == {
        "peak_gpu_memory_bytes": "the child ran on device eeee, which was not watched"
    }


def test_growth_of_a_device_on_which_the_child_is_not_is_not_the_childs():
    own = device([(1.0, 3000, 800), (1.1, 4500, 700)])
    readings = gpu_readings(
        trace_of(own, device(GROWN, uuid=B, pids=(999,))), TRAIN, ("train",), None
    )
    assert readings.devices[1].peak_gpu_memory_bytes is None
    assert (
        readings.devices[1].reasons["peak_gpu_memory_bytes"] == "the child was not on this device"
    )
    assert (readings.device_uuid, readings.all_devices_peak_bytes) == (A, 800)


def test_energy_is_the_counters_difference_between_interpolated_ends():
    slow = slow_samples((0.0, 2.0, 2.5, 3.5), energy=(100.0, 200.0, 260.0, 300.0), power=(9.0,) * 4)
    # at 0.5: a quarter of the way from 100 to 200; at 2.75: 260 + a quarter of 40
    assert energy_in(device([], slow=slow), (0.5, 2.75)) == (145.0, "nvml energy counter", None)


def test_energy_without_a_counter_is_the_trapezoids_under_the_power():
    slow = slow_samples((0.0, 1.0, 2.0, 3.0), power=(100.0, 200.0, 200.0, 400.0))
    # 0.5 to 1: (150 + 200) / 2 * 0.5 = 87.5; 1 to 2: 200; 2 to 2.5: (200 + 300) / 2 * 0.5 = 125
    assert energy_in(device([], slow=slow), (0.5, 2.5)) == (412.5, "integrated power", None)


def test_a_counter_that_stands_still_is_not_zero_joules():
    slow = slow_samples((0.0, 1.0, 2.0, 3.0), energy=(5.0,) * 4, power=(100.0,) * 4)
    assert energy_in(device([], slow=slow), (0.5, 2.5)) == (200.0, "integrated power", None)
    slow = slow_samples((0.0, 1.0, 2.0, 3.0), energy=(5.0,) * 4)
    unpowered = device([], slow=slow, power="no power here")
    assert energy_in(unpowered, (0.5, 2.5)) == (
        None,
        None,
        "the energy counter did not advance; no power here",
    )


@pytest.mark.parametrize(
    ("window", "why"),
    [
        ((1.2, 1.8), "the phase is too short for the readings of energy and power"),
        ((0.5, 3.5), "the readings do not reach over the whole phase"),
        ((-0.5, 2.5), "the readings do not reach over the whole phase"),
    ],
)
def test_energy_of_a_window_that_the_readings_do_not_cover_is_none(window, why):
    slow = slow_samples((0.0, 1.0, 2.0, 3.0), energy=(0.0, 1.0, 2.0, 3.0), power=(1.0,) * 4)
    assert energy_in(device([], slow=slow), window) == (None, None, why)


def throttled(times: int, reason: str):
    """A card that gives this reason in so many of the 20 readings of the train phase."""
    moments = tuple(1.0 + i / 20 for i in range(20))
    names = tuple(("sw_power_cap", reason) if i < times else ("gpu_idle",) for i in range(20))
    slow = slow_samples(
        (*moments, 5.0),
        throttle=(*names, ("hw_slowdown",)),  # the last is after the phase
        clock=(*[1000] * 10, *[2000] * 10, 1),
        celsius=(*[60] * 19, 71, 99),
    )
    seen = [(1.0, 3000, 800), (1.1, 4500, 700)]
    return gpu_readings(trace_of(device(seen, slow=slow)), TRAIN, ("train",), A)


def test_a_card_is_throttled_above_a_twentieth_of_the_train_phase():
    once, twice = throttled(1, "sw_thermal_slowdown"), throttled(2, "sw_thermal_slowdown")
    assert once.devices[0].conditions.throttled_ratio == 0.05
    assert (once.devices[0].is_throttled, once.invalid) == (False, ())
    assert twice.devices[0].conditions.throttled_ratio == 0.1
    assert twice.invalid == (
        "the GPU was throttled for 10% of the train phase: sw_thermal_slowdown",
    )
    assert throttled(20, "sync_boost").devices[0].conditions.throttled_ratio == 0.0


def test_conditions_are_of_the_train_phase_alone():
    conditions = throttled(3, "hw_slowdown").devices[0].conditions
    assert conditions.sm_clock_mean_mhz == 1500.0
    assert conditions.temperature_max_c == 71
    assert conditions.memory_clock_mean_mhz is conditions.power_mean_w is None
    assert conditions.throttle_reasons == ("gpu_idle", "hw_slowdown", "sw_power_cap")


def test_throttling_is_unknown_without_readings():
    silent = device(GROWN, throttle_reasons="no reasons here")
    readings = gpu_readings(trace_of(silent), TRAIN, ("train",), A)
    assert readings.devices[0].is_throttled is None
    assert readings.reasons["throttled_ratio"] == "no reasons here"
    unsampled = gpu_readings(trace_of(device(GROWN)), TRAIN, ("train",), A)
    assert unsampled.reasons["throttled_ratio"] == "no reading in the train phase"


def test_records_hold_plain_values():
    trace = trace_of(device(GROWN, slow=slow_samples((1.0, 1.5), power=(3.0, 4.0))))
    readings = gpu_readings(trace, TRAIN, ("train",), A)
    for record in (trace.to_dict(), readings.to_dict()):
        assert json.loads(json.dumps(record, allow_nan=False)).keys() == record.keys()
    assert replace(trace, pid=None).to_dict()["pid"] is None


def inference_record(**starts: float) -> dict:
    """Phases of a second each."""
    return {
        "phases": {n: {"start_monotonic_s": at, "seconds": 1.0} for n, at in starts.items()},
        "device_uuid": A,
        "disturbances": [],
        "null_reasons": dict.fromkeys(
            (f"peak_gpu_{v}_bytes" for v in ("base", "unmerged", "merged")), "not reported"
        ),
    }


def test_an_inference_record_has_the_peak_of_each_model_in_its_own_phase():
    record = inference_record(base=1.0, unmerged=2.0, measure=3.0, merged=4.0)
    memory = [
        (1.1, 3000, 900), (1.2, 3000, 950), (2.1, 3000, 1200), (2.2, 3000, 1100),
        (3.1, 9000, 8000), (3.2, 9000, 8000), (4.1, 3000, 940),
    ]  # fmt: skip
    slow = slow_samples((3.0, 3.5, 4.0), throttle=(("hw_slowdown",),) * 3)
    add_infer_gpu_readings(record, trace_of(device(memory, slow=slow)))
    assert record["peak_gpu_base_bytes"] == 950
    assert record["peak_gpu_unmerged_bytes"] == 1200
    assert record["peak_gpu_merged_bytes"] is None  # never the 8000 of all three together
    assert set(record["null_reasons"]) == {"peak_gpu_merged_bytes"}
    assert "a peak needs 2 readings, 1 came" in record["null_reasons"]["peak_gpu_merged_bytes"]
    assert [d.partition(" phase")[0] for d in record["disturbances"]] == [
        "the GPU was throttled for 100% of the measure"
    ]


def test_an_inference_record_without_a_watched_gpu_says_why():
    record = inference_record(base=1.0, unmerged=2.0, measure=3.0)
    record["null_reasons"]["peak_gpu_merged_bytes"] = "prefix does not merge"
    add_infer_gpu_readings(record, Trace(CHILD, None, None, None, (), "NVML: driver not loaded"))
    assert record["null_reasons"] == {
        "peak_gpu_base_bytes": "NVML: driver not loaded",
        "peak_gpu_unmerged_bytes": "NVML: driver not loaded",
        "peak_gpu_merged_bytes": "prefix does not merge",
    }
