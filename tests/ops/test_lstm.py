"""What is particular to lstm and lstm_cell: wrong variants, options together, lengths, states; test_battery.py has the
rest."""

import itertools
import warnings

import pytest
import torch
from torch.nn.utils import rnn

import llmkernels
from llmkernels import _native, functional, nn
from llmkernels.ops.lstm import cases, reference
from llmkernels.testing.battery import failures, judge, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name
from tests.conftest import device_of

warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")


# Deliberately wrong formulas: the rule has to reject each of them.


def _sequence(inputs, step):
    """A layer as a loop over `step(i, f, g, o, c)`, which gives (h, c)."""
    h, c, outputs = inputs.h0[0], inputs.c0[0], []
    w_ih, w_hh, b_ih, b_hh = inputs.parameters()
    for x in inputs.input.unbind():
        gates = x @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh
        h, c = step(*gates.chunk(4, -1), c)
        outputs.append(h)
    return torch.stack(outputs), h[None], c[None]


def _right(i, f, g, o, c):
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _cell_after(i, f, g, o, c):
    new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), new


def _no_tanh(i, f, g, o, c):
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * c, c


WRONG = {
    "i and f swapped": lambda i, f, g, o, c: _right(f, i, g, o, c),
    "g and o swapped": lambda i, f, g, o, c: _right(i, f, o, g, c),
    "no forget gate": lambda i, f, g, o, c: _right(i, torch.full_like(f, 40.0), g, o, c),
    "input gate is 1 - f": lambda i, f, g, o, c: _right(-f, f, g, o, c),
    "output of the last c": _cell_after,
    "c without tanh": _no_tanh,
    "forget bias of one": lambda i, f, g, o, c: _right(i, f + 1.0, g, o, c),
    "one percent off": lambda i, f, g, o, c: tuple(1.01 * s for s in _right(i, f, g, o, c)),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_variants(dtype, wrong):
    case = cases.LSTMCase("lstm", T=6, B=8, dtype=dtype)
    inputs = cases.make_inputs(case)
    step = _right if wrong is None else WRONG[wrong]

    def variant(leaves):
        wide = leaves.replace(**{name: getattr(leaves, name).float() for name in leaves.leaf_names()})
        return tuple(result.to(dtype) for result in _sequence(wide, step))

    found = failures(judge_results(cases, case, inputs, outputs_and_gradients(inputs, variant)))
    assert (found == []) == (wrong is None), found


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_gradients(dtype):
    case = cases.LSTMCase("lstm", T=6, B=8, dtype=dtype)
    inputs = cases.make_inputs(case)
    right = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, "torch"))
    assert failures(judge_results(cases, case, inputs, right)) == []
    wrong = {
        "one step of the weights' gradient forgotten": {"dw_hh_l0": right["dw_hh_l0"] * (5.0 / 6.0)},
        "biases' gradients twice": {"db_hh_l0": 2.0 * right["db_hh_l0"]},
        "dc0 is dh0": {"dc0": right["dh0"]},
        "inputs' gradients reversed": {"dinput": right["dinput"].flip(0)},
        "products swapped": {"dw_ih_l0": right["dw_hh_l0"][:, :12].contiguous()},
    }
    for name, results in wrong.items():
        assert failures(judge_results(cases, case, inputs, right | results)) != [], name


# The peer is torch's own module, for every combination of options.

GRID = list(itertools.product((1, 2), (False, True), (0, 5), (False, True), (False, True)))


def pair(dtype=torch.float32, *, backend=None, **options):
    """(torch's module, ours) with the same parameters."""
    theirs = torch.nn.LSTM(6, 9, dtype=dtype, **options)
    ours = nn.LSTM(6, 9, dtype=dtype, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def check(ours, theirs, parameters, tolerance):
    """Outputs and the gradients of all parameters agree."""
    torch.testing.assert_close(ours, theirs, **tolerance)
    for results, module in zip((ours, theirs), parameters, strict=True):
        module.zero_grad()
        sum((result.float() * torch.linspace(-1, 1, result.numel()).view(result.shape)).sum()
            for result in results).backward()  # fmt: skip
    for (name, a), (_, b) in zip(*(module.named_parameters() for module in parameters), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 1e-1},
    torch.float16: {"rtol": 1e-2, "atol": 2e-2},
}


@pytest.mark.parametrize("backend", ("torch", "cpu"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=short_name)
@pytest.mark.parametrize("kind", ("dense", "packed", "sorted", "lengths", "unbatched"))
def test_equals_torchs_module(backend, dtype, kind):
    if backend == "cpu" and _native.why_absent("cpu"):
        pytest.skip(f"cpu: {_native.why_absent('cpu')}")
    for layers, bidirectional, proj_size, bias, batch_first in GRID:
        options = {"num_layers": layers, "bidirectional": bidirectional, "proj_size": proj_size, "bias": bias}
        theirs, ours = pair(dtype, backend=backend, batch_first=batch_first, **options)
        generator = torch.Generator().manual_seed(layers)
        x = torch.randn(5, 4, 6, generator=generator).to(dtype)
        x = x.transpose(0, 1).contiguous() if batch_first else x
        states = layers * (2 if bidirectional else 1)
        hx = (torch.randn(states, 4, proj_size or 9, generator=generator).to(dtype),
              torch.randn(states, 4, 9, generator=generator).to(dtype))  # fmt: skip
        lengths = torch.tensor([5, 4, 4, 1] if kind == "sorted" else [2, 5, 1, 4])
        flat = lambda result: (result[0], *result[1])
        if kind == "dense":
            a, b = flat(ours(x, hx)), flat(theirs(x, hx))
            torch.testing.assert_close(flat(ours(x)), flat(theirs(x)), **TOLERANCE[dtype])
        elif kind == "unbatched":
            x, hx = x.select(0 if batch_first else 1, 0), tuple(state[:, 0] for state in hx)
            a, b = flat(ours(x, hx)), flat(theirs(x, hx))
            assert a[0].shape == b[0].shape and a[1].shape == b[1].shape
        else:
            packed = rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=kind == "sorted")
            b = theirs(packed, hx)
            if kind == "lengths":
                a = flat(ours(x, hx, lengths))
                padded = rnn.pad_packed_sequence(b[0], batch_first, total_length=5)[0]
                b = (padded, *b[1])
            else:
                a = ours(packed, hx)
                assert type(a[0]) is type(b[0]) and torch.equal(a[0].batch_sizes, b[0].batch_sizes)
                torch.testing.assert_close(ours(packed)[0].data, theirs(packed)[0].data, **TOLERANCE[dtype])
                a, b = (a[0].data, *a[1]), (b[0].data, *b[1])
        check(a, b, (ours, theirs), TOLERANCE[dtype])


def skip_unless(backend, case):
    try:
        cases.call(case, cases.make_inputs(case, device_of(backend)), backend)
    except llmkernels.NoBackendError as error:
        pytest.skip(f"{backend}: {str(error).split(': ', 2)[-1]}")


def options_of(case, inputs):
    return (inputs.parameters(), case.bias, case.layers, 0.0, False, case.bidirectional, case.batch_first)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
@pytest.mark.parametrize("B", (1, 7))
def test_two_halves_with_the_state_handed_on_are_the_whole(B, dtype, backend, device, poison):
    """Up to the rounding of c between the halves."""
    case = cases.LSTMCase("lstm", T=8, B=B, layers=2, dtype=dtype)
    skip_unless(backend, case)
    inputs = cases.make_inputs(case, device)
    run = lambda x, h, c: functional.lstm(x, (h, c), *options_of(case, inputs), backend=backend)
    whole = run(inputs.input, inputs.h0, inputs.c0)
    first, *state = run(inputs.input[:4], inputs.h0, inputs.c0)
    second, *state = run(inputs.input[4:], *state)
    tolerance = {"rtol": 0, "atol": {8: 1e-14, 4: 1e-6, 2: 4e-2}[dtype.itemsize]}
    torch.testing.assert_close((torch.cat((first, second)), *state), whole, **tolerance)


@pytest.mark.parametrize("options", ({}, {"bidirectional": True, "layers": 2}, {"proj": 7}, {"batch_first": True}))
def test_nothing_is_read_past_a_length(options, backend, device, poison):
    case = cases.LSTMCase("lstm", T=6, B=4, lengths=(3, 6, 1, 5), **options)
    skip_unless(backend, case)
    inputs = cases.make_inputs(case, device)
    clean = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, backend))
    dirty, late = (
        inputs.input.clone(),
        lambda x, b: x[b, case.lengths[b] :] if case.batch_first else x[case.lengths[b] :, b],
    )
    for b in range(4):
        late(dirty, b).fill_(float("nan"))
    found = outputs_and_gradients(inputs.replace(input=dirty), lambda leaves: cases.call(case, leaves, backend))
    assert all(torch.equal(found[name], clean[name]) for name in clean)
    assert not any(late(found["output"], b).any() for b in range(4))


def test_lengths_in_any_order_and_form(backend, device):
    case = cases.LSTMCase("lstm", T=6, B=4, lengths=(3, 6, 1, 5))
    skip_unless(backend, case)
    inputs = cases.make_inputs(case, device)
    call = lambda lengths: functional.lstm(
        inputs.input, (inputs.h0, inputs.c0), *options_of(case, inputs), lengths=lengths, backend=backend
    )
    expected = call(torch.tensor(case.lengths))
    for lengths in (case.lengths, torch.tensor(case.lengths, dtype=torch.int32), torch.tensor(case.lengths).to(device)):
        assert all(map(torch.equal, call(lengths), expected))


def test_room_for_all_sequences_or_none():
    """The two layouts of ragged rows, of every backend with the raw op."""
    for options in ({}, {"proj": 6}):
        case = cases.LSTMCase("lstm", T=4, B=3, I=10, H=10, **options)
        inputs = cases.make_inputs(case)
        weights = dict(zip(case.parameters(), inputs.parameters(), strict=True))
        counts = torch.tensor([3, 2, 2, 0])
        live = (torch.arange(3) < counts[:, None]).flatten()
        gates_x = torch.randn(12, 40)
        fixed = (inputs.h0[0], inputs.c0[0], weights["w_hh_l0"], weights.get("w_hr_l0"), counts)
        for space, reverse in itertools.product(("cpu", "torch"), (False, True)):
            if space == "cpu" and _native.why_absent("cpu"):
                continue
            ops = getattr(torch.ops, f"llmkernels_{space}")
            wide = ops.lstm_recurrence_fwd(gates_x, *fixed, reverse, True)
            dense = ops.lstm_recurrence_fwd(gates_x[live], *fixed, reverse, True)
            for a, b in zip(wide[:1] + wide[3:], dense[:1] + dense[3:], strict=True):
                torch.testing.assert_close(a[live], b)
            assert not wide[0][~live].any()
            torch.testing.assert_close(wide[1:3], dense[1:3])
            dy, dh, dc = torch.randn(12, case.size), torch.randn(3, case.size), torch.randn(3, 10)
            grads = [
                ops.lstm_recurrence_bwd(d, dh, dc, None, *fixed, reverse, *saved, [True] * 4 + [bool(case.proj)])
                for d, saved in ((dy, (wide[0], *wide[3:])), (dy[live], (dense[0], *dense[3:])))
            ]
            torch.testing.assert_close(grads[0][0][live], grads[1][0])
            assert not grads[0][0][~live].any()
            torch.testing.assert_close(grads[0][1:], grads[1][1:])


# Accuracy of the functions underneath, on every instruction set.


SMALL = (  # one case of each shape of tile and way of reading the weights
    {"B": 1, "T": 3, "H": 37}, {"B": 2, "T": 3, "H": 37}, {"B": 4, "T": 5, "H": 70, "proj": 33},
    {"B": 13, "T": 2, "H": 130, "lengths": (2,) * 6 + (1,) * 7, "bidirectional": True},
    {"B": 75, "T": 2, "H": 70}, {"B": 3, "T": 2, "H": 270},  # rows finished apart, sums of several pieces
)  # fmt: skip


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_every_instruction_set(dtype, isa, poison):
    for options in SMALL:
        case = cases.LSTMCase("lstm", dtype=dtype, **options)
        assert failures(judge(cases, case, "cpu")) == [], options
    assert failures(judge(cases, cases.LSTMCase("lstm_cell", B=5, H=37, dtype=dtype), "cpu")) == []


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_products_of_rows_on_every_instruction_set(dtype, isa, poison):
    product = torch.ops.llmkernels_cpu.rows_product
    allowed = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    for N, K, C in ((1, 1, 1), (7, 33, 65), (75, 270, 130), (145, 515, 64)):
        x, w, b = (torch.randn(shape).to(dtype) for shape in ((N, K), (C, K), (C,)))
        truth = x.double() @ w.double().t()
        pairs = ((product(x, w, b, False), truth + b.double()), (product(x, w.t(), None, True), truth))
        for found, expected in pairs:
            assert (found.double() - expected).abs().max() <= allowed * expected.abs().max()
    with pytest.raises(ValueError, match=r"rows_product: weights has shape \[2, 3\], expected \[2, 5\]"):
        product(torch.randn(4, 5), torch.randn(2, 3), None, False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_the_input_of_many_rows_has_gradients(dtype, backend, device):
    """Enough rows for the packed product, forward and backward, beside torch's."""
    case = cases.LSTMCase("lstm", T=12, B=24, I=40, H=36, dtype=dtype)
    skip_unless(backend, case)
    inputs = cases.make_inputs(case, device)
    results = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, backend))
    assert failures(judge_results(cases, case, inputs, results)) == []


LIMIT = 40.0  # a gate that is open in every digit


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=short_name)
def test_sigmoid_and_tanh_over_a_dense_sweep(dtype, isa):
    x = torch.cat((torch.linspace(-100, 100, 200_001), torch.logspace(-40, 2, 20_001), -torch.logspace(-40, 2, 20_001)))
    x = x.to(dtype)[None]
    zero, full = torch.zeros_like(x), torch.full_like(x, LIMIT)
    # c' = sigmoid(i) tanh(g) with one of the two open: i of 40 makes sigmoid one.
    cell = lambda i, g: _parts(i, g, zero, full)
    for result, truth in ((cell(full, x), torch.tanh(x.double())), (cell(x, full), torch.sigmoid(x.double()))):
        assert torch.isfinite(result).all()
        size = truth.abs().clamp(min=1e-36)
        error = (result.double() - truth).abs() / (torch.finfo(dtype).eps * size)
        assert error[truth.abs() > 1e-36].max() <= 4.0


def _parts(i, g, zero, full):
    gates = torch.cat((i, -full, g, full), -1)
    return torch.ops.llmkernels_cpu.lstm_cell_fwd(gates, torch.zeros_like(gates), zero, False)[1]


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_special_values_propagate_as_in_torch(value, op, backend, device):
    case = cases.LSTMCase(op, T=3, B=4)
    skip_unless(backend, case)
    inputs = cases.make_inputs(case, device)
    (inputs.input[2] if case.cell else inputs.input[1, 2])[5] = value
    ours = cases.call(case, inputs, backend)
    torch.testing.assert_close(ours, cases.call_torch(case, inputs), equal_nan=True, rtol=1e-4, atol=1e-5)


def test_reference_of_the_backward_is_autograds():
    case = cases.LSTMCase("lstm", T=4, B=3, I=10, H=10, proj=6, dtype=torch.float64)
    inputs = cases.make_inputs(case)
    weights = dict(zip(case.parameters(), inputs.parameters(), strict=True))
    for counts, reverse in itertools.product((None, torch.tensor([3, 2, 2, 1])), (False, True)):
        rows = 12 if counts is None else 8
        tensors = [torch.randn(rows, 40, dtype=torch.float64), inputs.h0[0], inputs.c0[0], weights["w_hh_l0"],
                   weights["w_hr_l0"]]  # fmt: skip
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = reference.recurrence(*tensors, counts, reverse)
        arriving = [torch.randn_like(output) for output in outputs]
        expected = torch.autograd.grad(outputs, tensors, arriving)
        y, _, _, gates, cells = reference.lstm_recurrence_fwd(*tensors, counts, reverse, True)
        found = reference.lstm_recurrence_bwd(*arriving, *tensors[1:], counts, reverse, y, gates, cells, [True] * 5)
        torch.testing.assert_close(found, expected)
