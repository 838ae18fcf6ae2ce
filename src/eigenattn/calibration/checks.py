"""What token ids have to satisfy before a model reads them, and its predictions before they are taken for numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import EigenAttnError
from ..models.families import family_of


def most_positions(config: Any) -> int | None:
    """How many tokens a model can read at all; None where positions never end, whatever it was trained on."""
    text = config.get_text_config(decoder=True)
    positions = family_of(text).positions_of(text)
    if positions == "learned":
        return text.max_position_embeddings
    # Some make their biases for so many tokens once.
    return getattr(text, "max_seq_len", None) if positions == "alibi" else None


def check_length(config: Any, length: int) -> None:
    """Raise an `EigenAttnError` if sequences have more tokens than a model with this configuration has positions."""
    most = most_positions(config)
    if most is not None and length > most:
        raise EigenAttnError(f"this model has {most:,} positions, too few for {length:,} tokens: ask for fewer tokens.")


def check_tokens(input_ids: Tensor, model: PreTrainedModel) -> None:
    """Raise an `EigenAttnError` if there are token ids [B, T] that a model has no embedding or position for."""
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    least, most = (int(extreme) for extreme in input_ids.aminmax())
    if least < 0 or most >= rows:
        wrong = least if least < 0 else most
        raise EigenAttnError(
            f"the text has token {wrong}, and the model knows tokens 0 to {rows - 1}: is the tokenizer another model's?"
        )
    check_length(model.config, input_ids.shape[1])


@contextmanager
def checked(model: PreTrainedModel) -> Iterator[None]:
    """Have a model refuse tokens that it does not know, and predictions that are no numbers, whoever calls it within.

    Raises:
        EigenAttnError: from the model's forward pass.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_tokens(args[0] if args else kwargs["input_ids"], model)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A largest logit is a number unless one is NaN or infinite; some models rule tokens out by -inf.
        if not output.logits.amax(-1).isfinite().all():
            raise EigenAttnError(
                "this model's predictions are NaN or infinite: try --dtype float32, or check its weights."
            )

    hooks = model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
