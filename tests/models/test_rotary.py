"""Rotation against transformers' own, to the last bit."""

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from eigenattn.models.rotary import at_columns, rotate

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


@pytest.mark.parametrize("rows", [1, 2])
def test_angles_at_columns_are_those_of_each_head_s_rows(rows):
    table = torch.randn(rows, 9, 6)
    columns = torch.tensor([[[0, 3, 8], [1, 2, 3]], [[4, 5, 6], [0, 7, 8]]])
    found = at_columns(table, columns)
    for b, head, place in torch.cartesian_prod(*map(torch.arange, columns.shape)).tolist():
        assert torch.equal(found[b, head, place], table[b if rows > 1 else 0, columns[b, head, place]])
