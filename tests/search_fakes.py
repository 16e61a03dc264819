"""What tests of searches share: a tokenizer of one character a token, and a count of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from models import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = (
    "\n 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/=().,:;?!'\"<>[]{}_#%&"
)


def letters() -> Any:
    """A tokenizer of transformers for the tiny models: ids 4 and up are single characters."""
    known = [*SPECIAL, *LETTERS]
    known += [chr(0x3B1 + i) for i in range(VOCAB - len(known))]
    vocab = {text: i for i, text in enumerate(known[:VOCAB])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@contextmanager
def tokens_through(model: Any) -> Iterator[list[int]]:
    """Counts, in the model itself, the tokens of every forward; for prompts of one length."""
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"].numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
