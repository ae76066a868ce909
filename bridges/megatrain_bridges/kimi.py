"""Kimi-K2: DeepSeek-V3 under another model_type, which Transformers knows from remote code only.

With its configuration's class registered, config.json is read without running that code; the
architecture it names is DeepSeek-V3's, and so are tensors and bridge.
"""

import transformers


class KimiK2Config(transformers.DeepseekV3Config):  # type: ignore[misc]
    """DeepSeek-V3's configuration under Kimi's name."""

    model_type = "kimi_k2"


transformers.AutoConfig.register(KimiK2Config.model_type, KimiK2Config, exist_ok=True)
