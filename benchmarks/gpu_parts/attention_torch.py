"""torch's scaled_dot_product_attention, causal, one segment a row: what `transformers` calls."""

from __future__ import annotations

from gpu_parts.common import PEAK, emit, torch_measured, torch_on


def main(small: bool) -> None:
    if (found := torch_on(small)) is None:
        return
    torch, device = found
    G, S, A, K, H = (4, 4096, 12, 2, 128) if not small else (2, 64, 4, 2, 16)
    q, k, v = (
        torch.randn(G, heads, S, H, device=device, dtype=torch.bfloat16, requires_grad=True) for heads in (A, K, K)
    )
    w = torch.randn_like(q)

    def attend() -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def forward() -> None:
        with torch.no_grad():
            attend()

    def both() -> None:
        q.grad = k.grad = v.grad = None
        attend().backward(w)  # type: ignore[attr-defined]

    for which, run, times in (("forward", forward, 1.0), ("value and gradient", both, 3.5)):
        took = torch_measured(torch, run, 10 if not small else 1)
        of_peak = times * 2.0 * G * A * S * S * H / took["seconds"] / PEAK
        row = {"form": "torch sdpa, one segment a row", "pass": which, "G": G, "S": S, "A": A, "K": K, "H": H}
        emit(**row, **took, of_peak=of_peak)
