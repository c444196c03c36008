"""The model that `auxstream run` is given, and its prompts as token ids.

Enters: a folder with a checkpoint, a config.json, or a word for a built-in configuration; prompts as text or as ids.
Leaves: a `Checkpoint` on its device, and `Prompt`s. Invariant: nothing is downloaded, no code that comes with a
checkpoint runs, and no weight that a checkpoint lacks is made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from .runtime.errors import InputError

_LAYERS: Final = {"gemma4-tiny": 2, "gemma4": 30}
"""Words for `--model`, and how many layers each has unless told."""
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
# The text model of a checkpoint that sees and hears too lies one name deeper.
_TEXT_ONLY: Final = {r"^model\.language_model\.": "model.", r"^language_model\.": ""}
_RANDOM_IDS: Final = 16


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model and what is known of it. `folder`: where its tokenizer would be; None for random weights."""

    name: str
    model: nn.Module
    weights: str
    vocabulary: int
    positions: int | None
    """Positions it is made for, where its config says."""
    folder: Path | None


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text they come from, if any."""

    ids: tuple[int, ...]
    text: str | None = None


def load(given: str, layers: int | None, device: torch.device, seed: int) -> Checkpoint:
    """Raises InputError for what is no model, or none that can be loaded whole."""
    from .capture.huggingface import build, gemma4_config

    if given in _LAYERS:
        config = gemma4_config(layers or _LAYERS[given], "tiny" if given == "gemma4-tiny" else "full")
        folder = None
    else:
        path = Path(given)
        config, folder = _config(path, layers), path if path.is_dir() else None
    if folder is None:
        dtype = getattr(config, "dtype", None) or torch.bfloat16
        model = _loading(given, lambda: build(config, device, dtype, seed))
    else:
        model = _weights(folder, config, device)
    weights = f"random weights, seed {seed}" if folder is None else "its own weights"
    return Checkpoint(
        given, model, weights, config.vocab_size, getattr(config, "max_position_embeddings", None), folder
    )


def _config(path: Path, layers: int | None) -> Any:
    """The configuration of the text model."""
    import transformers

    weights = path.is_dir() and any(path.glob("*.safetensors"))
    if not (weights and (path / "config.json").is_file()) and not (path.is_file() and path.suffix == ".json"):
        raise InputError(
            f"there is no model at {path}",
            expected="a folder with config.json and *.safetensors, a config.json by itself (random weights), or "
            + ", ".join(_LAYERS),
            came=_what_is_there(path),
            remedy="give the folder of a checkpoint that is on this machine: nothing is downloaded",
        )
    read = transformers.AutoConfig.from_pretrained
    made = _loading(str(path), lambda: read(str(path), local_files_only=True, trust_remote_code=False))
    config = made.get_text_config()
    return config if layers is None else _first_layers(config, layers)


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "nothing of that name"
    if path.is_file():
        return "a file that is no .json"
    missing = [name for name in ("config.json", "*.safetensors") if not any(path.glob(name))]
    return f"a folder without {' and '.join(missing)}"


def _first_layers(config: Any, layers: int) -> Any:
    """The same configuration, cut to its first layers."""
    total = config.num_hidden_layers
    if layers <= total:
        for name, value in list(vars(config).items()):
            if ("layer" in name or name == "kv_sharing_modes") and isinstance(value, list) and len(value) == total:
                setattr(config, name, value[:layers])
        config.num_hidden_layers = layers
    if config.num_hidden_layers != layers:
        raise InputError(
            f"this model cannot have {layers} layers",
            expected=f"at most {total}",
            came=f"--layers {layers}",
            remedy="leave --layers out, or cut the config.json by hand",
        )
    return config


def _weights(folder: Path, config: Any, device: torch.device) -> nn.Module:
    import transformers

    from .capture.huggingface import with_grouped_experts

    read = transformers.AutoModelForCausalLM.from_pretrained
    how: dict[str, Any] = {"config": config, "dtype": "auto", "local_files_only": True, "trust_remote_code": False}
    how |= {"key_mapping": _TEXT_ONLY, "output_loading_info": True}

    def make() -> tuple[Any, dict[str, Any]]:
        model, info = with_grouped_experts(lambda **experts: read(str(folder), **how, **experts))
        return model.to(device).eval(), info

    model, info = _loading(str(folder), make)
    if lacking := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise InputError(
            f"the checkpoint in {folder} does not have all weights of {type(model).__name__}",
            expected="every weight, in the shape that config.json says",
            came=f"{len(lacking)} missing or of another shape: {', '.join(lacking[:3])}"
            + (" ..." if len(lacking) > 3 else ""),
            remedy="complete the folder; or give its config.json alone, for random weights",
        )
    return model


def _loading(name: str, make: Callable[[], Any]) -> Any:
    """Whatever transformers raises about a model of the user's becomes one error."""
    from safetensors import SafetensorError

    try:
        return make()
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"transformers could not make a causal LM of {name}",
            expected="a config.json with a model_type that AutoModelForCausalLM knows, weights that fit it, and memory "
            "for them",
            came=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            remedy="the exception this one was raised from has transformers' own account",
        ) from error


# --- prompts ----------------------------------------------------------------------------------------------------------


def random_prompts(count: int, vocabulary: int, seed: int) -> list[Prompt]:
    """Prompts of random ids, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, _RANDOM_IDS), generator=draw).tolist()
    return [Prompt(tuple(row)) for row in ids]


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that hold something."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no text file",
            expected="UTF-8, a prompt in each line",
            came=str(error),
            remedy="write the prompts to a plain text file",
        ) from error
    if found := [line for line in lines if line.strip()]:
        return found
    raise InputError(
        f"{path} has no prompts",
        expected="a prompt in each line: text, or token ids as [1, 2, 3]",
        came=f"{len(lines)} empty lines" if lines else "an empty file",
        remedy="write some, or leave --prompts out for random ids",
    )


def encode(given: Sequence[str], checkpoint: Checkpoint) -> tuple[list[Prompt], Any]:
    """Prompts as ids, and the tokenizer if any is text. Raises InputError for text without a tokenizer, a prompt
    without tokens, and ids that the vocabulary does not have."""
    listed = [_ids(text) for text in given]
    tokenizer: Any = _tokenizer(checkpoint, given[listed.index(None)]) if None in listed else None
    prompts: list[Prompt] = []
    for number, (text, ids) in enumerate(zip(given, listed, strict=True), 1):
        made = Prompt(tuple(tokenizer(text)["input_ids"]), text) if ids is None else Prompt(tuple(ids))
        if not made.ids:
            raise InputError(
                f"prompt {number} has no tokens",
                expected="at least one",
                came=repr(text) + ("" if ids is not None else f", of which {type(tokenizer).__name__} makes none"),
                remedy="leave it out, or check the checkpoint's tokenizer files",
            )
        if outside := [i for i in made.ids if not 0 <= i < checkpoint.vocabulary]:
            raise InputError(
                f"prompt {number} has ids outside the vocabulary",
                expected=f"0 to {checkpoint.vocabulary - 1}",
                came=", ".join(map(str, outside[:5])) + (" ..." if len(outside) > 5 else ""),
                remedy="take ids of this model's own tokenizer",
            )
        prompts.append(made)
    return prompts, tokenizer


def _ids(text: str) -> list[int] | None:
    """Token ids written as JSON; None for text."""
    try:
        read: Any = json.loads(text)
    except ValueError:
        return None
    return cast("list[int]", read) if isinstance(read, list) and all(type(i) is int for i in read) else None


def _tokenizer(checkpoint: Checkpoint, text: str) -> Any:
    """The checkpoint's own. Where its files are not there, transformers would make an empty one."""
    folder = checkpoint.folder
    if folder is None or not any(any(folder.glob(name)) for name in _TOKENIZERS):
        where = f"random weights ({checkpoint.name})" if folder is None else f"none in {folder}"
        raise InputError(
            "a prompt is text, and there is no tokenizer to read it with",
            expected=f"one of {', '.join(_TOKENIZERS)} beside the weights",
            came=f"{where}; the prompt {text[:40]!r}",
            remedy="give token ids, as [1, 2, 3]; or add the model's tokenizer files to its folder",
        )
    import transformers

    read = transformers.AutoTokenizer.from_pretrained
    return _loading(str(folder), lambda: read(str(folder), local_files_only=True, trust_remote_code=False))
