"""Replaying traces: when requests are sent, what is kept when things go wrong, and live runs."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from experiments.composing import ConfigError, compose
from experiments.runs import run, simulate
from policies import registry
from policies.admission.fcfs import Fcfs
from policies.api import (
    AdmissionPolicy,
    ClusterView,
    EvictionPolicy,
    PDPolicy,
    Placement,
    PolicyError,
    PolicySet,
    RequestView,
)
from policies.registry import build, load_module, policy_set
from sim.backend import Deployment
from sim.request import Request
from sim.result import Result
from sim.scheduler import EngineLimits
from sim.simulator import Simulator
from traces import Trace, generate
from validate import vllm_backend
from validate.live_result import decision_rows, length_warnings
from validate.prompts import Prompts
from validate.replay import EngineDied, Fate, Instance, Replay
from validate.tiny_model import write
from validate.vllm_backend import LiveError, VllmBackend, policy_config, vllm_options

LIVE = (
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="needs vLLM: make validate builds an environment with it",
    ),
    # From torch's and vLLM's own imports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
)


def live(test: Callable[..., Any]) -> Callable[..., Any]:
    for mark in LIVE:
        test = mark(test)
    return test


def without_engine(test: Callable[..., Any]) -> Callable[..., Any]:
    """For tests that import vLLM and start nothing."""
    for mark in (LIVE[0], *LIVE[2:]):
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are made for want of another one go here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


# --------------------------------------------------------------------------- replay


class Fake(Instance):
    """An engine that takes a fixed time for every request."""

    def __init__(self, ident: int = 0, took_s: float = 0.02) -> None:
        super().__init__(ident, model="fake", chip="fake")
        self.block_tokens, self.kv_blocks, self.max_model_len = 16, 100, 1000
        self.took_s = took_s
        self.dies_after = 10**9
        self.served: list[str] = []

    async def serve(self, request: Request, prompt: list[int], fate: Fate) -> None:
        if len(self.served) >= self.dies_after:
            raise EngineDied(f"engine {self.id} died: for the test")
        self.served.append(request.id)
        assert len(prompt) == request.prompt_tokens
        fate.arrival = time.monotonic()
        await asyncio.sleep(self.took_s)
        fate.state, fate.received = "finished", time.monotonic()
        fate.output_tokens = request._true_output_tokens


def trace_of(arrival_s: list[float], prompt: int | list[int] = 40, **columns: Any) -> Trace:
    return Trace.build(
        "t", {"arrival_s": arrival_s, "prompt_tokens": prompt, "output_tokens": 5} | columns
    )


def replay_of(trace: Trace, *engines: Fake, pd: PDPolicy | None = None, **options: Any) -> Replay:
    return Replay(
        trace,
        trace.recoded(16),
        Prompts(trace, 16, range(3, 1024)),
        engines,
        pd or build(policy_set().pd, 0, "pd"),
        model="fake",
        **options,
    )


def test_arrivals_do_not_wait_for_answers() -> None:
    trace = trace_of([0.0, 0.05, 0.1])
    replay = replay_of(trace, Fake(took_s=0.3))
    asyncio.run(replay.run())
    sent = np.array([fate.arrival for fate in replay.fates]) - replay.start
    assert (sent >= [0.0, 0.05, 0.1]).all()
    assert (sent < [0.05, 0.1, 0.15]).all()
    assert [fate.state for fate in replay.fates] == ["finished"] * 3
    assert replay.incomplete == ""


def test_a_turn_waits_for_its_predecessor_and_the_think_time() -> None:
    trace = trace_of([0.0, 0.01, 0.4], session="s", turn=[0, 1, 2], think_s=[0.0, 0.05, 0.01])
    replay = replay_of(trace, Fake(took_s=0.1))
    asyncio.run(replay.run())
    first, second, third = replay.fates
    assert second.due == pytest.approx(first.received + 0.05)
    assert second.arrival >= second.due
    assert third.due == pytest.approx(replay.start + 0.4)  # its recorded arrival is later


def test_a_turn_whose_predecessor_is_refused_is_still_sent() -> None:
    trace = trace_of([0.0, 0.01], [5000, 40], session="s", turn=[0, 1], think_s=[0.0, 0.02])
    replay = replay_of(trace, Fake())
    asyncio.run(replay.run())
    assert [fate.state for fate in replay.fates] == ["rejected", "finished"]
    assert replay.fates[0].reason == ("prompt_too_long: 5000 prompt tokens, but at most 999 fit")
    assert replay.fates[1].due == pytest.approx(replay.fates[0].arrival + 0.02)


def test_outputs_are_cut_where_the_context_ends() -> None:
    replay = replay_of(trace_of([0.0], 998, output_tokens=50), Fake())
    asyncio.run(replay.run())
    assert replay.fates[0].output_tokens == 2


def test_after_the_timeout_everything_has_a_state() -> None:
    trace = trace_of([0.0, 0.01, 30.0])
    slow = Fake(took_s=60.0)
    replay = replay_of(trace, slow, timeout_s=0.3)
    began = time.monotonic()
    asyncio.run(replay.run())
    assert time.monotonic() - began < 5
    assert [fate.state for fate in replay.fates] == ["timed_out"] * 3
    assert [fate.engine for fate in replay.fates] == [0, 0, -1]
    assert "timeout_s=0.3; 3 of 3 requests have no answer" in replay.incomplete
    assert (slow.waiting, slow.inflight_tokens) == (0, 0)


def test_when_the_last_engine_dies_the_rest_is_not_waited_for() -> None:
    trace = trace_of([0.0, 0.01, 0.02, 60.0])
    engine = Fake()
    engine.dies_after = 2
    replay = replay_of(trace, engine)
    asyncio.run(replay.run())
    states = [fate.state for fate in replay.fates]
    assert states[2:] == ["failed", "failed"]
    assert "for the test" in replay.fates[3].reason
    assert "engine 0 died" in replay.incomplete


def test_other_engines_go_on_when_one_dies() -> None:
    engines = Fake(0), Fake(1)
    engines[0].dies_after = 1
    replay = replay_of(trace_of([0.0, 0.01, 0.02, 0.03, 0.04, 0.05]), *engines)
    asyncio.run(replay.run())
    assert [fate.state for fate in replay.fates] == [
        "finished", "finished", "failed", "finished", "finished", "finished",
    ]  # fmt: skip
    assert "1 of 6 requests have no answer" in replay.incomplete


def test_routers_do_not_see_the_dead() -> None:
    """Whose load would be the least."""
    engines = Fake(0, took_s=0.2), Fake(1, took_s=0.2)
    engines[0].dies_after = 0
    pd = build(policy_set(routing="least_loaded").pd, 0, "pd")
    replay = replay_of(trace_of([0.0, 0.02, 0.04, 0.06]), *engines, pd=pd)
    before = replay.instances
    asyncio.run(replay.run())
    states = [fate.state for fate in replay.fates]
    assert states == ["failed", "finished", "finished", "finished"]
    assert replay.instances == [engines[1]]
    assert before == list(engines)  # who kept the list may compare


def test_requests_that_find_nobody_alive_fail_with_the_reason() -> None:
    engine = Fake()
    engine.dies_after = 0
    replay = replay_of(trace_of([0.0] * 5), engine)
    asyncio.run(replay.run())
    assert [fate.state for fate in replay.fates] == ["failed"] * 5
    assert {fate.reason for fate in replay.fates} == {"engine 0 died: for the test"}


def test_an_error_of_one_request_fails_it_and_no_other() -> None:
    class Picky(Fake):
        async def serve(self, request: Request, prompt: list[int], fate: Fate) -> None:
            if request.id == "1":
                raise ValueError("a token\nis wrong")
            if request.id == "2":
                raise RuntimeError from ValueError("underneath")
            await super().serve(request, prompt, fate)

    engine = Picky()
    replay = replay_of(trace_of([0.0, 0.01, 0.02, 0.03]), engine)
    asyncio.run(replay.run())
    states = [fate.state for fate in replay.fates]
    assert states == ["finished", "failed", "failed", "finished"]
    assert replay.fates[1].reason == "ValueError: a token is wrong"
    assert replay.fates[2].reason == "ValueError: underneath"
    assert "2 of 4 requests have no answer" in replay.incomplete
    assert (engine.died, engine.inflight_tokens) == ("", 0)


def test_an_interruption_keeps_what_there_is() -> None:
    replay = replay_of(trace_of([0.0, 60.0]), Fake())
    timer = threading.Timer(0.4, replay.interrupt)
    timer.start()
    asyncio.run(replay.run())
    assert [fate.state for fate in replay.fates] == ["finished", "cancelled"]
    assert "interrupted" in replay.incomplete


def test_routers_see_what_was_sent_and_what_prompts_were_there() -> None:
    trace = generate("chat", sessions=6, session_rate_per_s=200.0, think_mean_s=0.01, token_s=0.0,
                     system_min=64, system_max=128, prompt_max=900, seed=2)  # fmt: skip
    engines = Fake(0), Fake(1)
    pd = build(policy_set(routing="prefix_affinity").pd, 0, "pd")
    replay = replay_of(trace, *engines, pd=pd)
    asyncio.run(replay.run())
    assert all(fate.state == "finished" for fate in replay.fates)
    assert all(
        engine.inflight_tokens == engine.waiting == engine.running == 0 for engine in engines
    )
    last = next(iter(reversed(list(engines[0]._cached))))
    assert last >= 0


def test_matched_tokens_are_those_of_the_prompts_that_still_fit() -> None:
    def request(*ids: int) -> Request:
        return Request(0, 0, 16 * len(ids) + 1, 1, [(ident, 1) for ident in ids])

    engine = Fake()
    engine.kv_blocks = 4
    engine.sent(request(1, 2, 3))
    assert engine.matched_tokens(request(1, 2, 9)) == 32
    engine.sent(request(5, 6))
    assert engine.matched_tokens(request(1, 2, 3)) == 32  # the end of the prompt went first
    assert (engine.waiting, engine.running) == (2, 0)
    engine.said(1, 0.5)
    assert (engine.waiting, engine.running, engine.kv_usage) == (1, 1, 0.5)


def test_a_placement_policy_that_breaks_its_contract_ends_the_run() -> None:
    class Wrong(PDPolicy):
        def place(self, request: RequestView, cluster: ClusterView, now: float) -> Placement:
            return Placement(None, None)  # type: ignore[arg-type]

    with pytest.raises(PolicyError, match=r"Wrong.place\(0\) answered"):
        asyncio.run(replay_of(trace_of([0.0, 9.0]), Fake(), pd=Wrong()).run())


# --------------------------------------------------------------------------- between runs


class FakeLive(Fake):
    """What the backend starts, without vLLM."""

    renewable = True
    vocabulary = range(3, 1024)
    started = 0
    renewals: ClassVar[list[Exception | None]] = []
    """What comes of each ``renew``."""
    starts: ClassVar[list[Exception | None]] = []
    """What comes of each ``ready``."""

    def __init__(self, ident: int, options: Any, environment: Any) -> None:
        super().__init__(ident, took_s=0.001)
        self.block_tokens = 32
        FakeLive.started += 1

    async def serve(self, request: Request, prompt: list[int], fate: Fate) -> None:
        await super().serve(request, prompt, fate)
        fate.admitted = fate.arrival
        fate.first = fate.finish = fate.received

    async def renew(self, config: Any) -> None:
        if FakeLive.renewals and (error := FakeLive.renewals.pop(0)) is not None:
            raise error

    async def ready(self) -> None:
        if FakeLive.starts and (error := FakeLive.starts.pop(0)) is not None:
            raise error

    def close(self) -> None:
        pass

    def forget(self) -> None:
        pass


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLive]:
    fake = SimpleNamespace(LiveEngine=FakeLive, on_cpu=lambda: True, option_names=list)
    monkeypatch.setattr(vllm_backend, "_vllm", lambda: fake)
    monkeypatch.setattr(vllm_backend, "_check_policies", lambda configs: None)
    FakeLive.started, FakeLive.renewals, FakeLive.starts = 0, [], []
    return FakeLive


DIED = EngineDied("engine 0 died: idle")


def test_an_engine_that_died_between_runs_is_started_again(fake_vllm: type[FakeLive]) -> None:
    with VllmBackend(DEPLOYMENT, model="some/model") as backend:
        for outcome, started in ((None, 1), (None, 1), (DIED, 2), (None, 2)):
            fake_vllm.renewals = [outcome]
            result = backend.serve(trace_of([0.0, 0.01]), policy_set())
            assert result.requests["state"].tolist() == ["finished"] * 2
            assert fake_vllm.started == started


def test_an_engine_that_does_not_stay_up_is_an_error(fake_vllm: type[FakeLive]) -> None:
    fake_vllm.starts = [DIED, DIED]
    with pytest.raises(LiveError, match="engine 0 died: idle; so it did when it was started again"):
        VllmBackend(DEPLOYMENT, model="some/model").serve(trace_of([0.0]), policy_set())
    assert fake_vllm.started == 2


def test_a_start_that_fails_inside_the_engine_names_likely_options(
    fake_vllm: type[FakeLive], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeLive, *args: Any) -> None:
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(FakeLive, "__init__", fail)
    with pytest.raises(LiveError, match=r"output above; .*gpu_memory_utilization.*live\.options"):
        VllmBackend(DEPLOYMENT, model="some/model").serve(trace_of([0.0]), policy_set())


@pytest.mark.parametrize(
    ("lengths", "outputs", "said"),
    [
        ([999, 5], [1, 995], []),
        ([1000, 5], [1, 1], ["1 of 2 prompts do not fit max_model_len=1000 and are rejected: 0"]),
        ([998, 5], [3, 1], ["1 of 2 outputs end where max_model_len=1000 is reached"]),
        ([2000] * 6, [1] * 6, ["6 of 6 prompts do not fit .* rejected: 0, 1, 2, 3, 4, ..."]),
    ],
)  # fmt: skip
def test_what_is_too_long_is_named(lengths: list[int], outputs: list[int], said: list[str]) -> None:
    trace = trace_of([0.0] * len(lengths), lengths, output_tokens=outputs)
    lines = length_warnings(trace, 1000)
    assert len(lines) == len(said)
    assert all(re.search(text, line) for text, line in zip(said, lines, strict=True))
    assert length_warnings(trace, None) == []


def test_too_long_prompts_are_told_before_engines_start(
    fake_vllm: type[FakeLive], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_vllm.starts = [DIED, DIED]
    common = ["backend=vllm", "live.model=some/model", "engine.block_tokens=32", "trace.limit=20"]
    with pytest.raises(LiveError):
        simulate(compose([*common, "engine.max_model_len=40", "engine.num_gpu_blocks=50"]))
    assert "20 of 20 prompts do not fit max_model_len=40" in " ".join(
        capsys.readouterr().err.split()
    )


@without_engine
@pytest.mark.parametrize("call", ["renew", "ready"])
def test_errors_of_vllms_client_between_runs_are_ours(call: str) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError  # noqa: PLC0415

    from validate.vllm_plugin.live import LiveEngine  # noqa: PLC0415

    class Client:
        def __init__(self, error: Exception) -> None:
            self.error = error

        async def collective_rpc(self, *args: Any, **options: Any) -> None:
            raise self.error

        async def get_supported_tasks(self) -> None:
            raise self.error

    def trouble(error: Exception) -> Any:
        engine = LiveEngine.__new__(LiveEngine)
        Instance.__init__(engine, 0, model="fake", chip="fake")
        engine._llm = Client(error)
        return engine.renew({}) if call == "renew" else engine.ready()

    with pytest.raises(EngineDied, match="engine 0 died"):
        asyncio.run(trouble(EngineDeadError()))
    if call == "renew":
        with pytest.raises(LiveError, match="engine 0 cannot begin anew: no such key"):
            asyncio.run(trouble(RuntimeError("no such\nkey")))


@without_engine
def test_policies_are_made_here_before_an_engine_is_started() -> None:
    vllm_backend._check_policies([{"eviction": {"name": "slo_aware", "grace_s": 5}}])
    with pytest.raises(LiveError, match=r"servelab\.eviction: .*did you mean 'eviction/slo_aware'"):
        vllm_backend._check_policies([{"eviction": "slo_awre"}])


# --------------------------------------------------------------------------- configuration


def test_every_limit_has_an_option_of_vllm() -> None:
    options = vllm_options(EngineLimits(block_tokens=32, num_gpu_blocks=99))
    assert (options["block_size"], options["num_gpu_blocks_override"]) == (32, 99)
    assert options["max_model_len"] == -1
    assert len(options) == len(dataclasses.fields(EngineLimits))


@live
def test_vllm_knows_every_option_that_is_given() -> None:
    from validate.vllm_plugin import live as plugin  # noqa: PLC0415

    backend = VllmBackend(Deployment.of("a100_80g", "llama3_8b"))
    assert backend.options(cpu=True).keys() <= set(plugin.option_names())


def test_policies_are_named_with_parameters_and_the_simulators_seeds() -> None:
    policies = policy_set(eviction={"name": "slo_aware", "grace_s": 5}, reuse="never")
    config = policy_config(policies, 0, 0)
    assert config["eviction"] == {"name": "slo_aware", "grace_s": 5}
    assert config["admission"] == {"name": "fcfs"}
    assert config["reuse"] == {"name": "never"}
    assert "policy_modules" not in config


def test_base_classes_leave_vllms_own_code_in_place() -> None:
    policies = PolicySet(eviction=policy_set().eviction, pd=policy_set().pd)
    assert list(policy_config(policies, 0, 0)) == ["eviction"]


MINE = """
from dataclasses import dataclass
from policies.api import ADMIT, AdmissionPolicy, Reject
from policies.registry import register

@register("admission/no_bulk")
@dataclass
class NoBulk(AdmissionPolicy):
    seed: int = 0
    def admit(self, request, engine, now):
        return Reject("bulk is not welcome") if request.tenant == "bulk" else ADMIT
"""


@pytest.fixture(scope="module")
def no_bulk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("policies") / "h_no_bulk.py"
    file.write_text(MINE)
    load_module(file)
    return file


def test_a_users_policy_travels_with_its_file_and_a_seed_per_engine(no_bulk: Path) -> None:
    one, two = (policy_config(policy_set(admission="no_bulk"), 3, engine) for engine in (0, 1))
    assert one["policy_modules"] == [str(no_bulk)]
    assert one["admission"]["seed"] != two["admission"]["seed"]
    assert one["admission"]["seed"] == build(policy_set(admission="no_bulk").admission, 3,
                                             "admission/0").seed  # type: ignore[attr-defined]  # fmt: skip


def test_policies_that_another_process_cannot_make_are_refused() -> None:
    class Unregistered(EvictionPolicy):
        pass

    def made() -> AdmissionPolicy:
        return Fcfs()

    pd = policy_set().pd
    with pytest.raises(PolicyError, match=r"eviction=.*Unregistered: .*@register"):
        policy_config(PolicySet(eviction=Unregistered, pd=pd), 0, 0)
    with pytest.raises(PolicyError, match=r"eviction/belady needs to know the future"):
        policy_config(policy_set(eviction="belady"), 0, 0)
    with pytest.raises(PolicyError, match=r"admission="):
        policy_config(PolicySet(eviction=policy_set().eviction, pd=pd, admission=made), 0, 0)


def test_a_policy_of_the_main_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fcfs, "__module__", "__main__")
    with pytest.raises(PolicyError, match="defined in the program itself"):
        policy_config(policy_set(), 0, 0)


DEPLOYMENT = Deployment.of(
    "a100_80g", "llama3_8b", block_tokens=32, num_gpu_blocks=200, max_model_len=1024,
    max_num_batched_tokens=512, max_num_seqs=16,
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "/no/such/folder"}, "live.model=/no/such/folder: the folder does not exist"),
        ({"timeout_s": 0.0}, "timeout_s=0.0: must be above 0"),
        ({"engine_options": {"block_size": 16}}, "block_size follows from the deployment"),
        ({"engine_options": {"scheduler_cls": "x"}}, "scheduler_cls follows from"),
    ],
)
def test_wrong_options_are_one_line(options: Any, said: str) -> None:
    with pytest.raises(LiveError, match=said):
        VllmBackend(DEPLOYMENT, **options)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LiveError, match=r"has no config.json"):
        VllmBackend(DEPLOYMENT, model=tmp_path)


def test_without_vllm_the_message_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_backend, "has_vllm", lambda: False)
    with pytest.raises(LiveError, match="make validate"):
        VllmBackend(DEPLOYMENT).serve(trace_of([0.0]), policy_set())


def test_configurations_choose_the_backend() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        simulate(compose(["backend=vlm"]))
    with pytest.raises(ConfigError, match=r"live\.options"):
        simulate(compose(["backend=vllm", "live.options=[3]"]))
    with pytest.raises(ConfigError, match="record_decisions"):
        simulate(compose(["backend=vllm", "record_decisions=true"]))
    with pytest.raises(LiveError, match=r"live\.model=/none"):
        simulate(compose(["backend=vllm", "live.model=/none"]))


def test_ids_lose_what_vllm_appends_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step":0,"entered":["a-1-0123abcd"],"aborted":[],"scheduled":{"a-1-0123abcd":3},'
        '"new":["a-1-0123abcd"],"resumed":[],"preempted":[],"hits":{"a-1-0123abcd":0},'
        '"blocks":{"a-1-0123abcd":[1]},"evicted":[["a-1-0123abcd:4",7]],"free":1,"waiting":[],'
        '"running":["a-1-0123abcd"]}\n{"step":1,"ent'
    )
    (row,) = decision_rows(log, ["a-1", "a"])
    assert row["scheduled"] == {"a-1": 3}
    assert row["evicted"] == [["a-1:4", 7]]
    assert decision_rows(tmp_path / "none", []) == []


# --------------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("live") / "tiny_model", layers=2, hidden=128)


def chats(count: int = 30) -> Trace:
    return generate(
        "chat", sessions=12, session_rate_per_s=6.0, prompt_max=900, system_min=64,
        system_max=256, user_mean=60.0, output_mean=30.0, output_max=100, think_mean_s=0.2,
        token_s=0.01, seed=1,
    ).head(count)  # fmt: skip


def changed(trace: Trace, **columns: Any) -> Trace:
    return dataclasses.replace(trace, requests=trace.requests.assign(**columns))


@live
def test_chats_live_find_the_simulators_hits_and_refusals_are_kept(
    model: Path, no_bulk: Path
) -> None:
    trace = chats()
    tenants = np.full(len(trace), "", dtype=object)
    tenants[4] = "bulk"
    trace = changed(trace, tenant=tenants)
    policies = policy_set(admission="no_bulk")
    simulated = Simulator(DEPLOYMENT).serve(trace, policies).requests
    with VllmBackend(DEPLOYMENT, model=model, timeout_s=120) as backend:
        result = backend.serve(trace, policies)
        # The second time on the same engine, which must have forgotten all.
        for found in (result, backend.serve(trace, policies)):
            assert found.meta["incomplete"] == ""
            for column in ("state", "reason", "cached_tokens", "output_tokens", "preemptions"):
                assert found.requests[column].tolist() == simulated[column].tolist()
        requests = result.requests
        assert (requests["state"] == "rejected").sum() == 1
        assert requests["cached_tokens"].sum() > 0
        mixed = trace_of([0.0, 0.1], [2000, 40], tenant="bulk")
        others = backend.serve(mixed, policy_set())  # which welcome bulk
    assert multiprocessing.active_children() == []
    assert others.requests["state"].tolist() == ["rejected", "finished"]
    assert others.requests["reason"][0].startswith("prompt_too_long: 2000")

    assert (requests["lateness_s"] >= 0).all()
    assert (requests["client_delay_s"].dropna() > 0).all()
    done = requests[requests["state"] == "finished"]
    ends = dict(zip(zip(done["session"], done["turn"], strict=True), done["finish_s"], strict=True))
    later = [
        arrival > ends[session, turn - 1]
        for session, turn, arrival in zip(
            requests["session"], requests["turn"], requests["arrival_s"], strict=True
        )
        if (session, turn - 1) in ends
    ]
    assert later
    assert all(later)

    assert len(result.runs) == result.engines["steps"].sum() > 0
    assert result.runs["decodes"].sum() == done["output_tokens"].sum() - len(done)
    assert result.runs["start_s"].min() == pytest.approx(done["admitted_s"].min(), abs=0.01)
    assert result.summary()["itl_p50_s"] > 0


@live
def test_an_engine_that_dies_leaves_what_it_had(model: Path, tmp_path: Path) -> None:
    trace = chats()
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if done == 10 and not killed:
            (process,) = multiprocessing.active_children()
            killed.append(process.pid or 0)
            process.kill()

    result = VllmBackend(DEPLOYMENT, model=model, timeout_s=120).serve(
        trace, policy_set(), progress=kill
    )
    states = result.requests["state"].value_counts().to_dict()
    assert killed
    assert states["finished"] >= 10
    assert states["failed"] == 30 - states["finished"] > 0
    assert "engine 0 died" in result.meta["incomplete"]
    assert any("incomplete" in line for line in result.meta["warnings"])
    assert result.engines["steps"][0] > 0
    loaded = Result.load(result.save(tmp_path / "run"))
    assert loaded.requests["state"].tolist() == result.requests["state"].tolist()


@live
def test_jobs_of_a_sweep_follow_each_other_in_one_process(model: Path, tmp_path: Path) -> None:
    common = [
        "trace=chat", "trace.sessions=6", "trace.session_rate_per_s=6", "trace.prompt_max=900",
        "trace.system_min=64", "trace.system_max=256", "trace.output_mean=20",
        "trace.think_mean_s=0.1", "trace.token_s=0.01", "trace.limit=15", "engines=2",
        "engine.block_tokens=32", "engine.num_gpu_blocks=200", "engine.max_model_len=1024",
        "policies/routing=prefix_affinity", f"live.model={model}", "live.timeout_s=120",
    ]  # fmt: skip
    for i, backend in enumerate(("vllm", "sim", "vllm")):
        folder = run(compose([*common, f"backend={backend}"]), tmp_path / str(i))
        result = Result.load(folder)
        assert result.meta["backend"] == backend
        assert (result.requests["state"] == "finished").all()
        assert set(result.requests["engine"]) <= {0, 1}
        assert result.engines["steps"].sum() > 0


@live
def test_options_that_vllm_refuses_are_one_line(model: Path) -> None:
    with pytest.raises(LiveError, match="no option 'dtyp'; did you mean 'dtype'"):
        VllmBackend(DEPLOYMENT, model=model, engine_options={"dtyp": 1}).serve(
            trace_of([0.0]), policy_set()
        )
    odd = Deployment.of("a100_80g", "llama3_8b", block_tokens=16)
    with pytest.raises(LiveError, match=r"engine.block_tokens=16: on a CPU .* multiple of 32"):
        VllmBackend(odd, model=model).serve(trace_of([0.0]), policy_set())
    with pytest.raises(LiveError, match="engine 0 did not start"):
        VllmBackend(DEPLOYMENT, model=model, engine_options={"dtype": "float99"}).serve(
            trace_of([0.0]), policy_set()
        )


TIGHT = Deployment.of(
    "a100_80g", "llama3_8b", block_tokens=32, num_gpu_blocks=34, max_model_len=1024,
    max_num_batched_tokens=256, max_num_seqs=16,
)  # fmt: skip
STUBBORN = Path(__file__).with_name("stubborn_policies.py")


@pytest.fixture(scope="module")
def stepped(model: Path) -> Iterator[Any]:
    """An engine in this process, in tight memory."""
    from validate.vllm_plugin.live import SteppedEngine  # noqa: PLC0415

    options = VllmBackend(TIGHT, model=model).options(cpu=True)
    engine = SteppedEngine(options | {"scheduler_cls": "validate.vllm_plugin.PolicyScheduler"})
    yield engine
    engine.close()


def step_through(engine: Any, trace: Trace, policies: PolicySet, *, together: bool) -> list[Any]:
    """Who ended, in order, with cached tokens and preemptions: one by one or all at once."""
    engine.renew(policy_config(policies, 0, 0))
    found: list[tuple[str, Fate]] = []
    for row, prompt in enumerate(Prompts(trace, 32, engine.vocabulary)):
        output = int(trace.requests["output_tokens"][row])
        priority = int(trace.requests["priority"][row])
        engine.add(
            Request(row, 0, len(prompt), output, name=str(row), priority=priority), prompt.tolist()
        )
        while engine.busy and not together:
            found += engine.step()
    while engine.busy:
        found += engine.step()
    assert {fate.state for _, fate in found} == {"finished"}
    return [(int(name), fate.cached_tokens, fate.preemptions) for name, fate in found]


def simulated(trace: Trace, policies: PolicySet) -> list[Any]:
    """The same of the simulator, which must have been short of memory."""
    result = Simulator(TIGHT).serve(trace, policies)
    assert result.engines["evictions"][0] > 0
    ended = result.requests.sort_values(["finish_s", "admitted_s"], kind="stable")
    return list(zip(ended.index, ended["cached_tokens"], ended["preemptions"], strict=True))


@live
def test_policies_decide_in_a_stepped_engine_as_in_the_simulator(
    stepped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    load_module(STUBBORN)
    trace = changed(chats(14), session="", turn=0, kind="once")
    apart = changed(trace, arrival_s=1000.0 * np.arange(len(trace)))
    stock = simulated(apart, policy_set())
    assert step_through(stepped, trace, policy_set(), together=False) == stock
    for policies in (
        policy_set(eviction="lfu"),
        policy_set(reuse={"name": "cap", "max_tokens": 64}),  # use
        policy_set(reuse="half"),  # retain
    ):
        expected = simulated(apart, policies)
        assert expected != stock
        assert step_through(stepped, trace, policies, together=False) == expected

    ranks = np.random.default_rng(5).permutation(len(trace))
    burst = changed(trace, arrival_s=0.0, priority=ranks)
    stock = simulated(burst, policy_set())
    expected = simulated(burst, policy_set(admission="priority"))
    assert expected != stock
    for policies, outcome in ((policy_set(), stock), (policy_set(admission="priority"), expected)):
        assert sum(preemptions for _, _, preemptions in outcome) > 0
        assert step_through(stepped, burst, policies, together=True) == outcome
