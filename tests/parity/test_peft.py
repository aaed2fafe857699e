"""The library PEFT computes the same with adapters that were saved here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from axicon.model import checkpoint
from axicon.model.adapters import Lora, Prefix, Scheme, SoftPrompt, peft_config, peft_tensors
from axicon.protocols import Moment
from tests.services.tiny import tiny_model


@pytest.mark.parametrize(
    "scheme", [Lora(r=3, targets=("q", "v", "down")), Prefix(length=4), SoftPrompt(length=3)]
)
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_what_was_trained(scheme: Scheme, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the library PEFT is not installed")
    from transformers import AutoModelForCausalLM

    base = tiny_model(tmp_path / "base", positions=64)
    model = checkpoint.load(base, dtype=torch.float32)
    scheme.install(model, Moment(0, 1).key)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    tensors = {name: value.contiguous() for name, value in peft_tensors(model).items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert isinstance(scheme, Lora | Prefix | SoftPrompt)
    config = peft_config(scheme, model, str(base))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()
    tokens = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want = theirs(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -9:]
        plain = checkpoint.load(base, dtype=torch.float32).logits(tokens)
        got = model.logits(tokens)
    assert not torch.allclose(got, plain, atol=1e-2)
    assert torch.allclose(got, want, atol=1e-4)
