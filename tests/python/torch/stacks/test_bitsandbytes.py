"""QLoRA on the CPU: bitsandbytes' 4-bit Linears under PEFT's LoRA, loaded as users load them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tests.python.torch.stacks.training import BF16, FP32, Doors, Recording, assert_same, collate, operate, rows, tiny_llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


def qlora(folder, dtype=torch.float32, prepared=False):
    """The tiny Llama with NF4 weights in all Linears but the head, and adapters none of which is zero."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype, device_map="cpu")
    if prepared:  # checkpointing, and what is not packed in float32
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)).train()
    kinds = {type(m.base_layer).__name__ for m in model.modules() if hasattr(m, "base_layer")}
    assert kinds == {"Linear4bit"}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def train(folder, surgery=False, **options):
    """Three steps of SGD."""
    model = qlora(folder, **options)
    if surgery:
        report = operate(model)
        assert sum(pattern == "lora" for _, pattern in report.patched) == 14
        before, after = report.bytes_per_token
        assert 0 < after < 0.8 * before
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    data, losses = rows(), []
    with Recording(model) as recording:
        for step in range(3):
            loss = model(**collate(data[2 * step : 2 * step + 2])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return recording.run(model, losses)


@pytest.mark.parametrize(
    "options, tolerance",
    [
        (dict(), FP32), (dict(prepared=True), FP32), (dict(dtype=torch.bfloat16), BF16),
        (dict(dtype=torch.bfloat16, prepared=True), BF16),
    ],
    ids=["fp32", "prepared, fp32", "bf16", "prepared, bf16"],
)  # fmt: skip
def test_qlora(options, tolerance, saved, monkeypatch, caplog):
    stock = train(saved, **options)
    doors = Doors(monkeypatch.setattr)
    ours = train(saved, surgery=True, **options)
    assert_same(ours, stock, tolerance)
    assert len(stock.moved) == 28 and doors.again > 0
    assert "quantization state" not in caplog.text  # what bitsandbytes says of a weight without its quant_state
