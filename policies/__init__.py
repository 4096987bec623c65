"""The bench of policies. Standard library only, so one object runs in the simulator and in vLLM."""
