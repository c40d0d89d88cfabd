"""accelerate and the interfaces of transformers: what must be refused, what is undone, what a user does in between."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import llmkernels  # noqa: E402
from llmkernels import _native  # noqa: E402
from llmkernels.accelerate.huggingface import attention, interface, settings  # noqa: E402
from tests.hf_models import FAMILIES, LENGTH, VOCABULARY, output_of  # noqa: E402

BEST = "cpu" if _native.why_absent("cpu") is None else "torch"
LLAMA = FAMILIES["llama"]


def accelerate(model, **options):
    return llmkernels.accelerate(model, **{"backend": "torch"} | options)


def entries(report, word):
    return [entry for entry in report.entries if entry.module.endswith("Attention") and word in str(entry.replacement)]


def reasons(report):
    return " / ".join(entry.detail for entry in report.kept)


# --- attention that is not what it seems is refused -------------------------------------------------------------------


def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, change="", **kwargs):
    """Llama's and Gemma 2's own, with a change."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (1.01 * scaling if change == "scale" else scaling)
    if softcap is not None and change != "no softcap":
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None and change != "no mask":
        scores = scores + attention_mask
    if change == "softcap last":
        scores = 50.0 * torch.tanh(scores / 50.0)
    if change == "sink":
        scores = torch.cat((scores, torch.zeros_like(scores[..., :1])), -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    weights = weights.flip(1) if change == "heads" else weights
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize("change", ("", "scale", "no mask", "softcap last", "sink", "heads"))
def test_another_attention_is_refused(monkeypatch, change):
    wrong = lambda *args, **kwargs: eager(*args, **kwargs, change=change)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", wrong)
    model = LLAMA.make(attn_implementation="eager")
    report = accelerate(model)
    assert bool(entries(report, "fused attention")) == (change == ""), str(report)
    if change:
        assert "fused attention disagrees" in reasons(report) and model.config._attn_implementation == "eager"


def test_a_softcap_that_is_ignored_is_refused(monkeypatch):
    for change, found in (("", 2), ("no softcap", 0)):
        wrong = lambda *args, change=change, **kwargs: eager(*args, **kwargs, change=change)
        monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", wrong)
        model = FAMILIES["gemma2"].make(attn_logit_softcapping=0.5)
        assert len(entries(accelerate(model), "fused attention")) == found


def test_what_our_attention_would_not_know_is_refused():
    class Biased(modeling_llama.LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
            function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
            out, weights = function(self, q, k, v, attention_mask, scaling=self.scaling, temperature=2.0, **kwargs)
            return self.o_proj(out.flatten(2)), weights

    model = LLAMA.make()
    model.model.layers[1].self_attn.__class__ = Biased
    report = accelerate(model)
    assert not entries(report, "fused attention") and model.config._attn_implementation == "sdpa"
    assert "it gives its attention temperature, which ours does not have" in reasons(report)
    assert "model.layers.1.self_attn reads the same config" in reasons(report)


def test_attention_that_does_not_say_that_it_is_causal_stays():
    """BigBirdPegasus' decoder is eager only, and gets its mask; ours would get none, and see later tokens."""
    config = transformers.BigBirdPegasusConfig(
        vocab_size=99, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=0,
        max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BigBirdPegasusForCausalLM(config).eval()
    ids = LLAMA.inputs()["input_ids"][:1]
    expected = model(input_ids=ids).logits
    report = accelerate(model)
    assert not entries(report, "fused attention") and "does not say that it is causal" in reasons(report)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    eager = FAMILIES["bart"].make(attn_implementation="eager")
    assert len(entries(accelerate(eager), "fused attention")) == 6, "sdpa is supported: its modules say what they are"


def test_an_implementation_that_somebody_chose_stays():
    model = LLAMA.make(attn_implementation="flex_attention")
    report = accelerate(model)
    assert not entries(report, "fused attention") and "'flex_attention', which somebody chose" in reasons(report)
    assert model.config._attn_implementation == "flex_attention"


def test_excluding_one_layer_keeps_the_config():
    model = LLAMA.make()
    report = accelerate(model, exclude="model.layers.0")
    assert not entries(report, "fused attention") and model.config._attn_implementation == "sdpa"
    assert "model.layers.0.self_attn reads the same config: excluded" in reasons(report)
    assert len(report.swapped) == 7  # the other layer, its rope, MLP and two norms; the last norm; the loss


def test_without_the_mask_interface_padding_would_be_lost(monkeypatch):
    """What the second interface is for: the test above all would not notice if it were not needed."""
    model, inputs = LLAMA.make(), LLAMA.inputs()
    expected = LLAMA.kept(output_of(model, inputs))
    accelerate(model)
    torch.testing.assert_close(LLAMA.kept(output_of(model, inputs)), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.delitem(transformers.AttentionMaskInterface._global_mapping, model.config._attn_implementation)
    assert (LLAMA.kept(output_of(model, inputs)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name, before", (("llama", "eager"), ("llama", "sdpa"), ("gpt_oss", "eager"), ("gemma2", "eager"))
)
def test_weights_are_returned_where_they_are_asked_for(name, before):
    family = FAMILIES[name]
    model, inputs = family.make(attn_implementation=before), family.inputs()
    expected = family.make(attn_implementation="eager")(**inputs, output_attentions=True).attentions
    assert entries(accelerate(model), "fused attention")
    found = model(**inputs, output_attentions=True).attentions
    assert len(found) == len(expected) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[:, :, 4:], b[:, :, 4:], rtol=1e-4, atol=1e-5)


def test_a_paged_cache_is_refused():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="continuous batching"):
        interface.attention(nn.Module(), q, q, q, None, cache=object())


# --- rotary embedding -------------------------------------------------------------------------------------------------


def _rotated(x, form):
    if form == "interleaved":
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((second, -first) if form == "backwards" else (-second, first), -1)


def rotary(form):
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        if form == "glm":  # pairs of neighbours by tables in halves
            cos, sin = (t[..., : t.shape[-1] // 2].repeat_interleave(2, -1) for t in (cos, sin))
        if form == "sin is cos":
            cos, sin = sin, cos
        turn = lambda x: x * cos + _rotated(x, "interleaved" if form == "glm" else form) * sin
        return turn(q), (k if form == "only q" else turn(k))

    return apply_rotary_pos_emb


@pytest.mark.parametrize(
    "form, expected",
    (("", "rope (halves)"), ("glm", "rope (interleaved)"), ("interleaved", "rope (pairs)"), ("backwards", None),
     ("sin is cos", None), ("only q", None)),
)  # fmt: skip
def test_forms_of_rotary_embedding(monkeypatch, form, expected):
    """Each is found as what it is, or refused; a model's tables may be of another form than its function, as here."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary(form))
    model = LLAMA.make()
    report = accelerate(model)
    assert {entry.replacement for entry in entries(report, "rope")} == ({expected} if expected else set())
    if form in ("", "glm"):
        plain = LLAMA.make()
        torch.testing.assert_close(
            LLAMA.kept(output_of(model, LLAMA.inputs())), LLAMA.kept(output_of(plain, LLAMA.inputs()))
        )


@pytest.mark.parametrize(
    "change", ("", "unsqueeze 2", "partial", "shared", "two dimensions", "positions", "wider", "other dtype")
)
def test_calls_that_rope_does_not_have_go_to_the_original(monkeypatch, change):
    from llmkernels.accelerate.kinds import rotary as kind

    calls, original, usual = [], modeling_llama.apply_rotary_pos_emb, kind.functional.rope
    if change == "positions":
        original = lambda q, k, cos, sin, position_ids=None: modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    if change == "partial":
        original = transformers.models.phi3.modeling_phi3.apply_rotary_pos_emb
    monkeypatch.setattr(kind.functional, "rope", lambda *args, **kwargs: calls.append(1) or usual(*args, **kwargs))
    ours = kind.rotary(original, "halves", "torch")
    q, k, options = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16), {}
    angles = torch.randn(1 if change == "shared" else 2, 6, 4 if change == "partial" else 8)
    cos, sin = (torch.cat((f, f), -1) for f in (angles.cos(), angles.sin()))
    if change == "unsqueeze 2":
        q, k, options = q.transpose(1, 2), k.transpose(1, 2), {"unsqueeze_dim": 2}
    if change == "two dimensions":
        q, k, cos, sin = q[0, 0], k[0, 0], cos[0], sin[0]
        original = lambda q, k, cos, sin: modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=0)
        ours = kind.rotary(original, "halves", "torch")
    if change == "positions":
        options = {"position_ids": torch.arange(6)}
    if change == "wider":
        q, k = q[:1], k[:1]
    if change == "other dtype":
        q, k = q.bfloat16(), k.bfloat16()
    expected, found = original(q, k, cos, sin, **options), ours(q, k, cos, sin, **options)
    torch.testing.assert_close(found, expected)
    assert len(calls) == (change not in ("two dimensions", "positions", "wider"))


def test_tables_that_do_not_repeat_are_left_to_the_original():
    """What trying out the function cannot see: its tables come from another module."""

    class TwoAngles(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            first, second = sin.chunk(2, -1)
            return cos, torch.cat((first, 0.5 * second), -1)

    def make():
        model = LLAMA.make()
        model.model.rotary_emb.__class__ = TwoAngles
        return model

    class Attention(modeling_llama.LlamaAttention):
        """A class of its own, by which the finding is kept."""

        forward = modeling_llama.LlamaAttention.forward

    plain, fast, inputs = make(), make(), LLAMA.inputs()
    for layer in fast.model.layers:
        layer.self_attn.__class__ = Attention
    report = accelerate(fast)
    assert len(entries(report, "rope")) == 2
    torch.testing.assert_close(
        LLAMA.kept(output_of(fast, inputs)), LLAMA.kept(output_of(plain, inputs)), rtol=1e-4, atol=1e-5
    )


def test_rope_is_what_runs(monkeypatch):
    model, inputs, calls = LLAMA.make(), LLAMA.inputs(), []
    accelerate(model)
    from llmkernels.accelerate.kinds import rotary as kind

    usual = kind.functional.rope
    monkeypatch.setattr(kind.functional, "rope", lambda *args, **kwargs: calls.append(args) or usual(*args, **kwargs))
    model(**inputs)
    assert len(calls) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = output_of(LLAMA.make(), inputs)
        torch.testing.assert_close(LLAMA.kept(output_of(model, inputs)), LLAMA.kept(plain), rtol=0.1, atol=2e-2)
    assert len(calls) == 4, "under autocast too"


# --- the loss hook ----------------------------------------------------------------------------------------------------


def _with_loss(function):
    model = LLAMA.make()
    model.loss_function = function
    return model


def test_losses_that_are_no_cross_entropy_of_tokens_are_left_alone():
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    def smoothed(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
        flat = labels.reshape(-1)
        return nn.functional.cross_entropy(
            logits.view(-1, vocab_size), flat, ignore_index=ignore_index, label_smoothing=0.1
        )

    ids = LLAMA.inputs()["input_ids"]
    for function, found in ((ForCausalLMLoss, True), (ForMaskedLMLoss, True), (smoothed, False), (lambda x: x, False)):
        model = _with_loss(function)
        expected = model(ids, labels=ids).loss if found else None
        report = accelerate(model)
        assert any("loss" in str(entry.replacement) for entry in report.swapped) == found, str(report)
        if found:
            torch.testing.assert_close(model(ids, labels=ids).loss, expected)
        llmkernels.restore(model)
        assert model.loss_function is function


def test_a_loss_that_was_set_since_stays():
    model = LLAMA.make()
    accelerate(model)
    mine = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    model.loss_function, model.config._attn_implementation = mine, "eager"
    llmkernels.restore(model)
    assert model.loss_function is mine and model.config._attn_implementation == "eager"


# --- what users do ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ("deepcopy", "pickle", "torch.save"))
def test_copies_are_accelerated_and_restored_by_themselves(way):
    model, inputs = LLAMA.make(), LLAMA.inputs()
    accelerate(model)
    expected = output_of(model, inputs)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(output_of(other, inputs), expected)
    assert llmkernels.restore(other) == llmkernels.restore(model) > 0
    assert type(other.model.layers[0].mlp) is modeling_llama.LlamaMLP and other.config._attn_implementation == "sdpa"
    assert "_loss_function" not in vars(other) and torch.equal(output_of(other, inputs), output_of(model, inputs))


def test_a_model_inside_of_another_module_and_a_part_of_one():
    wrapper = nn.ModuleDict({"inner": LLAMA.make()})
    report = accelerate(wrapper)
    assert len(report.swapped) == 14 and wrapper["inner"].config._attn_implementation == "llmkernels_torch"
    assert llmkernels.restore(wrapper["inner"].model) and wrapper["inner"].config._attn_implementation == "sdpa"
    assert llmkernels.restore(wrapper) == 1, "the loss, which is the outer model's"


def test_twice_and_in_a_context():
    model = LLAMA.make()
    accelerate(model)
    before = {id(module): type(module) for module in model.modules()}
    again = accelerate(model)
    assert len(again.swapped) == 14 and {entry.detail for entry in again.swapped} == {"swapped before"}
    with llmkernels.accelerated(model, backend="torch"):
        pass
    assert {id(module): type(module) for module in model.modules()} == before
    assert model.config._attn_implementation == "llmkernels_torch" and llmkernels.restore(model) == 13
    with pytest.raises(KeyError), llmkernels.accelerated(model, backend="torch", exclude="*.mlp") as report:
        assert len(report.swapped) == 12
        raise KeyError
    assert model.config._attn_implementation == "sdpa" and llmkernels.restore(model) == 0


def test_an_exception_late_undoes_settings_too(monkeypatch):
    model = LLAMA.make()
    monkeypatch.setattr(settings, "_losses", lambda session: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accelerate(model)
    assert model.config._attn_implementation == "sdpa" and llmkernels.restore(model) == 0


@pytest.mark.parametrize("name", ("llama", "t5"))
def test_example_inputs_of_a_model_with_loss(name):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    inputs["labels"] = inputs.pop("decoder_input_ids") if name == "t5" else inputs["input_ids"]
    report = accelerate(model, example_inputs=inputs)
    assert report.whole.startswith("outputs differ by") and "gradients" in report.whole and not report.kept
    assert all(p.grad is None for p in model.parameters())


def test_saved_and_loaded_by_transformers(tmp_path):
    model, inputs = LLAMA.make(), LLAMA.inputs()
    expected = output_of(model, inputs)
    accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded.model.norm) is modeling_llama.LlamaRMSNorm and loaded.config._attn_implementation == "sdpa"
    torch.testing.assert_close(output_of(loaded, inputs), expected)


def test_the_keywords_of_a_call():
    keywords = attention.call_of_interface(modeling_gemma2.Gemma2Attention.forward)
    assert set(keywords) == {"dropout", "scaling", "sliding_window", "softcap"}
    assert attention.call_of_interface(nn.Linear.forward) is None


@pytest.mark.parametrize("name", ("llama", "gemma2", "phi3", "gpt2", "t5"))
def test_compiled_whole(name):
    family = FAMILIES[name]
    model, inputs, ran = family.make(), family.inputs(), []
    expected = family.kept(output_of(model, inputs))
    accelerate(model, backend=BEST)

    def backend(graph, _):
        ran.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(family.kept(found), expected, rtol=1e-4, atol=1e-5)
    if BEST != "torch":  # whose kernels are no ops
        wanted = {"llmkernels_cpu.attention_fwd.default"}
        wanted |= {"llmkernels_cpu.rope_fwd.default"} if "rope (halves)" in family.found else set()
        assert wanted <= set(ran), sorted(set(ran))


def test_gradient_checkpointing_and_an_optimizer_made_before():
    def steps(model, change):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        change(model)
        model.train()
        ids, losses = LLAMA.inputs()["input_ids"], []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    plain = steps(LLAMA.make(), lambda model: None)
    changed = steps(LLAMA.make(), accelerate)
    saving = steps(LLAMA.make(), lambda m: (accelerate(m), m.gradient_checkpointing_enable(**checkpointing)))
    torch.testing.assert_close(changed, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(saving, plain, rtol=1e-4, atol=1e-5)


def test_dropout_of_attention_is_drawn_and_off_in_eval():
    model, ids = LLAMA.make(attention_dropout=0.5), torch.randint(3, VOCABULARY, (2, LENGTH))
    expected = output_of(model, {"input_ids": ids})
    accelerate(model)
    torch.testing.assert_close(output_of(model, {"input_ids": ids}), expected, rtol=1e-4, atol=1e-5)
    model.train()
    torch.manual_seed(0)
    first, second = (output_of(model, {"input_ids": ids}) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(output_of(model, {"input_ids": ids}), first) and not torch.equal(first, second)


def test_the_library_does_without_transformers():
    import subprocess
    import sys

    code = (
        "import sys, torch, llmkernels; model = torch.nn.Sequential(torch.nn.LayerNorm(8));"
        "llmkernels.accelerate(model, backend='torch'); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
