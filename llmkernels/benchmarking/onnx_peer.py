"""ONNX Runtime as a peer: one operator as a model of its own. Needs `pip install onnx onnxruntime`."""

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

AVAILABLE = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def operator(
    op_type: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[str],
    *,
    domain: str = "",
    constants: Sequence[Tensor] = (),
    **attributes,
) -> Callable:
    """`op_type` as a function of CPU tensors with the dtypes and ranks of `inputs`, returning a tuple of tensors.

    An empty name in `outputs` leaves that output of the operator out. `constants` are its inputs behind those, part of
    the model: what the runtime may bring into a form of its own once. It runs on torch's number of threads.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int32: TensorProto.INT32}
    names = [f"input{index}" for index in range(len(inputs))]
    stored = [numpy_helper.from_array(tensor.numpy(), f"constant{index}") for index, tensor in enumerate(constants)]
    own = [constant.name for constant in stored]
    node = helper.make_node(op_type, names + own, list(outputs), domain=domain, **attributes)
    values = [
        helper.make_tensor_value_info(name, kinds[tensor.dtype], [None] * tensor.dim())
        for name, tensor in zip(names, inputs, strict=True)
    ]
    wanted = [name for name in outputs if name]
    results = [helper.make_tensor_value_info(name, kinds[inputs[0].dtype], None) for name in wanted]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], op_type, values, results, initializer=stored)
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = onnx.IR_VERSION if onnx.IR_VERSION < 10 else 10  # what older runtimes read
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        feed = {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return tuple(torch.from_numpy(array) for array in session.run(wanted, feed))

    return run
