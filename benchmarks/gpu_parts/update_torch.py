"""The same with `transformers` and torch: bfloat16, gradient checkpointing, AdamW, micro-batches of two rows."""

from __future__ import annotations

from typing import Any

from gpu_parts.common import PEAK, QWEN_1_5B, TINY, emit, flops, torch_measured, torch_on


def main(small: bool) -> None:
    if (found := torch_on(small)) is None:
        return
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        emit(skipped=str(error))
        return
    torch, device = found
    shape, rows, S, micro = (QWEN_1_5B, 16, 4096, 2) if not small else (TINY, 4, 64, 2)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        intermediate_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        max_position_embeddings=S,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=not small)
    tokens = torch.randint(shape["vocab_size"], (rows, S), device=device)

    def logp(batch: Any) -> Any:
        logits = model(batch).logits[:, :-1].float()
        return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")

    def score() -> None:
        with torch.no_grad():
            for first in range(0, rows, micro):
                logp(tokens[first : first + micro])

    def update() -> None:
        for first in range(0, rows, micro):
            (-logp(tokens[first : first + micro]) / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for name, run, passes in (("score", score, 1), ("update", update, 3)):
        took = torch_measured(torch, run, 2 if not small else 1)
        work = passes * flops(shape, rows * S, S)
        row = {"program": f"transformers, {name}", "tokens": rows * S, **took}
        emit(**row, tokens_per_second=rows * S / took["seconds"], of_peak=work / took["seconds"] / PEAK)
