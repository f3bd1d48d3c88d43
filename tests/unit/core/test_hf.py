"""``sparsify`` is the paper's method on models of transformers, and the engine agrees with it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedModel,
)

from griffin_core import sparsify
from griffin_core.engine.task import GenerateTask, PruningParams, ScoreTask
from griffin_core.errors import InvalidRequest, UnknownFamily
from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.statistic import Statistics, group_score
from griffin_core.forward.events import (
    LayerExperts,
)
from griffin_core.forward.prefill import prefill
from griffin_core.hf import batch_score
from griffin_core.model.load import Model
from griffin_core.sampling.params import SamplingParams
from griffin_core.sampling.stopping import StoppingParams
from tests.tiny import CONTEXT, MODELS, VOCABULARY, roughen
from tests.unit.core.engines import complete, engine
from tests.unit.core.test_statistic import paper_s

OURS = ("llama", "gemma", "opt")

_LLAMA = MODELS["llama"][1]
_SHAPE = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
_GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}

# name -> (family, config)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi": ("phi", _SHAPE),
    "gpt_neox": ("gpt_neox", _SHAPE),
    "starcoder2": ("starcoder2", {**_SHAPE, "num_key_value_heads": 2}),
    "phi3": ("phi3", {**_SHAPE, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", {**_SHAPE, **_GPT2, "n_inner": 88}),
    "bloom": ("bloom", {**_SHAPE, "n_layer": 3, "n_head": 4}),
    "lfm2": (  # whose activation is a function
        "lfm2",
        {
            **_SHAPE,
            "num_key_value_heads": 2,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["full_attention"] * 3,
        },
    ),
}
DOWN = (
    "mlp.down_proj",
    ".fc2",
    "mlp.dense_4h_to_h",
    "mlp.c_proj",
    "feed_forward.w2",
)
FAMILIES = (*OURS, *OTHERS)

IDS = torch.randint(0, VOCABULARY - 5, (2, 30), generator=torch.Generator().manual_seed(5))


def build(family: str, values: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(sum(family.encode()))
    config = CONFIG_MAPPING[family](**values)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    roughen(made)
    made.generation_config.eos_token_id = None  # none ends before its length
    return made


@pytest.fixture(scope="module")
def hf(tiny_directory: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """Name of ``FAMILIES`` or of ``tests.tiny.MODELS`` -> the model of transformers, made once."""
    made: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in made and name in OTHERS:
            made[name] = build(*OTHERS[name])
        elif name not in made:
            made[name] = AutoModelForCausalLM.from_pretrained(
                tiny_directory(name), dtype=torch.float32
            )
            made[name].generation_config.eos_token_id = None
        return made[name]

    return get


def downs(model: nn.Module) -> list[nn.Module]:
    """The down projections, by the names that their families give them."""
    return [module for name, module in model.named_modules() if name.endswith(DOWN)]


def assert_refused(
    error: type[Exception], match: str, model: Any, input_ids: Tensor, **options: Any
) -> None:
    with (
        pytest.raises(error, match=match),
        sparsify(model, input_ids, **{"density": 0.5, **options}),
    ):
        pass


@contextlib.contextmanager
def activations(model: nn.Module) -> Iterator[list[Tensor]]:
    """What each layer's down projection reads, layer by layer: [T, F]."""
    seen: list[Tensor] = []
    hooks = [
        down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        for down in downs(model)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def masked_logits(model: PreTrainedModel, ids: Tensor, prompt: int, experts: Tensor) -> Tensor:
    """[T, V] of one sequence ids [T], its first ``prompt`` tokens on all neurons and the others on
    the experts [L, K]: the method written out for one pass over all of it."""
    hooks = []
    for down, kept in zip(downs(model), experts, strict=True):

        def zero(_: nn.Module, args: tuple[Tensor], kept: Tensor = kept) -> tuple[Tensor]:
            z = args[0].clone()
            rows = z.view(-1, z.shape[-1])
            some = torch.zeros_like(rows[prompt:])
            some[:, kept.long()] = rows[prompt:, kept.long()]
            rows[prompt:] = some
            return (z,)

        hooks.append(down.register_forward_pre_hook(zero))
    try:
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return logits


def greedy(model: PreTrainedModel, ids: Tensor, tokens: int = 12, **options: Any) -> Tensor:
    """The completions of ids [N, P], [B, tokens]."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    made = model.generate(ids, do_sample=False, max_new_tokens=tokens, pad_token_id=258, **options)
    completions: Tensor = made[:, ids.shape[1] :]
    return completions


def padded(lengths: tuple[int, ...], side: str) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths: ids [N, P] and attention_mask."""
    width = max(lengths)
    place = torch.arange(width)[None]
    wanted = torch.tensor(lengths)[:, None]
    mask = (place >= width - wanted) if side == "left" else (place < wanted)
    ids = torch.full((len(lengths), width), 258)
    ids[mask] = torch.randint(
        0, 250, (int(mask.sum()),), generator=torch.Generator().manual_seed(3)
    )
    return ids, mask.long()


# -- against the method written out ---------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_s_is_the_papers_formula_in_float64(
    name: str, hf: Callable[[str], PreTrainedModel]
) -> None:
    model = hf(name)
    with activations(model) as seen, torch.no_grad():
        model(IDS[:1, :9])
    with sparsify(model, IDS[:1, :9], density=0.5) as chosen:
        pass
    expected = torch.stack([paper_s(z) for z in seen])
    torch.testing.assert_close(chosen.s[0], expected, rtol=1e-6, atol=1e-9)
    best = expected.topk(chosen.experts.table.shape[1]).indices.sort(dim=1).values
    assert torch.equal(chosen.experts.table.long(), best)
    mass = [(e[b] ** 2).sum() / (e**2).sum() for e, b in zip(expected, best, strict=True)]
    assert chosen.norm_mass[0] == pytest.approx([float(m) for m in mass])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_runs_dense_and_the_rest_on_the_experts(
    name: str, hf: Callable[[str], PreTrainedModel]
) -> None:
    """One pass over prompt and continuation; the continuation in steps; and chunks across the end
    of the prompt: all as the method written out."""
    model, ids, prompt = hf(name), IDS[0], 17
    with torch.no_grad(), sparsify(model, ids[:prompt], density=0.3) as chosen:
        whole = model(ids[None]).logits[0]
        cut = {}
        for sizes in ((prompt, *[1] * (len(ids) - prompt)), (5, 7, 9, 9)):
            cache = DynamicCache(config=model.config)
            parts = [
                model(part[None], cache=cache, use_cache=True).logits[0]
                for part in ids.split(list(sizes))
            ]
            cut[sizes] = torch.cat(parts)
    expected = masked_logits(model, ids, prompt, chosen.experts.table)
    assert not torch.allclose(expected, model(ids[None]).logits[0], atol=1e-2)
    for logits in (whole, *cut.values()):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_at_density_1_to_the_bit(name: str, hf: Callable[[str], PreTrainedModel]) -> None:
    model, ids = hf(name), IDS[:1, :11]
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 8,
        "output_logits": True,
        "return_dict_in_generate": True,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 258,
    }
    expected = model.generate(ids, **options)
    with sparsify(model, ids, density=1.0) as chosen:
        made = model.generate(ids, **options)
    assert chosen.experts.density == 1
    assert torch.equal(made.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(made.logits, expected.logits, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: next(iter(options), "cached"),
)
def test_generate_however_it_runs_makes_the_tokens_of_the_method_written_out(
    name: str, options: dict[str, Any], hf: Callable[[str], PreTrainedModel]
) -> None:
    model, prompt = hf(name), IDS[0, :13]
    with sparsify(model, prompt, density=0.5) as chosen:
        made = greedy(model, prompt[None], **options)[0]
    sequence = torch.cat([prompt, made])
    logits = masked_logits(model, sequence, len(prompt), chosen.experts.table)
    assert torch.equal(made, logits[len(prompt) - 1 : -1].argmax(dim=1))
    assert not torch.equal(made, greedy(model, prompt[None])[0])


def test_beams_and_several_sequences_run_on_the_experts_of_their_batch(
    hf: Callable[[str], PreTrainedModel],
) -> None:
    model = hf("llama")
    ids, mask = padded((9, 14), "left")
    options = {"attention_mask": mask, "num_beams": 4, "num_return_sequences": 3}
    with sparsify(model, ids, density=0.4, attention_mask=mask):
        cached = greedy(model, ids, **options)
        whole = greedy(model, ids, use_cache=False, **options)
        one = greedy(model, ids, attention_mask=mask, num_beams=4)
    assert cached.shape == (6, 12)
    assert torch.equal(cached, whole)
    assert torch.equal(cached[::3], one)


# -- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_is_each_prompt_alone_on_the_experts_of_the_group(
    name: str, side: str, hf: Callable[[str], PreTrainedModel]
) -> None:
    """Prompts of several lengths and their continuations of several lengths, scored in one pass."""
    model, lengths = hf(name), (5, 12, 8)
    prompts, mask = padded(lengths, side)
    alone = []
    for row, real in zip(prompts, mask.bool(), strict=True):
        with sparsify(model, row[real], density=0.5) as one:
            alone.append(one.s[0])
    with sparsify(model, prompts, density=0.5, attention_mask=mask) as chosen:
        torch.testing.assert_close(chosen.s, torch.stack(alone))
        ids, real = padded((9, 14, 16), side)
        for row, inside, prompt, kept in zip(ids, real.bool(), prompts, mask.bool(), strict=True):
            row[inside.nonzero()[: kept.sum(), 0]] = prompt[kept]
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=real, position_ids=positions).logits
    score = sum(s / math.sqrt(n) for s, n in zip(alone, lengths, strict=True))
    best = score.topk(44).indices.sort(dim=1).values
    assert torch.equal(chosen.experts.table.long(), best)
    for row, inside, length, ours in zip(ids, real.bool(), lengths, logits, strict=True):
        expected = masked_logits(model, row[inside], length, chosen.experts.table)
        torch.testing.assert_close(ours[inside], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_padded_batch_generates_what_each_prompt_does_on_these_experts(
    cache: str, hf: Callable[[str], PreTrainedModel]
) -> None:
    model, lengths = hf("llama"), (5, 12, 8)
    ids, mask = padded(lengths, "left")
    with sparsify(model, ids, density=0.5, attention_mask=mask) as chosen:
        made = greedy(model, ids, attention_mask=mask, cache_implementation=cache)
    for row, real, completion in zip(ids, mask.bool(), made, strict=True):
        sequence = torch.cat([row[real], completion])
        logits = masked_logits(model, sequence, int(real.sum()), chosen.experts.table)
        assert torch.equal(completion, logits[int(real.sum()) - 1 : -1].argmax(dim=1))


# -- against the engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_greedy_tokens_and_scores_are_the_engines_by_every_policy(
    name: str,
    tiny: Callable[[str], Model],
    hf: Callable[[str], PreTrainedModel],
) -> None:
    model, prompt, continuation = hf(name), IDS[0, :19], IDS[1, :8]
    whole = torch.cat([prompt, continuation])
    calibration = tiny(name).decoder.calibration
    with engine(tiny(name), prefill_source=None) as running:
        for policy in POLICIES:
            pruning = PruningParams(density=0.5, policy=policy)
            task = GenerateTask(
                prompt=tuple(prompt.tolist()),
                sampling=SamplingParams(seed=11),
                stopping=StoppingParams(max_tokens=16, ignore_eos=True),
                pruning=pruning,
            )
            score = ScoreTask(
                prompt=task.prompt,
                continuations=(tuple(continuation.tolist()),),
                pruning=pruning,
                seed=11,
            )
            tokens, _ = complete(running, task)
            _, scored = complete(running, score)
            chosen = sparsify(
                model, prompt, density=0.5, policy=policy, seed=11, calibration=calibration
            )
            with chosen, torch.no_grad():
                assert greedy(model, prompt[None], 16)[0].tolist() == tokens, policy
                logprobs = model(whole[None]).logits[0].log_softmax(dim=1)[len(prompt) - 1 : -1]
            expected = logprobs.gather(1, continuation[:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(scored.continuations[0].logprobs), expected, atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OURS)
def test_statistic_and_experts_are_the_engines(
    name: str,
    policy: PolicyName,
    tiny: Callable[[str], Model],
    hf: Callable[[str], PreTrainedModel],
) -> None:
    selection = Selection(density=0.37, policy=policy, seed=2**63 + 5)
    decoder = tiny(name).decoder
    calibration = decoder.calibration
    layers = [
        [e for e in prefill(decoder, ids.tolist(), selection) if isinstance(e, LayerExperts)]
        for ids in IDS
    ]
    options: dict[str, Any] = {
        "density": 0.37,
        "policy": policy,
        "seed": 2**63 + 5,
        "calibration": calibration,
    }
    read = []
    for ids, ours in zip(IDS, layers, strict=True):
        with sparsify(hf(name), ids, **options) as chosen:
            pass
        s = torch.stack([layer.s2 for layer in ours]).sqrt()
        torch.testing.assert_close(chosen.s[0].float(), s, rtol=1e-4, atol=1e-5)
        assert torch.equal(chosen.experts.experts, torch.cat([e.experts for e in ours]))
        read.append(torch.stack([layer.sums for layer in ours], dim=1))
    with sparsify(hf(name), IDS, **options) as group:
        pass
    square = group_score([sums[0] for sums in read]).square()
    expected = select_experts(
        Statistics(sums=torch.cat([square[None], sum(read)[1:]]), tokens=IDS.numel()),
        selection,
        magnitude=decoder.magnitudes,
        calibration=calibration,
    )
    assert torch.equal(group.experts.experts, expected.experts)


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_magnitude_of_fused_and_of_transposed_weights(
    name: str, hf: Callable[[str], PreTrainedModel]
) -> None:
    state = hf(name).state_dict()
    with sparsify(hf(name), IDS[:1], density=0.5, policy="magnitude") as chosen:
        pass
    for layer, kept in enumerate(chosen.experts.layers):
        if name == "phi3":
            gate, up = state[f"model.layers.{layer}.mlp.gate_up_proj.weight"].chunk(2)
            strength = gate.norm(dim=1) * up.norm(dim=1)
        else:
            strength = state[f"transformer.h.{layer}.mlp.c_fc.weight"].norm(dim=0)
        assert torch.equal(kept.long(), strength.topk(44).indices.sort().values)


# -- the edges of the statistic -------------------------------------------------------------------


def test_tokens_that_fire_nothing_count_in_neither_s_nor_the_number_of_tokens() -> None:
    model = build("opt", MODELS["opt"][1])
    block = model.model.decoder.layers[1]
    with torch.no_grad():
        block.fc1.weight.zero_()
        block.fc1.bias.fill_(-1)
    with sparsify(model, IDS, density=0.5) as chosen:
        made = greedy(model, IDS)
    assert chosen.s.isfinite().all()
    assert chosen.s[:, 1].count_nonzero() == 0
    assert chosen.experts.layers[1].tolist() == list(range(44))
    assert made.shape == (2, 12)


def test_a_prompt_that_fires_nothing_has_no_say_in_its_group() -> None:
    s = torch.rand(1, 3, 20)
    score = batch_score(torch.cat([s, torch.zeros_like(s)]))
    assert torch.equal(score, batch_score(s))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = build("starcoder2", OTHERS["starcoder2"][1]).to(dtype)
    with activations(model) as seen, torch.no_grad():
        model(IDS[:1])
    expected = torch.stack([paper_s(z) for z in seen])
    dense = greedy(model, IDS[:1])
    with sparsify(model, IDS[:1], density=1.0) as chosen:
        assert torch.equal(greedy(model, IDS[:1]), dense)
    torch.testing.assert_close(chosen.s[0], expected, rtol=1e-6, atol=1e-9)


# -- the model is left as it was ------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[object]:
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return [getattr(module, kind) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("ending", ["well", "raises", "refused", "fails in the prompt"])
def test_the_model_is_left_as_it_was(
    ending: str, hf: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {module: set(vars(module)) for module in model.modules()}
    expected = model(IDS).logits
    random = torch.get_rng_state()
    if ending == "well":
        with sparsify(model, IDS, density=0.2, policy="sampled"):
            longer = model(torch.cat([IDS, IDS], dim=1)).logits
            torch.testing.assert_close(longer[:, :30], expected, atol=1e-4, rtol=1e-4)
    elif ending == "raises":
        with pytest.raises(KeyError), sparsify(model, IDS, density=0.2):
            greedy(model, IDS)
            raise KeyError
    elif ending == "refused":
        with pytest.raises(InvalidRequest), sparsify(model, IDS, density=0.2):
            model(IDS + 1)
    else:
        with monkeypatch.context() as broken:
            broken.setattr(model.model.layers[2].mlp, "forward", None)
            with pytest.raises(TypeError), sparsify(model, IDS, density=0.2):
                pass
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(hooks_of(model))
    assert {module: set(vars(module)) for module in model.modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, expected)
    with sparsify(model, IDS, density=0.2):  # it can be used again
        pass


def test_one_inside_another_is_refused_and_the_outer_goes_on(
    hf: Callable[[str], PreTrainedModel],
) -> None:
    model = hf("llama")
    with sparsify(model, IDS, density=0.3):
        expected = greedy(model, IDS)
        assert_refused(InvalidRequest, "inside another sparsify", model, IDS)
        assert torch.equal(greedy(model, IDS), expected)
        with sparsify(hf("opt"), IDS, density=0.3):  # another model has nothing to do with it
            assert torch.equal(greedy(model, IDS), expected)


def test_compiled_calls_do_not_pass_by_the_hooks() -> None:
    model = build("llama", _LLAMA)
    ids = IDS[:1, :8]
    whole = IDS[:1]
    dense = model(whole).logits
    with sparsify(model, ids, density=0.3):
        expected = model(whole).logits
    model.compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(whole).logits, dense)
        with sparsify(model, ids, density=0.3):
            torch.testing.assert_close(model(whole).logits, expected)
        torch.testing.assert_close(model(whole).logits, dense)


# -- what is refused ------------------------------------------------------------------------------


def test_mixtures_of_experts_are_refused_by_name() -> None:
    model = build("mixtral", {**_LLAMA, "num_local_experts": 4})
    assert_refused(UnknownFamily, r"model\.layers\.0\.mlp\.experts \(MixtralExperts\)", model, IDS)


@pytest.mark.parametrize(
    ("family", "values", "named"),
    [
        (
            "qwen2_moe",
            {
                **_SHAPE,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 40,
                "num_experts": 4,
                "decoder_sparse_step": 1,
            },
            r"model\.layers\.0 \(Qwen2MoeDecoderLayer\) has 2 .*shared_expert \(Qwen2MoeMLP\)",
        ),
        ("mamba", {"hidden_size": 48, "num_hidden_layers": 2}, r"layers\.0\.mixer \(MambaMixer\)"),
        ("llama", {**_LLAMA, "intermediate_size": 48}, r"model\.layers\.0\.mlp \(LlamaMLP\)"),
    ],
)
def test_other_structures_are_refused_by_name(
    family: str, values: dict[str, Any], named: str
) -> None:
    model = build(family, {"vocab_size": VOCABULARY, **values})
    assert_refused(UnknownFamily, named, model, IDS)


def test_what_reads_all_neurons_within_a_block_is_refused_by_name() -> None:
    model = build("llama", _LLAMA)
    model.model.layers[1].mlp.sub_norm = nn.LayerNorm(88)
    assert_refused(UnknownFamily, r"model\.layers\.1\.mlp .* sub_norm LayerNorm", model, IDS)


def test_a_block_that_two_layers_share_or_that_is_passed_by_is_refused_by_name() -> None:
    model = build("llama", _LLAMA)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    assert_refused(UnknownFamily, r"mlp: its down projection ran on \[30, 30", model, IDS[:1])
    assert not any(hooks_of(model))
    model = build("llama", _LLAMA)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj.weight.sum() + x
    assert_refused(
        UnknownFamily, r"layers\.1\.mlp: its down projection ran on \[\]", model, IDS[:1]
    )


def test_activations_that_are_not_finite_are_refused_by_name() -> None:
    model = build("llama", _LLAMA)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = math.inf
    match = r"NaN or infinite activations in model\.layers\.1\.mlp"
    assert_refused(InvalidRequest, match, model, IDS)


def test_magnitude_of_quantized_weights_is_refused(
    hf: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = hf("llama").model.layers[1].mlp.up_proj
    packed = nn.Parameter(torch.zeros(88, 24, dtype=torch.uint8), requires_grad=False)
    monkeypatch.setattr(up, "forward", partial(nn.functional.linear, weight=up.weight))
    monkeypatch.setitem(up._parameters, "weight", packed)
    match = r"magnitude, with quantized weights in model\.layers\.1\.mlp; allowed: another"
    assert_refused(InvalidRequest, match, hf("llama"), IDS, policy="magnitude")
    with sparsify(hf("llama"), IDS, density=0.5):
        pass


def test_layers_that_are_no_list_are_refused() -> None:
    model = build("llama", _LLAMA)
    model.config.num_hidden_layers = 4
    assert_refused(UnknownFamily, "LlamaForCausalLM has no list of 4 layers", model, IDS)


def test_layers_of_different_width_are_refused_by_name() -> None:
    model = build("llama", _LLAMA)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(48, 64), nn.Linear(48, 64)
    mlp.down_proj = nn.Linear(64, 48)
    assert_refused(UnknownFamily, r"model\.layers\.1\.mlp is not as wide as", model, IDS)


def test_encoders_and_other_modules_are_refused() -> None:
    shape = {"d_model": 48, "num_layers": 1, "num_heads": 4, "d_kv": 12, "d_ff": 64}
    t5 = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING["t5"](vocab_size=VOCABULARY, **shape))
    assert_refused(UnknownFamily, "T5ForConditionalGeneration has an encoder", t5.eval(), IDS)
    assert_refused(InvalidRequest, r"model: got Linear", nn.Linear(2, 2), IDS)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"density": 0}, "density: got 0;"),
        ({"density": 1.1}, "density: got 1.1"),
        ({"density": math.nan}, "density: got nan"),
        ({"policy": "best"}, "policy: got best; allowed: topk, sampled"),
        ({"seed": -1}, r"seed: got -1; allowed: \[0, 2\^64\)"),
        ({"input_ids": IDS.float()}, "input_ids: got torch.float32"),
        ({"input_ids": IDS[:, :0]}, r"input_ids: got torch.int64 \[2, 0\]"),
        ({"input_ids": IDS[None]}, r"input_ids: got torch.int64 \[1, 2, 30\]"),
        ({"input_ids": IDS + 200}, r"input_ids: got \d+; allowed: \[0, 260\)"),
        ({"input_ids": IDS - 300}, r"input_ids: got -\d+; allowed: \[0, 260\)"),
        ({"attention_mask": torch.ones(2, 29)}, r"attention_mask: got \[2, 29\]"),
        ({"attention_mask": torch.zeros(2, 30)}, "attention_mask: got a row of zeros"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_prompt_runs(
    given: dict[str, Any], error: str, hf: Callable[[str], PreTrainedModel]
) -> None:
    arguments = {"input_ids": IDS, **given}
    with activations(hf("llama")) as seen:
        assert_refused(InvalidRequest, error, hf("llama"), **arguments)
    assert not seen


def test_a_model_in_training_is_refused() -> None:
    model = build("llama", _LLAMA).train()
    assert_refused(InvalidRequest, "in training mode; allowed: after model", model, IDS)


def test_after_a_call_that_failed_halfway_a_part_of_the_model_is_refused_as_before(
    hf: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf("llama")
    with sparsify(model, IDS, density=0.5):
        with monkeypatch.context() as broken, pytest.raises(TypeError):
            broken.setattr(model.model.layers[2].mlp, "forward", None)
            model(IDS)
        with pytest.raises(InvalidRequest, match="model: got a part of it"):
            model.model(IDS)


def test_calls_that_are_not_of_the_prompt_are_refused(
    hf: Callable[[str], PreTrainedModel],
) -> None:
    model = hf("llama")
    ids, mask = padded((5, 12), "left")
    with sparsify(model, ids, density=0.5, attention_mask=mask):
        for call, error in (
            (lambda: model(ids.flip(0), attention_mask=mask), "input_ids: got other prompts"),
            (lambda: model(ids), "with the same padding in attention_mask"),
            (lambda: model(ids[:1], attention_mask=mask[:1]), "a multiple of the 2 prompts"),
            (lambda: model(inputs_embeds=torch.zeros(2, 12, 48)), "none inside sparsify"),
            (lambda: model.model(ids, attention_mask=mask), "model: got a part of it"),
            (lambda: model(ids, attention_mask=mask[:, 1:]), r"attention_mask: got \[2, 11\]"),
        ):
            with pytest.raises(InvalidRequest, match=error):
                call()
        model(ids, attention_mask=mask)
