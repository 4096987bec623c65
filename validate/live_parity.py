"""Whether a live engine decided what vLLM's scheduler decides without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from policies.api import AdmissionPolicy, PolicySet, Slo
from policies.registry import build, describe
from sim.backend import Deployment
from sim.result import Result
from traces import Trace
from validate.comparison import Parity
from validate.decisions import Decision, first_difference
from validate.prompts import Prompts
from validate.vllm_backend import policy_config
from validate.workloads import Entry, Workload

__all__ = ["decision_parity", "unchecked"]


def unchecked(deployment: Deployment, policies: PolicySet, live: Result) -> str:
    """Why the decisions of a live run cannot be compared, in words; empty if they can."""
    if deployment.engines > 1:
        return "which of several engines gets a request depends on time"
    admit = build(policies.admission, 0, "admission/0").__class__.admit
    if admit is not AdmissionPolicy.admit:
        return (
            f"admission {describe(policies.admission)} may defer or reject by the clock, "
            f"which the scheduler alone does not have"
        )
    if live.meta["incomplete"]:
        return "the live run is incomplete"
    return ""


def decision_parity(
    rows: Sequence[Decision],
    trace: Trace,
    deployment: Deployment,
    policies: PolicySet,
    *,
    seed: int = 0,
) -> Parity:
    """The decisions of a live engine against those of the same scheduler without a model.

    The latter is given the same requests at the same steps; ``unchecked`` says where that
    cannot be.
    """
    from validate.vllm_plugin.bare import BareEngine  # noqa: PLC0415 - imports vLLM

    # Other tokens than the live ones, but shared by the same requests, which is all that counts.
    prompts = Prompts(trace, deployment.limits.block_tokens, range(1 << 16), seed)
    place = {name: row for row, name in enumerate(trace.requests["id"])}
    table = trace.requests.to_dict("records")
    entries = []
    for step, decision in enumerate(rows):
        for name in decision["entered"]:
            row = table[place[name]]
            slo = Slo(
                name=row["slo_class"] or "none",
                ttft_s=row["slo_ttft_s"],
                tpot_s=row["slo_tpot_s"],
                e2e_s=row["slo_e2e_s"],
            )
            told = {key: row[key] for key in ("priority", "session", "tenant", "model", "kind")}
            prompt = tuple(prompts[place[name]].tolist())
            entries.append(
                Entry(id=name, at_step=step, prompt=prompt, output_tokens=row["output_tokens"],
                      slo=slo, **told)
            )  # fmt: skip
    limits = replace(
        deployment.limits,
        num_gpu_blocks=deployment.kv_blocks() + 1,
        max_model_len=deployment.max_model_len(),
    )
    workload = Workload(
        name=trace.name,
        limits=limits,
        policies=policy_config(policies, seed, 0),
        entries=tuple(entries),
    )
    alone = BareEngine(workload).run()
    differing = [
        (step, first)
        for step, (ours, theirs) in enumerate(zip(rows, alone, strict=False))
        if (first := first_difference([ours], [theirs])) is not None
    ]
    count = max(len(rows), len(alone))
    extra = count - min(len(rows), len(alone))
    words = f"{extra} steps more on one side" if extra else ""
    if differing:
        step, first = differing[0]
        words = f"step {step}: {first.field}: live {first.ours!r}, alone {first.theirs!r}"
    return Parity(rows=count, equal=count - extra - len(differing), first=words)
