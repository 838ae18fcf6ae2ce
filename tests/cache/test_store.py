import copy

import pytest
import torch

from eigenattn.cache.store import STEP, Store, room_for

B, G, WIDTH = 2, 3, 5


def rows(tokens, seed=0, dtype=torch.uint8):
    return torch.randint(0, 200, (B, G, tokens, WIDTH), generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(*lengths):
    store, expected = Store(rows(0)), rows(0)
    for seed, length in enumerate(lengths):
        store.append(rows(length, seed))
        expected = torch.cat([expected, rows(length, seed)], dim=-2)
    return store, expected


def allocated(store):
    return store.rows.untyped_storage().nbytes()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[], [0], [1], [STEP], [7, 1, 1, STEP, 1], [3 * STEP + 1, STEP - 1, 1]])
def test_holds_what_was_appended_in_whole_steps_of_room(lengths):
    store, expected = filled(*lengths)
    assert torch.equal(store.rows, expected)
    assert len(store) == sum(lengths)
    assert allocated(store) == B * G * WIDTH * room_for(sum(lengths))


@torch.no_grad()
def test_grows_in_place():
    store, _ = filled(3)
    first = store.rows.data_ptr()
    store.append(rows(STEP - 3, 1))
    assert store.rows.data_ptr() == first
    store.append(rows(1, 2))
    assert store.rows.data_ptr() != first


def test_crop_and_go_on():
    store, expected = filled(20, 5)
    store.crop(12)
    store.crop(30)
    store.append(rows(4, 9))
    assert torch.equal(store.rows, torch.cat([expected[:, :, :12], rows(4, 9)], dim=-2))


def test_what_is_dropped_in_front_gives_up_its_room():
    store, expected = filled(10)
    for seed in range(3 * STEP):
        store.append(rows(1, seed))
        expected = torch.cat([expected, rows(1, seed)], dim=-2)[:, :, 1:]
        store.drop_first(1)
        assert torch.equal(store.rows, expected)
        assert allocated(store) <= B * G * WIDTH * STEP
    store.drop_first(99)
    assert len(store) == 0


@torch.no_grad()
def test_rows_that_are_kept_take_their_room_alone():
    store, expected = filled(2 * STEP, 5)
    store.drop_first(2)
    index = torch.stack([torch.randperm(2 * STEP)[: STEP + 1].sort().values for _ in range(B * G)]).view(B, G, -1)
    store.keep(index)
    kept = expected[:, :, 2:].take_along_dim(index.unsqueeze(-1), dim=2)
    assert torch.equal(store.rows, kept)
    assert allocated(store) == B * G * WIDTH * 2 * STEP
    store.append(rows(1, 9))
    assert torch.equal(store.rows, torch.cat([kept, rows(1, 9)], dim=-2))
    store.keep(index[:, :, :0])
    assert (len(store), allocated(store)) == (0, 0)


def test_batches_change_and_copies_are_their_own():
    store, expected = filled(6)
    twin = copy.deepcopy(store)
    store.map(lambda x: x.index_select(0, torch.tensor([1, 1, 0])))
    store.append(rows(2, 3)[[0, 1, 1]])
    assert torch.equal(store.rows, torch.cat([expected[[1, 1, 0]], rows(2, 3)[[0, 1, 1]]], dim=-2))
    assert torch.equal(twin.rows, expected)


def test_nothing_grows_in_place_where_autograd_may_have_seen_it():
    store, _ = filled(3)
    first, before = store.rows, store.rows.clone()
    store.append(rows(1, 1))
    assert store.rows.data_ptr() != first.data_ptr()
    assert torch.equal(first, before)


def test_autograd_keeps_what_it_saw():
    store, weight = Store(rows(0, dtype=torch.float32)), torch.ones((), requires_grad=True)
    total = 0
    for seed in range(3):
        store.append(weight * rows(2, seed, torch.float32))
        total = total + store.rows.square().sum()
    total.backward()
    expected = sum(2 * (3 - seed) * rows(2, seed, torch.float32).square().sum() for seed in range(3))
    torch.testing.assert_close(weight.grad, expected)


def test_a_prefix_read_in_inference_mode_can_be_gone_on_with():
    with torch.inference_mode():
        store, expected = filled(4)
    store.append(rows(1, 1))
    assert torch.equal(store.rows, torch.cat([expected, rows(1, 1)], dim=-2))
