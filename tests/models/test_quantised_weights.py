"""Models whose weights are quantised: each kind that installs, and modules that keep to the same contract."""

import json

import helpers
import pytest
import torch
import transformers
from every_type import TABLE, built
from safetensors.torch import load_file, save_file
from tiny import PROJECTIONS, character_tokenizer, tiny, tokens, write_eight_bits
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import eigenattn
from eigenattn import EigenAttentionConfig, EigenAttnError, compress
from eigenattn.calibration.quantised import differentiable
from eigenattn.models.bases_file import save_bases
from eigenattn.models.conversion import eigen_layers
from eigenattn.models.projections import matrix_of
from eigenattn.report.inspection import inspect_checkpoint

IDS = tokens(2, 30)
CODED = {"kv_ratio": 0.25, "window": 4}
PLAIN = {"coded": False, "kv_ratio": 0.5, "rank_multiple": 2, "window": 0, "ranks": "uniform", "shrinkage": 0.3}
# bitsandbytes wants blocks of 64 on a CPU.
SIZES = {"intermediate_size": 128}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny("llama", **SIZES).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def loaded(base, settings=None):
    # None would stand in the place of what the checkpoint says.
    options = {} if settings is None else {"quantization_config": settings}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **options)


def bitsandbytes(base, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return loaded(base, BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))


def quanto(base, bits):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return loaded(base, QuantoConfig(weights=f"int{bits}"))


def torchao(base, name):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return loaded(base, TorchAoConfig(getattr(quantization, name)()))


def hqq(base, bits):
    quantize = pytest.importorskip("hqq.core.quantize")
    model, settings = loaded(base), quantize.BaseQuantizeConfig(nbits=bits, group_size=32)
    for name, module in list(model.named_modules()):
        if name.endswith(PROJECTIONS):
            quantised = quantize.HQQLinear(module, settings, compute_dtype=torch.bfloat16, device="cpu")
            model.set_submodule(name, quantised)
    return model


def compressed_tensors(base, kind, folder):
    pytest.importorskip("compressed_tensors")
    write_eight_bits(base, folder, kind)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def words(codes, order=range(8)):
    """Codes of four bits [n, m], eight neighbours a word, in this order from the lowest bits on: int32 [n, m / 8]."""
    parts = codes.long().unflatten(-1, (-1, 8))[..., list(order)] << (4 * torch.arange(8))
    return parts.sum(-1).to(torch.int32)  # which wraps around


def gptqmodel(base, folder, method):
    """A checkpoint of GPTQ's, or of AWQ's, in four bits with zero points of their own for 32 rows."""
    pytest.importorskip("gptqmodel")
    if method == "gptq":
        pytest.importorskip("optimum.gptq")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(tuple(f"{each}.weight" for each in PROJECTIONS))]:
        rows = tensors.pop(name).float().T.unflatten(0, (-1, 32))  # [groups, 32, out]
        low, high = rows.amin(1), rows.amax(1)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(1, 15)
        codes = (rows / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
        name = name.removesuffix("weight")
        tensors[f"{name}scales"] = scales.half()
        if method == "awq":
            tensors[f"{name}qweight"], tensors[f"{name}qzeros"] = (
                words(x, (0, 2, 4, 6, 1, 3, 5, 7)).contiguous() for x in (codes, zeros)
            )
        else:
            tensors[f"{name}qweight"] = words(codes.T).T.contiguous()
            tensors[f"{name}qzeros"] = words(zeros - 1).contiguous()
            tensors[f"{name}g_idx"] = torch.arange(len(codes), dtype=torch.int32) // 32
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "desc_act": False}
    config["quantization_config"] |= {"version": "gemm", "zero_point": True} if method == "awq" else {"sym": False}
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def gguf(base, monkeypatch):
    """Weights in the blocks of a GGUF file; single rows take a kernel that is fetched, and here go with the others."""
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    types = pytest.importorskip("gguf")
    monkeypatch.setattr(utils, "MAX_GEMV_ROWS", 0)
    model = loaded(base)
    for name, module in list(model.named_modules()):
        if name.endswith(PROJECTIONS):
            kind = types.GGMLQuantizationType.Q8_0
            packed = utils.GgufLinear(module.in_features, module.out_features, int(kind))
            blocks = types.quants.quantize(module.weight.detach().float().numpy(), kind)
            packed.weight.data = torch.from_numpy(blocks)
            model.set_submodule(name, packed)
    return model


class Packed(torch.nn.Module):
    """As AWQ's and GPTQ's layers: codes in a buffer, no `weight`, and arithmetic that knows no gradients."""

    def __init__(self, original):
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        weight = original.weight.detach()
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (weight / self.scales).round().to(torch.int32))
        self.bias = original.bias

    @torch.no_grad()
    def forward(self, x):
        y = x @ (self.qweight.to(x.dtype) * self.scales).T
        return y if self.bias is None else y + self.bias


class Fp8Linear(torch.nn.Linear):
    """As fine-grained FP8: a `weight` of eight bits and scales, multiplied by a kernel."""

    def __init__(self, original):
        super().__init__(original.in_features, original.out_features, bias=False, device="meta")
        weight = original.weight.detach()
        self.weight_scale_inv = torch.nn.Parameter(weight.abs().amax() / 448, requires_grad=False)
        codes = (weight / self.weight_scale_inv).to(torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)

    @torch.no_grad()
    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.weight_scale_inv).T


class Rounding(Fp8Linear):
    """The same with activations in eight bits, by blocks of 32, and by a kernel that divides 0 by 0 in one of zeros."""

    def forward(self, x):
        blocks = x.unflatten(-1, (-1, 32)).float()
        scales = blocks.abs().amax(-1, keepdim=True) / 448
        rounded = (blocks / scales).to(torch.float8_e4m3fn).float() * scales
        return super().forward(rounded.flatten(-2).to(x.dtype))


def bitnet(module, norm=False):
    """transformers' own layer of three values, which rounds activations, and may normalise them."""
    integration = pytest.importorskip("transformers.integrations.bitnet")
    weight = module.weight.detach()
    found = integration.BitLinear(module.in_features, module.out_features, False, dtype=weight.dtype, use_rms_norm=norm)
    found.weight_scale = 1 / weight.abs().mean()
    found.weight = integration.pack_weights((weight * found.weight_scale).round().clamp(-1, 1))
    return found.to(weight.dtype)


def gemma(module, scale=0.0):
    """The layer of Gemma's quantised checkpoints, which may round and cut off what it gives."""
    integration = pytest.importorskip("transformers.integrations.gemma_quant")
    weight = module.weight.detach()
    found = integration.QuantizedLinear(module.in_features, module.out_features)
    found.weight_scale.data = weight.float().abs().amax(1, keepdim=True) / 127
    found.weight.data = (weight / found.weight_scale).round().to(torch.int8)
    found.output_activation_scale.data.fill_(scale)
    return found


def in_place(base, kind):
    model = loaded(base)
    for name, module in list(model.named_modules()):
        if name.endswith(PROJECTIONS):
            model.set_submodule(name, kind(module))
    return model


KINDS = {
    "bitsandbytes-4": lambda base, folder, patch: bitsandbytes(base, 4),
    "bitsandbytes-8": lambda base, folder, patch: bitsandbytes(base, 8),
    "quanto-8": lambda base, folder, patch: quanto(base, 8),
    "quanto-4": lambda base, folder, patch: quanto(base, 4),
    "torchao-int8": lambda base, folder, patch: torchao(base, "Int8WeightOnlyConfig"),
    "torchao-dynamic": lambda base, folder, patch: torchao(base, "Int8DynamicActivationInt8WeightConfig"),
    "hqq-4": lambda base, folder, patch: hqq(base, 4),
    "compressed-tensors-fp8": lambda base, folder, patch: compressed_tensors(base, "float", folder),
    "compressed-tensors-int8": lambda base, folder, patch: compressed_tensors(base, "int", folder),
    "gptq": lambda base, folder, patch: gptqmodel(base, folder, "gptq"),
    "awq": lambda base, folder, patch: gptqmodel(base, folder, "awq"),
    "gguf": lambda base, folder, patch: gguf(base, patch),
    "packed": lambda base, folder, patch: in_place(base, Packed),
    "fp8": lambda base, folder, patch: in_place(base, Fp8Linear),
    "fp8-activations": lambda base, folder, patch: in_place(base, Rounding),
    "bitnet": lambda base, folder, patch: in_place(base, bitnet),
    "gemma": lambda base, folder, patch: in_place(base, gemma),
}


@pytest.fixture(params=KINDS)
def model(request, base, tmp_path, monkeypatch):
    with torch.compiler.set_stance("force_eager"):  # BitNet's layer compiles itself
        yield KINDS[request.param](base, tmp_path, monkeypatch)


# Other packages' own warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def test_a_projection_is_asked_for_its_matrix(model, base, request):
    original = loaded(base).model.layers[0].self_attn.o_proj.weight
    model(IDS)  # some are packed anew by their first pass
    found = matrix_of(model.model.layers[0].self_attn.o_proj, 64, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert found.shape == original.shape
    most = 0.6 if "bitnet" in request.node.name else 0.15
    assert (found - original).norm() < most * original.norm()


def test_gradients_pass(model):
    layer = model.model.layers[0]
    layer.requires_grad_(False)
    with torch.no_grad():
        model(IDS)
    x = torch.randn(1, 5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with differentiable(layer, x):
        y = layer.self_attn.o_proj(x)
        y.backward(torch.ones_like(y))
    expected = matrix_of(layer.self_attn.o_proj, 64, device=x.device, dtype=x.dtype).sum(0)
    assert (x.grad[0, 0] - expected).norm() < 0.05 * expected.norm()
    assert "forward" not in vars(layer.self_attn.o_proj) or not isinstance(layer.self_attn.o_proj, Packed)


def test_compressed(model):
    check(model, PLAIN)


@pytest.mark.parametrize("kind", [lambda module: bitnet(module, norm=True), lambda module: gemma(module, scale=2.0)])
def test_what_is_not_linear_is_refused(base, kind):
    """A matrix that it was asked for would say nothing of it."""
    model = in_place(base, kind)
    with torch.compiler.set_stance("force_eager"):
        for settings in (PLAIN, CODED):
            with pytest.raises(EigenAttnError, match=r"a (Bit|Quantized)Linear .* does not multiply by a matrix"):
                compress(model, [IDS], EigenAttentionConfig(**settings))
            assert not eigen_layers(model)


def test_inspect_shows_what_is_gained(base, tmp_path):
    """Of weights that are quantised on loading, too, of which no file says how large they are."""
    model = bitsandbytes(base, 8)
    compress(model, [IDS], EigenAttentionConfig(**PLAIN))
    save_bases(model, tmp_path)
    weights = inspect_checkpoint(str(tmp_path)).memory["weights"]
    assert weights["this"] == model.get_memory_footprint() < 0.9 * weights["original"]


def test_every_kind_is_on_the_page():
    """Of the release that the table of types is of: a new one may have more."""
    if json.loads(TABLE.read_text(encoding="utf-8"))["transformers"] != transformers.__version__:
        pytest.skip("the page is of another transformers")
    page = TABLE.with_name("quantised-weights.md").read_text(encoding="utf-8")
    # Other packages may have registered theirs.
    known = {name for name, kind in AUTO_QUANTIZER_MAPPING.items() if kind.__module__.startswith("transformers.")}
    known = {name.removesuffix("_4bit").removesuffix("_8bit") for name in known}
    assert not {name for name in known if f"`{name}`" not in page}


def test_coded(base):
    check(in_place(base, Packed), CODED)


def check(model, settings):
    with torch.no_grad():
        exact = model(IDS).logits
    before = {name: type(each) for name, each in model.named_modules() if name.endswith(PROJECTIONS)}
    report = compress(model, [IDS], EigenAttentionConfig(**settings))
    assert abs(report.kv_ratio - settings["kv_ratio"]) < 0.02
    assert {name: type(each) for name, each in model.named_modules() if name in before} == before  # nothing is folded
    assert {attention.dtype for attention in eigen_layers(model)} == {torch.bfloat16}
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        pieces = helpers.in_pieces(model, IDS, DynamicCache(config=model.config), [13, 1, 1, 1, 14])
    assert (whole - exact).abs().max() > 0
    # Of each token: where a router is torn in bfloat16, some take other experts.
    assert ((pieces - whole).norm(dim=-1) / whole.norm(dim=-1)).median() < 0.1


def test_experts_that_give_no_gradients(base):
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = torch.nn.Parameter(torch.zeros(4, 8, 8, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x

    model = loaded(base)
    model.model.layers[1].mlp = Experts()
    with pytest.raises(EigenAttnError, match=r"pass mlp, a Experts with quantised weights: take basis=.attention"):
        compress(model, [IDS], EigenAttentionConfig(**CODED))
    assert not eigen_layers(model)
    compress(model, [IDS], EigenAttentionConfig(**PLAIN))
    assert eigenattn.models.conversion.layouts_of(model)[0].beside


def mxfp4(weight):
    """Codes, two a byte, and powers of two of 32 each, of experts [E, in, out], as checkpoints of gpt-oss have them."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = weight.mT.unflatten(-1, (-1, 32))
    exponents = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
    scaled = blocks / 2**exponents
    codes = (scaled.abs().unsqueeze(-1) - values).abs().argmin(-1) + 8 * (scaled < 0)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return packed.to(torch.uint8), (exponents.squeeze(-1) + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A folder with a tiny gpt-oss whose experts are in MXFP4."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    built("gpt_oss").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensors.pop(name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mxfp4_is_dequantised_on_a_cpu(gpt_oss, tmp_path):
    """By transformers, on loading: gradients pass, and bases go beside the checkpoint as it is."""
    model = loaded(gpt_oss)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    expected = built("gpt_oss").model.layers[0].mlp.experts.gate_up_proj
    assert experts.dtype == torch.bfloat16
    assert (experts - expected).norm() < 0.2 * expected.norm()
    check(model, CODED)
    save_bases(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert eigen_layers(again)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_mxfp4_in_kernels_gives_no_gradients(gpt_oss):
    """On GPUs: what transformers then holds the codes in is no tensor, and does not say that it is quantised."""
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    model = loaded(gpt_oss)
    for layer in model.model.layers:
        plain, experts = layer.mlp.experts, integration.Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj"):
            delattr(experts, name)
            setattr(experts, name, object())
        experts.forward = torch.no_grad()(plain.forward)
        layer.mlp.experts = experts
    with pytest.raises(EigenAttnError, match=r"pass mlp.experts, a Mxfp4GptOssExperts .*: take basis=.attention"):
        compress(model, [IDS], EigenAttentionConfig(**CODED))
    assert not eigen_layers(model)
    check(model, PLAIN)
