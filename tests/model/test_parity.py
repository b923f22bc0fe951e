"""Our network against the torch models of `transformers`, from folders in the published format.

Needs the extra `parity`; without torch the golden logits of test_hf.py stand in for this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import bits, toy_mesh

from aspo_jax.head import Head
from aspo_jax.model import (
    Model,
    ModelConfig,
    build_model,
    load_params,
    read_model_config,
    save_model,
)
from aspo_jax.sampler import EVERYTHING, Limits, PagedSampler, Request

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
torch.set_num_threads(1)  # so small that threads only wait for each other

BASE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
}


def yarn(factor: float, original: int, theta: float, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "factor": factor, "rope_theta": theta}
    return rope | {"original_max_position_embeddings": original} | more


def plain(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


def widths(vocabulary: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int):
    names = ("vocab_size", "hidden_size", "intermediate_size")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim")
    return dict(zip(names, (vocabulary, hidden, mlp, heads, kv_heads, head_dim), strict=True))


def qwen2(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "qwen2", BASE | changes


def qwen3(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "qwen3", BASE | {"head_dim": 4} | changes


def llama(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "llama", BASE | {"eos_token_id": None} | changes  # its default is 2


def llama3(factor: float, original: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": factor, "rope_theta": 5e5}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope | {"original_max_position_embeddings": original} | more


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EVERY_YARN_SETTING = yarn(
    *(8.0, 4096, 1e4), beta_fast=16.0, beta_slow=2.0, attention_factor=1.3, truncate=False
)

# In transformers' own names. Qwen2 has biases on q, k, v; Qwen3 norms of each head of q and k;
# Llama has neither.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "2 tied, a key head per query head": qwen2(num_key_value_heads=4, **TIED),
    "2 untied, grouped": qwen2(rope_parameters=plain(1e4), **UNTIED),
    "2 tied, one key head, theta 1e6": qwen2(
        num_key_value_heads=1, rope_parameters=plain(1e6), **TIED
    ),
    "2 odd sizes, wide heads": qwen2(rms_norm_eps=1e-5, **widths(41, 33, 17, 3, 3, 10)),
    "2 one layer, grouped by three": qwen2(num_hidden_layers=1, **widths(37, 16, 24, 6, 2, 8)),
    "2 five layers, scanned": qwen2(num_hidden_layers=5, rope_parameters=plain(1e6), **TIED),
    "2 YaRN": qwen2(max_position_embeddings=131_072, rope_parameters=yarn(4.0, 32_768, 1e6)),
    "2 YaRN, every setting": qwen2(head_dim=16, rope_parameters=EVERY_YARN_SETTING),
    "3 untied, a key head per query head": qwen3(num_key_value_heads=4, **UNTIED),
    "3 tied, grouped, heads wider than hidden": qwen3(
        head_dim=16, rope_parameters=plain(1e6), **TIED
    ),
    "3 one key head, odd sizes": qwen3(**widths(43, 27, 31, 5, 1, 6)),
    "3 five layers, scanned": qwen3(num_hidden_layers=5, head_dim=8),
    "3 YaRN": qwen3(
        head_dim=16, max_position_embeddings=256, rope_parameters=yarn(4.0, 64, 1e6), **TIED
    ),
    "L tied, five layers, as SmolLM2": llama(
        num_hidden_layers=5, rms_norm_eps=1e-5, rope_parameters=plain(1e5), **TIED
    ),
    "L untied, as TinyLlama": llama(max_position_embeddings=2048, **UNTIED),
    "L odd sizes, head width given": llama(**widths(41, 33, 17, 3, 1, 10)),
    "L its scaling, as Llama 3.1": llama(
        head_dim=32, max_position_embeddings=131_072, rope_parameters=llama3(8.0, 8192), **UNTIED
    ),
    "L its scaling, other turns": llama(
        num_key_value_heads=None,
        head_dim=16,
        rope_parameters=llama3(4.0, 64, low_freq_factor=0.5, high_freq_factor=7.0),
        **TIED,
    ),
    "L YaRN": llama(head_dim=16, rope_parameters=yarn(4.0, 64, 1e4)),
}


class Pair(NamedTuple):
    """One network twice: theirs, and ours read from the folder that they saved."""

    theirs: Any
    folder: Path
    model: Model
    params: Any


def torch_model(name: str) -> Any:
    family, changes = SHAPES[name]
    letter = family.capitalize()
    config = getattr(transformers, f"{letter}Config")(**changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{letter}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            weight.normal_(mean=1.0 if "norm" in path else 0.0, std=0.3)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory) -> Pair:
    theirs, folder = torch_model(request.param), tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    config = read_model_config(folder)
    return Pair(theirs, folder, build_model(config), load_params(folder, config))


def no_tokenizer(folder: Path) -> None:
    pass


def their_logits(model: Any, **inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(**{k: torch.tensor(v) for k, v in inputs.items()}).logits
    return logits.float().numpy()


def our_logits(model: Model, params: Any, *inputs: np.ndarray) -> np.ndarray:
    @jax.jit
    def run(params, *inputs):
        hidden = model.apply(params, *inputs)[0].astype(jnp.float32)
        return hidden @ model.unembedding(params).astype(jnp.float32).T

    return np.asarray(run(params, *inputs))


def rows_of(config: ModelConfig, lengths: list[list[int]], T: int, first: list[int]):
    """Rows of sequences packed from the right, so that a single one is padded on the left."""
    rng = np.random.RandomState(1)
    token_BT = rng.randint(config.vocab_size, size=(len(lengths), T))
    position_BT, segment_BT = np.zeros_like(token_BT), np.zeros_like(token_BT)
    for b, row in enumerate(lengths):
        start = T - sum(row)
        for segment, length in enumerate(row, 1):
            segment_BT[b, start : start + length] = segment
            position_BT[b, start : start + length] = first[b] + np.arange(length)
            start += length
    return token_BT, position_BT, segment_BT


def test_logits_of_plain_padded_packed_and_far_rows(pair):
    """Each sequence alone in theirs; in ours beside others, behind padding, or at position 20k."""
    lengths, first = [[24], [17], [5, 12, 7], [24]], [0, 0, 0, 20_000]
    rows = token_BT, position_BT, segment_BT = rows_of(pair.model.config, lengths, 24, first)
    got = our_logits(pair.model, pair.params, *rows)
    for b, row in enumerate(lengths):
        for segment in range(1, len(row) + 1):
            own = segment_BT[b] == segment
            expected = their_logits(
                pair.theirs,
                input_ids=token_BT[b, own][None],
                position_ids=position_BT[b, own][None],
            )[0]
            error = np.abs(got[b, own] - expected).max()
            assert error <= 1e-4 * np.abs(expected).max(), (b, segment, error)


def greedy(pair: Pair, prompts: list[np.ndarray], count: int) -> np.ndarray:
    """The likeliest token, ``count`` times, by the sampler with its pages: [B, count]."""
    limits = Limits(8, count, slots=2, stop_ids=(), prompts=2, page=16)
    head = Head(1.0, np.ones(pair.model.config.vocab_size, bool))
    sampler = PagedSampler(pair.model, head, limits, toy_mesh(), seed=0).drawing(0.0, EVERYTHING)
    sampler.start(pair.params)
    requests = [Request(prompt.tolist(), (0, n, 0, 0)) for n, prompt in enumerate(prompts)]
    drawn = sorted(sampler.sample(requests), key=lambda completion: completion.request)
    return np.stack([completion.tokens_T for completion in drawn])


def test_greedy_continuations_of_prompts_padded_on_the_left(pair):
    token_BT, _, segment_BT = rows_of(pair.model.config, [[8], [5]], 8, [0, 0])
    with torch.no_grad():
        expected = pair.theirs.generate(
            input_ids=torch.tensor(token_BT),
            attention_mask=torch.tensor(segment_BT),
            do_sample=False,
            max_new_tokens=64,
            pad_token_id=0,
        ).numpy()[:, 8:]
    assert expected.shape == (2, 64)
    prompts = [row[mask > 0] for row, mask in zip(token_BT, segment_BT, strict=True)]
    np.testing.assert_array_equal(greedy(pair, prompts, 64), expected)


@pytest.mark.parametrize("keeps_source", [True, False], ids=["their config", "our config"])
def test_what_we_export_is_what_they_saved(pair, tmp_path, keeps_source):
    config = pair.model.config
    source = pair.folder if keeps_source else None
    export = {"eos_token_id": 2, "source": source, "max_shard_bytes": 6000}
    save_model(tmp_path / "ours", pair.params, config, no_tokenizer, **export)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    assert read_model_config(tmp_path / "ours") == config
    assert bits(load_params(tmp_path / "ours", config)) == bits(pair.params)
    again, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not any(notes.values()), notes
    assert again.dtype == torch.float32
    token_BT = np.arange(20).reshape(2, 10)
    expected = their_logits(pair.theirs, input_ids=token_BT)
    np.testing.assert_array_equal(their_logits(again.eval(), input_ids=token_BT), expected)


BFLOAT16 = [
    *("2 untied, grouped", "3 tied, grouped, heads wider than hidden"),
    "L its scaling, as Llama 3.1",
]


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_in_and_out_is_bitwise(name, tmp_path):
    theirs = torch_model(name).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    config = read_model_config(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", config, dtype=jnp.bfloat16)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    save_model(tmp_path / "ours", params, config, no_tokenizer, eos_token_id=2, dtype="bfloat16")
    assert bits(load_params(tmp_path / "ours", config, dtype=jnp.bfloat16)) == bits(params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in theirs.state_dict().items())


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_logits_are_as_far_from_float32_as_theirs(name, tmp_path, capsys):
    """Statistics, and a loose bound: our rounding is no worse than three times theirs."""
    theirs = torch_model(name)
    theirs.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    params = load_params(tmp_path, config)
    rows = rows_of(config, [[64]] * 4, 64, [0] * 4)
    exact = our_logits(build_model(config), params, *rows)
    ours = our_logits(build_model(config, dtype=jnp.bfloat16), params, *rows)
    half = their_logits(theirs.bfloat16(), input_ids=rows[0])
    scale = np.abs(exact).max()
    errors = {"ours": np.abs(ours - exact) / scale, "theirs": np.abs(half - exact) / scale}
    with capsys.disabled():
        for who, error in errors.items():
            print(f"\n{name}: {who}: mean {error.mean():.1e}, max {error.max():.1e}", end="")
    assert errors["ours"].mean() <= 3 * errors["theirs"].mean()
