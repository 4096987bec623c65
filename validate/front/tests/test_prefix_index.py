"""What an engine has cached, from its KV events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from validate.front.kv_events import KvEvents
from validate.front.prefix_index import PrefixIndex, chain

BLOCK = 4
TOKENS = list(range(20))
DIGESTS = chain(TOKENS, BLOCK)


def stored(first: int, last: int, **more: Any) -> dict[str, Any]:
    """Blocks ``first`` to ``last - 1`` of ``TOKENS``, named by their number."""
    return {
        "type": "BlockStored",
        "block_hashes": list(range(first, last)),
        "parent_block_hash": first - 1 if first else None,
        "token_ids": TOKENS[first * BLOCK : last * BLOCK],
        "block_size": BLOCK,
        **more,
    }


def removed(*names: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(names)}


def matched(*events: dict[str, Any], digests: Sequence[bytes] = DIGESTS) -> int:
    index = PrefixIndex()
    for event in events:
        index.apply(event)
    return index.matched_blocks(digests)


def test_a_chain_depends_on_everything_before() -> None:
    assert len(DIGESTS) == len(set(DIGESTS)) == 5
    assert chain(TOKENS[:-1], BLOCK) == DIGESTS[:4], "only full blocks"
    assert chain(TOKENS[8:], BLOCK, DIGESTS[1]) == DIGESTS[2:]
    assert chain(TOKENS[8:], BLOCK) != DIGESTS[2:]
    salted = chain(TOKENS, BLOCK, extra_keys=[["salt"]])
    assert not set(salted) & set(DIGESTS)


def test_blocks_are_stored_in_parts_and_removed_from_the_end() -> None:
    assert matched(stored(0, 2)) == 2
    assert matched(stored(0, 2), stored(2, 5)) == 5
    assert matched(stored(0, 5), removed(4), removed(3)) == 3
    assert matched(stored(0, 5), removed(1)) == 1
    assert matched(stored(0, 5), {"type": "AllBlocksCleared"}) == 0


def test_a_copy_outlives_another() -> None:
    assert matched(stored(0, 2), stored(0, 2), removed(1)) == 2
    assert matched(stored(0, 2), stored(0, 2), removed(1), removed(1)) == 1


def test_what_follows_on_the_unknown_is_left_out() -> None:
    assert matched(stored(2, 5), digests=DIGESTS[2:]) == 0
    assert matched(stored(2, 5), stored(0, 2)) == 2
    assert matched(stored(0, 2), removed(9)) == 2


def test_other_tiers_and_groups_do_not_count() -> None:
    assert matched(stored(0, 2, medium="CPU")) == 0
    assert matched(stored(0, 2, group_idx=1)) == 0
    assert matched(stored(0, 2, medium="GPU", group_idx=0)) == 2


def test_a_masked_tail_is_not_cached() -> None:
    assert matched(stored(0, 5, block_hashes=[0, 1])) == 2


def test_salted_blocks_match_only_with_the_salt() -> None:
    event = stored(0, 2, extra_keys=[["salt"], None])
    assert matched(event) == 0
    assert matched(event, digests=chain(TOKENS, BLOCK, extra_keys=[["salt"]])) == 2


def test_an_unknown_event_is_an_error() -> None:
    with pytest.raises(ValueError, match="BlockMoved"):
        PrefixIndex().apply({"type": "BlockMoved"})


# --------------------------------------------------------------------------- sequence numbers


class Events(KvEvents):
    """Replays what it is given."""

    kept: Sequence[tuple[int, bytes]] = ()

    async def _replayed(self, start: int) -> list[tuple[int, bytes]]:
        return [(number, batch) for number, batch in self.kept if number >= start]


def taken(numbers: Sequence[int], *, replay: bool, kept: Sequence[int] = ()) -> Any:
    """After batches with these numbers, each storing the block of that number."""
    msgspec = pytest.importorskip("msgspec", reason="msgspec comes with vLLM")
    batches = [msgspec.msgpack.encode([0.0, [stored(n, n + 1)], 0]) for n in range(5)]
    lines: list[str] = []
    endpoints = "tcp://a:1,tcp://a:2" if replay else "tcp://a:1"
    events = Events(PrefixIndex(), endpoints, lines.append)
    events.kept = [(number, batches[number]) for number in kept]

    async def run() -> None:
        for number in numbers:
            await events.take(number, batches[number])

    asyncio.run(run())
    return events.index.matched_blocks(DIGESTS), len(events.index), lines, events.resets


def test_batches_in_order_need_no_replay() -> None:
    assert taken([0, 1, 2], replay=False) == (3, 3, [], 0)


def test_a_gap_drops_the_index_and_says_so() -> None:
    found, blocks, lines, resets = taken([0, 1, 3], replay=False)
    assert (found, blocks, resets) == (0, 0, 1)
    assert lines == ["1 batches of KV events are missing: prefix index dropped"]


def test_a_gap_is_filled_by_the_replay() -> None:
    assert taken([0, 1, 4], replay=True, kept=range(5)) == (5, 5, [], 0)
    assert taken([0, 3, 4], replay=True, kept=range(4)) == (5, 5, [], 0)


def test_a_late_listener_gets_what_came_before() -> None:
    assert taken([3], replay=True, kept=range(4))[:2] == (4, 4)
    found, _, lines, resets = taken([3, 4], replay=False)
    assert (found, resets) == (0, 0)
    assert lines == ["3 batches of KV events came before the front listened"]


def test_a_replay_that_is_too_short_drops_the_index() -> None:
    assert taken([0, 4], replay=True, kept=[3])[3] == 1


def test_numbers_that_fall_mean_a_new_engine() -> None:
    found, blocks, lines, _ = taken([0, 1, 2, 0], replay=False)
    assert (found, blocks, lines) == (1, 1, [])


@pytest.mark.parametrize("wrong", ["", "127.0.0.1:5557", "tcp://a:1,b", "tcp://a,tcp://b,tcp://c"])
def test_endpoints_are_checked(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not of the form tcp://"):
        KvEvents(PrefixIndex(), wrong, print)
