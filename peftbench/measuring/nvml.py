"""What the NVIDIA driver says of its GPUs, for a process that watches them and imports no torch.

An answer that the driver does not give is None, and the reason is remembered in one sentence; no
reading raises. The library stays initialised for the life of the process: that keeps the driver
loaded between rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Error numbers of nvml.h that decide what to do next; the others only become words.
_ABSENT = {13, 25, 26}  # function not found, struct version unknown, deprecated: ask the older one
_LOST = {1, 9, 15, 16, 28}  # no further answer in this process's life
_LASTING = {3, 4, *_ABSENT}  # will be answered alike the next time: not asked again
_WORDS = {
    1: "NVML is shut down",
    3: "not supported by this device",
    4: "no permission",
    9: "driver not loaded",
    12: "library libnvidia-ml.so.1 not found",
    13: "the driver has no such function",
    15: "the GPU is lost (it fell off the bus or cannot be reached)",
    16: "the GPU must be reset before it can be used again",
    18: "the driver and its library have different versions (reload the driver or reboot)",
    25: "the driver does not know this version of the structure",
    28: "the GPU is not there any more",
}
_NOT_AVAILABLE = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}  # NVML_VALUE_NOT_AVAILABLE, 32 and 64 bits

_THROTTLE_BITS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
# The card was not at the speed its settings allow. The power cap is not here: large cards train at
# it all day, and it is part of what is compared.
HARMFUL_REASONS = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)


@dataclass(frozen=True)
class Memory:
    """A device's memory. With api "v1" `used_bytes` counts what the driver reserves for itself."""

    used_bytes: int
    total_bytes: int
    api: str  # v1 or v2


def throttle_names(mask: int) -> tuple[str, ...]:
    """The names of the set bits of NVML's clocks event reasons; an unknown bit gives its value."""
    bits = [1 << n for n in range(mask.bit_length()) if mask >> n & 1]
    return tuple(_THROTTLE_BITS.get(bit, f"{bit:#x}") for bit in bits)


class Device:
    """One GPU or MIG instance, known by its UUID, and the reasons for what it does not tell.

    `reasons` maps a quantity to the sentence why (some of) its readings are None. `lost` is that
    sentence once the device answers nothing any more. `index` is NVML's, for people only.
    """

    def __init__(
        self, handle: Any, uuid: str, index: int, parent_uuid: str | None, pci: tuple[int, ...]
    ) -> None:
        self.uuid = uuid
        self.index = index
        self.parent_uuid = parent_uuid
        self.pci = pci  # domain, bus, device of the card; () where it is not told
        self.reasons: dict[str, str] = {}
        self.lost: str | None = None
        self._handle = handle
        self._way: dict[str, int] = {}  # which of several functions answered
        self._given_up: set[str] = set()
        import pynvml

        name = self._ask("name", lambda: pynvml.nvmlDeviceGetName(handle))
        self.name: str | None = None if name is None else str(name)

    @property
    def is_mig(self) -> bool:
        return self.parent_uuid is not None

    def _ask(self, quantity: str, *ways: Callable[[], Any]) -> Any:
        """The answer of the first function that the driver has, or None with its reason kept."""
        if self.lost is not None or quantity in self._given_up:
            return None
        import pynvml

        for number in range(self._way.get(quantity, 0), len(ways)):
            try:
                answer = ways[number]()
            except pynvml.NVMLError as error:
                if error.value in _ABSENT and number + 1 < len(ways):
                    continue
                self._refused(quantity, error)
                return None
            self._way[quantity] = number
            if isinstance(answer, int) and answer in _NOT_AVAILABLE:
                self._remember(quantity, "the driver answers N/A")
                return None
            return answer
        return None

    def _refused(self, quantity: str, error: Any) -> None:
        if error.value in _LOST:
            self.lost = f"NVML: {_words(error)}"
            self.reasons["device"] = self.lost
        else:
            self._remember(quantity, _words(error))
        if error.value in _LASTING:
            self._given_up.add(quantity)

    def _remember(self, quantity: str, why: str) -> None:
        self.reasons.setdefault(quantity, f"NVML gives no {quantity.replace('_', ' ')}: {why}")

    def info(self) -> dict[str, str | int | float | None]:
        """What stays the same during a run: name, driver, memory, power limit, MIG mode."""
        import pynvml

        cuda = self._ask(
            "cuda_driver_version",
            pynvml.nvmlSystemGetCudaDriverVersion_v2,
            pynvml.nvmlSystemGetCudaDriverVersion,
        )
        driver = self._ask("driver_version", pynvml.nvmlSystemGetDriverVersion)
        memory = self.memory()
        return {
            "name": self.name,
            "uuid": self.uuid,
            "driver_version": None if driver is None else str(driver),
            "cuda_driver_version": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "total_bytes": None if memory is None else memory.total_bytes,
            "memory_api": None if memory is None else memory.api,
            "power_limit_w": self._thousandth(
                "power_limit", lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)
            ),
            "mig": self._mig(),
        }

    def _mig(self) -> str | None:
        """The card's MIG mode, on or off (None: it has none), or that this is an instance."""
        import pynvml

        if self.is_mig:
            return "instance"
        mode = self._ask("mig_mode", lambda: pynvml.nvmlDeviceGetMigMode(self._handle))
        return None if mode is None else "on" if mode[0] else "off"

    def memory(self) -> Memory | None:
        """The device's memory now, all processes together."""
        import pynvml

        answer = self._ask(
            "memory",
            lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2),
            lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle),
        )
        if answer is None:
            return None
        if {answer.used, answer.total} & _NOT_AVAILABLE:
            self._remember("memory", "the driver answers N/A")
            return None
        return Memory(int(answer.used), int(answer.total), ("v2", "v1")[self._way["memory"]])

    def processes(self) -> dict[int, int | None] | None:
        """Bytes by pid of the processes that compute on the device; None if they are not listed.

        A single process's bytes are None where the driver does not tell them. The pids are those
        of the host, also for a reader inside a container.
        """
        import pynvml

        listed = self._ask(
            "process_list",
            lambda: pynvml.nvmlDeviceGetComputeRunningProcesses_v3(self._handle),
            lambda: pynvml.nvmlDeviceGetComputeRunningProcesses_v2(self._handle),
        )
        if listed is None:
            return None
        found: dict[int, int | None] = {}
        for process in listed:
            pid = int(process.pid)
            used = self._process_memory(process.usedGpuMemory)
            before = found.get(pid, 0)  # one entry for each instance of a card that it uses
            found[pid] = None if used is None or before is None else before + used
        return found

    def _process_memory(self, answer: int | None) -> int | None:
        if answer is None or answer in _NOT_AVAILABLE:  # pynvml turns one of the two into None
            self._remember("process_memory", "the driver answers N/A for it")
            return None
        if answer == 0:  # a process with a context holds some hundred MB: this is not a reading
            self._remember("process_memory", "the driver lists the process with 0 bytes")
            return None
        return int(answer)

    def process_bytes(self, pid: int) -> int | None:
        """Memory of that process on the device, its context included."""
        listed = self.processes()
        if listed is not None and pid not in listed:
            self._remember("process_memory", f"no process {pid} on this device")
        return None if listed is None else listed.get(pid)

    def _thousandth(self, quantity: str, way: Callable[[], Any]) -> float | None:
        answer = self._ask(quantity, way)
        return None if answer is None else answer / 1000

    def _whole(self, quantity: str, *ways: Callable[[], Any]) -> int | None:
        answer = self._ask(quantity, *ways)
        return None if answer is None else int(answer)

    def energy_j(self) -> float | None:
        """The energy counter: joules since the driver was loaded."""
        import pynvml

        return self._thousandth(
            "energy_counter", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        )

    def power_w(self) -> float | None:
        """Power draw of the whole card; an average over the last second on many cards."""
        import pynvml

        return self._thousandth("power", lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle))

    def sm_clock_mhz(self) -> int | None:
        import pynvml

        return self._whole(
            "sm_clock",
            lambda: pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM),
        )

    def memory_clock_mhz(self) -> int | None:
        import pynvml

        return self._whole(
            "memory_clock",
            lambda: pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_MEM),
        )

    def temperature_c(self) -> int | None:
        """Temperature of the chip, in degrees Celsius."""
        import pynvml

        sensor = pynvml.NVML_TEMPERATURE_GPU
        return self._whole(
            "temperature",
            lambda: pynvml.nvmlDeviceGetTemperatureV(self._handle, sensor),
            lambda: pynvml.nvmlDeviceGetTemperature(self._handle, sensor),
        )

    def throttle_reasons(self) -> tuple[str, ...] | None:
        """Names of what holds the clocks down now; see HARMFUL_REASONS."""
        import pynvml

        mask = self._whole(
            "throttle_reasons",
            lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle),
            lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle),
        )
        return None if mask is None else throttle_names(mask)


def _words(error: Any) -> str:
    return _WORDS.get(error.value, str(error))


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("mig-").removeprefix("gpu-")


def find_uuid(identities: Sequence[tuple[str, str | None]], uuid: str) -> int | None:
    """Index of the device that a child means by `uuid`, or None.

    torch leaves "GPU-" and "MIG-" out of it. `identities` are pairs of a device's uuid and, for a
    MIG instance, its card's. Older CUDA names an instance by its card: clear if it is alone there.
    """
    wanted = _bare(uuid)
    own = [i for i, (name, _) in enumerate(identities) if _bare(name) == wanted]
    of_card = [i for i, (_, card) in enumerate(identities) if card and _bare(card) == wanted]
    found = own or of_card
    return found[0] if len(found) == 1 else None


def select(devices: Sequence[Device], uuid: str) -> Device | None:
    """The device on which a child says that it runs."""
    found = find_uuid([(d.uuid, d.parent_uuid) for d in devices], uuid)
    return None if found is None else devices[found]


def open_devices(
    visible: str | None, device_order: str | None = None
) -> tuple[list[Device], str | None]:
    """The devices that CUDA_VISIBLE_DEVICES (`visible`) leaves a child, and a note.

    `device_order` is the value of CUDA_DEVICE_ORDER. The note says why the list is empty or, where
    an index cannot be mapped for certain, that all devices are in it.
    """
    import pynvml

    if visible is not None and not visible.strip():
        return [], "CUDA_VISIBLE_DEVICES is empty: no GPU is visible"
    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        return [], f"NVML: {_words(error)}"
    devices, refused = _list_devices(count)
    if not devices:
        return [], "NVML: " + ("; ".join(refused) or "no GPU in this machine")
    if visible is None:
        return devices, None
    return _visible(devices, visible, device_order)


def _list_devices(count: int) -> tuple[list[Device], list[str]]:
    """Cards, or in MIG mode their instances; and why others are not to be had."""
    import pynvml

    devices: list[Device] = []
    refused = []
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError as error:  # a card that this container or user was not given
            refused.append(f"GPU {index}: {_words(error)}")
            continue
        try:
            pci = pynvml.nvmlDeviceGetPciInfo_v3(handle)
            place: tuple[int, ...] = (int(pci.domain), int(pci.bus), int(pci.device))
        except pynvml.NVMLError:
            place = ()
        instances = _instances(handle, uuid, index, place)
        devices.extend(instances or [Device(handle, uuid, index, None, place)])
    return devices, refused


def _instances(card: Any, card_uuid: str, index: int, pci: tuple[int, ...]) -> list[Device]:
    """The card's MIG instances; CUDA programs can only use those once the mode is on."""
    import pynvml

    try:
        if not pynvml.nvmlDeviceGetMigMode(card)[0]:
            return []
        slots = int(pynvml.nvmlDeviceGetMaxMigDeviceCount(card))
    except pynvml.NVMLError:  # most cards have no such mode
        return []
    found = []
    for slot in range(slots):
        try:
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, slot)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        except pynvml.NVMLError:  # the slot is empty or not ours
            continue
        found.append(Device(handle, uuid, index, card_uuid, pci))
    return found


def _visible(
    devices: list[Device], visible: str, device_order: str | None
) -> tuple[list[Device], str | None]:
    """Apply CUDA's rule: entries in order, up to the first that names no device."""
    entries = [entry.strip() for entry in visible.split(",")]
    by_index = _cuda_order(devices, device_order)
    chosen: list[Device] = []
    for entry in entries:
        if entry.isdecimal() and by_index is None and int(entry) < len(devices):
            if {*entries} == {str(i) for i in range(len(devices))}:
                return devices, None  # all of them, whatever the order
            return devices, (
                f"CUDA_VISIBLE_DEVICES={visible} counts in CUDA's own order, which NVML does not "
                f"know, so all {len(devices)} devices are watched; "
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID or give UUIDs"
            )
        named = _named(devices, by_index or [], entry)
        if named is None:
            break
        chosen.append(named)
    if not chosen:
        return [], f"CUDA_VISIBLE_DEVICES={visible} names no device that NVML lists"
    return chosen, None


def _cuda_order(devices: list[Device], device_order: str | None) -> list[Device] | None:
    """The devices as CUDA counts them, or None where that is not known ("fastest first", MIG)."""
    if len(devices) == 1:
        return devices
    if device_order != "PCI_BUS_ID" or any(d.is_mig or not d.pci for d in devices):
        return None
    return sorted(devices, key=lambda d: d.pci)


def _named(devices: list[Device], by_index: list[Device], entry: str) -> Device | None:
    if entry.isdecimal():
        return by_index[int(entry)] if int(entry) < len(by_index) else None
    if not entry.lower().startswith(("gpu-", "mig-")):
        return None
    found = [d for d in devices if d.uuid.lower().startswith(entry.lower())]
    return found[0] if len(found) == 1 else None  # CUDA wants an abbreviation to be unique
