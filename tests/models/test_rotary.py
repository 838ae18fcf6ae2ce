"""Rotation against transformers' own, to the last bit."""

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from eigenattn.models.rotary import once_a_pass, rotate

HEAD_DIM = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_rotate_is_exactly_the_original(interleaved, dtype):
    config_class, rotary_class, original = (
        (modeling_cohere.CohereConfig, modeling_cohere.CohereRotaryEmbedding, modeling_cohere.apply_rotary_pos_emb)
        if interleaved
        else (modeling_llama.LlamaConfig, modeling_llama.LlamaRotaryEmbedding, modeling_llama.apply_rotary_pos_emb)
    )
    rotary = rotary_class(config_class(hidden_size=4 * HEAD_DIM, num_attention_heads=4, num_key_value_heads=2))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, HEAD_DIM, generator=generator).to(dtype)
    k = torch.randn(2, 2, 9, HEAD_DIM, generator=generator).to(dtype)
    cos, sin = rotary(q, torch.arange(9)[None])
    expected = original(q, k, cos, sin)
    assert torch.equal(rotate(q, cos, sin, interleaved), expected[0])
    assert torch.equal(rotate(k, cos, sin, interleaved), expected[1])
    assert rotate(q, cos, sin, interleaved).dtype == dtype


def test_layers_share_what_they_compute_within_a_pass():
    positions = torch.arange(4)[None]

    def one_pass() -> list[int]:
        return [once_a_pass(positions, layer, "sum", lambda: int(positions.sum())) for layer in range(3)]

    assert one_pass() == [6, 6, 6]
    calls = []
    for layer in range(3):
        once_a_pass(positions, layer, "other", lambda: calls.append(None))
    assert len(calls) == 1
    positions += 1  # the same tensor, written over before the next pass
    assert one_pass() == [10, 10, 10]
