"""A plug-in of vLLM's that mends LoRA where vLLM 0.32 goes wrong.  Runs in vLLM's own processes.

It is found by its entry points, beside this package, when that folder is on PYTHONPATH and
VLLM_PLUGINS names it.  Imports no megatrain.
"""
