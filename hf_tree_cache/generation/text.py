"""From prompts to tokens, and from tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InvalidArgument

CONTEXT = 8
"""Tokens before a piece of text that decide how it is spelled (a leading space, half a letter)."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | torch.Tensor
"""Text, token ids, or the messages of a chat."""


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a text (with the tokenizer's special tokens), of ids, or of chat messages.

    Messages go through the chat template and end with the assistant's turn, which goes on where the
    last message is the assistant's own.

    Raises:
        InvalidArgument: an empty prompt, no tokenizer or no chat template where one is needed.
    """
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim > 1 and len(prompt) > 1:
            raise InvalidArgument(
                f"A prompt of shape {tuple(prompt.shape)}: give each row as a prompt of its own."
            )
        prompt = prompt.flatten().tolist()
    if isinstance(prompt, str):
        ids = _needed(tokenizer, "a prompt in words")(prompt)["input_ids"]
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        ids = _encode_messages(list(prompt), _needed(tokenizer, "a chat"))
    elif isinstance(prompt, Sequence) and all(
        isinstance(token, int) and not isinstance(token, bool) for token in prompt
    ):
        ids = list(prompt)
    else:
        raise InvalidArgument(
            "A prompt is a text, a list of token ids or a list of chat messages, not "
            f"{prompt!r:.80}. Several prompts go into one list."
        )
    if not ids:
        raise InvalidArgument(
            "An empty prompt: the model needs a token to begin with. Pass at least "
            "[tokenizer.bos_token_id]."
        )
    return ids


def encode_text(text: str | Sequence[int], tokenizer: Any) -> list[int]:
    """Token ids of text that goes on, without special tokens; ids as they are."""
    if isinstance(text, str):
        needed = _needed(tokenizer, "text to append")
        return needed(text, add_special_tokens=False)["input_ids"]
    return [int(token) for token in text]


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise InvalidArgument(f"{what} needs a tokenizer; pass one, or pass token ids.")
    return tokenizer


def _encode_messages(messages: list[Any], tokenizer: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidArgument(
            f"{type(tokenizer).__name__} has no chat template, so messages have no one form. Pass "
            "the prompt as text, or set tokenizer.chat_template."
        )
    goes_on = messages[-1].get("role") == "assistant"
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        tokenize=True,
        return_dict=True,
    )["input_ids"]


class TextStream:
    """Decodes one branch token by token.

    Letters of several tokens come with the last of them. Special tokens have no text.

    Args:
        tokenizer: anything with ``decode``.
        context: tokens before the first.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT:])
        self._shown = len(self._decode(self._window))
        self.text = ""
        self.is_whole = True
        """No letter is half done."""

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is complete now, perhaps none."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) < 4 * CONTEXT:
            self.is_whole = False
            return ""
        self.is_whole = True
        piece = text[self._shown :]
        self.text += piece
        if len(self._window) >= 3 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            text = self._decode(self._window)
        self._shown = len(text)
        return piece

    def flush(self) -> str:
        """What is left of half a letter at the end."""
        piece = self._decode(self._window)[self._shown :]
        self._shown += len(piece)
        self.text += piece
        return piece

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def decode_after(tokenizer: Any, context: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of ``tokens`` where they stand behind ``context``."""
    stream = TextStream(tokenizer, context)
    stream._window += tokens
    return stream.flush()
