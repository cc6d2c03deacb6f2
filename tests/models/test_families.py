"""LLaMA, Mistral, Qwen2 and OPT against transformers and PEFT: logits, gradients, cached decoding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spjax import vocab
from spjax.convert.decoders import FAMILIES as TABLE
from spjax.models import decode, low_rank, prompted_lm, prompts, unit_lm, verbalizers
from spjax.models.config import BLOCK
from spjax.models.prompts import PromptConfig
from spjax.serving.frozen import KINDS, quantize
from spjax.types import KV
from tests.models import peers, tiny
from tests.models.peers import Peer, error, peer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
LENGTHS = (9, 1, 5)
PROMPT = PromptConfig(length=3, separators=2, rank=2, alpha=3.0)
SPECIALS = np.asarray([vocab.PAD, vocab.EOS, *range(vocab.UNIT_OFFSET, peers.SIZE)])  # tokens that transformers has


def kinds(*quick: str, slow: tuple[str, ...]) -> Any:
    """Parameters: those that the default suite runs, and those that only the slow one does."""
    return pytest.mark.parametrize("kind", [*quick, *(pytest.param(kind, marks=pytest.mark.slow) for kind in slow)])


def rows(lengths: tuple[int, ...] = LENGTHS) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens [B, T], and whether a column is real."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocab.UNIT_OFFSET, peers.SIZE, (len(lengths), max(lengths)))
    tokens[:, 0] = vocab.EOS
    real = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    return np.where(real, tokens, vocab.PAD), real


def test_every_option_of_the_block_is_compared() -> None:
    """The kinds differ in all fields, so that none is left at its default in every comparison."""
    fields = {name for kind in peers.CONFIGS for name in peer(kind).config.block}
    assert fields == {*BLOCK}


@kinds("llama3", "mistral", "qwen2", "opt_350m", slow=("llama", "linear", "opt", "opt_bare"))
def test_logits_of_padded_and_packed_rows(kind: str) -> None:
    model, config, params = peer(kind)
    tokens, real = rows()
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real.astype(int))}
    expected = model(**given).logits.detach().numpy()
    found = np.asarray(tiny.jit(unit_lm.logits, static_argnums=1)(params, config, tokens))
    assert error(found[real][:, SPECIALS], expected[real][:, SPECIALS]) < 1e-4
    assert (found[..., [vocab.BOS, vocab.UNK]] == unit_lm.ABSENT).all()
    assert config.absent == (vocab.BOS, vocab.UNK)
    # The same rows, packed into one.
    packed, segment = tokens[real][None], np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    position = np.concatenate([np.arange(length) for length in LENGTHS])[None]
    mask = (segment[:, None] == segment) & np.tril(np.ones((len(segment),) * 2, bool))
    hidden = tiny.jit(unit_lm.hidden_states, static_argnums=1)(
        params, config, packed, position=position, mask=mask[None]
    )
    assert error(unit_lm.unembed(params, hidden)[0][:, SPECIALS], expected[real][:, SPECIALS]) < 1e-4


def adapted(one: Peer, bank: Any) -> Any:
    """The model with the adapters of a bank of one, by PEFT."""
    names = decoders_of(one)
    made = peft.get_peft_model(
        peers.make(one_kind(one)),
        peft.LoraConfig(r=PROMPT.rank, lora_alpha=PROMPT.alpha, target_modules=[*names.values()], lora_dropout=0.0),
    ).eval()
    for ours, theirs in names.items():
        for number, module in enumerate(layers_of(made)):
            lora = module.get_submodule(theirs)
            with torch.no_grad():
                lora.lora_A["default"].weight.copy_(torch.tensor(np.asarray(bank[f"{ours}_a"][0, number])))
                lora.lora_B["default"].weight.copy_(torch.tensor(np.asarray(bank[f"{ours}_b"][0, number]).T))
    return made


def one_kind(one: Peer) -> str:
    return next(kind for kind in peers.CONFIGS if peer(kind) is one)


def layers_of(model: Any) -> Any:
    return next(m for name, m in model.named_modules() if name.endswith("layers") and len(list(m)))


def decoders_of(one: Peer) -> dict[str, str]:
    """Our kernels → their modules inside a layer."""
    names = TABLE[one.model.config.model_type][1]
    return {kernel: names[f"layers/{kernel}"].partition("{}.")[2] for kernel in one.config.kernels}


def bank_of(one: Peer, verbalizer: Any) -> Any:
    targets = tuple(name for name in low_rank.KNOWN if name in one.config.kernels)
    return tiny.bank(one.config, PromptConfig(**{**PROMPT.__dict__, "targets": targets}), verbalizer, 1)


def prompted(model: Any, trained: dict[str, Any], tokens: list[int], feeds: list[int]) -> Any:
    """transformers' output for one utterance: projected prompts as its cache, trained separators, positions from 0."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = peers.transformers.DynamicCache()
    for number, layer in enumerate(layers_of(model)):
        attention = layer.self_attn
        key, value = (
            x.reshape(1, len(x), -1, attention.head_dim).transpose(1, 2)
            for x in (attention.k_proj(trained["key"][0, number]), attention.v_proj(trained["value"][0, number]))
        )
        cache.update(key, value, number)
    decoder = base.get_decoder()
    project = getattr(decoder, "project_in", None)
    x = base.get_input_embeddings()(torch.tensor([*tokens, *feeds]))
    x = x if project is None else project(x)
    x = torch.cat([x[: len(tokens)], trained["sep"][0], x[len(tokens) :]])[None]
    if project is not None:
        decoder.project_in = None  # separators are vectors of the LM's width
    out = base(inputs_embeds=x, past_key_values=cache, position_ids=torch.arange(x.shape[1])[None], use_cache=True)
    if project is not None:
        decoder.project_in = project
    return out


@kinds("llama", "opt_350m", slow=("qwen2", "opt", "mistral"))
def test_gradients_of_prompts_and_adapters(kind: str) -> None:
    """A padded batch with prompts, separators, fed-back labels and LoRA on every kernel."""
    one = peer(kind)
    verbalizer = verbalizers.identity(tiny.TASK, peers.SIZE)
    bank = bank_of(one, verbalizer)
    batch = tiny.batch(units := tiny.utterances(one.config, LENGTHS), 12)
    feeds = np.asarray([[5, 9], [7, 4], [20, 21]])
    weights = np.random.default_rng(1).normal(size=(len(units), 3, peers.SIZE)).astype(np.float32)
    weights[..., [vocab.BOS, vocab.UNK]] = 0

    def loss(bank: Any) -> Any:
        ready = low_rank.scaled(bank, PROMPT.scale)
        state = prompted_lm.run(one.params, ready, batch, feeds, config=one.config, queries=3)
        scores = unit_lm.unembed(one.params, state.hidden)
        return jnp.sum(scores * weights), scores

    (_, scores), grads = tiny.jit(jax.value_and_grad(loss, has_aux=True))(bank)
    model = adapted(one, bank)
    trained = {name: torch.tensor(np.asarray(bank[name]), requires_grad=True) for name in ("key", "value", "sep")}
    total, expected = 0.0, []
    for row, utterance in enumerate(units):
        tokens = [vocab.EOS, *(unit + vocab.UNIT_OFFSET for unit in utterance)]
        logits = prompted(model, trained, tokens, feeds[row].tolist()).logits[0, -3:]
        expected.append(logits.detach().numpy())
        total = total + (logits * torch.tensor(weights[row])).sum()
    total.backward()
    assert error(scores[..., SPECIALS], np.stack(expected)[..., SPECIALS]) < 1e-4
    for name, leaf in trained.items():
        assert error(grads[name], leaf.grad) < 1e-4, name
    for ours, theirs in decoders_of(one).items():
        loras = [module.get_submodule(theirs) for module in layers_of(model)]
        a = np.stack([lora.lora_A["default"].weight.grad.numpy() for lora in loras])
        b = np.stack([lora.lora_B["default"].weight.grad.numpy().T for lora in loras])
        assert error(grads[f"{ours}_a"][0], a) < 1e-4, ours
        assert error(grads[f"{ours}_b"][0], b) < 1e-4, ours


@kinds("llama", "opt", slow=("qwen2", "opt_350m"))
def test_positions_shifted_by_the_prompt_equal_peft_prefix_tuning(kind: str) -> None:
    """PEFT numbers units from P; so shifted, the same keys and values give the same logits and gradients."""
    _, config, params = peer(kind)
    length = 3
    made = peft.get_peft_model(
        peers.make(kind), peft.PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")
    ).eval()
    table = made.prompt_encoder["default"].embedding.weight
    tokens, real = rows((9, 9))
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(real.astype(int))}
    expected = made(**given).logits
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    weights[..., [vocab.BOS, vocab.UNK]] = 0
    (expected * torch.tensor(weights)).sum().backward()

    def split(table: Any) -> Any:  # [P, L, key or value, G, Dh] -> [2, L, 1, G, P, Dh]
        flat = np.asarray(table.detach()).reshape(length, config.layers, 2, config.key_heads, config.head_dim)
        return flat.transpose(2, 1, 3, 0, 4)[:, :, None]

    def loss(key: Any, value: Any, shift: int) -> Any:
        position = jnp.arange(tokens.shape[1])[None] + shift
        x = unit_lm.embed_tokens(params, tokens, scaled=False)
        x = x + unit_lm.embed_positions(params, config, position, 64)
        causal = jnp.tril(jnp.ones((1, tokens.shape[1], tokens.shape[1]), bool))
        mask = jnp.concatenate([jnp.ones((1, tokens.shape[1], length), bool), causal], axis=2)
        hidden, _ = unit_lm.extend(params, config, (x,), KV(key, value), mask, position=position)
        logits = unit_lm.unembed(params, hidden)
        return jnp.sum(logits * weights), logits

    run = tiny.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    key, value = map(jnp.asarray, split(table))
    (_, shifted), grads = run(key, value, length)
    assert error(shifted[..., SPECIALS], expected.detach().numpy()[..., SPECIALS]) < 1e-4
    for found, wanted in zip(grads, split(table.grad), strict=True):
        assert error(found, wanted) < 1e-4
    (_, ours), _ = run(key, value, 0)
    assert error(ours, shifted) > 1e-2, "the numbering matters"


@kinds("qwen2", slow=("llama", "opt", "opt_350m", "mistral"))
def test_cached_decoding(kind: str) -> None:
    """Steps after a prefill equal transformers' with its cache; so do greedy decoding and scores of a label tree."""
    one = peer(kind)
    config, params = one.config, one.params
    verbalizer = verbalizers.identity(tiny.TASK, peers.SIZE)
    bank = tiny.bank(config, PromptConfig(length=3, separators=1), verbalizer, 1)
    batch = tiny.batch(units := tiny.utterances(config, (6, 2)), 8)
    feeds = np.asarray([[5, 9], [7, 4]])

    @tiny.jit
    def run(bank: Any, batch: Any) -> Any:
        nothing = jnp.zeros((2, 0), jnp.int32)
        state = prompted_lm.run(params, bank, batch, nothing, config=config, queries=1)
        found = [prompted_lm.outputs(params, bank, state.hidden, batch.prompt_id)]
        for step in range(2):
            seen, at = jnp.ones((1, 1), bool), state.position[:, None]
            state = prompted_lm.step(params, state, feeds[:, step : step + 1], seen, at, config=config)
            found.append(prompted_lm.outputs(params, bank, state.hidden, batch.prompt_id))
        tree = decode.label_tree(verbalizer, None)
        score = decode.score(params, bank, batch, [tree], config=config)
        chosen = decode.greedy(params, bank, batch, max_steps=4, verbalizer=verbalizer, config=config)
        return jnp.concatenate(found, axis=1), score, chosen

    found, scores, chosen = run(bank, batch)
    trained = {name: torch.tensor(np.asarray(bank[name])) for name in ("key", "value", "sep")}
    tree = decode.label_tree(verbalizer, None)
    for row, utterance in enumerate(units):
        tokens = [vocab.EOS, *(unit + vocab.UNIT_OFFSET for unit in utterance)]
        out = prompted(one.model, trained, tokens, [])
        expected, cache, position = [out.logits[0, -1]], out.past_key_values, len(tokens) + 1
        for step, feed in enumerate(feeds[row]):
            given = {"input_ids": torch.tensor([[feed]]), "position_ids": torch.tensor([[position + step]])}
            out = one.model(**given, past_key_values=cache, use_cache=True)
            expected.append(out.logits[0, -1])
        expected = torch.stack(expected).detach().numpy()
        assert error(found[row][:, SPECIALS], expected[:, SPECIALS]) < 1e-4
        # Every label combination in one forward pass each, on some.
        total = []
        for combination in tree.combinations:
            codes = verbalizer.codes[combination].reshape(-1)
            logits = prompted(one.model, trained, tokens, codes[:-1].tolist()).logits[0, -len(codes) :].detach()
            steps = [torch.log_softmax(x[np.flatnonzero(ok)], 0) for x, ok in zip(logits, tree.allowed, strict=True)]
            places = [np.flatnonzero(ok).tolist().index(code) for ok, code in zip(tree.allowed, codes, strict=True)]
            total.append(sum(float(step[place]) for step, place in zip(steps, places, strict=True)))
        total = np.asarray(total) - np.logaddexp.reduce(total)
        assert error(scores[row], total) < 1e-4
        fed: list[int] = []
        for _ in range(4):
            logits = prompted(one.model, trained, tokens, fed).logits[0, -1].detach().numpy()
            logits[[vocab.BOS, vocab.UNK]] = -np.inf
            fed.append(int(logits.argmax()))
            if fed[-1] == vocab.EOS:
                break
        assert chosen[row].tolist() == (fed + [vocab.EOS] * 4)[:4]


@pytest.mark.parametrize("kind", ["llama", "opt_350m"])
def test_input_prompts_have_no_position(kind: str) -> None:
    """Columns of an input prompt are at position 0 (not rotated, nothing added), and the units are numbered from 0."""
    _, config, params = peer(kind)
    verbalizer = verbalizers.identity(tiny.TASK, peers.SIZE)
    bank = tiny.bank(config, PromptConfig(length=2, deep=False), verbalizer, 1)
    batch = tiny.batch(tiny.utterances(config, (5,)), 5)
    nothing = jnp.zeros((1, 0), jnp.int32)
    state = prompted_lm.run(params, bank, batch, nothing, config=config, queries=2)
    tokens = np.concatenate([batch.source[0], batch.last])
    x = jnp.concatenate([unit_lm.embed_tokens(params, tokens, scaled=False), bank["sep"][0]])
    position = np.arange(len(x))
    x = x + unit_lm.embed_positions(params, config, position, 64)
    x = jnp.concatenate([bank["input"][0], x])[None]
    causal = np.tril(np.ones((1, x.shape[1], x.shape[1]), bool))
    position = np.concatenate([[0, 0], position])[None]
    hidden, _ = unit_lm.extend(params, config, (x,), unit_lm.empty_prefix(config), causal, position=position)
    assert error(state.hidden, hidden[:, -2:]) < 1e-5


@kinds("bfloat16", slow=("int8",))
def test_low_precision(kind: str) -> None:
    _, config, params = peer("qwen2")
    tokens, real = rows()
    run = tiny.jit(functools.partial(unit_lm.logits, compute=KINDS[kind]), static_argnums=1)
    found, expected = run(quantize(params, kind), config, tokens), unit_lm.logits(params, config, tokens)
    assert error(np.asarray(found)[real][:, SPECIALS], np.asarray(expected)[real][:, SPECIALS]) < 0.1


def test_rotary_positions_are_required_and_a_gate_only_where_there_is_one() -> None:
    _, config, params = peer("llama")
    with pytest.raises(ValueError, match="needs the positions"):
        unit_lm.extend(
            params, config, (jnp.zeros((1, 2, 32)),), unit_lm.empty_prefix(config), jnp.ones((1, 2, 2), bool)
        )
    config = peer("opt").config
    gate = PromptConfig(length=0, rank=2, targets=("ffn_gate",))
    with pytest.raises(ValueError, match="must be kernels of the LM, which has query"):
        prompts.init_member(
            jax.random.key(0), gate, config, verbalizers.identity(tiny.TASK, peers.SIZE), jnp.zeros((24, 32))
        )
