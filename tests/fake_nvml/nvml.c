/* A stand-in for libnvidia-ml.so.1: NVML's C interface, answering from a text file.
 *
 * FAKE_NVML_SCENE names the file. It is read anew for every call, so a test can change the scene
 * while a sampler runs (replace the file, do not write into it). A line is "key value"; a card is a
 * number ("0.used 1000"), and so is a MIG instance ("0.mig0 7" puts card-like entry 7 into slot 0
 * of card 0). A value "!N" makes the call return error N; a missing key means "not supported".
 * "N.error E" makes every call on device N return E. "N.processes" holds pid:bytes pairs joined by
 * commas, N/A for bytes that are not told, or "none".
 *
 * With -DOLD_DRIVER the functions that old drivers lack are left out of the library.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, VERSION = 25 };

typedef struct { unsigned int number; } device_t;
typedef struct { char legacy[16]; unsigned int domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
typedef struct { unsigned long long total, free, used; } memory_v1_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu, compute; } process_t;
typedef struct { unsigned int version, sensor; int celsius; } temperature_t;

static device_t devices[32];

/* Copy the value of the key into text; returns an NVML code. */
static int find(const char *key, char *text, size_t size)
{
    const char *path = getenv("FAKE_NVML_SCENE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[1024];
    size_t length = strlen(key);
    if (!file) return NOT_SUPPORTED;
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) || line[length] != ' ') continue;
        fclose(file);
        line[strcspn(line, "\n")] = 0;
        if (line[length + 1] == '!') return atoi(line + length + 2);
        snprintf(text, size, "%s", line + length + 1);
        return OK;
    }
    fclose(file);
    return NOT_SUPPORTED;
}

static int find_number(const char *key, unsigned long long *value)
{
    char text[64];
    int code = find(key, text, sizeof text);
    if (code == OK) *value = strtoull(text, NULL, 0);
    return code;
}

static int of_device(device_t *device, const char *quantity, char *text, size_t size)
{
    char key[64];
    unsigned long long error;
    snprintf(key, sizeof key, "%u.error", device->number);
    if (find_number(key, &error) == OK) return (int)error;
    snprintf(key, sizeof key, "%u.%s", device->number, quantity);
    return find(key, text, size);
}

static int wide(device_t *device, const char *quantity, unsigned long long *value)
{
    char text[64];
    int code = of_device(device, quantity, text, sizeof text);
    if (code == OK) *value = strtoull(text, NULL, 0);
    return code;
}

static int narrow(device_t *device, const char *quantity, unsigned int *value)
{
    unsigned long long answer;
    int code = wide(device, quantity, &answer);
    if (code == OK) *value = (unsigned int)answer;
    return code;
}

static device_t *numbered(unsigned long long number)
{
    devices[number % 32].number = (unsigned int)number;
    return &devices[number % 32];
}

int nvmlInitWithFlags(unsigned int flags)
{
    char text[64];
    int code = find("init", text, sizeof text);
    (void)flags;
    return code == NOT_SUPPORTED ? OK : code;
}

const char *nvmlErrorString(int code)
{
    static char text[32];
    snprintf(text, sizeof text, "fake error %d", code);
    return text;
}

int nvmlSystemGetDriverVersion(char *text, unsigned int size) { return find("driver", text, size); }

static int cuda_version(int *version)
{
    unsigned long long value;
    int code = find_number("cuda", &value);
    if (code == OK) *version = (int)value;
    return code;
}

int nvmlSystemGetCudaDriverVersion(int *version) { return cuda_version(version); }

int nvmlDeviceGetCount_v2(unsigned int *count)
{
    unsigned long long value;
    int code = find_number("count", &value);
    if (code == OK) *count = (unsigned int)value;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, device_t **device)
{
    char key[32], text[64];
    int code;
    snprintf(key, sizeof key, "%u.handle", index);
    code = find(key, text, sizeof text);
    *device = numbered(index);
    return code == NOT_SUPPORTED ? OK : code;
}

int nvmlDeviceGetName(device_t *d, char *text, unsigned int size) { return of_device(d, "name", text, size); }
int nvmlDeviceGetUUID(device_t *d, char *text, unsigned int size) { return of_device(d, "uuid", text, size); }

int nvmlDeviceGetPciInfo_v3(device_t *device, pci_t *info)
{
    memset(info, 0, sizeof *info);
    return narrow(device, "bus", &info->bus);
}

int nvmlDeviceGetMemoryInfo(device_t *device, memory_v1_t *info)
{
    unsigned long long reserved = 0;
    int code = wide(device, "used", &info->used);
    if (code != OK) return code;
    if (wide(device, "reserved", &reserved) == OK) info->used += reserved;
    return wide(device, "total", &info->total);
}

static int list_processes(device_t *device, unsigned int *count, process_t *out)
{
    char text[1024], *rest = text, *entry;
    unsigned int found = 0, room = out ? *count : 0;
    int code = of_device(device, "processes", text, sizeof text);
    if (code != OK) return code;
    while (strcmp(text, "none") && (entry = strsep(&rest, ","))) {
        char *bytes = strchr(entry, ':') + 1;
        if (found < room) {
            out[found].pid = (unsigned int)strtoul(entry, NULL, 10);
            out[found].used = strcmp(bytes, "N/A") ? strtoull(bytes, NULL, 10) : ~0ULL;
            out[found].gpu = out[found].compute = ~0U;
        }
        found++;
    }
    *count = found;
    return found > room ? TOO_SMALL : OK;
}

int nvmlDeviceGetComputeRunningProcesses_v2(device_t *d, unsigned int *count, process_t *out)
{
    return list_processes(d, count, out);
}

int nvmlDeviceGetTotalEnergyConsumption(device_t *d, unsigned long long *mj) { return wide(d, "energy", mj); }
int nvmlDeviceGetPowerUsage(device_t *d, unsigned int *mw) { return narrow(d, "power", mw); }
int nvmlDeviceGetEnforcedPowerLimit(device_t *d, unsigned int *mw) { return narrow(d, "power_limit", mw); }

int nvmlDeviceGetClockInfo(device_t *device, unsigned int type, unsigned int *mhz)
{
    if (type == 1) return narrow(device, "sm_clock", mhz);
    return type == 2 ? narrow(device, "memory_clock", mhz) : INVALID;
}

int nvmlDeviceGetTemperature(device_t *device, unsigned int sensor, unsigned int *celsius)
{
    return sensor == 0 ? narrow(device, "temperature", celsius) : INVALID;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device_t *d, unsigned long long *mask)
{
    return wide(d, "throttle", mask);
}

#ifndef OLD_DRIVER

int nvmlSystemGetCudaDriverVersion_v2(int *version) { return cuda_version(version); }

int nvmlDeviceGetMemoryInfo_v2(device_t *device, memory_v2_t *info)
{
    char text[64];
    int code = of_device(device, "memory_v2", text, sizeof text);
    if (code != OK && code != NOT_SUPPORTED) return code;
    if (info->version != (2u << 24 | sizeof *info)) return VERSION;
    code = wide(device, "used", &info->used);
    return code == OK ? wide(device, "total", &info->total) : code;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t *d, unsigned int *count, process_t *out)
{
    return list_processes(d, count, out);
}

int nvmlDeviceGetTemperatureV(device_t *device, temperature_t *info)
{
    if (info->version != (1u << 24 | sizeof *info)) return VERSION;
    return info->sensor == 0 ? narrow(device, "temperature", (unsigned int *)&info->celsius) : INVALID;
}

int nvmlDeviceGetCurrentClocksEventReasons(device_t *d, unsigned long long *mask)
{
    return wide(d, "throttle", mask);
}

int nvmlDeviceGetMigMode(device_t *device, unsigned int *current, unsigned int *pending)
{
    int code = narrow(device, "mig_mode", current);
    *pending = *current;
    return code;
}

int nvmlDeviceGetMaxMigDeviceCount(device_t *device, unsigned int *count)
{
    return narrow(device, "mig_slots", count);
}

int nvmlDeviceGetMigDeviceHandleByIndex(device_t *card, unsigned int slot, device_t **instance)
{
    char quantity[32];
    unsigned int number;
    int code;
    snprintf(quantity, sizeof quantity, "mig%u", slot);
    code = narrow(card, quantity, &number);
    if (code != OK) return code == NOT_SUPPORTED ? NOT_FOUND : code;
    *instance = numbered(number);
    return OK;
}

#endif
