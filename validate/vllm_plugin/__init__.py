"""The policies of this project inside a real vLLM; the only package that imports it.

Use it with ``--scheduler-cls validate.vllm_plugin.PolicyScheduler`` (asynchronous scheduling:
``AsyncPolicyScheduler``) and ``--additional-config '{"servelab": {"eviction": "lfu"}}'``.
"""

from validate.vllm_plugin import seams

seams.check()

from validate.vllm_plugin.scheduler import (  # noqa: E402 - only into a vLLM that fits
    AsyncPolicyScheduler,
    PolicyScheduler,
)

__all__ = ["AsyncPolicyScheduler", "PolicyScheduler"]
