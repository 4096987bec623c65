"""What may be configured, and the one line that a mistake gives."""

# ruff: noqa: E402 - vLLM is looked for before what needs it is imported

from __future__ import annotations

import json
import re
from socket import socket
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="needs vLLM: make validate builds an environment with it")

from policies import registry
from policies.registry import policy_set
from sim.latency import AffineStepModel
from validate.decisions import read as read_decisions
from validate.tests.plugin_bench import LIMITS
from validate.vllm_plugin import bare, config
from validate.vllm_plugin.live import renew
from validate.vllm_plugin.scheduler import PolicyScheduler
from validate.vllm_plugin.views import StepTimes
from validate.workloads import Entry, Workload

STEPS = {"c0_s": 0.002, "cp_s": 3e-5, "cd_s": 4e-5, "cc_s": 1e-7, "ca_s": 1e-9, "cn_s": 1e-3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lru"], "servelab is ['lru']; allowed: a mapping"),
        ({"evicton": "lru"}, "no key 'evicton'; did you mean 'eviction'?"),
        ({"eviction": "lruu"}, "no policy 'eviction/lruu'; did you mean 'eviction/lru'?"),
        ({"eviction": "reuse/cap"}, "servelab.eviction is 'reuse/cap', which is of another kind"),
        ({"eviction": 3}, "servelab.eviction is 3; allowed: a name, or a mapping"),
        ({"eviction": {"grace_s": 3}}, "servelab.eviction is {'grace_s': 3}; allowed: a name"),
        (
            {"eviction": {"name": "slo_aware", "grace": 3}},
            "did you mean 'grace_s'?",
        ),
        (
            {"eviction": {"name": "slo_aware", "grace_s": "long"}},
            "eviction/slo_aware: grace_s is 'long'; allowed: float",
        ),
        ({"reuse": {"name": "cap", "max_tokens": -1}}, "max_tokens is -1; at least 0 is allowed"),
        ({"eviction": "belady"}, "eviction/belady reads the future"),
        ({"routing": "random"}, "servelab.routing: one engine does not route"),
        ({"pd": "colocated"}, "servelab.pd: one engine does not route"),
        ({"seed": "7"}, "servelab.seed is '7'; allowed: a whole number"),
        ({"policy_modules": "mine.py"}, "servelab.policy_modules is 'mine.py'; allowed: a list"),
        ({"policy_modules": ["no/such.py"]}, "no policy file no/such.py"),
        ({"decisions": 1}, "servelab.decisions is 1; allowed: the path of a file"),
        ({"step_times": {"c0_s": 1.0}}, "allowed: a mapping with exactly c0_s, cp_s, cd_s"),
        ({"step_times": STEPS | {"cp_s": -1}}, "servelab.step_times.cp_s is -1; allowed"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(given: Any, message: str) -> None:
    with pytest.raises(config.ConfigError, match=re.escape(message)) as caught:
        config.read({"servelab": given})
    assert "\n" not in str(caught.value)


def test_the_engine_does_not_start_with_a_mistake() -> None:
    workload = Workload(name="", limits=LIMITS, policies={"eviction": "lfuu"}, entries=())
    with pytest.raises(config.ConfigError, match="did you mean 'eviction/lfu'"):
        bare.BareEngine(workload)


def test_nothing_configured_is_no_policy() -> None:
    for given in ({}, {"other": 1}, {"servelab": {}}, None, object()):
        assert config.read(given) == config.Settings()


def test_policies_and_step_times_are_made_as_configured() -> None:
    settings = config.read(
        {
            "servelab": {
                "admission": "admission/priority",
                "eviction": {"name": "slo_aware", "grace_s": 3},
                "step_times": STEPS,
            }
        }
    )
    assert settings.admission is not None
    assert settings.admission.policy_name == "admission/priority"  # type: ignore[attr-defined]
    assert settings.eviction.grace_s == 3.0  # type: ignore[union-attr]
    assert settings.reuse is None
    assert isinstance(settings.steps, AffineStepModel)
    assert settings.steps.prefill_ps(100) == 10**9 * 6 + 10**3 * 10_000


RANDOM = """
from dataclasses import dataclass
from policies.eviction.lru import Lru
from policies.registry import register

@register("eviction/seeded_for_plugin_test")
@dataclass(eq=False)
class Seeded(Lru):
    seed: int = 0
"""


def test_modules_are_loaded_first_and_seeds_are_the_simulators(tmp_path: Any, request: Any) -> None:
    name = "seeded_for_plugin_test"
    request.addfinalizer(lambda: registry._registered.pop(f"eviction/{name}", None))
    path = tmp_path / "plugin_test_policy.py"
    path.write_text(RANDOM, encoding="utf-8")
    given = {"servelab": {"eviction": name, "policy_modules": [str(path)], "seed": 7}}
    seeds = [config.read(given, engine).eviction.seed for engine in (0, 3)]  # type: ignore[union-attr]
    expected = [
        registry.build(policy_set(eviction=name).eviction, 7, f"eviction/{engine}").seed  # type: ignore[attr-defined]
        for engine in (0, 3)
    ]
    assert seeds == expected
    assert seeds[0] != seeds[1]


def test_decisions_are_written_to_the_file(tmp_path: Any) -> None:
    path = tmp_path / "rows" / "decisions.jsonl"
    entry = Entry(id="a", at_step=0, prompt=tuple(range(40)), output_tokens=3)
    policies = {"eviction": "lru", "decisions": str(path)}
    workload = Workload(name="", limits=LIMITS, policies=policies, entries=(entry,))
    engine = bare.BareEngine(workload)
    rows = engine.run()
    engine.scheduler.shutdown()
    assert len(rows) == 3
    assert [row["scheduled"] for row in read_decisions(path)] == [{"a": 40}, {"a": 1}, {"a": 1}]
    assert json.loads(path.read_text("utf-8").splitlines()[0])["entered"] == ["a"]
    again = bare.BareEngine(workload)
    again.run()
    again.scheduler.shutdown()
    assert [row["step"] for row in read_decisions(path)] == [0, 1, 2] * 2


def test_every_data_parallel_rank_has_a_file_of_its_own() -> None:
    given = {"servelab": {"decisions": "logs/rows.jsonl"}}
    found = [config.read(given, engine).decisions for engine in (0, 1, 12)]
    assert found == ["logs/rows.jsonl", "logs/rows-1.jsonl", "logs/rows-12.jsonl"]


def test_prefixes_that_end_inside_blocks_are_refused() -> None:
    workload = Workload(name="", limits=LIMITS, policies={"eviction": "lru"}, entries=())
    scheduler = bare.BareEngine(workload).scheduler
    scheduler.hash_block_size = 8
    with pytest.raises(config.ConfigError, match="match every 8 tokens in blocks of 16"):
        scheduler._check_cache()


class Publisher(PolicyScheduler):
    """Holds a port while it lives, like a scheduler that publishes KV events."""

    port = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.held = socket()
        self.held.bind(("127.0.0.1", type(self).port))
        type(self).port = self.held.getsockname()[1]

    def shutdown(self) -> None:
        super().shutdown()
        self.held.close()


def test_the_next_scheduler_may_publish_where_the_last_one_did() -> None:
    options = bare.engine_config(LIMITS, additional_config={"servelab": {"eviction": "lru"}})
    first = bare._scheduler(options, Publisher)
    core = SimpleNamespace(scheduler=first, vllm_config=options, structured_output_manager=None)
    try:
        renew(core, {"eviction": "lfu"})
        assert core.scheduler is not first
        assert core.scheduler.policies["eviction"].policy_name == "eviction/lfu"
    finally:
        core.scheduler.shutdown()


def test_step_times_are_measured_where_none_are_given() -> None:
    times = StepTimes()
    assert times.prefill_s(100) == pytest.approx(100 * StepTimes.GUESS_S)
    at_s = 0.0
    for step in range(400):
        took_s = 0.004 if step % 2 else 0.004 + 200 * 2e-5
        times.ran(at_s, at_s + took_s, 0 if step % 2 else 200)
        at_s += took_s
    assert times.prefill_s(1000) == pytest.approx(0.004 + 1000 * 2e-5, rel=0.02)
    times = StepTimes()
    times.ran(0.0, 0.010, 0)
    times.ran(0.005, 0.020, 0)  # overlaps the step before
    assert times.prefill_s(0) == pytest.approx(0.010)
