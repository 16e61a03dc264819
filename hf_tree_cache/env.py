"""What a bug report or a benchmark should say about the machine: `python -m hf_tree_cache.env`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

COMMIT_VARIABLE = "HF_TREE_CACHE_COMMIT"
"""The commit of a copy of the tree that has no history to ask, as on a borrowed machine."""

PACKAGES = (
    "hf_tree_cache",
    "torch",
    "transformers",
    "triton",
    "accelerate",
    "safetensors",
    "huggingface_hub",
)


def environment() -> dict[str, str]:
    """Returns versions, platform, commit and GPUs; what is missing is said, never raised."""
    report = {"python": platform.python_version()}
    report |= {package: version_of(package) for package in PACKAGES}
    report["commit"] = _commit()
    report["platform"] = platform.platform()
    report["cpu_count"] = str(os.cpu_count())
    return report | _devices()


def main() -> None:
    report = environment()
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:<{width}}  {value}")


def version_of(package: str) -> str:
    """Its version, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    if told := os.environ.get(COMMIT_VARIABLE):
        return told
    root = Path(__file__).resolve().parents[1]
    # An installed package may lie inside somebody else's repository.
    if not (root / ".git").exists():
        return "not a git checkout"
    return _first_line("git", "-C", str(root), "rev-parse", "--short", "HEAD") or "unknown"


def _devices() -> dict[str, str]:
    try:
        import torch
    except Exception as error:
        return {"gpu": f"unknown, torch does not import: {error}"}
    report = {
        "torch_threads": str(torch.get_num_threads()),
        "torch_cuda": torch.version.cuda or "none",
        "torch_hip": torch.version.hip or "none",
    }
    if not torch.cuda.is_available():
        return report | {"gpu": "none"}
    count = torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability(0)
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return report | {
        "gpu": torch.cuda.get_device_name(0) + (f" x {count}" if count > 1 else ""),
        "gpu_capability": f"{major}.{minor}",
        "gpu_driver": driver or "unknown",
    }


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
