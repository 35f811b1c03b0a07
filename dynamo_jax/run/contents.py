"""What a checkpoint holds, under which names, and what stands in for what an older one lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Contents(NamedTuple):
    """All that a run needs to go on as if nothing had happened."""

    train: Any  # the policy's state: parameters, moments, counts (`update.TrainState`)
    history: Any  # what allocation knows of the prompts (`allocation.AllocationState`)
    data: Mapping[str, Any] = {}  # which prompts come next, of which set (`PromptIterator.state`)
    evals: list[str] | None = None  # fingerprints of the held-out prompts; None: not known
    line: Mapping[str, Any] | None = None  # the step's metrics, which its line may still lack; None: it is written

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays, and JSON data."""
        arrays = {"train": self.train, "stats": self.history}
        return arrays, {"data": dict(self.data), "evals": self.evals, "line": self.line}

    @classmethod
    def load_state(cls, arrays: Mapping[str, Any], host: Mapping[str, Any]) -> Contents:
        """The inverse of `state`. Older runs saved a step after its line, and did not note the held-out prompts."""
        return cls(arrays["train"], arrays["stats"], host["data"], host.get("evals"), host.get("line"))


class Form(NamedTuple):
    """Arrays as some version saved them (`jax.ShapeDtypeStruct` leaves), and how those of today are made from them."""

    arrays: Any
    upgrade: Callable[[Any], Any] = lambda arrays: arrays


def forms(train: Sequence[Form], history: Sequence[Form]) -> list[Form]:
    """The forms of a whole state, today's first, from those of its parts."""

    def combined(t: Form, h: Form) -> Form:
        def upgrade(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {"train": t.upgrade(arrays["train"]), "stats": h.upgrade(arrays["stats"])}

        return Form({"train": t.arrays, "stats": h.arrays}, upgrade)

    return [combined(t, h) for t in train for h in history]


def with_params_alone(params: Any) -> dict[str, Any]:
    """The arrays of a state of which only the parameters are wanted."""
    return {"train": {"params": params}}


def params_of(arrays: Mapping[str, Any]) -> Any:
    """The parameters in what was restored into `with_params_alone`."""
    return arrays["train"]["params"]
