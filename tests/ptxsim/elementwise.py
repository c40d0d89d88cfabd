"""Kernels of one instruction: every thread loads its operands, computes, stores. Instructions that share types share a module."""

import core
import numpy as np

HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"
BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 4}  # fmt: skip


def _register(kind: str) -> str:
    return {1: "b16", 2: "b16", 4: "b32", 8: "b64"}[BYTES[kind]] if kind not in ("f32", "f64") else kind


def source(name: str, instruction: str, inputs: list[str], output: str) -> str:
    """`instruction` names its operands {d}, {a}, {b}, {c}, {e}; a predicate becomes 0 or 1."""
    lines = [f".visible .entry {name}(.param .u64 out, " + ", ".join(f".param .u64 in{i}" for i in range(len(inputs))) + ") {",
             ".reg .b32 %r<4>; .reg .b64 %rd<12>; .reg .pred %p<4>;",
             f".reg .{_register(output)} %d;" if output != "pred" else ".reg .b32 %d;",
             "mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r0, %r1, %r2;"]  # fmt: skip
    names = {}
    for i, kind in enumerate(inputs):
        letter = "abce"[i]
        names[letter] = f"%{letter}"
        lines.append(f".reg .{_register(kind)} %{letter};")
        lines.append(
            f"ld.param.u64 %rd{i}, [in{i}]; mul.wide.u32 %rd10, %r3, {BYTES[kind]}; add.s64 %rd{i}, %rd{i}, %rd10;"
        )
        loaded = kind if kind in ("f32", "f64") else f"b{8 * BYTES[kind]}"
        lines.append(f"ld.global.{loaded} %{letter}, [%rd{i}];")
    lines.append(instruction.format(d="%p0" if output == "pred" else "%d", **names) + ";")
    if output == "pred":
        lines.append("selp.b32 %d, 1, 0, %p0;")
    stored = output if output in ("f32", "f64") else f"b{8 * BYTES[output]}"
    lines.append(f"ld.param.u64 %rd9, [out]; mul.wide.u32 %rd10, %r3, {BYTES[output]}; add.s64 %rd9, %rd9, %rd10;")
    lines.append(f"st.global.{stored} [%rd9], %d; ret; }}")
    return "\n".join(lines) + "\n"


def run(cases: dict[str, tuple[str, list[str], str]], arrays: dict[str, list[np.ndarray]], out_types: dict[str, type]):
    """Result of each case by its key; arrays of a case have the same length."""
    names = {key: f"k{i}" for i, key in enumerate(cases)}
    module = core.Module(HEADER + "".join(source(names[key], *case) for key, case in cases.items()), "elementwise.ptx")
    results = {}
    for key in cases:
        count = len(arrays[key][0])
        assert count % 32 == 0
        out = np.zeros(count, dtype=out_types[key])
        module.launch(names[key], count // 32, 32, [out, *arrays[key]], arch="sm_90a", check=False)
        results[key] = out
    return results


def one(instruction: str, inputs: list[str], output: str, arrays: list[np.ndarray], out_type: type) -> np.ndarray:
    return run({"x": (instruction, inputs, output)}, {"x": arrays}, {"x": out_type})["x"]
