"""lstm and lstm_cell as part of torch: ops, transforms, compile, export, threads, errors, the modules' extras."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn.utils import rnn

import llmkernels
from llmkernels import _native, functional, nn
from llmkernels.ops.lstm import cases, reference
from tests.support import check_exported

warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")

needs_cpu = pytest.mark.skipif(_native.why_absent("cpu") is not None, reason=f"cpu: {_native.why_absent('cpu')}")
X, LENGTHS = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 6, 4])


def module(**options):
    torch.manual_seed(1)
    return nn.LSTM(8, 12, 2, bidirectional=True, **options)


def state():
    return torch.randn(4, 3, 12), torch.randn(4, 3, 12)


def test_functorch():
    lstm, cell, tangent = module(), nn.LSTMCell(8, 12), torch.randn_like(X)
    formula = torch.nn.LSTM(8, 12, 2, bidirectional=True)
    formula.load_state_dict(lstm.state_dict())
    loss = lambda f: lambda x: f(x)[0].cos().sum()
    torch.testing.assert_close(torch.func.grad(loss(lstm))(X), _grad(loss(formula), X))
    batch = torch.stack((X, 2 * X))
    expected = torch.stack([formula(x)[0] for x in batch])
    torch.testing.assert_close(torch.func.vmap(lambda x: lstm(x)[0])(batch), expected)
    _, derivative = torch.func.jvp(loss(lstm), (X,), (tangent,))
    torch.testing.assert_close(derivative, (_grad(loss(formula), X) * tangent).sum(), rtol=1e-4, atol=1e-5)
    expected = torch.stack([cell(x)[0] for x in X])
    torch.testing.assert_close(torch.func.vmap(lambda x: cell(x)[0])(X), expected)
    by_lengths = lambda x: lstm(x, None, LENGTHS)[0].cos().sum()
    torch.testing.assert_close(torch.func.grad(by_lengths)(X), _grad(by_lengths, X))


def _grad(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.parametrize("kind", ("dense", "lengths", "packed", "state", "projection"))
def test_compile_fullgraph_in_training(kind):
    torch._dynamo.reset()
    lstm = module(proj_size=5 if kind == "projection" else 0)
    packed, hx = rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False), state()

    def run(x):
        if kind == "lengths":
            return lstm(x, None, LENGTHS)[0]
        if kind == "packed":
            return lstm(packed._replace(data=x))[0].data
        return lstm(x, hx if kind == "state" else None)[0]

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        lstm.zero_grad()
        x = (packed.data if kind == "packed" else X).clone().requires_grad_()
        y = function(x)
        y.cos().sum().backward()
        results.append([y, x.grad, *[parameter.grad.clone() for parameter in lstm.parameters()]])
    torch.testing.assert_close(*results)


def test_compile_of_a_cell_loop():
    torch._dynamo.reset()
    cell = nn.LSTMCell(8, 12)

    def run(x):
        hx = None
        for step in x:
            hx = cell(step, hx)
        return hx

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(X), run(X))


def test_padding_may_be_anything_in_a_compiled_graph():
    torch._dynamo.reset()
    lstm, dirty = module(), X.clone()
    for b, length in enumerate(LENGTHS):
        dirty[length:, b] = float("nan")
    run = lambda x: lstm(x, None, LENGTHS)[0]
    clean, found = X.clone().requires_grad_(), dirty.requires_grad_()
    run(clean).sum().backward()
    torch.compile(run, fullgraph=True, backend="aot_eager")(found).sum().backward()
    torch.testing.assert_close(found.grad, clean.grad)


@pytest.mark.parametrize("with_lengths", (False, True))
def test_export_is_portable(tmp_path, with_lengths):
    """Exported here, it runs where nothing is compiled, on the torch backend."""
    lstm = module().eval()
    arguments = (X, None, LENGTHS) if with_lengths else (X,)
    program = torch.export.export(lstm, arguments)
    with torch.no_grad():
        expected = lstm(*arguments)
    check_exported(program, "lstm_recurrence_fwd", arguments, expected, tmp_path)


@pytest.mark.parametrize("name", ("cpu", "torch", "portable"))
def test_raw_ops_pass_opcheck(name):
    if name != "torch" and _native.why_absent("cpu") is not None:
        pytest.skip(f"cpu: {_native.why_absent('cpu')}")
    ops = getattr(torch.ops, "llmkernels" if name == "portable" else f"llmkernels_{name}")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    counts = torch.tensor([3, 2, 1])
    for w_hr, R, batch_sizes, rows in ((None, 5, None, 9), (torch.randn(4, 5), 4, counts, 6), (None, 5, counts, 9)):
        inputs = (torch.randn(rows, 20), torch.randn(3, R), torch.randn(3, 5), torch.randn(20, R), w_hr, batch_sizes)
        for save in (False, True):
            torch.library.opcheck(ops.lstm_recurrence_fwd.default, (*inputs, True, save), test_utils=tests)
        y, h_n, c_n, gates, cells = ops.lstm_recurrence_fwd(*inputs, True, True)
        for wanted in ([True] * 4 + [w_hr is not None], [False, True, False, False, False]):
            grads = (y, h_n, c_n, cells)
            torch.library.opcheck(ops.lstm_recurrence_bwd.default,
                                  (*grads, *inputs[1:], True, y, gates, cells, wanted), test_utils=tests)  # fmt: skip
    if name == "torch":
        return
    gates, c = torch.randn(3, 20), torch.randn(3, 5)
    torch.library.opcheck(ops.lstm_cell_fwd.default, (gates, gates + 1, c, True), test_utils=tests)
    torch.library.opcheck(ops.lstm_cell_bwd.default, (c, None, gates, c, c + 1), test_utils=tests)


def test_public_ops():
    lstm, cell = module(), nn.LSTMCell(8, 12)
    params = list(lstm.parameters())
    found = torch.ops.llmkernels.lstm(X, state(), params, True, 2, 0.0, True, True, False, lengths=LENGTHS)
    assert found[0].shape == (6, 3, 24)
    found[0].sum().backward()
    assert all(parameter.grad is not None for parameter in params)
    hx = (torch.randn(3, 12), torch.randn(3, 12))
    assert all(map(torch.equal, torch.ops.llmkernels.lstm_cell(X[0], hx, *cell.parameters()), cell(X[0], hx)))


# Threads.


@needs_cpu
@pytest.mark.parametrize("H, proj", ((300, 0), (300, 130)))
def test_any_number_of_threads_gives_the_same_bits(H, proj):
    case = cases.LSTMCase("lstm", T=6, B=9, I=16, H=H, proj=proj)
    inputs = cases.make_inputs(case)
    before = torch.get_num_threads()
    raw, weights = torch.ops.llmkernels_cpu, dict(zip(case.parameters(), inputs.parameters(), strict=True))
    gates_x = torch.randn(54, 4 * H)
    fixed = (inputs.h0[0], inputs.c0[0], weights["w_hh_l0"], weights.get("w_hr_l0"), None, False)
    results = []
    try:
        for threads in (1, 2, 3, 7):  # more than there are cores, and not a divisor of the blocks
            torch.set_num_threads(threads)
            y, h_n, c_n, gates, cells = raw.lstm_recurrence_fwd(gates_x, *fixed, True)
            grads = raw.lstm_recurrence_bwd(y, h_n, c_n, None, *fixed, y, gates, cells, [True] * 3 + [False] * 2)
            results.append((y, h_n, c_n, gates, cells, *grads))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


HARD = """
import os, sys, threading, torch
from llmkernels import nn
torch.set_num_threads(4)
lstm, x = nn.LSTM(256, 256, backend="cpu"), torch.randn(20, 8, 256)
expected = lstm(x)[0]
def check():
    with torch.no_grad():
        assert torch.equal(lstm(x)[0], expected)
"""
PLACES = {
    "several threads of Python": "ts = [threading.Thread(target=check) for _ in range(4)]\n"
    "[t.start() for t in ts]; [t.join() for t in ts]",
    "autograd's threads": "y = lstm(x)[0]; y.sum().backward(); check()",
    # What torch itself does with several threads hangs in such a child: only the recurrence runs there.
    "after a fork": "gates, h, w = torch.randn(160, 1024), torch.randn(8, 256), torch.randn(1024, 256)\n"
    "run = lambda: torch.ops.llmkernels_cpu.lstm_recurrence_fwd(gates, h, h, w, None, None, False, False)[0]\n"
    "y = run(); pid = os.fork()\n"
    "if pid == 0:\n    os._exit(not torch.equal(run()[-8:], y[-8:]))\nassert os.waitpid(pid, 0)[1] == 0\ncheck()",
    "a worker of a DataLoader": "class Data(torch.utils.data.Dataset):\n"
    "    def __len__(self): return 2\n    def __getitem__(self, i): check(); return i\n"
    "assert len(list(torch.utils.data.DataLoader(Data(), num_workers=1))) == 2",
    "fewer threads than asked for": "os.environ['OMP_DYNAMIC'] = 'true'; check()",
}


@needs_cpu
@pytest.mark.parametrize("place", PLACES)
def test_a_team_of_threads_never_hangs(place):
    environment = {**os.environ, "OMP_THREAD_LIMIT": "3"} if "fewer" in place else dict(os.environ)
    run = subprocess.run(
        [sys.executable, "-c", HARD + PLACES[place]], capture_output=True, text=True, timeout=100, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]


# Arguments.


def test_bad_arguments_have_one_clear_message():
    p = list(torch.nn.LSTM(8, 12).parameters())
    hx = (torch.zeros(1, 3, 12), torch.zeros(1, 3, 12))
    narrow = (hx[0][..., :11], hx[1])
    lstm = lambda x=X, hx=hx, p=p, layers=1, dropout=0.0, **more: functional.lstm(
        x, hx, p, True, layers, dropout, False, False, False, **more
    )
    cell = functional.lstm_cell
    c = list(torch.nn.LSTMCell(8, 12).parameters())
    s = (torch.zeros(3, 12), torch.zeros(3, 12))
    wrong = [
        (ValueError, r"lstm: input has shape \(6, 3, 7\), expected 2-D or 3-D with 8", lambda: lstm(X[..., :7])),
        (ValueError, r"lstm: input has shape \(1, 6, 3, 8\), expected 2-D or 3-D", lambda: lstm(X[None])),
        (ValueError, r"lstm: input has shape \(0, 3, 8\), expected at least one step", lambda: lstm(X[:0])),
        (TypeError, "lstm: input has dtype torch.int64, expected one of float32", lambda: lstm(X.long())),
        (ValueError, "lstm: w_ih of layer 0 has dtype torch.float32, expected torch.float64", lambda: lstm(X.double())),
        (ValueError, r"lstm: h0 has shape \(1, 3, 11\), expected \(1, 3, 12\)", lambda: lstm(hx=narrow)),
        (ValueError, r"lstm: c0 has shape \(1, 2, 12\), expected \(1, 3, 12\)", lambda: lstm(hx=(hx[0], hx[1][:, :2]))),
        (ValueError, r"lstm: h0 has shape \(1, 3, 12\), expected \(1, 12\)", lambda: lstm(X[:, 0])),
        (ValueError, "lstm: c0 has dtype torch.float16", lambda: lstm(hx=(hx[0], hx[1].half()))),
        (ValueError, "lstm: c0 is on meta, expected cpu", lambda: lstm(hx=(hx[0], hx[1].to("meta")))),
        (ValueError, "lstm: params has 4 tensors, expected 8, or 10 with a projection", lambda: lstm(layers=2)),
        (ValueError, r"lstm: w_hh of layer 0 has shape", lambda: lstm(p=[p[0], p[1][:, :5], *p[2:]])),
        (ValueError, "lstm: w_hr of layer 0 has 12 rows, expected fewer", lambda: lstm(p=[*p, torch.zeros(12, 12)])),
        (ValueError, "lstm: dropout is 1.5, expected a probability", lambda: lstm(dropout=1.5)),
        (ValueError, "lstm: zoneout is -0.5, expected a probability", lambda: lstm(zoneout=-0.5)),
        (ValueError, r"lstm: lengths are 0 to 4, expected 1 to 6", lambda: lstm(lengths=[0, 4, 2])),
        (ValueError, r"lstm: lengths are 1 to 7, expected 1 to 6", lambda: lstm(lengths=[1, 7, 2])),
        (ValueError, r"lstm: lengths has shape \(2,\) and dtype torch.int64", lambda: lstm(lengths=[1, 4])),
        (ValueError, "lstm: lengths has shape .* dtype torch.float32", lambda: lstm(lengths=torch.ones(3))),
        (ValueError, "lstm: lengths is given with one sequence", lambda: lstm(X[:, 0], None, lengths=[3])),
        (ValueError, r"lstm_cell: input has shape \(3, 7\), expected 2-D with 8", lambda: cell(X[0, :, :7], s, *c)),
        (ValueError, r"lstm_cell: h has shape \(2, 12\), expected \(3, 12\)", lambda: cell(X[0], (s[0][:2], s[1]), *c)),
        (ValueError, "lstm_cell: b_hh has shape", lambda: cell(X[0], s, *c[:3], c[3][:5])),
        (ValueError, "LSTMCell: input has shape", lambda: nn.LSTMCell(8, 12)(X)),
        (ValueError, "proj_size has to be smaller than hidden_size", lambda: nn.LSTM(8, 12, proj_size=12)),
        (ValueError, "LSTM: recurrent_dropout is 2, expected", lambda: nn.LSTM(8, 12, recurrent_dropout=2)),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: lstm(backend="cuda")),
        (llmkernels.NoBackendError, "cpu: zoneout and layer norm", lambda: lstm(zoneout=0.1, backend="cpu")),
    ]  # fmt: skip
    if _native.why_absent("cpu"):
        wrong.pop()
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
    packed = rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False)
    with pytest.raises(ValueError, match="lengths is given with a PackedSequence"):
        nn.LSTM(8, 12)(packed, None, LENGTHS)
    with pytest.raises(ValueError, match=r"h0 has shape \(1, 2, 12\), expected \(1, 3, 12\)"):
        nn.LSTM(8, 12)(packed, (torch.zeros(1, 2, 12), torch.zeros(1, 3, 12)))


@needs_cpu
def test_raw_ops_never_crash():
    raw = torch.ops.llmkernels_cpu
    gates, h, c, w = torch.randn(6, 20), torch.randn(3, 5), torch.randn(3, 5), torch.randn(20, 5)
    fwd = lambda *args: raw.lstm_recurrence_fwd(*args, False, True)
    counts = torch.tensor([3, 2, 1])
    saved = fwd(gates, h, c, w, None, counts)
    bwd = lambda *args: raw.lstm_recurrence_bwd(*args, False, saved[0], saved[3], saved[4], [True] * 5)
    wrong = (
        lambda: fwd(gates[:5], h, c, w, None, None),
        lambda: fwd(gates[:, :19], h, c, w, None, None),
        lambda: fwd(gates, h, c, w[:19], None, None),
        lambda: fwd(gates, h[:, :4], c, w, None, None),
        lambda: fwd(gates, h[:, :4], c, w[:, :4], torch.randn(4, 6), None),
        lambda: fwd(gates, h.half(), c, w, None, None),
        lambda: fwd(gates.long(), h, c, w, None, None),
        lambda: fwd(gates[0], h, c, w, None, None),
        lambda: fwd(gates, h, c, w, None, torch.tensor([3, 4, -1])),
        lambda: fwd(gates, h, c, w, None, torch.tensor([2, 3, 1])),
        lambda: fwd(gates, h, c, w, None, torch.tensor([3, 2, 2])),
        lambda: fwd(gates, h, c, w, None, torch.tensor([3.0, 2.0, 1.0])),
        lambda: bwd(saved[0][:5], None, None, None, h, c, w, None, counts),
        lambda: bwd(None, None, c[:2], None, h, c, w, None, counts),
        lambda: bwd(None, None, None, saved[4].double(), h, c, w, None, counts),
        lambda: raw.lstm_cell_fwd(gates[:3], gates[:2], c, True),
        lambda: raw.lstm_cell_fwd(gates[:3], gates[:3], c[0], True),
        lambda: raw.lstm_cell_bwd(h[:2], None, gates[:3], c, c),
    )
    for call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            call()


# The modules' extras.


def test_dropout_draws_torchs_masks():
    theirs = torch.nn.LSTM(8, 12, 2, bidirectional=True, dropout=0.4)
    ours = module(dropout=0.4)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for lstm in (ours, theirs):
        torch.manual_seed(7)
        results.append(lstm(X))
    torch.testing.assert_close(*results)
    ours.eval()
    assert torch.equal(ours(X)[0], ours(X)[0])


def test_dropout_is_replayed_by_checkpointing():
    lstm = module(dropout=0.4, recurrent_dropout=0.2)
    grads = []
    for use in (False, True):
        torch.manual_seed(7)
        x = X.clone().requires_grad_()
        run = lambda x: lstm(x)[0]
        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if use else run(x)
        grads.append(torch.autograd.grad(y.cos().sum(), x)[0])
    assert torch.equal(*grads)


def test_recurrent_dropout_is_a_layer_with_dropped_weights():
    lstm, plain = nn.LSTM(8, 12, recurrent_dropout=0.5), nn.LSTM(8, 12)
    plain.load_state_dict(lstm.state_dict())
    torch.manual_seed(3)
    found = lstm(X)
    torch.manual_seed(3)
    with torch.no_grad():
        plain.weight_hh_l0.copy_(torch.nn.functional.dropout(lstm.weight_hh_l0, 0.5))
    torch.testing.assert_close(found, plain(X))


def _by_hand(lstm, x, step):
    """One layer as a loop: `step(gates_x, h, c)` gives (h, c)."""
    h = c = x.new_zeros(x.shape[1], 12)
    outputs = []
    for row in x:
        h, c = step(row, h, c)
        outputs.append(h)
    return torch.stack(outputs)


def test_zoneout_keeps_the_last_values():
    lstm = nn.LSTM(8, 12, zoneout=(0.3, 0.2)).eval()

    def step(row, h, c):
        gates = row @ lstm.weight_ih_l0.t() + lstm.bias_ih_l0 + lstm.bias_hh_l0
        new_h, new_c = reference.lstm_cell(gates, h @ lstm.weight_hh_l0.t(), c)
        o_tanh = new_h / torch.tanh(new_c)
        new_c = 0.2 * c + 0.8 * new_c
        return 0.3 * h + 0.7 * o_tanh * torch.tanh(new_c), new_c

    torch.testing.assert_close(lstm(X)[0], _by_hand(lstm, X, step))
    lstm.train()
    lstm.zoneout = 1.0
    assert not lstm(X)[0].any(), "with probability 1 h stays what it was"
    lstm.zoneout = 0.5
    y = lstm(X)[0]
    kept = (y[1:] == y[:-1]).float().mean()
    assert 0.35 < kept < 0.65


def test_layer_norm_is_the_formula():
    lstm = nn.LSTM(8, 12, layer_norm=True)
    for name in lstm.norm_names:
        torch.nn.init.normal_(getattr(lstm, name), 1.0, 0.3)
    norm = torch.nn.functional.layer_norm

    def step(row, h, c):
        gates = norm(row @ lstm.weight_ih_l0.t(), (48,), lstm.norm_ih_l0) + lstm.bias_ih_l0 + lstm.bias_hh_l0
        i, f, g, o = (gates + norm(h @ lstm.weight_hh_l0.t(), (48,), lstm.norm_hh_l0)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(norm(c, (12,), lstm.norm_c_l0, lstm.norm_c_bias_l0)), c

    torch.testing.assert_close(lstm(X)[0], _by_hand(lstm, X, step))
    lstm(X)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in lstm.parameters())
    assert len(lstm.state_dict()) == 8
    again = nn.LSTM(8, 12, layer_norm=True)
    again.load_state_dict(lstm.state_dict())
    torch.testing.assert_close(again(X)[0], lstm(X)[0])


@pytest.mark.parametrize("kind", ("dense", "lengths", "packed"))
def test_cells_are_every_c(kind):
    lstm = module(return_cells=True)
    packed = rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False)
    if kind == "packed":
        _, (_, c_n), cells = lstm(packed)
        cells = rnn.pad_packed_sequence(cells)[0]
    else:
        _, (_, c_n), cells = lstm(X, None, LENGTHS if kind == "lengths" else None)
    last = torch.full((3,), 5) if kind == "dense" else LENGTHS - 1
    torch.testing.assert_close(cells[last, torch.arange(3), :12], c_n[2])
    torch.testing.assert_close(cells[0, :, 12:], c_n[3])
    cells.cos().sum().backward()
    assert lstm.weight_hh_l0.grad.abs().sum() > 0
    with torch.no_grad():
        again = lstm(packed if kind == "packed" else X, *((None, LENGTHS) if kind == "lengths" else ()))[2]
    assert torch.equal(rnn.pad_packed_sequence(again)[0] if kind == "packed" else again, cells)


def test_autocast_is_torchs():
    theirs, ours = torch.nn.LSTM(8, 12), nn.LSTM(8, 12)
    cell, other = nn.LSTMCell(8, 12), torch.nn.LSTMCell(8, 12)
    ours.load_state_dict(theirs.state_dict())
    cell.load_state_dict(other.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        (y, (h, c)), (y2, (h2, c2)) = ours(X), theirs(X)
        assert (y.dtype, h.dtype, c.dtype) == (y2.dtype, h2.dtype, c2.dtype) == (torch.bfloat16,) * 3
        torch.testing.assert_close(y, y2, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(cell(X[0]), other(X[0]), rtol=2e-2, atol=2e-2)


def test_modules_have_torchs_state_dicts_and_repr():
    for options in ({}, {"num_layers": 2, "bidirectional": True, "proj_size": 5}, {"bias": False, "batch_first": True}):
        theirs, ours = torch.nn.LSTM(8, 12, **options), nn.LSTM(8, 12, **options)
        assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    torch.manual_seed(5)
    ours = nn.LSTM(8, 12, 2)
    torch.manual_seed(5)
    assert all(map(torch.equal, ours.parameters(), torch.nn.LSTM(8, 12, 2).parameters()))
    assert list(nn.LSTMCell(8, 12).state_dict()) == list(torch.nn.LSTMCell(8, 12).state_dict())
    assert "zoneout=0.1" in repr(nn.LSTM(8, 12, zoneout=0.1))
    assert nn.LSTM(4, 8, dtype=torch.bfloat16, device="meta").weight_hh_l0.dtype == torch.bfloat16
    one = nn.LSTMCell(8, 12)
    assert [t.shape for t in one(X[0, 0])] == [(12,), (12,)]


def test_explain_names_what_is_missing():
    reasons = llmkernels.explain("lstm", X, None, list(torch.nn.LSTM(8, 12).parameters()), True, 1, 0.0, False, False,
                                 False, zoneout=0.1).reasons  # fmt: skip
    if _native.why_absent("cpu") is None:
        assert reasons["cpu"] == "zoneout and layer norm are computed on torch alone"
    assert reasons["torch"] is None
