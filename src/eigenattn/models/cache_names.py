"""What transformers calls a cache: models by one name, which 5.24 changed, and decoder layers by several."""

from collections.abc import Mapping
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

# By which a model is given its cache, and returns it. Since 5.24 the old name warns.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# By which a decoder layer hands it to its attention. Before 5.24 `cache` was that of continuous batching alone.
NAMES = ("past_key_values", "layer_past", "cache")


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of an attention module, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)
