"""Eigen Attention: smaller KV caches for Hugging Face causal language models.

Once it is installed, `AutoModelForCausalLM.from_pretrained` loads what it writes.
"""

from .cache.evicting import EigenCache
from .compression.pipeline import CompressionReport, compress
from .config import EigenAttentionConfig
from .errors import EigenAttnError
from .models.bases_file import attach, save_bases

__all__ = [
    "CompressionReport",
    "EigenAttentionConfig",
    "EigenAttnError",
    "EigenCache",
    "attach",
    "compress",
    "save_bases",
]
