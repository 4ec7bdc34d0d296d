"""SHADOW: settings are kept, running is refused in a sentence and changes nothing."""

from __future__ import annotations

import pytest

from hf.tiny import IDS, llama
from veneer import PeftConfig, ShadowConfig, get_peft_model


def test_settings_are_kept_and_use_is_refused(tmp_path):
    ShadowConfig(r=4, target_modules=["layers.0"], shadow_num_hidden_layers=1).write(tmp_path)
    config = PeftConfig.read(tmp_path)
    assert isinstance(config, ShadowConfig) and config.r == 4 and config.shadow_num_hidden_layers == 1
    base = llama()
    expected = base(IDS).logits
    for one in (config, ShadowConfig()):
        with pytest.raises(NotImplementedError, match="leaves open how its small shadow model"):
            get_peft_model(base, one)
    assert (base(IDS).logits == expected).all()
