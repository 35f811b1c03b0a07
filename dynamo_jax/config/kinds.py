"""Kinds of values that settings in several files have."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

STRICT = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# Of a section with a key that is no name in Python. Its alias is the key everywhere but in Python.
ALIASED = pydantic.ConfigDict(**STRICT, validate_by_name=True, validate_by_alias=True)
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
