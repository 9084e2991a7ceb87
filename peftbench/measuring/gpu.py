"""From the sampler's trace and the child's clock to what each phase took: arithmetic, no driver.

Peaks count readings inside a phase's window, start included and end excluded; what lies between two
windows (collecting, emptying caches) belongs to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peftbench.measuring.energy import MIN_SAMPLES, Conditions, Window, conditions_in, energy_in
from peftbench.measuring.nvml import HARMFUL_REASONS, find_uuid
from peftbench.measuring.sampler import DeviceTrace, Trace

TIMED_PHASE = "train"
# A thermal or brake slowdown takes about half of the clock, so a throttled twentieth of the window
# makes the time some 2.5 % longer: about the size of the differences that are reported.
THROTTLED_RATIO_LIMIT = 0.05

_NOT_HERE = "the child was not on this device"
_HOST_PIDS = (
    "the child's pid is not in NVML's list, which holds the host's pids: a container sees others"
)


@dataclass(frozen=True)
class PhaseReadings:
    """One phase on one device. What is None has its sentence in `reasons`, by field name.

    `nvml_device_peak_bytes` is the device's use minus the reading before the child was started;
    `energy_j` is the whole card's, in joules.
    """

    samples: int
    nvml_process_peak_bytes: int | None
    nvml_device_peak_bytes: int | None
    energy_j: float | None
    energy_source: str | None
    reasons: dict[str, str]


@dataclass(frozen=True)
class DeviceReadings:
    """One device: its phases, the peak of the headline phases together, and who else was there."""

    uuid: str
    name: str | int | float | None
    phases: dict[str, PhaseReadings]
    samples: int  # in the headline phases together
    peak_gpu_memory_bytes: int | None
    peak_gpu_memory_source: str | None
    foreign_processes: int | None
    is_shared: bool | None
    is_throttled: bool | None
    conditions: Conditions
    invalid: tuple[str, ...]  # why the round must not be counted
    reasons: dict[str, str]
    power_limit_w: float | None  # with `mig`, what must be equal for two runs to be compared
    mig: str | None


@dataclass(frozen=True)
class GpuReadings:
    """What a round took of the GPUs; the headline is that of the device named by `device_uuid`.

    `all_devices_peak_bytes` is the largest of the devices' own peaks. `invalid` gives the reasons
    why the round is kept but must stay out of the statistics.
    """

    device_uuid: str | None
    peak_gpu_memory_bytes: int | None
    peak_gpu_memory_source: str | None
    all_devices_peak_bytes: int | None
    samples: int
    interval_s: float | None
    invalid: tuple[str, ...]
    devices: tuple[DeviceReadings, ...]
    note: str | None
    reasons: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)


def gpu_readings(
    trace: Trace,
    windows: dict[str, Window],
    headline: tuple[str, ...],
    device_uuid: str | None,
    timed: str = TIMED_PHASE,
) -> GpuReadings:
    """The readings of a round whose child ran its phases in `windows`, on `device_uuid`.

    A window is (start, end) in seconds of `time.monotonic()`, which parent and child share. The
    headline is over those of the `headline` phases that the round had. Without `device_uuid` it is
    that of the device with the largest peak. `timed` is the phase whose clocks must be the card's.
    """
    devices = tuple(_device(trace, device, windows, headline, timed) for device in trace.devices)
    peaks = [d.peak_gpu_memory_bytes for d in devices if d.peak_gpu_memory_bytes is not None]
    chosen, why_none = _headline_device(trace, devices, device_uuid)
    source = None if chosen is None else chosen.peak_gpu_memory_source
    if source is not None and device_uuid is None and len(devices) > 1:
        source += f"; the largest of {len(devices)} devices, as the child named none"
    reasons = {} if chosen is None else dict(chosen.reasons)
    if why_none is not None:
        reasons["peak_gpu_memory_bytes"] = why_none
    return GpuReadings(
        device_uuid=None if chosen is None else chosen.uuid,
        peak_gpu_memory_bytes=None if chosen is None else chosen.peak_gpu_memory_bytes,
        peak_gpu_memory_source=source,
        all_devices_peak_bytes=max(peaks, default=None),
        samples=0 if chosen is None else chosen.samples,
        interval_s=trace.interval_s,
        invalid=() if chosen is None else chosen.invalid,
        devices=devices,
        note=trace.note,
        reasons=reasons,
    )


def _headline_device(
    trace: Trace, devices: Sequence[DeviceReadings], uuid: str | None
) -> tuple[DeviceReadings | None, str | None]:
    """The device whose peak is the headline, or why there is none."""
    if not devices:
        return None, trace.note or "no GPU was watched"
    if uuid is None:
        return max(devices, key=lambda d: d.peak_gpu_memory_bytes or 0), None
    found = find_uuid([(d.uuid, d.parent_uuid) for d in trace.devices], uuid)
    if found is None:
        return None, f"the child ran on device {uuid}, which was not watched"
    return devices[found], None


def _device(
    trace: Trace,
    device: DeviceTrace,
    windows: dict[str, Window],
    headline: tuple[str, ...],
    timed: str,
) -> DeviceReadings:
    absent = _why_no_process(trace, device)
    peaks = _peaks(device, [windows[name] for name in headline if name in windows], absent)
    peak, source, why_no_peak = _headline(peaks, absent)
    foreign, why_unknown = _foreign(trace, device, absent)
    conditions = conditions_in(device, windows.get(timed))
    why_no_ratio = None
    if conditions.throttled_ratio is None:
        why_no_ratio = device.reasons.get("throttle_reasons", f"no reading in the {timed} phase")
    throttled = _throttled(conditions, timed)
    shared = _shared(foreign, is_growth=peaks.process is None and peak is not None)
    missing = {
        "peak_gpu_memory_bytes": why_no_peak,
        "foreign_processes": why_unknown,
        "throttled_ratio": why_no_ratio,
    }
    return DeviceReadings(
        uuid=device.uuid,
        name=device.info["name"],
        phases={name: _phase(device, window, absent) for name, window in windows.items()},
        samples=peaks.samples,
        peak_gpu_memory_bytes=peak,
        peak_gpu_memory_source=source,
        foreign_processes=foreign,
        is_shared=None if foreign is None else foreign > 0,
        is_throttled=None if conditions.throttled_ratio is None else throttled is not None,
        conditions=conditions,
        invalid=tuple(sentence for sentence in (shared, throttled) if sentence is not None),
        reasons=peaks.reasons | {name: why for name, why in missing.items() if why is not None},
        power_limit_w=device.info.get("power_limit_w"),  # type: ignore[arg-type]
        mig=device.info.get("mig"),  # type: ignore[arg-type]
    )


def _shared(foreign: int | None, is_growth: bool) -> str | None:
    """Why other processes spoil the round, or None where none are known."""
    if not foreign:
        return None
    others = "another process" if foreign == 1 else f"{foreign} other processes"
    sentence = f"{others} used the GPU"
    return f"{sentence}, and may have grown on it in the child's stead" if is_growth else sentence


def _throttled(conditions: Conditions, timed: str) -> str | None:
    """Why the card's clocks spoil the round, or None where they do not."""
    ratio = conditions.throttled_ratio
    if ratio is None or ratio <= THROTTLED_RATIO_LIMIT:
        return None
    names = sorted(HARMFUL_REASONS & {*(conditions.throttle_reasons or ())})
    return f"the GPU was throttled for {ratio:.0%} of the {timed} phase: {', '.join(names)}"


@dataclass(frozen=True)
class _Peaks:
    samples: int
    process: int | None
    growth: int | None
    reasons: dict[str, str]


def _peaks(device: DeviceTrace, windows: Sequence[Window], absent: str | None) -> _Peaks:
    """The largest readings within the windows together; `absent` is why the child is not seen."""
    inside = [
        i
        for i, t in enumerate(device.memory.times_s)
        if any(start <= t < end for start, end in windows)
    ]
    used = [b for b in (device.memory.used_bytes[i] for i in inside) if b is not None]
    process = [b for b in (device.memory.process_bytes[i] for i in inside) if b is not None]
    reasons = {}
    if len(process) < MIN_SAMPLES:
        reasons["nvml_process_peak_bytes"] = absent or _too_few(device, process)
    growth, why = _growth(device, used)
    if why is not None:
        reasons["nvml_device_peak_bytes"] = why
    peak = max(process) if len(process) >= MIN_SAMPLES else None
    return _Peaks(len(used), peak, growth, reasons)


def _growth(device: DeviceTrace, used: list[int]) -> tuple[int | None, str | None]:
    before = device.baseline.used_bytes
    if before is None:
        return None, device.reasons.get("memory", "no reading before the child was started")
    if len(used) < MIN_SAMPLES:
        return None, _too_few(device, used)
    if max(used) < before:
        return None, "the device's use fell below the reading before: another process freed memory"
    return max(used) - before, None


def _too_few(device: DeviceTrace, readings: Sequence[object]) -> str:
    why = f"a peak needs {MIN_SAMPLES} readings, {len(readings)} came"
    lost = device.reasons.get("device")
    return why if lost is None else f"{why}; {lost}"


def _pids_match(trace: Trace) -> bool:
    """Whether the driver's pids are those of this machine's processes, as the child shows."""
    return any(p.pid == trace.pid for device in trace.devices for p in device.processes)


def _why_no_process(trace: Trace, device: DeviceTrace) -> str | None:
    """Why the child has no reading at all on this device, or None where it has some."""
    if trace.pid is None:
        return "the sampler was not told the child's pid"
    if any(p.pid == trace.pid for p in device.processes):
        found = any(b is not None for b in device.memory.process_bytes)
        return None if found else device.reasons.get("process_memory", "no reading")
    if "process_list" in device.reasons:
        return device.reasons["process_list"]
    return _NOT_HERE if _pids_match(trace) else _HOST_PIDS


def _headline(peaks: _Peaks, absent: str | None) -> tuple[int | None, str | None, str | None]:
    """Peak, its source, and why there is none."""
    if peaks.process is not None:
        return peaks.process, "memory of the child's process, from NVML", None
    why_no_process = peaks.reasons["nvml_process_peak_bytes"]
    if peaks.growth is None:
        return None, None, f"{why_no_process}; {peaks.reasons['nvml_device_peak_bytes']}"
    if absent == _NOT_HERE:  # what grew there is somebody else's
        return None, None, absent
    if peaks.growth == 0:
        return None, None, f"{why_no_process}; the device's use did not grow"
    return peaks.growth, f"growth of the device's use, from NVML: {why_no_process}", None


def _foreign(
    trace: Trace, device: DeviceTrace, absent: str | None
) -> tuple[int | None, str | None]:
    """How many other processes were on the device, before or with the child, or why not known."""
    if device.baseline.pids is None:
        return None, device.reasons.get("process_list", "the driver does not list processes")
    before = set(device.baseline.pids)
    if _pids_match(trace):
        return len((before | {p.pid for p in device.processes}) - {trace.pid}), None
    if before:
        return len(before), None  # whoever it is, it was there before the child
    return None, f"cannot be told: {absent}"


def _phase(device: DeviceTrace, window: Window, absent: str | None) -> PhaseReadings:
    peaks = _peaks(device, [window], absent)
    energy, source, why = energy_in(device, window)
    reasons = dict(peaks.reasons)
    if why is not None:
        reasons["energy_j"] = why
    return PhaseReadings(peaks.samples, peaks.process, peaks.growth, energy, source, reasons)
