"""From the state dict of the released ``imagebind_huge.pth`` to a folder that the encoder loads.

Names and shapes are the same on both sides. What changes is the container, and which towers are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from encoders.imagebind import ImageBind, ImageBindConfig
from encoders.imagebind_encoder import WEIGHTS_FILE, write_config
from encoders.preprocess import PreprocessConfig
from encoders.text_tokens import TextTokens

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
MASK = "modality_preprocessors.text.mask"
"""The one tensor of the release that holds infinities."""


def released_shapes(config: ImageBindConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a release with these sizes."""
    with torch.device("meta"):
        state = ImageBind(config).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def check_tokenizer(config: ImageBindConfig, tokenizer: Path | None) -> None:
    """Look whether a text tower has the vocabulary that it needs, in the folder ``tokenizer``.

    Raises:
        ValueError: a text tower without its tokenizer, or with one of another vocabulary.

    """
    if config.text is None:
        return
    if tokenizer is None:
        raise ValueError(
            "The text tower needs CLIP's vocabulary, which is not in the release. Give its folder with "
            "--tokenizer (Stable Diffusion 1.5 has it as tokenizer/), or leave the text tower out."
        )
    try:
        size = TextTokens.load(tokenizer, config.text.context_length).vocabulary_size
    except OSError as error:
        raise ValueError(str(error)) from error
    if size != config.text.vocabulary_size:
        raise ValueError(
            f"{tokenizer} has {size} tokens; the text tower expects {config.text.vocabulary_size}. "
            f"Use CLIP's vocabulary."
        )


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    narrow = tensor.to(dtype or tensor.dtype).contiguous()
    if bool((narrow.isinf() & tensor.isfinite()).any()):
        raise ValueError(
            f"{name} holds {float(tensor.abs().max()):g}, which {str(dtype).removeprefix('torch.')} cannot "
            f"hold. Choose bfloat16 or float32."
        )
    return narrow


def write_folder(
    tensors: Mapping[str, Tensor],
    folder: Path,
    config: ImageBindConfig,
    preprocessing: PreprocessConfig,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an encoder folder.

    Args:
        tensors: the release, checked against :func:`released_shapes`; those of towers that ``config``
            lacks are left out.
        folder: is made.
        config: the towers to keep.
        preprocessing: belongs to the release.
        tokenizer: folder with CLIP's vocabulary, checked by :func:`check_tokenizer`.
        dtype: of the weights written; None keeps theirs.

    """
    folder.mkdir(parents=True)
    # NExT-GPT's input projection was trained on plain means over the clips; other readers take tokens.
    write_config(folder, config, preprocessing, pooled="mean")
    state = {name: _narrowed(name, tensors[name], dtype) for name in released_shapes(config)}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if config.text is not None and tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
