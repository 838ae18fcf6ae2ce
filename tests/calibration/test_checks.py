"""Tokens and predictions are checked by what models themselves do."""

import pytest
import torch
from tiny import TINY, tiny, tokens

from eigenattn import EigenAttnError
from eigenattn.calibration.checks import check_length, checked, most_positions


@pytest.mark.parametrize("name", list(TINY))
@torch.no_grad()
def test_positions_end_where_the_model_fails(name):
    model = tiny(name)
    most = most_positions(model.config)
    if most is None:
        assert model(tokens(1, 513)).logits.isfinite().all()
        return
    assert model(tokens(1, most)).logits.isfinite().all()
    check_length(model.config, most)
    with pytest.raises((IndexError, RuntimeError)):
        model(tokens(1, most + 1))
    with pytest.raises(EigenAttnError, match="512 positions, too few for 513"):
        check_length(model.config, most + 1)


@torch.no_grad()
def test_a_model_is_checked_for_a_while():
    model, unknown = tiny("llama"), torch.full((1, 4), 128)
    with checked(model):
        model(input_ids=tokens(1, 4))
        with pytest.raises(EigenAttnError, match="token 128"):
            model(unknown)
        model.lm_head.weight[5] = -torch.inf  # NaN or an infinity of either sign
        with pytest.raises(EigenAttnError, match="NaN or infinite"):
            model(tokens(1, 4))
    assert not model(tokens(1, 4)).logits.isfinite().all()
