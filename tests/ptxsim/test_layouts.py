"""The interpreter's matrix layouts agree with CuTe's tables, which others have run on hardware for years.

The tables are read out of the headers of the wheel `nvidia-cutlass` and evaluated with its `pycute`: nothing is copied.
Each test lays matrices out the way CuTe says, lets a conformance kernel run one instruction on them, and compares with
the plain product.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests.ptxsim import sim
from tests.ptxsim.launching import KERNELS

pycute = pytest.importorskip("pycute", reason="nvidia-cutlass is not installed (pip install nvidia-cutlass)")
pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=str(sim.absent()))

# --- reading the headers ---------------------------------------------------------------------------------------------


def header(name: str) -> str:
    package = importlib.util.find_spec("cutlass_library").submodule_search_locations[0]
    return (Path(package) / "source" / "include" / "cute" / "atom" / name).read_text()


def layout(text: str, **integers: int):
    """The value of a C++ type such as Layout<Shape<Shape<_4,_8>,_2>, Stride<Stride<_16,_1>,_8>>."""
    for name, value in integers.items():
        text = re.sub(rf"\b{name}\b", str(value), text)
    text = re.sub(r"Int<(\d+)/(\d+)>", lambda match: str(int(match[1]) // int(match[2])), text)
    text = re.sub(r"\b(Layout|Shape|Stride)\b|\s", "", text).replace("<", "(").replace(">", ",)")
    return pycute.Layout(*ast.literal_eval(re.sub(r"_(\d+)", r"\1", text)))


def alias(source: str, name: str, **integers: int):
    """The layout that `using name = ...` stands for."""
    found = re.search(rf"using {name}\s*=\s*([^;]+);", source)
    assert found, f"no {name} in the header"
    return layout(found[1], **integers) if "<" in found[1] else alias(source, found[1].strip(), **integers)


def traits(source: str, struct: str, name: str):
    """The layout `name` of a traits struct, or of the one it inherits from."""
    found = re.search(rf"struct {re.escape(struct)}\s*(?::\s*(\w+<\w+>))?\s*\{{(.*?)\n\}};", source, re.DOTALL)
    assert found, f"no {struct} in the header"
    member = re.search(rf"using {name}\s*=\s*([^;]+);", found[2])
    if member is None:
        return traits(source, found[1], name)
    return layout(member[1]) if "<" in member[1] else alias(source, member[1].strip())


def indices(table, threads: int) -> torch.Tensor:
    """[thread, value] -> index of an element, column-major in the matrix."""
    values = pycute.size(table[1])
    return torch.tensor([[table(thread, value) for value in range(values)] for thread in range(threads)])


def column_major(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.T.flatten()


# --- mma.sync --------------------------------------------------------------------------------------------------------

MMA = {
    "mma_bf16": ("sm_80", "SM80_16x8x16_F32BF16BF16F32_TN", torch.bfloat16, torch.float32, 16),
    "mma_f16": ("sm_80", "SM80_16x8x16_F32F16F16F32_TN", torch.float16, torch.float32, 16),
    "mma_tf32": ("sm_80", "SM80_16x8x8_F32TF32TF32F32_TN", torch.float32, torch.float32, 8),
    "mma_s8": ("sm_80", "SM80_16x8x32_S32S8S8S32_TN", torch.int8, torch.int32, 32),
    "mma_e4m3": ("sm_90a", "SM89_16x8x32_F32E4M3E4M3F32_TN", torch.float8_e4m3fn, torch.float32, 32),
}


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Small enough that every type holds them, and every sum of their products, exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed))


def registers(matrix: torch.Tensor, table, dtype: torch.dtype) -> torch.Tensor:
    """Words [register, thread] of an operand."""
    return column_major(matrix)[indices(table, 32)].to(dtype).view(torch.int32).T


@pytest.mark.parametrize("kernel", MMA)
def test_mma(kernel):
    arch, op, dtype, sum_dtype, k = MMA[kernel]
    source = header(f"mma_traits_{op.split('_')[0].lower()}.hpp")
    table_a, table_b, table_c = (traits(source, f"MMA_Traits<{op}>", f"{operand}Layout") for operand in "ABC")
    a, b, c = integers(16, k, seed=1), integers(8, k, seed=2), integers(16, 8, seed=3)
    operands = [(a, table_a, dtype), (b, table_b, dtype), (c, table_c, sum_dtype)]
    given = torch.cat([registers(*operand) for operand in operands]).contiguous()
    out = torch.zeros(4, 32, dtype=torch.int32)
    sim.launch(kernel, 1, 32, 0, given, out, source=KERNELS / "conformance_warp.cu", arch=arch)
    got = torch.empty(16 * 8, dtype=sum_dtype)
    got[indices(table_c, 32).flatten()] = out.T.contiguous().view(sum_dtype).flatten()
    assert got.long().equal(column_major(a @ b.T + c))


# --- ldmatrix, stmatrix ----------------------------------------------------------------------------------------------

# In the order in which conformance_warp.cu puts them: tiles, CuTe's name.
LDMATRIX = (
    (1, "SM75_U32x1_LDSM_N"),
    (1, "SM75_U16x2_LDSM_T"),
    (2, "SM75_U32x2_LDSM_N"),
    (2, "SM75_U16x4_LDSM_T"),
    (4, "SM75_U32x4_LDSM_N"),
    (4, "SM75_U16x8_LDSM_T"),
)
ROW_OF_LANE = torch.tensor([(lane * 5 + 3) % 32 for lane in range(32)])


def halves(table, threads: int, count: int) -> list[list[int]]:
    """[thread, 16-bit value] -> index of a half word; CuTe counts bits here."""
    return [[table(thread, 16 * value) // 16 for value in range(count)] for thread in range(threads)]


def test_ldmatrix():
    tile = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)  # every half word is another
    given = tile.view(torch.int32).T.contiguous()
    out = torch.zeros(14, 32, dtype=torch.int32)
    sim.launch("ldmatrix", 1, 32, 0, given, out, source=KERNELS / "conformance_warp.cu")
    source, first = header("copy_traits_sm75.hpp"), 0
    for tiles, op in LDMATRIX:
        from_table, to_table = (traits(source, f"Copy_Traits<{op}>", f"{side}Layout") for side in ("Src", "Dst"))
        contents = torch.zeros(tiles * 64, dtype=torch.int16)
        for lane, row in enumerate(halves(from_table, 8 * tiles, 8)):
            contents[row] = tile[ROW_OF_LANE[lane]]
        expected = contents[torch.tensor(halves(to_table, 32, 2 * tiles))]
        got = out[first : first + tiles].T.flatten().view(torch.int16).view(32, 2 * tiles)
        assert got.equal(expected), op
        first += tiles


@pytest.mark.parametrize("part, op", enumerate(("SM75_U32x4_LDSM_N", "SM75_U16x8_LDSM_T")))
def test_stmatrix(part, op):
    """copy_traits_sm90.hpp defines SM90_U32x4_STSM_N and SM90_U16x8_STSM_T as these two, backwards."""
    held = torch.arange(32 * 8, dtype=torch.int16).view(32, 8)
    given = held.view(torch.int32).T.contiguous()
    out = torch.zeros(8, 32, dtype=torch.int32)
    sim.launch("stmatrix", 1, 32, 0, given, out, source=KERNELS / "conformance_sm90.cu", arch="sm_90a")
    source = header("copy_traits_sm75.hpp")
    rows, registers_ = (traits(source, f"Copy_Traits<{op}>", f"{side}Layout") for side in ("Src", "Dst"))
    contents = torch.zeros(256, dtype=torch.int16)
    contents[torch.tensor(halves(registers_, 32, 8)).flatten()] = held.flatten()
    expected = torch.zeros(32, 8, dtype=torch.int16)
    expected[ROW_OF_LANE] = contents[torch.tensor(halves(rows, 32, 8))]
    assert out[4 * part : 4 * part + 4].T.contiguous().view(torch.int16).equal(expected)


# --- wgmma -----------------------------------------------------------------------------------------------------------

GMMA = "mma_traits_sm90_gmma.hpp"
MODES = {"INTER": 0, "SW128": 1, "SW64": 2, "SW32": 3}  # LayoutType in arch/mma_sm90_desc.hpp


class Operand:
    """A matrix [rows, 16] in shared memory, made of CuTe's atoms of one swizzle and major, M or N first."""

    def __init__(self, matrix: torch.Tensor, major: str, swizzle: str):
        name = rf"Layout_{major}_{swizzle}_Atom_Bits"
        found = re.search(
            rf"using {name}\s*=\s*ComposedLayout<Swizzle<(\d),(\d),(\d)>, smem_ptr_flag, (.+?)>;", header(GMMA)
        )
        self.swizzle = pycute.Swizzle(*(int(found[i]) for i in (1, 2, 3)))  # of byte addresses
        self.atom = layout(found[4])
        self.shape = [size if size == 8 else size // 16 for size in self.atom.shape]  # the other mode counts bits
        self.atom_bytes = self.shape[0] * self.shape[1] * 2
        rows, columns = matrix.shape
        self.atoms = (-(-rows // self.shape[0]), -(-columns // self.shape[1]))
        contents = torch.full((self.atoms[0] * self.atoms[1] * self.atom_bytes // 2,), float("nan"), dtype=matrix.dtype)
        for row in range(rows):
            for column in range(columns):
                contents[self.swizzle(self.place(row, column)) // 2] = matrix[row, column]
        self.words = contents.view(torch.int32)
        # As make_gmma_desc chooses them; where there is only one block in a direction, its step does not matter.
        width = 1 if swizzle == "INTER" else self.atom_bytes // 128
        step_k, step_rows = self.place(0, 8), self.place(8 if major == "K" or width == 1 else 8 * width, 0)
        if major == "K":
            self.leading, self.stride = (step_k if width == 1 else 16), step_rows
        else:
            self.leading, self.stride = (step_k, step_rows) if width == 1 else (step_rows, step_k)
        self.fields = [self.leading, self.stride, MODES[swizzle]]

    def place(self, row: int, column: int) -> int:
        """Byte offset before the swizzle."""
        bits = [1 if size == 8 else 16 for size in self.atom.shape]
        inside = self.atom(row % self.shape[0] * bits[0], column % self.shape[1] * bits[1]) // 8
        return (row // self.shape[0] + column // self.shape[1] * self.atoms[0]) * self.atom_bytes + inside


def multiply(kernel: str, a_words, a_fields, b: Operand, c: torch.Tensor) -> torch.Tensor:
    header_words = torch.tensor([*a_fields, *b.fields, len(a_words), len(b.words)], dtype=torch.int32)
    given = torch.cat([header_words, a_words, b.words, c.float().flatten().view(torch.int32)])
    out = torch.zeros(c.shape)
    source, shared = KERNELS / "conformance_sm90.cu", 4 * (len(a_words) + 256 + len(b.words))
    sim.launch(kernel, 1, 128, shared, given, out, source=source, arch="sm_90a")
    return out


CASES = [
    ("wgmma_bf16_n64", 64, "K", "K"),
    ("wgmma_bf16_n64_ta", 64, "MN", "K"),
    ("wgmma_bf16_n64_tb", 64, "K", "MN"),
    ("wgmma_bf16_n64_ta_tb", 64, "MN", "MN"),
    ("wgmma_bf16_n128_tb", 128, "K", "MN"),
    ("wgmma_bf16_n8", 8, "K", "K"),
    ("wgmma_f16_n96", 96, "K", "K"),
    ("wgmma_f16_n256", 256, "K", "K"),
]


@pytest.mark.parametrize("swizzle", MODES)
@pytest.mark.parametrize("kernel, n, major_a, major_b", CASES, ids=[case[0] for case in CASES])
def test_wgmma_in_shared_memory(kernel, n, major_a, major_b, swizzle):
    dtype = torch.float16 if "_f16_" in kernel else torch.bfloat16
    a, b, c = integers(64, 16, seed=1), integers(n, 16, seed=2), integers(64, n, seed=3)
    operands = Operand(a.to(dtype), major_a, swizzle), Operand(b.to(dtype), major_b, swizzle)
    got = multiply(kernel, operands[0].words, operands[0].fields, operands[1], c)
    assert got.equal((a @ b.T + c).float())


@pytest.mark.parametrize("kernel, major", [("wgmma_bf16_n64_registers", "K"), ("wgmma_f16_n64_registers_tb", "MN")])
def test_wgmma_in_registers(kernel, major):
    dtype = torch.float16 if "_f16_" in kernel else torch.bfloat16
    a, b, c = integers(64, 16, seed=1), integers(64, 16, seed=2), integers(64, 64, seed=3)
    got = multiply(kernel, a.to(dtype).view(torch.int32).flatten(), [0, 0, 0], Operand(b.to(dtype), major, "SW128"), c)
    assert got.equal((a @ b.T + c).float())


def test_wgmma_registers_are_where_the_kernels_think():
    """The fragments that conformance_sm90.cu and hopper_gemm.cu load and store, and wgmma.cuh describes, are CuTe's."""
    accumulator = indices(alias(header(GMMA), "CLayout_64xN", N=64), 128)
    operand = indices(alias(header(GMMA), "ALayout_64x16"), 128)
    for thread in range(128):
        row, t = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for e in range(32):
            assert accumulator[thread, e] == row + 8 * (e // 2 % 2) + 64 * (8 * (e // 4) + 2 * t + e % 2)
        for e in range(8):
            assert operand[thread, e] == row + 8 * (e // 2 % 2) + 64 * (2 * t + e % 2 + 8 * (e // 4))


# --- TMA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swizzle, span", [("SW128", 128), ("SW64", 64), ("SW32", 32), ("INTER", 128)])
def test_tma_swizzle(swizzle, span):
    """A box of rows of the swizzle's span lies where the K-major operand of wgmma with that swizzle is expected."""
    tensor = torch.arange(64 * span // 2, dtype=torch.int16).view(64, span // 2)
    modes = {"INTER": sim.Swizzle.NONE, "SW32": sim.Swizzle.B32, "SW64": sim.Swizzle.B64, "SW128": sim.Swizzle.B128}
    box = sim.TensorMap(tensor, (16, span // 2), modes[swizzle])
    given = torch.tensor([16 * span // 4, 0, 24, 0, 0, 0], dtype=torch.int32)
    out = torch.zeros(16 * span // 4, dtype=torch.int32)
    source = KERNELS / "conformance_sm90.cu"
    sim.launch("tma_load_2d", 1, 32, 16 * span, box, given, out, source=source, arch="sm_90a")
    swizzled = Operand(torch.zeros(8, 8), "K", swizzle).swizzle
    places = torch.tensor([swizzled(2 * i) // 2 for i in range(16 * span // 2)])
    assert out.view(torch.int16)[places].equal(tensor[24:40].flatten())
