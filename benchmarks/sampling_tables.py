"""Tables of sampling on a GPU, from what benchmarks/sampling.py measured."""

from __future__ import annotations

from typing import Any


def docs_text(result: dict[str, Any] | None) -> str:
    """Everything that was measured."""
    if result is None:
        return "Not measured yet: `python benchmarks/sampling.py`."
    where = result["environment"]
    lines = [
        f"{where['gpu']}, driver {where['gpu_driver']}, torch {where['torch']}, "
        f"triton {where['triton']}, transformers {where['transformers']}, commit "
        f"{where['commit']}.",
        f"Ceiling of that run: linear read {result['linear_read_tb_s']:.2f} TB/s.",
        "",
        "| logits | rows | sampling | floor | ours (p20 to p80) | transformers | with log-probs "
        "| host, ours | host, transformers |",
        "| :-- | --: | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    parts = [row for row in result["rows"] if "parts" in row]
    for row in result["rows"]:
        if "parts" in row:
            continue
        ours, theirs, known = (
            row[name] for name in ("ours", "transformers", "transformers_with_logprobs")
        )
        lines.append(
            f"| {row['kind']} | {row['num_rows']} | {row['sampling']} | {row['floor_us']:.0f} "
            f"| **{ours['us']:.0f}** ({ours['p20']:.0f} to {ours['p80']:.0f}) "
            f"| {theirs['us']:,.0f} | {known['us']:,.0f}{_verdict(ours['us'], known['us'])} "
            f"| {ours['host_us']:.0f} | {theirs['host_us']:.0f} |"
        )
    lines += [
        "",
        "| logits | rows | the noise alone | log-sum-exp, entropy and varentropy |",
        "| :-- | --: | --: | --: |",
    ]
    lines += [
        f"| {row['kind']} | {row['num_rows']} | {row['parts']['noise']['us']:.0f} "
        f"| {row['parts']['uncertainty']['us']:.0f} |"
        for row in parts
    ]
    return "\n".join(lines)


def _verdict(ours: float, theirs: float) -> str:
    if ours <= theirs:
        return f" ({theirs / ours:.1f} ×)"
    return f" (**we lose: {ours / theirs:.2f} × longer**)"
