"""Multi-head latent attention: what is cached, coded, counted, refused (that it is right, `test_families.py` says)."""

import pytest
import torch
from helpers import check_generation, close, in_pieces
from test_quantised_weights import Fp8Linear, Packed
from tiny import HEAD_DIM, compressed, tiny, tokens
from transformers import AutoConfig, DynamicCache, StaticCache

from eigenattn import EigenAttentionConfig, EigenAttnError, attach, compress, save_bases
from eigenattn.cache.size import HALF, allocated_bytes, cache_bytes
from eigenattn.evaluation.rivals import RIVALS
from eigenattn.evaluation.spectra import spectra_of
from eigenattn.models.checkpoint_format import checkpoint_of
from eigenattn.models.conversion import convert_attention, eigen_layers, layouts_of
from eigenattn.report.inspection import inspect_checkpoint
from eigenattn.report.planning import plan_capacity
from eigenattn.vllm.bases import blueprint

NAME, WINDOW = "deepseek_v3", 4
TEXT = list(tokens(8, 64, seed=3).split(2))
PROJECTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def coded(model=None, **options):
    """A tiny model compressed as by default, but for the window."""
    model = model or tiny(NAME)
    compress(model, TEXT, EigenAttentionConfig(window=WINDOW, **options), provenance={"base_model": "base"})
    return model


@torch.no_grad()
def test_by_default_latents_are_coded_and_read_alike_by_every_way():
    model, ids = coded().double(), tokens(2, 30)
    assert all(layout.coded and layout.tied and len(layout.latents) == 1 for layout in layouts_of(model))
    exact = model(ids, use_cache=False).logits
    original = tiny(NAME).double()(ids).logits
    assert 0 < (exact - original).abs().mean() < 0.2 * original.std()
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=48)):
        close(in_pieces(model, ids, cache, [13, 1, 7, *[1] * 9]), exact)
    check_generation(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_token_is_cached_once(kind):
    """Neither latents nor the window hold it as a key and as a value."""
    model, ids = coded(), tokens(1, 30)
    layouts = layouts_of(model)
    assert [layout.original_elements for layout in layouts] == [HEAD_DIM] * 3
    cache = kind(config=model.config, **({} if kind is DynamicCache else {"max_cache_len": 64}))
    in_pieces(model, ids, cache, [29, 1])
    held = allocated_bytes(cache)
    if kind is DynamicCache:
        assert held == cache_bytes(layouts, 4, 30)
    else:
        assert held == sum(64 * layout.bytes_per_token(4) + WINDOW * HEAD_DIM * 4 for layout in layouts)


def test_sizes_compare_with_the_latent_that_the_original_caches(tmp_path):
    AutoConfig.for_model(NAME, dtype="bfloat16").save_pretrained(tmp_path)  # of the published sizes
    found = inspect_checkpoint(str(tmp_path))
    assert found.bytes_per_token == found.baseline_bytes_per_token == 61 * (512 + 64) * HALF
    plan = plan_capacity(str(tmp_path), gpu_memory=1800, context=32768)
    assert plan.compressed.bytes_per_token == found.bytes_per_token // 4
    with pytest.raises(EigenAttnError, match="cannot be split evenly over 8"):
        plan_capacity(str(tmp_path), gpu_memory=180, context=32768, tensor_parallel_size=8)
    with pytest.raises(EigenAttnError, match="nothing to share"):
        plan_capacity(str(tmp_path), gpu_memory=1800, context=32768, config=EigenAttentionConfig(share="1kv"))


@torch.no_grad()
@pytest.mark.parametrize("scale", [64, 1 / 64])
def test_the_unit_of_the_rotated_part_does_not_matter(scale):
    """Keys' rotated part larger, and queries' as much smaller, compute the same: so do codes, then."""
    models = [tiny(NAME), tiny(NAME)]
    for layer in models[1].model.layers:
        attention, rotated = layer.self_attn, models[1].config.qk_rope_head_dim
        attention.kv_a_proj_with_mqa.weight[-rotated:] *= scale
        attention.q_b_proj.weight.unflatten(0, (4, -1))[:, -rotated:] /= scale
    ids = tokens(2, 64, seed=9)
    original = models[0](ids).logits
    lost = [(coded(model)(ids).logits - original).abs().mean() for model in models]
    assert layouts_of(models[0]) == layouts_of(models[1])
    assert lost[1] < 1.2 * lost[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "1kv"}, "nothing to share: leave out share"),
        ({"share": "2"}, "cannot share a latent"),
        ({"kv_ratio": 0.6}, "'attention' takes apart: take fisher"),
        ({"basis": "eigen"}, "'eigen' takes apart: take fisher"),
        ({"basis": "fisher", "ranks": "uniform", "refit": True}, "leave out refit"),
    ],
)
def test_what_there_is_not_is_refused(options, message):
    model = tiny(NAME)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(EigenAttnError, match=message) as error:
        coded(model, **options)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == kinds


def test_vllm_refuses_it():
    model = coded()
    with pytest.raises(EigenAttnError, match="not served by vLLM"):
        blueprint(model.config, checkpoint_of(model))


def test_spectra_of_keys_and_of_values_are_refused():
    with pytest.raises(EigenAttnError, match="one vector"):
        spectra_of(tiny(NAME), [], basis="fisher")


@torch.no_grad()
@pytest.mark.parametrize("kind", [Packed, Fp8Linear])
def test_projections_may_be_quantised(kind, tmp_path):
    def quantised():
        model = tiny(NAME).to(torch.bfloat16)
        model.config.dtype = torch.bfloat16  # as loading has it
        for name, module in list(model.named_modules()):
            if name.endswith(PROJECTIONS):
                model.set_submodule(name, kind(module))
        return model

    model, ids = quantised(), tokens(2, 30)
    exact = model(ids).logits.float()
    convert_attention(model)
    assert (model(ids).logits.float() - exact).abs().mean() < 0.05 * exact.std()
    model = coded(quantised())
    save_bases(model, tmp_path)
    assert torch.equal(attach(quantised(), tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_on_what_is_absorbed_are_seen_and_trained():
    peft = pytest.importorskip("peft")
    model, ids = compressed(NAME, WINDOW), tokens(1, 20)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["kv_b_proj"], r=2))
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: each for name, each in adapted.named_parameters() if "lora_B" in name}
    assert len(trained) == 3 and all(each.grad.abs().max() > 0 for each in trained.values())
    for each in trained.values():
        torch.nn.init.normal_(each, std=0.1)
    with torch.no_grad():
        beside = adapted.eval()(input_ids=ids).logits
        close(adapted.merge_and_unload()(ids).logits, beside, 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain-4", "kivi-4", "hadamard-4-64"])
def test_rivals_round_it_once(name):
    model, ids, rival = tiny(NAME), tokens(1, 40), RIVALS[name]
    exact = model(ids).logits
    convert_attention(model)
    rival.check(model.config, WINDOW)
    with rival.reading(eigen_layers(model), WINDOW) as logits:
        lost = (logits(model, ids, 40) - exact).abs().mean()
    assert 1e-3 < lost < 0.5 * exact.std()
