"""Conversations as calibration text: the messages of a row, and what a tokenizer's chat template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.errors import DataError, first_line

CONVERSATION_FIELDS = ("messages", "conversations")
"""Columns that hold a list of messages, looked for behind those of text."""
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Turn = Mapping[str, Any]


def turns_of(value: Sequence[Any], place: str) -> tuple[Turn, ...]:
    """The messages of a row: `role` and `content`, as chat templates take them, or `from` and `value`, as ShareGPT's
    sets have them; other keys of a message (`tool_calls`, `name`) are kept for the template.

    Raises:
        DataError: there is none, or one is no such mapping; `place` says where.
    """
    turns = []
    for number, turn in enumerate(value, start=1):
        if isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and "content" in turn:
            turns.append({key: part for key, part in turn.items() if part is not None or key == "content"})
        elif isinstance(turn, Mapping) and turn.get("from") in _SHAREGPT and isinstance(turn.get("value"), str):
            turns.append({"role": _SHAREGPT[turn["from"]], "content": turn["value"]})
        else:
            raise DataError(
                f"{place}: message {number} has no role and content (or from and value, as ShareGPT's have).",
                "Mend the row, or set field to one that holds text.",
            )
    if not turns:
        raise DataError(f"{place}: the conversation is empty.", "Fill it, or remove the row.")
    return tuple(turns)


def rendered(turns: Sequence[Turn], tokenizer: Any, place: str) -> str:
    """The text of a conversation by the tokenizer's chat template, its special tokens included; behind a last message
    of the user with the beginning of the answer, as it is when served.

    Raises:
        DataError: the tokenizer has no template, or the template refuses these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{place}: the row is a conversation, and the model's tokenizer has no chat template to make text of it.",
            "Set field to one that holds text.",
        )
    asked = turns[-1]["role"] == "user"
    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asked)
    except Exception as error:  # whatever a template raises, of roles and contents that it does not take
        raise DataError(
            f"{place}: the tokenizer's chat template does not take this conversation: {first_line(error)}.",
            "Mend or remove the row, or set field to one that holds text.",
        ) from error
    return text
