import json
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import write_bin

from support.common import UserError
from train_gpt2 import DataLoaderLite

T = 8


@pytest.fixture
def corpus(tmp_path, make_shards):
    """Shards of uneven lengths, one shorter than a row and one empty. Each token is its position in the stream."""
    lengths = [101, 3, 57, 0, 250, 8, 64]
    edges = np.cumsum([0, *lengths])
    train = [np.arange(a, b) for a, b in zip(edges, edges[1:])]
    return make_shards(tmp_path / "data", {"val": [np.arange(1000, 1100)], "train": train}), int(edges[-1])


def take_rows(loaders, rows):
    """Return the next rows of the global batches that these loaders form together, each with its last target."""
    taken = []
    while len(taken) < rows:
        for loader in loaders:
            x, y = loader.next_batch()
            assert x.shape == y.shape == (loader.B, T) and x.dtype == torch.int64
            assert torch.equal(x[:, 1:], y[:, :-1])
            taken += torch.cat((x, y[:, -1:]), dim=1).tolist()
    return taken[:rows]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_reads_every_row_once(corpus, shuffle):
    """The original drops every shard's tail and crashes on a shard shorter than a batch. Here each row is read once."""
    folder, tokens = corpus
    loader = DataLoaderLite(folder, "train", 3, T, shuffle=shuffle)
    rows = (tokens - 1) // T
    assert loader.num_rows == rows
    in_order = [list(range(i * T, i * T + T + 1)) for i in range(rows)]
    taken = take_rows([loader], 3 * rows)
    for epoch in (taken[:rows], taken[rows : 2 * rows], taken[2 * rows :]):
        assert sorted(epoch) == in_order
        assert (epoch == in_order) is not shuffle


def test_epochs_differ_and_repeat_with_the_seed(corpus):
    """The order must change with the epoch and with the seed, and be the same if both are the same."""
    folder, _ = corpus
    first, again, other = (DataLoaderLite(folder, "train", 1, T, seed=seed) for seed in (1, 1, 2))
    epochs = [take_rows([first], first.num_rows) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert [take_rows([again], again.num_rows) for _ in range(2)] == epochs
    assert take_rows([other], other.num_rows) != epochs[0]


def test_shuffled_stream_is_fixed_for_good(corpus):
    """A run that is resumed years later must read the same rows. This test fails if the generator changes."""
    folder, _ = corpus
    loader = DataLoaderLite(folder, "train", 6, T, seed=1337)
    assert loader.next_batch()[0][:, 0].tolist() == [232, 432, 328, 184, 288, 96]


def test_large_shards_are_read_one_at_a_time(corpus):
    """A shuffle over the whole corpus would read rows from everywhere. Ours finishes one shard before the next."""
    folder, _ = corpus
    loader = DataLoaderLite(folder, "train", 1, T)
    loader.SHUFFLE_ROWS = 1
    orders = []
    for _ in range(4):
        starts = [row[0] for row in take_rows([loader], loader.num_rows)]
        shards = [int(np.searchsorted(loader.starts, start, side="right")) for start in starts]
        orders.append([shard for i, shard in enumerate(shards) if i == 0 or shards[i - 1] != shard])
        assert len(orders[-1]) == len(set(shards))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_global_batch_is_the_same_on_every_layout(corpus, shuffle):
    """The original's ranks leave a shard at different steps. Row r of step s must not depend on the layout."""
    folder, _ = corpus
    layouts = [(24, 1), (8, 1), (1, 1), (12, 2), (3, 2), (3, 8), (1, 8), (1, 24)]
    batches = []
    for B, world_size in layouts:
        loaders = [DataLoaderLite(folder, "train", B, T, rank, world_size, shuffle) for rank in range(world_size)]
        batches.append([take_rows(loaders, 24) for _ in range(10)])  # four epochs
    assert all(batch == batches[0] for batch in batches[1:])


def test_position_is_the_whole_state(corpus):
    """A loader with another loader's position continues like that one, for any layout, even in a later epoch."""
    folder, _ = corpus
    one = DataLoaderLite(folder, "train", 4, T)
    take_rows([one], 4 * 37)
    two = [DataLoaderLite(folder, "train", 2, T, rank, 2) for rank in range(2)]
    for loader in two:
        loader.position = one.position
    assert take_rows(two, 40) == take_rows([one], 40)


def test_small_shards_are_mixed(tmp_path, make_shards):
    """If a shard of a few documents is read alone, training overfits to them: 700 steps reached 1.43, not 1.18."""
    train = [np.arange(i * 100, i * 100 + 100) for i in range(50)]
    loader = DataLoaderLite(make_shards(tmp_path, {"val": [[1] * 99], "train": train}), "train", 1, T)
    loader.SHUFFLE_ROWS = 100
    rows = take_rows([loader], loader.num_rows)
    assert sorted(rows) == [list(range(i * T, i * T + T + 1)) for i in range(loader.num_rows)]
    first = [row[0] // 100 for row in rows][:100]  # interleaved from 8 or 9 shards of 12 or 13 rows
    assert len(set(first)) in (8, 9) and sum(a != b for a, b in zip(first, first[1:])) > 50


def test_unshuffled_is_the_lectures_order(corpus):
    """--no-shuffle reads the stream like build-nanogpt: consecutive rows, one rank after the other."""
    folder, _ = corpus
    loaders = [DataLoaderLite(folder, "train", 2, T, rank, 2, shuffle=False) for rank in range(2)]
    batches = [loader.next_batch()[0] for _ in range(2) for loader in loaders]
    assert torch.cat(batches).flatten().tolist() == list(range(8 * T))


def test_bin_shards_read_like_npy(tmp_path, corpus):
    """Published .bin shards must give the same batches as our shards of the same tokens."""
    folder, _ = corpus
    for path in folder.glob("*.npy"):
        tokens = np.load(path)
        if not tokens.size:
            continue
        write_bin(tmp_path / f"{path.stem}.bin", tokens)
    ours, theirs = (DataLoaderLite(f, "train", 4, T, shuffle=False) for f in (folder, tmp_path))
    assert take_rows([ours], 100) == take_rows([theirs], 100)


def test_bad_data_is_named(tmp_path, make_shards):
    """Too little data, no data, and ids outside the vocabulary: one line says where, and what to do."""
    folder = make_shards(tmp_path / "a", {"val": [np.arange(8)], "train": [[1] * 50 + [50257] + [1] * 50]})
    with pytest.raises(UserError, match="too few for one sequence"):
        DataLoaderLite(folder, "val", 1, T)
    loader = DataLoaderLite(folder, "train", 12, T)
    with pytest.raises(UserError, match="edufineweb_train_000001.npy has token id 50257"):
        loader.next_batch()
    with pytest.raises(UserError, match="preset demo"):
        DataLoaderLite(tmp_path / "nowhere", "train", 1, T)
    (folder / "manifest.json").write_text(json.dumps({"encoding": "gpt2", "vocab_size": 1}))
    with pytest.raises(UserError, match="manifest.json"):
        DataLoaderLite(folder, "train", 1, T)


def test_memory_does_not_grow_with_the_shards(tmp_path):
    """Shards are memory-mapped, so opening a corpus and reading a batch must not load it."""
    shard = tmp_path / "edufineweb_train_000001.npy"
    np.lib.format.open_memmap(shard, mode="w+", dtype=np.uint16, shape=(100_000_000,))  # zeros, a sparse file
    tracemalloc.start()
    DataLoaderLite(tmp_path, "train", 4, 1024).next_batch()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # the shard has 200,000,000 bytes, and the order of its rows 800,000
