"""Documents as blocks of tokens, packed and streamed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.packing import BlockCollator, DealtBlocks, PackedBlocks, StreamedBlocks


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8), block_size=st.integers(2, 7))
def test_packing_predicts_every_token_but_the_first_once_and_in_order(lengths: list[int], block_size: int) -> None:
    tokens = np.arange(sum(lengths), dtype=np.int32)
    pieces = np.split(tokens, np.cumsum(lengths)[:-1])
    if len(tokens) < 2:
        with pytest.raises(ValueError, match="at least two tokens"):
            PackedBlocks(pieces, block_size)
        return
    blocks = PackedBlocks(pieces, block_size)
    batch = BlockCollator(block_size, padding_id=0)([blocks[index] for index in range(len(blocks))])
    used = batch["labels"] != -100
    assert batch["labels"][used].tolist() == tokens[1:].tolist()
    assert batch["input_ids"][used].tolist() == tokens[:-1].tolist()
    assert used[:-1].all(), "only the last block is padded"
    assert used.sum(1).min() >= 1
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_a_stream_gives_the_packed_blocks_pass_after_pass() -> None:
    documents = [list(range(start, start + length)) for start, length in ((0, 5), (5, 1), (6, 30), (36, 5))]
    sequence = [np.array(document) for document in documents * 3]
    packed = PackedBlocks(sequence, 4)
    stream = StreamedBlocks(lambda: iter(documents), 4, 30, buffer=1, seed=0)
    assert [stream[index] for index in range(30)] == [packed[index] for index in range(30)]


def test_a_stream_shuffles_within_its_buffer_and_repeats_for_a_seed() -> None:
    def stream(buffer: int, seed: int) -> StreamedBlocks:
        return StreamedBlocks(lambda: [list(range(101))], 2, 40, buffer, seed)

    plain, shuffled = ([blocks[index] for index in range(40)] for blocks in (stream(1, 0), stream(5, 3)))
    order = [block["tokens"][0] // 2 for block in plain]
    drawn = [block["tokens"][0] // 2 for block in shuffled]
    assert order == list(range(40))
    assert drawn != order
    assert len(set(drawn)) == 40
    assert all(number <= place + 4 for place, number in enumerate(drawn)), "read further ahead than the buffer"
    other, late = stream(5, 4), stream(5, 3)
    assert [other[index] for index in range(40)] != shuffled
    assert [late[index] for index in (17, 18, 39, 3)] == [shuffled[index] for index in (17, 18, 39, 3)]


def test_an_empty_stream_is_no_endless_loop() -> None:
    with pytest.raises(ValueError, match="no document with any text"):
        StreamedBlocks(list, 2, 4, 1, 0)[0]


def test_a_process_finds_its_own_blocks_where_they_were_dealt() -> None:
    dealt = [DealtBlocks([{"tokens": [process, own]} for own in range(6)], 2, process, 3) for process in range(3)]
    assert {len(blocks) for blocks in dealt} == {18}
    for index in range(18):
        process = index // 2 % 3
        assert dealt[process][index]["tokens"] == [process, index // 6 * 2 + index % 2]
        with pytest.raises(IndexError, match=f"is for process {process}"):
            dealt[process - 1][index]
