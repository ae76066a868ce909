"""Architectures that do not compute here what their definition says, or cannot be tested.

Each with the reason, which the error tells the user.
"""

_REMOTE = "its definition is remote code that Transformers lacks, so no test can compare with it"

REFUSED = {
    "ChatGLMForConditionalGeneration": f"{_REMOTE}; GLM-4 and GLM-Edge in the form of "
    "GlmForCausalLM (zai-org/glm-4-9b-chat-hf) are supported",
    "ChatGLMModel": f"{_REMOTE}; GLM-4 and GLM-Edge in the form of GlmForCausalLM "
    "(zai-org/glm-4-9b-chat-hf) are supported",
    "DeepseekV4ForCausalLM": "its bridge cannot read the rope parameters of Transformers'",
    "FalconH1ForCausalLM": "its Mamba layers need mamba-ssm, which needs CUDA",
    "GlmMoeDsaForCausalLM": "its sparse attention gives other log-probabilities than Transformers'",
    "InternLM2ForCausalLM": f"{_REMOTE}; as LlamaForCausalLM, which InternLM's own "
    "tools/convert2llama.py makes of it, it is supported",
    "InternLM3ForCausalLM": _REMOTE,
    "NemotronHForCausalLM": "its Mamba layers need mamba-ssm, which needs CUDA",
}
