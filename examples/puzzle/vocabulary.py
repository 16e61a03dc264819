"""The symbols that puzzles and their solutions are written in, and the tokenizer over them."""

from __future__ import annotations

import re
from typing import Any

PAD, END = "<pad>", "<end>"
SYMBOLS = (PAD, END, "make ", " from", " left:", " ", "\n", *"+-*/=", *"0123456789")
IDS = {symbol: index for index, symbol in enumerate(SYMBOLS)}

_PATTERN = "make | from| left:|[-+*/= \n0-9]"


def encode(text: str) -> list[int]:
    """The same ids as `tokenizer`, for text that the task wrote."""
    return [IDS[symbol] for symbol in re.findall(_PATTERN, text)]


def tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` that pads on the left, as generation needs it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(IDS, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
