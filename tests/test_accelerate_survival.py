"""What is done with models after, or before, they are accelerated: they go on as models of PyTorch do."""

import copy
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import llmkernels
from llmkernels import _native

COLS = 24
BEST = "cpu" if _native.why_absent("cpu") is None else "torch"


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(COLS, 32), nn.Linear(COLS, 32), nn.Linear(32, COLS)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """One of each kind that has no state of its own between calls, and a tied head."""

    def __init__(self, *, saving=False):
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, COLS), nn.Linear(COLS, 17, bias=False)
        self.head.weight = self.embedding.weight
        self.attention_norm, self.norm, self.mlp = nn.LayerNorm(COLS), nn.RMSNorm(COLS, eps=1e-6), MLP()
        self.attention, self.act = nn.MultiheadAttention(COLS, 4, batch_first=True), nn.GELU()
        self.loss, self.saving = nn.CrossEntropyLoss(), saving

    def logits(self, tokens):
        x = self.embedding(tokens)
        h = self.attention_norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.act(x + self._mlp(x)))

    def _mlp(self, x):
        if self.saving:
            return torch.utils.checkpoint.checkpoint(self.mlp, self.norm(x), use_reentrant=False)
        return self.mlp(self.norm(x))

    def forward(self, tokens):
        return self.loss(self.logits(tokens).flatten(0, 1), tokens.flatten())


SWAPPED = 6
TOKENS = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(1))


def make(**options):
    torch.manual_seed(0)
    return Model(**options)


def accelerate(model, backend=BEST):
    report = llmkernels.accelerate(model, backend=backend)
    assert len(report.swapped) == SWAPPED, str(report)
    return model


def steps(model, optimizer, count=4):
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(TOKENS)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("saving", (False, True), ids=("", "checkpointing"))
def test_trains_with_an_optimizer_made_before(saving):
    plain, fast = make(), make(saving=saving)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (plain, fast)]
    expected = steps(plain, optimizers[0])
    accelerate(fast)
    torch.testing.assert_close(steps(fast, optimizers[1]), expected, rtol=1e-4, atol=1e-5)
    assert fast.head.weight is fast.embedding.weight, "tied still"
    llmkernels.restore(fast)
    torch.testing.assert_close(steps(fast, optimizers[1]), steps(plain, optimizers[0]), rtol=1e-3, atol=1e-4)


def test_frozen_parameters_get_no_gradient():
    model = make()
    for parameter in (*model.mlp.parameters(), *model.norm.parameters(), model.attention_norm.weight):
        parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    accelerate(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    model(TOKENS).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == flags[name], name
    model.mlp.requires_grad_(True)
    model(TOKENS).backward()
    assert all(parameter.grad is not None for parameter in model.mlp.parameters())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_converted_afterwards(dtype):
    fast, plain = accelerate(make(), "torch").to(dtype), make().to(dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(fast.logits(TOKENS), plain.logits(TOKENS), rtol=tolerance, atol=tolerance)
    assert fast.logits(TOKENS).dtype == dtype and fast.to("cpu") is fast


def test_moved_to_the_meta_device_afterwards():
    """Shapes alone, as for planning memory; autocast, which our functions ask for, has no such device."""
    model = accelerate(make(), "torch").to("meta")
    loss = model(TOKENS.to("meta"))
    loss.backward()
    assert loss.is_meta and loss.shape == () and model.mlp.gate.weight.grad.is_meta


@pytest.mark.parametrize(
    "way", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("copy", "pickle")
)
def test_copies(way):
    model = accelerate(make())
    other = way(model)
    assert torch.equal(other(TOKENS), model(TOKENS)) and other.head.weight is other.embedding.weight
    assert llmkernels.restore(other) == SWAPPED == llmkernels.restore(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in make().modules()]


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = make()(TOKENS)
        found = accelerate(make())(TOKENS)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.backward()


def test_hooks_see_what_they_saw():
    def watched(model):
        seen = []
        for name, module in model.named_modules():
            if name in ("norm", "mlp", "attention", "loss", "mlp.gate"):
                module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, len(args))))
                module.register_full_backward_hook(lambda _, into, out, name=name: seen.append((name, "back")))
        return seen

    plain, fast = make(), make()
    expected, seen = watched(plain), watched(fast)
    accelerate(fast)
    assert seen == []
    plain(TOKENS).backward()
    fast(TOKENS).backward()
    assert seen == expected and len(seen) == 10


def test_compiled_with_and_without_gradients():
    model = make()
    expected = model(TOKENS)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(TOKENS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, list(model.parameters())), gradients, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS), expected)


def test_exported():
    model = make().eval()
    expected = model(TOKENS)
    program = torch.export.export(accelerate(model), (TOKENS,))
    torch.testing.assert_close(program.module()(TOKENS), expected)


def test_state_dicts_go_both_ways():
    plain, fast = make(), accelerate(make())
    plain.load_state_dict(fast.state_dict(), strict=True)
    with torch.no_grad():
        plain.norm.weight.mul_(2.0)
    fast.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(fast(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("first", ("quantize", "accelerate"))
def test_with_quantized_layers(first):
    """In either order: the layers of a gated MLP are quantized, and what runs between them is ours."""

    def changed(model, order):
        for change in order:
            if change == "quantize":
                llmkernels.quantize(model, "int8", keep_original=True, progress=False)
            else:
                llmkernels.accelerate(model, backend=BEST)
        return model

    quantized = changed(make(), ["quantize"])
    both = changed(make(), sorted(("quantize", "accelerate"), key=lambda name: name != first))
    assert type(both.mlp) is not MLP and type(both.mlp.gate) is type(quantized.mlp.gate) is not nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(both(TOKENS), quantized(TOKENS), rtol=1e-4, atol=1e-5)
    llmkernels.restore(both)
    assert [type(module) for module in both.modules()] == [type(module) for module in make().modules()]
    assert torch.equal(both(TOKENS), make()(TOKENS))


# --- torch's transformer layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", (False, True))
def test_transformer_encoder(norm_first):
    """In eval mode without gradients torch's fused layer runs, with nested tensors where there is padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(COLS, 4, 40, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(COLS), enable_nested_tensor=not norm_first)
    x, padding = torch.randn(2, 7, COLS), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True

    def run():
        found = []
        for mode in (True, False):
            encoder.train(mode)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    found += [encoder(x), encoder(x, src_key_padding_mask=padding)[~padding]]
        return found

    expected = run()
    report = llmkernels.accelerate(encoder, backend=BEST)
    assert len(report.swapped) == 9 and not report.kept
    assert [entry.replacement for entry in report.swapped[-2:]] == 2 * ["add_layer_norm (norm1, norm2)"]
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    assert llmkernels.restore(encoder) == 9 and all(map(torch.equal, run(), expected))


def test_transformer_with_a_decoder():
    torch.manual_seed(0)
    model = nn.Transformer(COLS, 4, 1, 1, 40, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 6, COLS), torch.randn(2, 5, COLS)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    run = lambda: model(source, target, tgt_mask=mask, tgt_is_causal=True)
    expected = run(), run().square().sum()
    gradients = torch.autograd.grad(expected[1], list(model.parameters()))
    assert len(llmkernels.accelerate(model, backend=BEST).swapped) == 12
    found = run(), run().square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found[1], list(model.parameters())), gradients, rtol=1e-3, atol=1e-3)


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


def _distributed(rank: int, size: int, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = []
    for order in ("never", "before", "after"):
        model = make()
        if order == "before":
            accelerate(model)
        wrapped = DistributedDataParallel(model)
        if order == "after":
            llmkernels.accelerate(wrapped, backend=BEST)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            wrapped((TOKENS + rank + step) % 17).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    results.put((rank, [vector.tolist() for vector in found]))
    dist.destroy_process_group()


def test_distributed_data_parallel():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_distributed, args=(rank, 2, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    never, before, after = (torch.tensor(vector) for vector in found[0])
    torch.testing.assert_close(before, never, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after, never, rtol=1e-4, atol=1e-6)
    assert found[0] == found[1], "the same on every process"
