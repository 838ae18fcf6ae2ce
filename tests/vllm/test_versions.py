"""What the plug-in knows of vLLM, in the sources of the versions that are here: the one that is installed, and those
that lie unpacked in the folders of `EIGENATTN_VLLM_SOURCES`, separated by colons. Nothing of vLLM is run."""

import ast
import functools
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from eigenattn import EigenAttnError
from eigenattn.vllm import SUPPORTED, check_version

OURS = Path(__file__).parents[2] / "src" / "eigenattn" / "vllm"
# The modules that may name anything of vLLM.
KNOWING = ("engine", "registration")
SPEC = find_spec("vllm")
SOURCES = [Path(folder) for folder in os.environ.get("EIGENATTN_VLLM_SOURCES", "").split(":") if folder]
SOURCES += [Path(SPEC.origin).parents[1]] if SPEC is not None and SPEC.origin is not None else []

# What is called, or overridden: its module, and the parameters that are counted on, the first of all.
SIGNATURES = {
    "v1.attention.backend AttentionImpl.forward": "self layer query key value kv_cache attn_metadata output",
    "v1.attention.backend AttentionMetadataBuilder.__init__": "self kv_cache_spec layer_names vllm_config device",
    "v1.attention.backend AttentionMetadataBuilder.build": "self common_prefix_len common_attn_metadata fast_build",
    "v1.attention.backends.registry register_backend": "backend class_path",
    "model_executor.layers.attention.attention get_attention_context": "layer_name",
    "model_executor.layers.attention.attention unified_attention_with_output": "query key value output layer_name",
    "model_executor.layers.attention_layer_base AttentionLayerBase.bind_kv_cache": "self kv_cache",
    "model_executor.layers.attention_layer_base AttentionLayerBase.get_kv_cache_spec": "self vllm_config",
    "model_executor.layers.mamba.ops.ssu_dispatch initialize_mamba_ssu_backend": "mamba_config kv_cache_config",
    "model_executor.layers.quantization.base_config QuantizationConfig.from_config": "cls config",
    "model_executor.layers.quantization.base_config QuantizationConfig.get_quant_method": "self layer prefix",
    "model_executor.models.registry _ModelRegistry.register_model": "self model_arch model_cls",
    "model_executor.models.registry _ModelRegistry.get_supported_archs": "self",
    "platforms.interface Platform.check_and_update_config": "cls vllm_config",
    "utils.torch_utils kv_cache_dtype_str_to_dtype": "kv_cache_dtype model_config",
    "v1.core.single_type_kv_cache_manager SlidingWindowManager.reachable_block_mask": "cls start_block end_block "
    "alignment_tokens kv_cache_spec use_eagle retention_interval",
    "v1.kv_cache_interface SlidingWindowSpec.max_admission_blocks_per_request": "self max_in_flight_tokens "
    "max_model_len",
    "v1.kv_cache_interface SlidingWindowSpec.max_memory_usage_bytes": "self vllm_config",
    "v1.kv_cache_spec_registry KVCacheSpecRegistry.register": "cls kvcache_spec_cls manager_class "
    "uniform_type_base_spec",
}
# Fields and properties that are read or set.
FIELDS = {
    "config.cache CacheConfig": "block_size user_specified_block_size cache_dtype num_gpu_blocks use_replayssm",
    "config.compilation CompilationConfig": "static_forward_context",
    "config.model ModelConfig": "hf_config multimodal_config is_mm_prefix_lm uses_mrope mrope_num_dims",
    "config.multimodal MultiModalConfig": "language_model_only",
    "config.vllm VllmConfig": "additional_config max_in_flight_tokens num_speculative_tokens kv_transfer_config "
    "mamba_config",
    "v1.attention.backend AttentionBackend": "supported_dtypes supported_kv_cache_dtypes "
    "forward_includes_kv_cache_update supported_kv_cache_layouts supports_sliding_window",
    "v1.attention.backend CommonAttentionMetadata": "query_start_loc_cpu seq_lens num_reqs num_actual_tokens "
    "block_table_tensor slot_mapping mm_req_doc_ranges",
    "v1.kv_cache_interface AttentionSpec": "num_kv_heads head_size head_size_v dtype",
    "v1.kv_cache_interface KVCacheSpec": "block_size block_stride_alignment",
    "v1.kv_cache_interface SlidingWindowSpec": "sliding_window",
    "v1.kv_cache_layout KVCacheLayout": "BLNHC BLHNC",
    "v1.kv_cache_spec_registry KVCacheSpecRegistry": "_ensure_registered",
}

needs_sources = pytest.mark.skipif(not SOURCES, reason="no sources of vLLM are here")


@functools.cache
def tree_of(root: Path, module: str) -> ast.Module:
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def names_in(root: Path, module: str) -> set[str]:
    """What a module binds, or hands on by names in quotes."""
    found = set()
    for node in ast.walk(tree_of(root, module)):
        if isinstance(node, ast.ImportFrom):
            if any(alias.name == "*" for alias in node.names):
                found |= names_in(root, ".".join(filter(None, [module if node.level else "", node.module])))
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif module == "vllm" and isinstance(node, ast.Constant):
            found.add(str(node.value))
    return found


def member(root: Path, place: str) -> ast.AST:
    """A function, a class, or a method, as `MODULE NAME` or `MODULE CLASS.NAME`."""
    module, _, name = place.partition(" ")
    node: ast.AST = tree_of(root, f"vllm.{module}")
    for part in name.split("."):
        inside = [each for each in ast.walk(node) if getattr(each, "name", None) == part]
        assert inside, f"{root} has no {place}"
        node = inside[0]
    return node


@pytest.mark.parametrize("module", KNOWING)
@needs_sources
def test_names_are_there(module):
    for root in SOURCES:
        for node in ast.walk(ast.parse((OURS / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vllm" and not node.level:
                assert {alias.name for alias in node.names} <= names_in(root, node.module), (root, node.module)


@pytest.mark.parametrize("place", SIGNATURES)
@needs_sources
def test_signatures_are_as_counted_on(place):
    for root in SOURCES:
        arguments = member(root, place).args
        found = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        counted_on = SIGNATURES[place].split()
        assert found[: len(counted_on)] == counted_on, root


@pytest.mark.parametrize("place", FIELDS)
@needs_sources
def test_fields_are_there(place):
    for root in SOURCES:
        held = set()
        for node in ast.walk(member(root, place)):
            if isinstance(node, ast.FunctionDef):
                held.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                held |= {target.id for target in targets if isinstance(target, ast.Name)}
        assert set(FIELDS[place].split()) <= held, root


def test_no_other_module_names_anything_of_vllm():
    for path in OURS.glob("*.py"):
        imported = {
            node.module if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
            for alias in node.names
        }
        theirs = {module for module in imported if module.split(".")[0] == "vllm"}
        assert path.stem in KNOWING or theirs <= {"vllm"}, path  # its version alone


def test_other_versions_are_refused_with_those_that_are_supported():
    for version in SUPPORTED:
        check_version(f"{version}.1")
    with pytest.raises(EigenAttnError, match=r"vLLM .*, not 0\.1\.2"):
        check_version("0.1.2")
