"""The hub: whether it answers, before its libraries ask it again and again."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantcli.errors import first_line

SECONDS = 5.0
"""How long the hub may take to answer at all. What is asked of it then has its libraries' own patience and retries."""


@contextmanager
def hub_asked() -> Iterator[str]:
    """Yields why the hub does not answer; empty if it does. If not, its libraries take what is in their caches, in the
    body of the `with` statement, and do not try to reach it."""
    from huggingface_hub import constants

    obstacle = _obstacle()
    switches: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in switches]
    try:
        for module in switches if obstacle else ():
            module.HF_HUB_OFFLINE = True
        yield obstacle
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _obstacle() -> str:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)  # whatever it says, it answers
    except Exception as error:  # of the library's HTTP client, which is not the same in all of its versions
        said = re.sub(r"\[Errno -?\d+\] ", "", first_line(error))
        return f"{constants.ENDPOINT} cannot be reached ({said})"
    return ""
