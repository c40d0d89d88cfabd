"""A real GPU, by the driver's own interface: the same launches as sim.launch, to compare the interpreter with it."""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.ptxsim import sim

_DTYPES = {  # CUtensorMapDataType
    torch.uint8: 0, torch.int8: 0, torch.int32: 3, torch.int64: 5,
    torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_CLUSTER_DIMENSION = 4  # CUlaunchAttributeID


class Gpu:
    """The first device, with a context of its own. Tensors are copied there and back for each launch."""

    def __init__(self):
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        self.capability = tuple(self._attribute(number, device) for number in (75, 76))
        name = ctypes.create_string_buffer(100)
        self._call("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode()

    def runs(self, arch: str) -> bool:
        """Whether code for `arch` can run here: an "a" means this generation only."""
        wanted = (int(arch[3]), int(arch[4]))
        return self.capability == wanted if arch.endswith("a") else self.capability[0] == wanted[0]

    def launch(self, source, arch: str, kernel: str, grid, block, smem: int, args: Sequence, cluster=1) -> None:
        """As sim.launch; tensors among `args` hold the kernel's results afterwards."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), _cubin(str(source), arch))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        if smem > 48 << 10:  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, 8, smem)
        tensors = [arg.tensor if isinstance(arg, sim.TensorMap) else arg for arg in args]
        copies = {id(tensor): self._upload(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)}
        values = [self._argument(arg, copies) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = _Attribute(_CLUSTER_DIMENSION, 0, sim.three(cluster))
        config = _Config(sim.three(grid), sim.three(block), smem, None, ctypes.pointer(attribute), int(cluster != 1))
        self._call("cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
        self._call("cuCtxSynchronize")
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                address, size = copies[id(tensor)], tensor.untyped_storage().nbytes()
                self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(tensor.untyped_storage().data_ptr()), address, size)
        for address in copies.values():
            self._call("cuMemFree_v2", address)
        self._call("cuModuleUnload", module)

    def _argument(self, arg, copies):
        """The value of an argument in memory that the driver reads."""
        if isinstance(arg, sim.TensorMap):
            return self._tensor_map(arg, copies[id(arg.tensor)].value)
        if isinstance(arg, torch.Tensor):
            return ctypes.c_uint64(copies[id(arg)].value + arg.storage_offset() * arg.element_size())
        if isinstance(arg, int):
            return ctypes.c_int64(arg)  # little-endian: a narrower parameter reads its low bytes
        if isinstance(arg, float):
            return ctypes.c_float(arg)
        return ctypes.create_string_buffer(bytes(arg), len(bytes(arg)))

    def _tensor_map(self, arg: sim.TensorMap, base: int):
        tensor, rank = arg.tensor, arg.tensor.dim()
        encoded = (ctypes.c_uint64 * 32)()  # of which 16, on a multiple of 64 bytes, are the map
        start = -ctypes.addressof(encoded) % 64
        size = tensor.element_size()
        self._call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(ctypes.addressof(encoded) + start), _DTYPES[tensor.dtype], ctypes.c_uint(rank),
            ctypes.c_uint64(base + tensor.storage_offset() * size),
            (ctypes.c_uint64 * rank)(*reversed(tensor.shape)),
            (ctypes.c_uint64 * max(rank - 1, 1))(*(stride * size for stride in reversed(tensor.stride()[:-1]))),
            (ctypes.c_uint * rank)(*reversed(arg.box)),
            (ctypes.c_uint * rank)(*reversed(arg.element_strides or (1,) * rank)),
            0, arg.swizzle, 0, int(arg.nan_fill),
        )  # fmt: skip
        return ctypes.create_string_buffer(ctypes.string_at(ctypes.addressof(encoded) + start, 128), 128)

    def _upload(self, tensor: torch.Tensor) -> ctypes.c_uint64:
        address, storage = ctypes.c_uint64(), tensor.untyped_storage()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(storage.nbytes(), 1)))
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()))
        return address

    def _attribute(self, number: int, device) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def _call(self, function: str, *args) -> None:
        code = getattr(self._driver, function)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'error').decode()} ({code})")


@functools.cache
def _cubin(source: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.cubin"
        flags = ("-cubin", *(flag for flag in sim.NVCC_FLAGS if flag != "-ptx"))
        command = [sim.nvcc(), *flags, f"-arch={arch}", "-o", out, sim.ROOT / source]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"nvcc cannot compile {source} for {arch}:\n{run.stderr[-4000:]}")
        return out.read_bytes()


def find() -> Gpu | None:
    """The GPU, or None where there is none."""
    try:
        return Gpu()
    except (OSError, RuntimeError):
        return None
