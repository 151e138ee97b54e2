"""The bundled base model, and how any base model is loaded and named by hash.

A base model is a folder in Hugging Face form, by path or hub id, or the small one in this folder
(`BUNDLED`), which `workers/base_model/make.py` made. All go through the same `from_pretrained`.
Importing this package loads no engine: torch and transformers come with the first `load`.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ledger.errors import ComputeError, ConfigError

BUNDLED = Path(__file__).parent / "tributary-base"
"""Folder of the bundled model."""

MODEL_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""Files that can change what the model computes: weights, configuration, tokenizer, template.
A README, a .gitattributes or a weights file in another format cannot: `load` reads safetensors."""

_CHUNK = 1 << 20


def folder(named: str | Path | None) -> Path:
    """The base model that somebody named, in settings or on a command line; else the bundled."""
    return Path(named) if named else BUNDLED


def load(path: str | Path = BUNDLED) -> tuple[Any, Any]:
    """`(model, tokenizer)`: a causal LM in float32 in eval mode on the CPU, and its tokenizer.

    `path` is a folder or a Hugging Face hub id. Weights are read from safetensors only (a pickle
    would run its author's code). Raises ConfigError when there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a small file read is no news
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no base model at {path}: {error}. Give the path of a folder with config.json and "
            "model.safetensors, a hub id, or make the bundled one: make base-model"
        ) from error
    return model.eval(), tokenizer


def with_adapter(model: Any, folder: str | Path, *, name: str = "default") -> Any:
    """`model` with the LoRA adapter in `folder` (PEFT's files) active, as a `PeftModel`."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft 0.21 asks transformers 5 for something by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


def digest(path: str | Path = BUNDLED) -> str:
    """SHA-256 over a model folder, in lower-case hex: the base model's hash in events.

    Defined as the hash of the text that `sha256sum` would print for its files: for each regular
    file directly in the folder whose suffix is in MODEL_SUFFIXES, ordered by name as bytes, one
    line `<sha256 hex>  <name>\\n`. So anyone recomputes it with
    `LC_ALL=C sha256sum *.jinja *.json *.safetensors | LC_ALL=C sort -k2 | sha256sum`
    (plus *.model and *.txt where present).

    Raises ConfigError when `path` is no folder or holds no weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{path} is no folder: a base model is hashed from its files. Download a hub model "
            "first (huggingface_hub.snapshot_download) and pass the folder"
        )
    files = sorted(
        (f for f in folder.iterdir() if f.is_file() and f.suffix in MODEL_SUFFIXES),
        key=lambda f: f.name.encode(),
    )
    if not any(f.suffix == ".safetensors" for f in files):
        raise ConfigError(f"{path} holds no .safetensors file: not a base model we can load")
    listing = "".join(f"{_sha256(f)}  {f.name}\n" for f in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _sha256(file: Path) -> str:
    state = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                state.update(chunk)
    except OSError as error:
        raise ComputeError(f"cannot read {file.name} of the base model: {error}") from error
    return state.hexdigest()
