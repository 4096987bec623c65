"""vLLM's scheduling rules as tables worked by hand, on both engines.

A step takes 100 ps + 1 ps per prompt token + 10 ps per decoding request; blocks hold 4 tokens.
Comments list, per step, what runs and when the step ends.
"""

from __future__ import annotations

from typing import Any

import pytest

from sim.hardware import ProfileError
from sim.tests.bench import MODES, Job, Mode, serve

pytestmark = pytest.mark.parametrize("mode", MODES)


def test_a_prompt_over_the_budget_is_computed_in_chunks(mode: Mode) -> None:
    outcome = serve(Job(0, 20, 3), mode=mode, max_num_batched_tokens=8, max_num_seqs=8)
    assert outcome.steps == [
        (0, 108, 0, 8),
        (108, 108, 0, 8),
        (216, 104, 0, 4),  # the prompt is complete: first token at 320
        (320, 110, 1, 0),
        (430, 110, 1, 0),
    ]
    assert outcome.times == [(0, 320, 540)]


def test_a_chunk_shares_its_step_with_decodes_which_come_first(mode: Mode) -> None:
    # 0: A4 -> 104. 104: A decodes, B7 of 10 -> 217. 217: A decodes, B3 -> 330. 330: B alone.
    outcome = serve(
        Job(0, 4, 3), Job(50, 10, 2), mode=mode, max_num_batched_tokens=8, max_num_seqs=8
    )
    assert outcome.steps == [(0, 104, 0, 4), (104, 117, 1, 7), (221, 113, 1, 3), (334, 110, 1, 0)]
    assert outcome.times == [(0, 104, 334), (104, 334, 444)]


def test_an_arrival_in_mid_run_joins_at_the_next_step(mode: Mode) -> None:
    # A alone: 104, 214, 324; B, here since 250, is computed in the step from 324 to 438.
    outcome = serve(Job(0, 4, 5), Job(250, 4, 1), mode=mode)
    assert outcome.times == [(0, 104, 548), (324, 438, 438)]


def test_an_arrival_at_the_very_end_of_a_step_joins_the_next_one(mode: Mode) -> None:
    outcome = serve(Job(0, 4, 5), Job(214, 4, 1), mode=mode)
    assert outcome.times == [(0, 104, 548), (214, 328, 328)]


def test_an_arrival_just_after_the_end_of_a_step_waits_a_whole_one(mode: Mode) -> None:
    outcome = serve(Job(0, 4, 5), Job(215, 4, 1), mode=mode)
    assert outcome.times == [(0, 104, 548), (324, 438, 438)]


def test_arrivals_at_one_instant_share_the_first_step_in_their_order(mode: Mode) -> None:
    # 0: A6 and B2 fill the budget -> 108. 108: B4 -> 212.
    outcome = serve(Job(0, 6, 1), Job(0, 6, 1), mode=mode, max_num_batched_tokens=8, max_num_seqs=8)
    assert outcome.times == [(0, 108, 108), (0, 212, 212)]


def test_each_decode_step_costs_its_context(mode: Mode) -> None:
    # 7 ps per KV token, the one computed in the step included: 100 + 7 * 5, then 100 + 7 * 6.
    outcome = serve(Job(0, 4, 3), mode=mode, steps=(100, 0, 0, 7, 0))
    assert outcome.steps == [(0, 100, 0, 4), (100, 135, 1, 0), (235, 142, 1, 0)]


def test_the_last_admitted_is_preempted_and_computed_again(mode: Mode) -> None:
    # 0: A4 B4 -> 108. Four steps of both -> 588: 8 KV tokens and 5 outputs each, no free block.
    # 588: A takes one of the two blocks that B loses -> 698, A is done. 698: B4 + 5 -> 807.
    outcome = serve(Job(0, 4, 6), Job(0, 4, 6), mode=mode, blocks=4, enable_prefix_caching=False)
    assert outcome.steps == [
        (0, 108, 0, 8),
        (108, 120, 2, 0),
        (228, 120, 2, 0),
        (348, 120, 2, 0),
        (468, 120, 2, 0),
        (588, 110, 1, 0),
        (698, 109, 0, 9),
    ]
    assert outcome.times == [(0, 108, 698), (0, 108, 807)]
    assert outcome.column("preemptions") == [0, 1]
    assert outcome.column("output_tokens") == [6, 6]


def test_a_preempted_request_goes_before_those_that_never_ran(mode: Mode) -> None:
    # As above; C came at 300 and fits beside neither. B runs again at 698, C at 807.
    outcome = serve(
        Job(0, 4, 6),
        Job(0, 4, 6),
        Job(300, 8, 1),
        mode=mode,
        blocks=4,
        enable_prefix_caching=False,
    )
    assert outcome.times == [(0, 108, 698), (0, 108, 807), (807, 915, 915)]


@pytest.mark.parametrize(("admission", "preempted"), [("fcfs", [0, 0, 1]), ("priority", [0, 1, 0])])
def test_priority_preempts_the_least_urgent_and_fcfs_the_last(
    mode: Mode, admission: str, preempted: list[int]
) -> None:
    # 0: 12 tokens -> 112. Four steps of three -> 632: no free block. The victim's two blocks let
    # the others finish -> 752; then it computes 9 tokens -> 861.
    outcome = serve(
        Job(0, 4, 6, priority=0),
        Job(0, 4, 6, priority=5),
        Job(0, 4, 6, priority=1),
        mode=mode,
        blocks=6,
        enable_prefix_caching=False,
        policies={"admission": admission},
    )
    assert outcome.column("preemptions") == preempted
    assert [finish for _, _, finish in outcome.times] == [[752, 861][n] for n in preempted]


def test_the_least_urgent_in_front_preempts_itself_in_a_step_that_takes_no_time(
    mode: Mode,
) -> None:
    # 0: A4 -> 104. 104: A decodes, B4 -> 218. Three steps of both -> 578: A has 8 KV tokens and no
    # block for the next; it is the least urgent, so it goes, and vLLM's step ends there, empty.
    # Again at 578: B (7 KV tokens) -> 688, done. 688: A computes 4 + 5 -> 797, and decodes -> 907.
    outcome = serve(
        Job(0, 4, 7, priority=5),
        Job(50, 4, 5, priority=0),
        mode=mode,
        blocks=4,
        enable_prefix_caching=False,
        policies={"admission": "priority"},
    )
    assert outcome.steps[-4:] == [
        (458, 120, 2, 0),
        (578, 110, 1, 0),
        (688, 109, 0, 9),
        (797, 110, 1, 0),
    ]
    assert outcome.times == [(0, 104, 907), (104, 218, 688)]
    assert outcome.column("preemptions") == [1, 0]


def test_a_victim_that_was_scheduled_already_leaves_the_step(mode: Mode) -> None:
    # 0: A6 -> 106. 106: A decodes, B4 -> 220. 220: A (7 KV tokens) needs no block and is in the
    # step; B needs one, takes it from A, which leaves -> 330, B is done. 330: A6 + 2 -> 438.
    outcome = serve(
        Job(0, 6, 3, priority=5),
        Job(50, 4, 2, priority=0),
        mode=mode,
        blocks=3,
        enable_prefix_caching=False,
        policies={"admission": "priority"},
    )
    assert outcome.steps == [(0, 106, 0, 6), (106, 114, 1, 4), (220, 110, 1, 0), (330, 108, 0, 8)]
    assert outcome.times == [(0, 106, 438), (106, 220, 330)]
    assert outcome.column("preemptions") == [1, 0]


def test_priority_orders_the_queue_but_never_takes_a_running_request_off(mode: Mode) -> None:
    outcome = serve(
        Job(0, 4, 2, priority=9),
        Job(10, 4, 1, priority=5),
        Job(20, 4, 1, priority=0),
        mode=mode,
        max_num_seqs=1,
        policies={"admission": "priority"},
    )
    assert outcome.times == [(0, 104, 214), (318, 422, 422), (214, 318, 318)]


@pytest.mark.parametrize(
    ("watermark", "admitted_ps"),
    [
        (0.0, 0),
        (0.19, 0),  # int(0.19 * 10 blocks, the null block included) = 1 is kept free
        (0.2, 336),  # 2 are: 4 needed + 2 > 5 free
    ],
)
def test_the_watermark_keeps_blocks_free_from_those_that_wait(
    mode: Mode, watermark: float, admitted_ps: int
) -> None:
    # Alone, A takes 116 ps for its prompt and 110 ps for each of two more tokens.
    outcome = serve(
        Job(0, 16, 3),
        Job(0, 16, 1),
        mode=mode,
        blocks=9,
        max_num_batched_tokens=64,
        watermark=watermark,
    )
    assert outcome.times[1][0] == admitted_ps


def test_the_watermark_does_not_bind_an_empty_engine(mode: Mode) -> None:
    outcome = serve(Job(0, 35, 1), mode=mode, blocks=9, max_num_batched_tokens=64, watermark=0.5)
    assert outcome.times == [(0, 135, 135)]


def test_a_prompt_is_only_admitted_if_all_of_it_fits(mode: Mode) -> None:
    # 0: A8 -> 108. B needs 4 blocks, 3 are free beside A: it waits for A's end at 438.
    outcome = serve(
        Job(0, 8, 4),
        Job(0, 16, 1),
        mode=mode,
        blocks=6,
        max_num_batched_tokens=8,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    assert outcome.times == [(0, 108, 438), (438, 654, 654)]


def test_without_that_reservation_a_prompt_starts_and_may_preempt_itself(mode: Mode) -> None:
    # 108: A, B7 (2 of 3 free blocks) -> 225. 225: B wants 2 blocks, 1 is free: it preempts itself;
    # A -> 335. 335: A, B7 -> 452, A is done. 452: B8 -> 560. 560: B1 -> 661.
    outcome = serve(
        Job(0, 8, 4),
        Job(0, 16, 1),
        mode=mode,
        blocks=6,
        max_num_batched_tokens=8,
        max_num_seqs=8,
        enable_prefix_caching=False,
        scheduler_reserve_full_isl=False,
    )
    assert outcome.steps == [
        (0, 108, 0, 8),
        (108, 117, 1, 7),
        (225, 110, 1, 0),
        (335, 117, 1, 7),
        (452, 108, 0, 8),
        (560, 101, 0, 1),
    ]
    assert outcome.times == [(0, 108, 452), (108, 661, 661)]
    assert outcome.column("preemptions") == [0, 1]


@pytest.mark.parametrize(
    ("chunked", "times"),
    [
        (True, [(0, 116, 116), (0, 220, 220)]),  # A10 B6, then B4
        (False, [(0, 110, 110), (110, 220, 220)]),  # A10, then B10
    ],
)
def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_holds_it(
    mode: Mode, chunked: bool, times: list[tuple[int, int, int]]
) -> None:
    outcome = serve(
        Job(0, 10, 1),
        Job(0, 10, 1),
        mode=mode,
        enable_chunked_prefill=chunked,
        max_model_len=16,
    )
    assert outcome.times == times


def test_without_chunked_prefill_a_step_must_hold_the_longest_prompt(mode: Mode) -> None:
    with pytest.raises(ProfileError, match="max_num_batched_tokens=16 is less than max_model_len"):
        serve(Job(0, 4, 1), mode=mode, enable_chunked_prefill=False, max_model_len=17)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        # A4 B4, A4 B2; then A is alone and the threshold does not hold: A8.
        ({}, [(0, 108, 0, 8), (108, 106, 0, 6), (214, 108, 0, 8)]),
        # max(4, 16 // 2): A8 B6, then A8.
        (
            {"long_prefill_token_threshold_adaptive": True},
            [(0, 114, 0, 14), (114, 108, 0, 8)],
        ),
    ],
)
def test_the_threshold_cuts_long_prompts_only_while_others_are_present(
    mode: Mode, limits: dict[str, Any], steps: list[tuple[int, int, int, int]]
) -> None:
    outcome = serve(
        Job(0, 16, 1), Job(0, 6, 1), mode=mode, long_prefill_token_threshold=4, **limits
    )
    assert outcome.steps == steps


def test_at_most_max_num_seqs_requests_run(mode: Mode) -> None:
    outcome = serve(Job(0, 4, 2), Job(0, 4, 1), mode=mode, max_num_seqs=1)
    assert outcome.times == [(0, 104, 214), (214, 318, 318)]


def test_a_prompt_that_can_never_fit_is_rejected_and_counted(mode: Mode) -> None:
    outcome = serve(Job(0, 16, 1), Job(0, 15, 5), mode=mode, blocks=4)
    assert outcome.column("state") == ["rejected", "finished"]
    assert outcome.column("reason")[0] == "prompt_too_long: 16 prompt tokens, but at most 15 fit"
    assert outcome.times[0] == (-1, -1, -1)
    summary = outcome.result.summary()
    assert (summary["requests"], summary["finished"], summary["rejected"]) == (2, 1, 1)


def test_generation_ends_where_the_context_is_full(mode: Mode) -> None:
    outcome = serve(Job(0, 10, 50), mode=mode, max_model_len=13)
    assert outcome.column("output_tokens") == [3]
    assert outcome.times == [(0, 110, 330)]


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is(mode: Mode) -> None:
    # A's two blocks are cached at 108. B has the same prompt: its second block is computed again.
    chain = ((70, 2),)
    outcome = serve(Job(0, 8, 1, chain=chain), Job(500, 8, 1, chain=chain), mode=mode)
    assert outcome.column("cached_tokens") == [0, 4]
    assert outcome.steps == [(0, 108, 0, 8), (500, 104, 0, 4)]


def test_a_prompt_can_be_hit_in_the_step_that_computes_it(mode: Mode) -> None:
    # Blocks are hashed when scheduled: B, admitted behind A, computes only its last block.
    chain = ((70, 2),)
    outcome = serve(Job(0, 8, 1, chain=chain), Job(0, 8, 1, chain=chain), mode=mode)
    assert outcome.column("cached_tokens") == [0, 4]
    assert outcome.steps == [(0, 112, 0, 12)]


def test_a_preempted_request_finds_its_own_blocks_again(mode: Mode) -> None:
    # As in the table of preemption, with the cache on: A takes one of B's cached blocks, the
    # deeper one. At 698 B finds its first block (4 tokens) and computes 5 of 9 in two more: A's
    # last one, which never was full, and A's deeper cached one.
    outcome = serve(Job(0, 4, 6), Job(0, 4, 6), mode=mode, blocks=4)
    assert outcome.steps[-2:] == [(588, 110, 1, 0), (698, 105, 0, 5)]
    assert outcome.column("cached_tokens") == [0, 0]  # counted at the first admission only
    assert outcome.result.engines["evictions"].tolist() == [2]
