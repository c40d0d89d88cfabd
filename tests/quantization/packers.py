"""Files of AWQ and GPTQ, packed one code at a time in numpy from the description of their layouts alone.

Nothing of llmkernels is used here. A layer is codes `[K, N]`, zero points `[G, N]`, scales `[G, N]` and the group of
each row `[K]`; it means scales[g, n] * (codes[k, n] - zeros[g, n]).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy

# AutoAWQ packs the eight columns of a word in this order, the first of these in the lowest four bits.
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class PackedLayer:
    codes: numpy.ndarray
    zeros: numpy.ndarray
    scales: numpy.ndarray
    groups: numpy.ndarray
    bias: numpy.ndarray | None

    def weight(self) -> numpy.ndarray:
        """`[N, K]` in fp64, element by element."""
        K, N = self.codes.shape
        found = numpy.zeros((N, K))
        for k in range(K):
            g = self.groups[k]
            for n in range(N):
                found[n, k] = float(self.scales[g, n]) * (int(self.codes[k, n]) - int(self.zeros[g, n]))
        return found


def random_layer(seed, K, N, group_size, *, symmetric=False, desc_act=False, bias=False, least_zero=1) -> PackedLayer:
    random = numpy.random.default_rng(seed)
    size = K if group_size == -1 else group_size
    G = -(-K // size)
    groups = numpy.arange(K) // size
    if desc_act:
        groups = groups[random.permutation(K)]
    zeros = numpy.full((G, N), 8) if symmetric else random.integers(least_zero, 16, (G, N))
    scales = random.uniform(0.001, 0.02, (G, N)).astype(numpy.float16)
    offset = random.normal(size=N).astype(numpy.float16) if bias else None
    return PackedLayer(random.integers(0, 16, (K, N)), zeros, scales, groups, offset)


def _word(nibbles) -> int:
    """Eight codes as one signed 32-bit integer, the first in the lowest bits."""
    word = 0
    for place, nibble in enumerate(nibbles):
        assert 0 <= nibble <= 15
        word |= int(nibble) << (4 * place)
    return word - 2**32 if word >= 2**31 else word


def _pack_rows(matrix) -> numpy.ndarray:
    rows, columns = matrix.shape
    words = [[_word(matrix[8 * r + i, c] for i in range(8)) for c in range(columns)] for r in range(rows // 8)]
    return numpy.array(words, dtype=numpy.int32)


def _pack_columns(matrix, order) -> numpy.ndarray:
    rows, columns = matrix.shape
    words = [[_word(matrix[r, 8 * c + i] for i in order) for c in range(columns // 8)] for r in range(rows)]
    return numpy.array(words, dtype=numpy.int32)


def gptq(layer: PackedLayer, version: int = 1, g_idx: bool = True) -> dict[str, numpy.ndarray]:
    """qweight [K / 8, N]; qzeros [G, N / 8], less one in version 1; scales [G, N]; g_idx [K]."""
    tensors = {
        "qweight": _pack_rows(layer.codes),
        "qzeros": _pack_columns(layer.zeros - (1 if version == 1 else 0), range(8)),
        "scales": layer.scales,
    }
    if g_idx:
        tensors["g_idx"] = layer.groups.astype(numpy.int32)
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def awq(layer: PackedLayer) -> dict[str, numpy.ndarray]:
    """qweight [K, N / 8]; qzeros [G, N / 8]; scales [G, N]."""
    tensors = {
        "qweight": _pack_columns(layer.codes, AWQ_COLUMNS),
        "qzeros": _pack_columns(layer.zeros, AWQ_COLUMNS),
        "scales": layer.scales,
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def write_safetensors(path: Path, tensors: dict[str, numpy.ndarray]) -> None:
    """A file from the description of the format: the length of a JSON header, the header, the bytes."""
    kinds = {"int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = numpy.ascontiguousarray(tensor).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": kinds[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(folder: Path, tensors: dict[str, numpy.ndarray], config: dict, shards: int = 1) -> None:
    """config.json and the tensors in one file, or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "quantization_config": config}))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[shard::shards]
        index |= dict.fromkeys(names, file)
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
