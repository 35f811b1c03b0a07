"""Log-probabilities and entropies in torch: written down, compiled, and Liger's Triton and CuTe kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_parts.common import PEAK, emit, torch_measured, torch_on


def main(small: bool) -> None:
    if (found := torch_on(small)) is None:
        return
    torch, device = found
    D, V = (4096, 131072) if not small else (32, 700)
    for T in (8192, 2048, 32768) if not small else (48,):
        hidden = torch.randn(T, D, device=device, dtype=torch.bfloat16).mul_(3 * D**-0.5).requires_grad_()
        head = torch.randn(V, D, device=device, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(V, (T,), device=device)
        for form, f in forms(torch, small).items():
            row: dict[str, Any] = {"form": form, "T": T, "D": D, "V": V, "dtype": "bfloat16"}

            def forward(f: Callable[..., Any] = f) -> None:
                with torch.no_grad():
                    f(hidden, head, targets)  # noqa: B023

            def both(f: Callable[..., Any] = f) -> None:
                hidden.grad = head.grad = None  # noqa: B023
                f(hidden, head, targets).backward()  # noqa: B023

            for which, run, products in (("forward", forward, 1), ("value and gradient", both, 4)):
                try:
                    took = torch_measured(torch, run, 5 if not small else 1)
                except Exception as error:  # another project's kernel, or out of memory
                    emit(**row, **{"pass": which}, failed=str(error)[:300])
                    continue
                of_peak = 2.0 * products * T * D * V / took["seconds"] / PEAK
                emit(**row, **{"pass": which}, **took, of_peak=of_peak)


def forms(torch: Any, small: bool) -> dict[str, Callable[..., Any]]:
    """Each gives a scalar: the sum of what it has for every token."""

    def naive(hidden: Any, head: Any, targets: Any) -> Any:
        logp = torch.log_softmax((hidden @ head.T).float(), -1)
        return logp.gather(1, targets[:, None]).sum() - (logp.exp() * logp).sum()

    found: dict[str, Callable[..., Any]] = {"torch, logp and entropy": naive}
    if small:
        return found
    found["torch.compile, logp and entropy"] = torch.compile(naive)
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Triton

        def liger(hidden: Any, head: Any, targets: Any) -> Any:
            loss = Triton.apply(hidden, head, targets, None, None, -100, 0.0, 0.0, "sum")
            return loss[0] if isinstance(loss, tuple) else loss

        found["Liger Triton, logp alone"] = liger
    except ImportError as error:
        emit(skipped=f"Liger's Triton kernel: {error}")
    try:
        from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
            LigerFusedScaledCrossEntropySM90Function as CuTe,
        )

        def cute(hidden: Any, head: Any, targets: Any) -> Any:
            nll, entropy = CuTe.apply(hidden, head, targets, 1.0, -100, 1, True)
            return entropy.float().sum() - nll.sum()

        found["Liger CuTe, logp and entropy"] = cute
    except ImportError as error:
        emit(skipped=f"Liger's CuTe kernel: {error}")
    return found
