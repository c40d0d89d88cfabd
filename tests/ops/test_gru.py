"""What is particular to gru and gru_cell: wrong variants, torch's module as the peer, compile, transforms, errors."""

import itertools

import pytest
import torch
from torch.nn.utils import rnn

import llmkernels
from llmkernels import _native, functional, nn
from llmkernels.ops.lstm import cases, gru_reference
from llmkernels.testing.battery import failures, judge, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name
from tests.support import with_threads

X, LENGTHS = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 6, 4])
GRID = list(itertools.product((1, 2), (False, True), (False, True), (False, True)))
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 1e-1},
    torch.float16: {"rtol": 1e-2, "atol": 2e-2},
}


def pair(dtype=torch.float32, **options):
    """(torch's module, ours) with the same parameters."""
    torch.manual_seed(1)
    theirs, ours = torch.nn.GRU(8, 12, dtype=dtype, **options), nn.GRU(8, 12, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def skip_unless_built(backend):
    if backend == "cpu" and _native.why_absent("cpu"):
        pytest.skip(f"cpu: {_native.why_absent('cpu')}")


# Deliberately wrong formulas: the rule has to reject each of them.


def _right(x, q, h):
    r, z = torch.sigmoid(x[0] + q[0]), torch.sigmoid(x[1] + q[1])
    n = torch.tanh(x[2] + r * q[2])
    return (1.0 - z) * n + z * h


def _ungated(x, q, h):
    z = torch.sigmoid(x[1] + q[1])
    return (1.0 - z) * torch.tanh(x[2] + q[2]) + z * h


def _gated_input(x, q, h):
    r, z = torch.sigmoid(x[0] + q[0]), torch.sigmoid(x[1] + q[1])
    return (1.0 - z) * torch.tanh(r * x[2] + q[2]) + z * h


WRONG = {
    "r and z swapped": lambda x, q, h: _right((x[1], x[0], x[2]), (q[1], q[0], q[2]), h),
    "z the other way round": lambda x, q, h: _right((x[0], -x[1], x[2]), (q[0], -q[1], q[2]), h),
    "no reset gate": _ungated,
    "reset of the input": _gated_input,
    "one percent off": lambda x, q, h: 1.01 * _right(x, q, h),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_variants(dtype, wrong):
    case = cases.LSTMCase("gru", T=6, B=8, dtype=dtype)
    inputs, step = cases.make_inputs(case), WRONG.get(wrong, _right)

    def variant(leaves):
        h, outputs = leaves.h0[0].float(), []
        w_ih, w_hh, b_ih, b_hh = (p.float() for p in leaves.parameters())
        for x in leaves.input.float().unbind():
            h = step((x @ w_ih.t() + b_ih).chunk(3, -1), (h @ w_hh.t() + b_hh).chunk(3, -1), h)
            outputs.append(h)
        return torch.stack(outputs).to(dtype), h[None].to(dtype)

    found = failures(judge_results(cases, case, inputs, outputs_and_gradients(inputs, variant)))
    assert (found == []) == (wrong is None), found


@pytest.mark.parametrize("backend", ("torch", "cpu"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=short_name)
@pytest.mark.parametrize("kind", ("dense", "packed", "sorted", "lengths", "unbatched"))
def test_equals_torchs_module(backend, dtype, kind):
    skip_unless_built(backend)
    for layers, bidirectional, bias, batch_first in GRID:
        theirs, ours = pair(dtype, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first)
        ours.backend = backend
        x = X.to(dtype).transpose(0, int(batch_first)).contiguous()
        hx = torch.randn(layers * (2 if bidirectional else 1), 3, 12, dtype=dtype)
        lengths = torch.tensor([6, 4, 4]) if kind == "sorted" else LENGTHS
        if kind == "dense":
            pairs = [(ours(x, hx), theirs(x, hx)), (ours(x), theirs(x))]
        elif kind == "unbatched":
            x, hx = x.select(0 if batch_first else 1, 0), hx[:, 0]
            pairs = [(ours(x, hx), theirs(x, hx)), (ours(x), theirs(x))]
        else:
            packed = rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted=kind == "sorted")
            expected = [theirs(packed, hx), theirs(packed)]
            if kind == "lengths":
                padded = [(rnn.pad_packed_sequence(y, batch_first, total_length=6)[0], h) for y, h in expected]
                pairs = list(zip((ours(x, hx, lengths), ours(x, None, lengths)), padded, strict=True))
            else:
                pairs = [((a[0].data, a[1]), (b[0].data, b[1]))
                         for a, b in zip((ours(packed, hx), ours(packed)), expected, strict=True)]  # fmt: skip
        grads = []
        for index, module in enumerate((ours, theirs)):
            results = [result for found in pairs for result in found[index]]
            loss = sum((r.float() * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in results)
            grads.append(torch.autograd.grad(loss, list(module.parameters())))
        for a, b in pairs:
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])
        torch.testing.assert_close(*grads, **TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ("torch", "cpu"))
@pytest.mark.parametrize("bias", (True, False))
def test_cell_equals_torchs(bias, backend):
    skip_unless_built(backend)
    theirs, ours = torch.nn.GRUCell(8, 12, bias), nn.GRUCell(8, 12, bias, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    h = torch.randn(3, 12)
    for x, state in ((X[0], h), (X[0], None), (X[0, 0], h[0]), (X[0, 0], None)):
        torch.testing.assert_close(ours(x, state), theirs(x, state))
    grads = [torch.autograd.grad(cell(X[0], h).cos().sum(), list(cell.parameters())) for cell in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_dropout_draws_torchs_masks():
    theirs, ours = pair(num_layers=3, bidirectional=True, dropout=0.4)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        results.append(module(X))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.eval()(X), theirs.eval()(X))


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("counts", (None, torch.tensor([3, 2, 1])))
def test_backward_is_the_formulas_in_fp64(counts, reverse):
    rows = 6 if counts is not None else 9
    shapes = ((rows, 15), (3, 5), (15, 5), (15,))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    y, h_n = gru_reference.recurrence(*leaves, counts, reverse)
    arriving = torch.randn_like(y), torch.randn_like(h_n)
    expected = torch.autograd.grad((y, h_n), leaves, arriving)
    with torch.no_grad():
        y, _, gates = gru_reference.gru_recurrence_fwd(*leaves, counts, reverse, True)
        found = gru_reference.gru_recurrence_bwd(*arriving, *leaves[1:3], counts, reverse, y, gates, [True] * 4)
    torch.testing.assert_close(found, tuple(expected))


SMALL = (  # one case of each shape of tile and way of reading the weights
    {"B": 1, "T": 3, "H": 37}, {"B": 2, "T": 3, "H": 37}, {"B": 4, "T": 5, "H": 70, "bias": False},
    {"B": 13, "T": 2, "H": 130, "lengths": (2,) * 6 + (1,) * 7, "bidirectional": True},
    {"B": 75, "T": 2, "H": 70}, {"B": 3, "T": 2, "H": 270},  # rows finished apart, sums of several pieces
)  # fmt: skip


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_every_instruction_set(dtype, isa, poison):
    for options in SMALL:
        case = cases.LSTMCase("gru", dtype=dtype, **options)
        assert failures(judge(cases, case, "cpu")) == [], options


@pytest.mark.parametrize("options", ({}, {"bidirectional": True, "layers": 2}, {"batch_first": True}))
def test_nothing_is_read_past_a_length(options, poison):
    skip_unless_built("cpu")
    case = cases.LSTMCase("gru", T=6, B=4, lengths=(3, 6, 1, 5), **options)
    inputs = cases.make_inputs(case)
    late = torch.arange(6)[:, None] >= torch.tensor(case.lengths)
    late = late.t() if case.batch_first else late
    spoiled = inputs.replace(input=inputs.input.masked_fill(late[..., None], float("nan")))
    found = [outputs_and_gradients(i, lambda leaves: cases.call(case, leaves, "cpu")) for i in (inputs, spoiled)]
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name
    assert not found[0]["output"][late].any()


def test_room_for_all_sequences_or_none():
    """The two layouts of ragged rows, of every backend with the raw op."""
    generator = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    counts, gates_x, h0, w_hh, b_hh = (
        torch.tensor([3, 2, 2, 0]),
        normal(12, 30),
        normal(3, 10),
        normal(30, 10),
        normal(30),
    )
    live = (torch.arange(3) < counts[:, None]).flatten()
    dy, dh = normal(12, 10), normal(3, 10)
    results = []
    for space, reverse in itertools.product(("torch", "cpu"), (False, True)):
        if space == "cpu" and _native.why_absent("cpu"):
            continue
        ops = getattr(torch.ops, f"llmkernels_{space}")
        for rows in (slice(None), live):
            y, h_n, gates = ops.gru_recurrence_fwd(gates_x[rows], h0, w_hh, b_hh, counts, reverse, True)
            grads = ops.gru_recurrence_bwd(dy[rows], dh, h0, w_hh, counts, reverse, y, gates, [True] * 4)
            if rows is not live:
                assert not y[~live].any() and not grads[0][~live].any()
                y, gates, grads = y[live], gates[live], (grads[0][live], *grads[1:])
            results.append((reverse, (y, h_n, gates, *grads)))
    for reverse in (False, True):
        first, *others = (found for own, found in results if own == reverse)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)


def test_any_number_of_threads_gives_the_same_bits():
    skip_unless_built("cpu")
    raw, (rows, H) = torch.ops.llmkernels_cpu, (54, 300)
    gates_x, fixed = torch.randn(rows, 3 * H), (torch.randn(9, H), torch.randn(3 * H, H))
    b_hh = torch.randn(3 * H)

    def run():
        y, h_n, gates = raw.gru_recurrence_fwd(gates_x, *fixed, b_hh, None, False, True)
        return y, h_n, gates, *raw.gru_recurrence_bwd(y, h_n, *fixed, None, False, y, gates, [True, True, False, False])

    first, *others = with_threads(run)
    for other in others:
        assert all(map(torch.equal, other, first))


def test_double_backward_and_transforms():
    theirs, ours = pair(torch.float64, num_layers=2, bidirectional=True)
    x = X.double().requires_grad_()

    def penalty(module):
        (grad,) = torch.autograd.grad(module(x)[0].cos().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(module.parameters()))

    torch.testing.assert_close(penalty(ours), penalty(theirs))
    loss = lambda module: lambda x: module(x)[0].cos().sum()
    (expected,) = torch.autograd.grad(loss(theirs)(x), x)
    torch.testing.assert_close(torch.func.grad(loss(ours))(X.double()), expected)
    _, derivative = torch.func.jvp(loss(ours), (X.double(),), (X.double(),))
    torch.testing.assert_close(derivative, (expected * X).sum())
    batch = torch.stack((X, 2 * X)).double()
    found = torch.func.vmap(lambda x: ours(x)[0])(batch)
    torch.testing.assert_close(found, torch.stack([theirs(x)[0] for x in batch]))


@pytest.mark.parametrize("kind", ("dense", "lengths", "packed"))
def test_compile_fullgraph_in_training(kind):
    torch._dynamo.reset()
    _, ours = pair(num_layers=2, bidirectional=True)
    packed = rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False)

    def run(x):
        if kind == "packed":
            return ours(packed._replace(data=x))[0].data
        return ours(x, None, LENGTHS if kind == "lengths" else None)[0]

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x = (packed.data if kind == "packed" else X).clone().requires_grad_()
        y = function(x)
        results.append([y, *torch.autograd.grad(y.cos().sum(), [x, *ours.parameters()])])
    torch.testing.assert_close(*results)


def test_compile_of_a_cell_loop_and_export():
    torch._dynamo.reset()
    cell = nn.GRUCell(8, 12)

    def run(x):
        h = None
        for step in x:
            h = cell(step, h)
        return h

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(X), run(X))
    ours = nn.GRU(8, 12).eval()
    program = torch.export.export(ours, (X,))
    assert "llmkernels.gru_recurrence_fwd.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(X), ours(X))


@pytest.mark.parametrize("space", ("llmkernels", "llmkernels_torch", "llmkernels_cpu"))
def test_raw_ops_pass_opcheck(space):
    skip_unless_built(space.removeprefix("llmkernels_"))
    ops = getattr(torch.ops, space)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for bias, counts, rows in ((None, None, 9), (torch.randn(15), torch.tensor([3, 2, 1]), 6)):
        inputs = (torch.randn(rows, 15), torch.randn(3, 5), torch.randn(15, 5), bias, counts, True)
        for save in (False, True):
            torch.library.opcheck(ops.gru_recurrence_fwd.default, (*inputs, save), test_utils=tests)
        y, _, gates = ops.gru_recurrence_fwd(*inputs, True)
        arguments = (y, None, *inputs[1:3], counts, True, y, gates, [True, False, True, bias is not None])
        torch.library.opcheck(ops.gru_recurrence_bwd.default, arguments, test_utils=tests)


def test_public_ops_and_autocast():
    theirs, ours = pair()
    found = torch.ops.llmkernels.gru(
        X, None, list(ours.parameters()), True, 1, 0.0, True, False, False, lengths=LENGTHS
    )
    torch.testing.assert_close(found, ours(X, None, LENGTHS))
    cell = nn.GRUCell(8, 12)
    h = torch.randn(3, 12)
    torch.testing.assert_close(torch.ops.llmkernels.gru_cell(X[0], h, *cell.parameters()), cell(X[0], h))
    with torch.autocast("cpu", torch.bfloat16):
        (y, h), (y2, h2) = ours(X), theirs(X)
    assert (y.dtype, h.dtype) == (y2.dtype, h2.dtype) == (torch.float32,) * 2
    torch.testing.assert_close((y, h), (y2, h2), rtol=2e-2, atol=2e-2)


def test_modules_have_torchs_state_dicts_and_repr():
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}):
        torch.manual_seed(5)
        theirs = torch.nn.GRU(8, 12, **options)
        torch.manual_seed(5)
        ours = nn.GRU(8, 12, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert list(nn.GRUCell(8, 12).state_dict()) == list(torch.nn.GRUCell(8, 12).state_dict())


def test_bad_arguments_have_one_clear_message():
    p, h = list(torch.nn.GRU(8, 12).parameters()), torch.zeros(1, 3, 12)
    gru = lambda x=X, h=h, p=p, layers=1, dropout=0.0, **more: functional.gru(
        x, h, p, True, layers, dropout, False, False, False, **more
    )
    c, s = list(torch.nn.GRUCell(8, 12).parameters()), torch.zeros(3, 12)
    cell = functional.gru_cell
    packed = rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False)
    wrong = [
        (ValueError, r"gru: input has shape \(6, 3, 7\), expected 2-D or 3-D with 8", lambda: gru(X[..., :7])),
        (ValueError, r"gru: input has shape \(0, 3, 8\), expected at least one step", lambda: gru(X[:0])),
        (TypeError, "gru: input has dtype torch.int64, expected one of float32", lambda: gru(X.long())),
        (ValueError, r"gru: h0 has shape \(1, 2, 12\), expected \(1, 3, 12\)", lambda: gru(h=h[:, :2])),
        (ValueError, r"gru: h0 has shape \(1, 3, 12\), expected \(1, 12\)", lambda: gru(X[:, 0])),
        (ValueError, "gru: h0 has dtype torch.float16", lambda: gru(h=h.half())),
        (ValueError, "gru: params has 4 tensors, expected 8 for num_layers=2", lambda: gru(layers=2)),
        (ValueError, "gru: params has 5 tensors, expected 4 for", lambda: gru(p=[*p, torch.zeros(5, 12)])),
        (ValueError, "gru: w_hh of layer 0 has shape", lambda: gru(p=[p[0], p[1][:, :5], *p[2:]])),
        (ValueError, r"gru: w_ih of layer 0 has shape \(35, 8\), expected \[3", lambda: gru(p=[p[0][:35], *p[1:]])),
        (ValueError, "gru: dropout is 1.5, expected a probability", lambda: gru(dropout=1.5)),
        (ValueError, "gru: lengths are 0 to 4, expected 1 to 6", lambda: gru(lengths=[0, 4, 2])),
        (ValueError, "gru: lengths is given with one sequence", lambda: gru(X[:, 0], None, lengths=[3])),
        (ValueError, "GRU: lengths is given with a PackedSequence", lambda: nn.GRU(8, 12)(packed, None, LENGTHS)),
        (ValueError, r"h0 has shape \(1, 2, 12\)", lambda: nn.GRU(8, 12)(packed, h[:, :2])),
        (ValueError, r"gru_cell: h has shape \(2, 12\), expected \(3, 12\)", lambda: cell(X[0], s[:2], *c)),
        (ValueError, "gru_cell: b_hh has shape", lambda: cell(X[0], s, *c[:3], c[3][:5])),
        (ValueError, "GRUCell: input has shape", lambda: nn.GRUCell(8, 12)(X)),
        (TypeError, "proj_size", lambda: nn.GRU(8, 12, proj_size=4)),
        (llmkernels.NoBackendError, "gru: backend 'cuda' cannot run this call", lambda: gru(backend="cuda")),
        (llmkernels.NoBackendError, "gru_cell: backend 'triton'", lambda: cell(X[0], s, *c, backend="triton")),
    ]  # fmt: skip
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
