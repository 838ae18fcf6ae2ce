import pytest
import torch
from tiny import converted, tokens

from eigenattn import EigenAttnError
from eigenattn.calibration.statistics import Batch, LayerMoments, collect_moments, second_moment


def test_second_moment_against_a_loop():
    x = torch.randn(2, 4, 5, 3)
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    for b in range(2):
        for head in range(4):
            for t in range(5):
                if valid[b, t]:
                    v = x[b, head, t].double()
                    expected[head // 2] += torch.outer(v, v)
    torch.testing.assert_close(second_moment(x, valid, 2), expected)


def test_moments_are_those_of_the_projections():
    model, layers = converted()
    ids = tokens(2, 20)
    (moments, *_) = collect_moments(model, layers, [Batch(ids)], LayerMoments.of)
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    attention = model.model.layers[0].self_attn
    keys = attention.k_proj(hidden).double().view(-1, 2, 16).transpose(0, 1)  # before rotation
    torch.testing.assert_close(moments.key, keys.transpose(1, 2) @ keys, rtol=1e-5, atol=1e-5)
    queries = attention.q_proj(hidden).double().view(-1, 2, 2, 16).permute(1, 0, 2, 3).flatten(1, 2)
    torch.testing.assert_close(moments.query, queries.transpose(1, 2) @ queries, rtol=1e-5, atol=1e-5)
    assert moments.tokens == 40


def test_batches_add_up_and_padding_does_not_count():
    model, layers = converted()
    first, second = tokens(1, 20), tokens(1, 12, seed=5)
    apart = collect_moments(model, layers, [Batch(first), Batch(second)], LayerMoments.of)
    pad = torch.zeros(1, 8, dtype=torch.int64)
    ids = torch.cat([first, torch.cat([second, pad], 1)])
    mask = torch.cat([torch.ones(1, 20), torch.cat([torch.ones(1, 12), torch.zeros(1, 8)], 1)]).long()
    together = collect_moments(model, layers, [Batch(ids, mask)], LayerMoments.of)
    for a, b in zip(apart, together, strict=True):
        assert a.tokens == b.tokens == 32
        for name in ("query", "key", "value"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)


def test_observers_are_taken_off_again():
    model, layers = converted()
    collect_moments(model, layers, [Batch(tokens(1, 8))], LayerMoments.of)
    assert all(a.observer is None for a in layers)


def test_not_finite_activations_name_the_layer():
    model, layers = converted()
    with torch.no_grad():
        layers[1].v_proj.weight[0, 0] = float("nan")
    with pytest.raises(EigenAttnError, match="layer 1 gives NaN"):
        collect_moments(model, layers, [Batch(tokens(1, 8))], LayerMoments.of)


def test_no_batches():
    model, layers = converted()
    with pytest.raises(EigenAttnError, match="no tokens"):
        collect_moments(model, layers, [], LayerMoments.of)


@pytest.mark.parametrize(
    "wrong", ["text", torch.randn(2, 4), torch.ones(2, 1, dtype=torch.int64), {"ids": torch.ones(1, 4)}, [1, 2, 3]]
)
def test_wrong_batches_are_one_line(wrong):
    with pytest.raises(EigenAttnError) as error:
        Batch.of(wrong, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_batches_as_people_have_them():
    ids = tokens(2, 6)
    assert torch.equal(Batch.of(ids[0], torch.device("cpu")).input_ids, ids[:1])
    batch = Batch.of({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.device("cpu"))
    assert batch.tokens == 12


def test_a_row_of_a_dataset_is_a_batch_of_one():
    datasets = pytest.importorskip("datasets", reason="needs the extra data")
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    found = [Batch.of(row, torch.device("cpu")) for row in rows.with_format("torch")]
    assert [batch.tokens for batch in found] == [6, 4]
    assert torch.equal(torch.cat([batch.input_ids for batch in found]), ids)
    assert torch.equal(torch.cat([batch.attention_mask for batch in found]), mask)
