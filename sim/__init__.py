"""The simulated backend: any chip, any policy, vLLM's rules, on SimPy.

Invariants, checked by ``audit()`` at the end of every run and by the tests:

I1  conservation: requests that arrived = finished + rejected + waiting + running.
I2  blocks: free + cached and used + unhashed and used = total; what can be evicted is what is
    cached and has no user.
I3  causality: arrival <= admission < first token <= finish, and the clock never goes back.
I4  determinism: the same seed gives the same bytes.
I5  equivalence: the fast engine == the step-by-step engine, in every decision and every time.
I6  no future: no view holds the true output length.
I7  work conservation: no engine sleeps while a request waits that may run.
I8  bounds: no step beats the roofline, no cache beats Belady's.
I9  event budget: SimPy events per request do not grow with the output length.
"""

from policies.api import PolicyError, PolicySet
from sim.backend import Backend, Deployment
from sim.hardware import Chip, ProfileError, chips, load_chip
from sim.model import ModelSpec, load_model, models
from sim.result import Result, ResultError
from sim.scheduler import EngineLimits
from sim.simulator import Simulator

__all__ = [
    "Backend",
    "Chip",
    "Deployment",
    "EngineLimits",
    "ModelSpec",
    "PolicyError",
    "PolicySet",
    "ProfileError",
    "Result",
    "ResultError",
    "Simulator",
    "chips",
    "load_chip",
    "load_model",
    "models",
]
