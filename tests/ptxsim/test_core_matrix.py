"""mma.sync, ldmatrix, stmatrix, movmatrix and wgmma against plain matrix products of small integers: exact."""

import itertools

import core
import elementwise
import numpy as np
import pytest
import torch

RNG = np.random.default_rng(11)


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Bytes of small integers in an element type."""
    t = torch.from_numpy(values.astype(np.float64))
    table = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "f64": torch.float64, "s8": torch.int8,
             "u8": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}  # fmt: skip
    return t.to(table[kind]).contiguous().view(torch.uint8).numpy()


def integers(shape, kind):
    low = 0 if kind == "u8" else -4
    return RNG.integers(low, 5, shape)


SHAPES = [(16, 16, "bf16", "bf16", "f32"), (16, 8, "bf16", "bf16", "f32"), (16, 16, "f16", "f16", "f32"), (16, 8, "f16", "f16", "f32"),
          (16, 16, "f16", "f16", "f16"), (16, 8, "f16", "f16", "f16"), (16, 8, "tf32", "tf32", "f32"), (16, 4, "tf32", "tf32", "f32"),
          (16, 32, "s8", "s8", "s32"), (16, 32, "u8", "s8", "s32"), (16, 32, "s8", "u8", "s32"), (16, 16, "u8", "u8", "s32"), (8, 16, "s8", "s8", "s32"),
          (16, 32, "e4m3", "e4m3", "f32"), (16, 32, "e5m2", "e4m3", "f32"), (16, 32, "e4m3", "e5m2", "f16"), (16, 16, "e4m3", "e4m3", "f32"),
          (8, 4, "f64", "f64", "f64"), (16, 4, "f64", "f64", "f64"), (16, 8, "f64", "f64", "f64"), (16, 16, "f64", "f64", "f64")]  # fmt: skip


def lane_words(matrix: np.ndarray, kind: str, a_rows: int) -> np.ndarray:
    """Registers of A (a_rows 8 or 16), or of B given as its transpose (a_rows 0), from the manual's figures: [reg, lane] words."""
    word = 8 if kind == "f64" else 4
    raw = encode(matrix, kind).reshape(matrix.shape[0], -1, word)  # [row, word along k, bytes]
    words_k = raw.shape[1]
    regs = []
    if a_rows == 16:
        for high_k, high_row in itertools.product(range(words_k // 4), range(2)):
            regs.append([raw[lane // 4 + 8 * high_row, lane % 4 + 4 * high_k] for lane in range(32)])
    else:
        for high_k in range(words_k // 4):
            regs.append([raw[lane // 4, lane % 4 + 4 * high_k] for lane in range(32)])
    return np.array(regs).view(np.uint64 if word == 8 else np.uint32)[..., 0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"m{s[0]}n8k{s[1]}-{s[2]}-{s[3]}-{s[4]}")
def test_mma(shape):
    m, k, a_kind, b_kind, d_kind = shape
    a, b, c = integers((m, k), a_kind), integers((8, k), b_kind), RNG.integers(-9, 10, (m, 8))
    a_regs, b_regs = lane_words(a, a_kind, m), lane_words(b, b_kind, 0)
    dtype = {"f32": np.float32, "f64": np.float64, "s32": np.int32, "f16": np.float16}[d_kind]
    elements = m // 4
    where = [[(lane // 4 + 8 * (e >> 1), 2 * (lane % 4) + (e & 1)) for lane in range(32)] for e in range(elements)]
    c_values = np.array([[c[rc] for rc in row] for row in where]).astype(dtype)
    c_regs = (
        c_values if d_kind != "f16" else np.stack([c_values[0::2], c_values[1::2]], -1).copy().view(np.uint32)[..., 0]
    )
    wide, reg = a_kind == "f64", "b64" if a_kind == "f64" else "b32"
    acc_reg = {"f32": "f32", "f64": "f64", "s32": "b32", "f16": "b32"}[d_kind]
    size = 8 if wide else 4
    na, nb, nc = len(a_regs), len(b_regs), len(c_regs)
    load = lambda n, name, base, kind: "".join(
        f"ld.global.{kind} %{name}{i}, [{base}+{i * 32 * size}];\n" for i in range(n)
    )
    group = lambda name, n: "{" + ", ".join(f"%{name}{i}" for i in range(n)) + "}"
    text = elementwise.HEADER + f""".visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pc) {{
    .reg .{reg} %a<9>, %b<9>; .reg .{acc_reg} %c<9>, %d<9>; .reg .b64 %pa, %pb, %pc, %o; .reg .b32 %t;
    ld.param.u64 %pa, [pa]; ld.param.u64 %pb, [pb]; ld.param.u64 %pc, [pc]; mov.u32 %t, %tid.x; mul.wide.u32 %o, %t, {size};
    add.s64 %pa, %pa, %o; add.s64 %pb, %pb, %o; add.s64 %pc, %pc, %o;
    {load(na, "a", "%pa", reg)}{load(nb, "b", "%pb", reg)}{load(nc, "c", "%pc", acc_reg)}
    mma.sync.aligned.m{m}n8k{k}.row.col.{d_kind}.{a_kind}.{b_kind}.{d_kind} {group("d", nc)}, {group("a", na)}, {group("b", nb)}, {group("c", nc)};
    """ + "".join(f"st.global.{acc_reg} [%pc+{i * 32 * size}], %d{i};\n" for i in range(nc)) + "ret; }\n"  # fmt: skip
    out = np.ascontiguousarray(c_regs)
    result = core.Module(text, "mma.ptx").launch(
        "kernel", 1, 32, [np.ascontiguousarray(a_regs), np.ascontiguousarray(b_regs), out], arch="sm_90a"
    )
    if d_kind == "f16":
        halves = out.view(np.float16).reshape(nc, 32, 2)
        got_values = np.stack([halves[e // 2, :, e % 2] for e in range(elements)])
    else:
        got_values = out.view(dtype).reshape(elements, 32)
    got = np.zeros((m, 8))
    for row, values in zip(where, got_values):
        for rc, v in zip(row, values):
            got[rc] = v
    assert np.array_equal(got, a @ b.T + c)
    assert result.mma_flops == 2 * m * 8 * k


def test_matrix_moves(nvcc):
    source = """
    extern "C" __global__ void kernel(unsigned* out) {
      __shared__ __align__(128) unsigned short s[4][8][8];
      __shared__ __align__(128) unsigned short t[4][8][8];
      for (int i = threadIdx.x; i < 256; i += 32) (&s[0][0][0])[i] = i;
      __syncthreads();
      unsigned r[4], q[4], m;
      unsigned a = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x / 8][threadIdx.x % 8][0]);
      unsigned b = (unsigned)__cvta_generic_to_shared(&t[threadIdx.x / 8][threadIdx.x % 8][0]);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3]) : "r"(a));
      asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(m) : "r"(r[1]));
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" :: "r"(b), "r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]) : "memory");
      __syncthreads();
      for (int i = 0; i < 4; ++i) { out[i * 32 + threadIdx.x] = r[i]; out[128 + i * 32 + threadIdx.x] = q[i]; }
      out[256 + threadIdx.x] = m;
      for (int i = threadIdx.x; i < 128; i += 32) out[288 + i] = ((unsigned*)t)[i];
    }"""  # fmt: skip
    out = np.zeros(416, np.uint32)
    core.Module(nvcc(source, "sm_90a"), "moves.ptx").launch("kernel", 1, 32, [out], arch="sm_90a")
    s = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    assert np.array_equal(
        out[:128].view(np.uint16).reshape(4, 8, 8), s
    )  # lane l: row l / 4, columns 2 (l % 4) + {0, 1}
    assert np.array_equal(out[128:256].view(np.uint16).reshape(4, 8, 8), s.transpose(0, 2, 1))
    assert np.array_equal(out[256:288].view(np.uint16).reshape(8, 8), s[1].T)
    assert np.array_equal(out[288:].view(np.uint16).reshape(4, 8, 8), s)


# Canonical layouts of the manual, in units of 16 bytes, for an operand of mn x (32 bytes of k); `build` lays a matrix out.
SWIZZLES = {0: 16, 3: 32, 2: 64, 1: 128}  # descriptor mode: bytes of its span


def place_k_major(raw: np.ndarray, mode: int) -> tuple[np.ndarray, int, int]:
    """raw [mn, bytes of k]: shared memory image, LBO, SBO in bytes, for one step along k."""
    mn, row_bytes = raw.shape
    if mode == 0:  # 8 x 16-byte core matrices, those along k next to each other
        image = raw.reshape(mn // 8, 8, row_bytes // 16, 16).transpose(0, 2, 1, 3).reshape(-1)
        return image, 128, 128 * (row_bytes // 16)
    span = SWIZZLES[mode]
    padded = np.zeros((mn, span), np.uint8)
    padded[:, :row_bytes] = raw
    return padded.reshape(-1), 16, 8 * span


def swizzle_image(image: np.ndarray, mode: int) -> np.ndarray:
    mask = {0: 0, 3: 1, 2: 3, 1: 7}[mode]
    out = np.zeros_like(image)
    for chunk in range(len(image) // 16):
        address = 16 * chunk
        to = address ^ (((address >> 7) & mask) << 4)
        out[to : to + 16] = image[address : address + 16]
    return out


def place_mn_major(values16: np.ndarray, mode: int) -> tuple[np.ndarray, int, int]:
    """values16 [mn, 16] of 16-bit elements, k = 16: image, LBO, SBO."""
    mn = values16.shape[0]
    if mode == 0:  # core matrix: 8 rows of k, 16 bytes of mn each
        image = values16.T.reshape(2, 8, mn // 8, 8).transpose(2, 0, 1, 3)  # [mn/8, k/8, k%8, mn%8]
        return np.ascontiguousarray(image).view(np.uint8).reshape(-1), 128, 256
    span = SWIZZLES[mode] // 2  # elements of mn in a line
    image = values16.T.reshape(2, 8, mn // span, span).transpose(2, 0, 1, 3)  # [mn/span, k/8, k%8, span]
    atom = 8 * span * 2
    return np.ascontiguousarray(image).view(np.uint8).reshape(-1), 2 * atom, atom


def wgmma_module(n, a_kind, d_kind, a_in_registers, trans_a, trans_b, b_kind=None):
    k = 32 // {"bf16": 2, "f16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}[a_kind]
    regs = n // 4 if d_kind == "f16" else n // 2
    acc = "b32" if d_kind in ("f16", "s32") else "f32"
    d = "{" + ", ".join(f"%d{i}" for i in range(regs)) + "}"
    a = "{%a0, %a1, %a2, %a3}" if a_in_registers else "%da"
    tail = "" if d_kind == "s32" else ", 1, 1"
    if k == 16:
        tail += f", {trans_b}" if a_in_registers else f", {trans_a}, {trans_b}"
    size_a, size_b = "%na", "%nb"
    return core.Module(elementwise.HEADER + f""".visible .entry kernel(.param .u64 pa, .param .u64 pb, .param .u64 pd, .param .u64 da, .param .u64 db, .param .u32 na, .param .u32 nb, .param .u64 ra) {{
    .reg .{acc} %d<{regs}>; .reg .b32 %a<4>, %t, %i, %v, %s, %na, %nb, %base; .reg .b64 %pa, %pb, %pd, %da, %db, %q, %ra; .reg .pred %p;
    .extern .shared .align 1024 .b8 shared[];
    ld.param.u64 %pa, [pa]; ld.param.u64 %pb, [pb]; ld.param.u64 %pd, [pd]; ld.param.u64 %da, [da]; ld.param.u64 %db, [db]; ld.param.u64 %ra, [ra];
    ld.param.u32 %na, [na]; ld.param.u32 %nb, [nb]; mov.u32 %t, %tid.x; mov.u32 %base, shared;
    shl.b32 %i, %t, 2;
    A: setp.ge.u32 %p, %i, {size_a}; @%p bra B; cvt.u64.u32 %q, %i; add.s64 %q, %q, %pa; ld.global.b32 %v, [%q]; add.u32 %s, %base, %i; st.shared.b32 [%s], %v; add.u32 %i, %i, 512; bra A;
    B: shl.b32 %i, %t, 2; add.u32 %base, %base, 32768;
    C: setp.ge.u32 %p, %i, {size_b}; @%p bra D; cvt.u64.u32 %q, %i; add.s64 %q, %q, %pb; ld.global.b32 %v, [%q]; add.u32 %s, %base, %i; st.shared.b32 [%s], %v; add.u32 %i, %i, 512; bra C;
    D: fence.proxy.async.shared::cta; bar.sync 0;
    mul.wide.u32 %q, %t, 16; add.s64 %ra, %ra, %q; ld.global.v4.b32 {{%a0, %a1, %a2, %a3}}, [%ra];
    """ + "".join(f"mov.b32 %d{i}, {'0f00000000' if acc == 'f32' else 0};\n" for i in range(regs)) + f"""
    wgmma.fence.sync.aligned;
    setp.ne.u32 %p, %na, %na;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d_kind}.{a_kind}.{b_kind or a_kind} {d}, {a}, %db, %p{tail};
    setp.eq.u32 %p, %na, %na;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d_kind}.{a_kind}.{b_kind or a_kind} {d}, {a}, %db, %p{tail};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %q, %t, 4; add.s64 %pd, %pd, %q;
    """ + "".join(f"st.global.b32 [%pd+{i * 512}], %d{i};\n" for i in range(regs)) + "ret; }\n", "wgmma.ptx")  # fmt: skip


def descriptor(address, lbo, sbo, mode):
    return address >> 4 | lbo >> 4 << 16 | sbo >> 4 << 32 | mode << 62


def run_wgmma(n, a_kind, d_kind, mode, *, in_registers=False, mn_a=False, mn_b=False, b_kind=None):
    k = 32 // {"bf16": 2, "f16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}[a_kind]
    a, b = integers((64, k), a_kind), integers((n, k), b_kind or a_kind)
    images = []
    for matrix, kind, mn in ((a, a_kind, mn_a), (b, b_kind or a_kind, mn_b)):
        raw = encode(matrix, kind).reshape(len(matrix), 32)
        image, lbo, sbo = (
            place_mn_major(np.ascontiguousarray(raw).view(np.uint16), mode) if mn else place_k_major(raw, mode)
        )
        images.append((np.ascontiguousarray(swizzle_image(np.ascontiguousarray(image), mode)), lbo, sbo))
    (image_a, lbo_a, sbo_a), (image_b, lbo_b, sbo_b) = images
    raw = encode(a, a_kind).reshape(64, 8, 4)
    fragments = (
        np.array(
            [
                [raw[16 * (t // 32) + t % 32 // 4 + 8 * (r & 1), t % 4 + 4 * (r >> 1)] for r in range(4)]
                for t in range(128)
            ]
        )
        .reshape(-1)
        .copy()
    )
    regs = n // 4 if d_kind == "f16" else n // 2
    out = np.zeros((regs, 128), np.uint32)
    module = wgmma_module(n, a_kind, d_kind, in_registers, int(mn_a), int(mn_b), b_kind)
    module.launch("kernel", 1, 128, [image_a, image_b, out, descriptor(1024, lbo_a, sbo_a, mode), descriptor(1024 + 32768, lbo_b, sbo_b, mode),
                                     len(image_a), len(image_b), fragments], shared=32768 * 3, arch="sm_90a")  # fmt: skip
    got = np.zeros((64, n))
    for e in range(n // 2):
        for t in range(128):
            row, col = 16 * (t // 32) + t % 32 // 4 + 8 * ((e >> 1) & 1), 8 * (e // 4) + 2 * (t % 4) + (e & 1)
            if d_kind == "f16":
                got[row, col] = out[e // 2].view(np.float16).reshape(128, 2)[t, e & 1]
            else:
                got[row, col] = out[e].view(np.int32 if d_kind == "s32" else np.float32)[t]
    assert np.array_equal(got, 2 * (a @ b.T))


@pytest.mark.parametrize("mode", SWIZZLES)
@pytest.mark.parametrize("major", ["kk", "kmn", "mnk", "mnmn"])
def test_wgmma_layouts(mode, major):
    run_wgmma(64, "bf16", "f32", mode, mn_a=major.startswith("mn"), mn_b=major.endswith("mn"))


@pytest.mark.parametrize(
    "kinds",
    [
        ("bf16", "f32"),
        ("f16", "f32"),
        ("f16", "f16"),
        ("tf32", "f32"),
        ("s8", "s32"),
        ("u8", "s32"),
        ("e4m3", "f32"),
        ("e5m2", "f16"),
    ],
)
@pytest.mark.parametrize("in_registers", [False, True])
def test_wgmma_types(kinds, in_registers):
    run_wgmma(32, *kinds, 1, in_registers=in_registers)


@pytest.mark.parametrize("n", [8, 24, 128, 256])
def test_wgmma_widths(n):
    run_wgmma(n, "f16", "f32", 1)
    run_wgmma(n, "s8", "s32", 2, b_kind="u8")
