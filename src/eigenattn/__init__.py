"""Eigen Attention: smaller KV caches for Hugging Face causal language models.

Importing this package lets `AutoModelForCausalLM.from_pretrained` load the checkpoints it writes.
"""

from .cache.evicting import EigenCache
from .compression.pipeline import CompressionReport, compress
from .config import EigenAttentionConfig
from .errors import EigenAttnError
from .models.bases_file import attach

__all__ = ["CompressionReport", "EigenAttentionConfig", "EigenAttnError", "EigenCache", "attach", "compress"]
