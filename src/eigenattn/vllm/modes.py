"""Ways to run the engine that latents are not served in: refused at its start. Nothing of vLLM is named here."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ..errors import EigenAttnError
from .bases import asked_for

# Drafts by ngrams, and by layers with caches of their own. Only these were tested.
NGRAM, DRAFTING = "ngram", ("draft_model", "eagle", "eagle3", "mtp")

# Of positions where images have several: the time, the height and the width.
TESTED_ROWS = 3

# Layers with states, by vLLM's name of their kind, that its CPU build computes wrongly or has no kernels for.
ON_GPUS_ALONE = {"SHORT_CONV": "short convolutions", "MAMBA1": "Mamba 1"}


def layers_draft(vllm_config: Any) -> bool:
    """Whether drafts are made by layers with caches of their own."""
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method in DRAFTING


def is_of_drafts(vllm_config: Any) -> bool:
    """Whether this is the configuration of a model that drafts, and not of the one that is served."""
    return layers_draft(vllm_config) and vllm_config.model_config is vllm_config.speculative_config.draft_model_config


def positions_in_rows(vllm_config: Any) -> int | None:
    """How many rows of positions tokens have, where images give them others than their place in the text; or None."""
    model, images = vllm_config.model_config, vllm_config.model_config.multimodal_config
    if not model.uses_mrope or images is None or images.language_model_only:
        return None
    return model.mrope_num_dims


def check_modes(vllm_config: Any) -> None:
    """Refuse what latents are not served with.

    Raises:
        EigenAttnError: in one line, by name.
    """
    cache, speculation = vllm_config.cache_config, vllm_config.speculative_config
    rows = positions_in_rows(vllm_config)
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        raise EigenAttnError(f"latents are not cached in {cache.cache_dtype}: leave --kv-cache-dtype at auto.")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise EigenAttnError("context parallel is not supported for latents: use tensor or pipeline parallel.")
    if speculation is not None and speculation.method not in (NGRAM, *DRAFTING):
        raise EigenAttnError(
            f"speculative decoding by {speculation.method} is not supported for latents: use {NGRAM}, or one of "
            f"{', '.join(DRAFTING)}."
        )
    if layers_draft(vllm_config) and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise EigenAttnError(f"in pipelines only {NGRAM} drafts beside latents: use it, or tensor parallel.")
    if vllm_config.kv_transfer_config is not None:
        raise EigenAttnError("KV connectors and offloading are not supported for latents.")
    if rows not in (None, TESTED_ROWS):
        raise EigenAttnError(
            f"positions of images in {rows} rows are not served with latents: text is, by --language-model-only."
        )
    if rows and layers_draft(vllm_config):
        raise EigenAttnError(f"beside images of such positions only {NGRAM} drafts: use it, or --language-model-only.")
    if rows and vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise EigenAttnError(
            "pipeline parallel is not supported for latents and images of such positions: use tensor parallel, or "
            "--language-model-only."
        )
    if vllm_config.model_config.is_mm_prefix_lm and not vllm_config.scheduler_config.disable_chunked_mm_input:
        raise EigenAttnError(
            "tokens of this model's images see each other in both directions, so that an image is read at once: serve "
            "it with --disable-chunked-mm-input, or text alone by --language-model-only."
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise EigenAttnError("the exact window needs vLLM's hybrid cache manager: leave it on.")


def check_served(vllm_config: Any, served: Collection[str]) -> None:
    """Refuse bases for what vLLM would serve by a class without them, and so uncompressed.

    Args:
        served: names of the classes that latents are served by.

    Raises:
        EigenAttnError: naming the class.
    """
    config = vllm_config.model_config
    if config is None or getattr(config, "is_submodel_config", False) or config.architecture in served:
        return
    if is_of_drafts(vllm_config):
        return
    if asked_for(config.hf_config, vllm_config.additional_config):
        raise EigenAttnError(
            f"{config.architecture} is not served with latents: leave out the bases, or generate by transformers."
        )


def check_states(kinds: Iterable[str], device: str) -> None:
    """Refuse what vLLM itself does not compute rightly on a device.

    Args:
        kinds: of layers with states, as vLLM names them.

    Raises:
        EigenAttnError: naming them.
    """
    failing = sorted({ON_GPUS_ALONE[kind] for kind in kinds if kind in ON_GPUS_ALONE})
    if device == "cpu" and failing:
        raise EigenAttnError(
            f"vLLM's CPU build is not right with {' and '.join(failing)}: serve on GPUs, or generate by transformers."
        )
