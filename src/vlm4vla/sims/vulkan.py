"""Which devices Vulkan offers here: what SimplerEnv's renderers (sapien 2 and 3) can take, and what results call it.

Vulkan itself is asked, not ``/dev``: a container often has a GPU's files without its Vulkan driver. It is asked in a
process of its own, for a broken driver can abort one: this file as a script, which needs the standard library alone.
"""

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict, dataclass

TIMEOUT_S = 60
WORDS = 500
"""Characters of a driver's last words that an error quotes."""
MARK = "the devices of Vulkan: "
"""What comes before the script's answer."""
NO_DRIVER = -9
"""``VK_ERROR_INCOMPATIBLE_DRIVER`` of ``vulkan_core.h``: what a loader without any driver says."""
NVIDIA = 0x10DE
"""The vendor's PCI id."""
SEMAPHORES = "VK_KHR_external_semaphore_fd"
MEND = (
    "apt-get install libvulkan1 mesa-vulkan-drivers (Mesa 25 or newer); a GPU's driver brings its own, "
    "in a container with NVIDIA_DRIVER_CAPABILITIES=all"
)


@dataclass(frozen=True)
class Device:
    name: str
    vendor: int
    """PCI id."""
    semaphores: bool
    """Whether it has the extension ``SEMAPHORES``, which sapien 2 asks for."""


def devices() -> tuple[Device, ...]:
    """All physical devices in Vulkan's order; none where there is no loader or no driver.

    Raises:
        UserError: a driver hangs, crashes or refuses.
    """
    from vlm4vla.errors import UserError  # not at the top, which a script without the package runs too

    script = [sys.executable, "-I", __file__]
    mend = f"see what it says: {' '.join(script)}; name another driver: export VK_DRIVER_FILES=/path/to/driver.json"
    try:
        done = subprocess.run(script, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        found = f"a Vulkan driver that gives no answer within {TIMEOUT_S} s"
        raise UserError(found, "a list of devices", mend) from None
    _, marked, answer = done.stdout.decode(errors="replace").rpartition(MARK)  # a driver may talk before and after it
    if not marked:
        words = done.stderr.decode(errors="replace").strip()[-WORDS:]
        found = f"a Vulkan driver that ends with status {done.returncode} and no answer" + (words and f": {words}")
        raise UserError(found, "a list of devices", mend)
    return tuple(Device(**each) for each in json.JSONDecoder().raw_decode(answer)[0])


def chosen() -> tuple[Device, ...]:
    """Those that sapien takes one of: NVIDIA's, where there are any. It does not say which of several others it takes.

    Raises ``UserError`` as ``devices`` does.
    """
    found = devices()
    return tuple(device for device in found if device.vendor == NVIDIA) or found


class _InstanceCreateInfo(ctypes.Structure):
    _fields_ = [
        ("sType", ctypes.c_int),
        ("pNext", ctypes.c_void_p),
        ("flags", ctypes.c_uint),
        ("pApplicationInfo", ctypes.c_void_p),
        ("enabledLayerCount", ctypes.c_uint),
        ("ppEnabledLayerNames", ctypes.c_void_p),
        ("enabledExtensionCount", ctypes.c_uint),
        ("ppEnabledExtensionNames", ctypes.c_void_p),
    ]


def _ask() -> list[Device]:
    """``devices`` in this process. Sizes and offsets are those of the structures in ``vulkan_core.h``."""
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return []
    instance, count = ctypes.c_void_p(), ctypes.c_uint()
    info = _InstanceCreateInfo(sType=1)  # VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO
    if status := vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)):
        if status == NO_DRIVER:
            return []
        raise OSError(f"vkCreateInstance: {status}")
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    handles = (ctypes.c_void_p * count.value)()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
    found = []
    for handle in map(ctypes.c_void_p, handles):
        properties, number = ctypes.create_string_buffer(4096), ctypes.c_uint()  # VkPhysicalDeviceProperties: 824 bytes
        vulkan.vkGetPhysicalDeviceProperties(handle, properties)
        vulkan.vkEnumerateDeviceExtensionProperties(handle, None, ctypes.byref(number), None)
        extensions = ctypes.create_string_buffer(260 * number.value)  # of VkExtensionProperties
        vulkan.vkEnumerateDeviceExtensionProperties(handle, None, ctypes.byref(number), extensions)
        vendor = int.from_bytes(properties.raw[8:12], sys.byteorder)
        name = properties.raw[20:276].split(b"\0")[0].decode(errors="replace")
        found.append(Device(name, vendor, SEMAPHORES.encode() in extensions.raw))
    return found


if __name__ == "__main__":
    print(MARK + json.dumps([asdict(device) for device in _ask()]), flush=True)  # a driver may crash at the end
