"""``patchbay train adopt``: a run that begins where the shipped weights are, in place of nothing.

Every part of the preset's folder of weights becomes what its step would have left, so that a step goes on
from there with a fresh optimiser. Of the encoder only what reads media is shipped: the steps after it can go
on, its own cannot. The autoencoders stay what they are, since the denoisers know their latents.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alignment.embedded.captions import Kind
from alignment.embedded.export import MODALITIES
from alignment.embedded.language import grown
from alignment.fitting import begin_from
from alignment.stages import STAGES, Aligned
from decoders.patch_autoencoder import PatchAutoencoderKL
from decoders.projection import OutputProjection
from encoders.imagebind_encoder import ImageBindEncoder
from encoders.media import Modality
from llm import checkpoint
from llm.lora import LoraOptions
from llm.model import LanguageModel
from llm.signals import SignalVocabulary
from llm.tokenizer import ConversationTokenizer

_UNET, _TEXT_ENCODER = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def adopt(
    weights: Path, folder: Path, untrained_bridges: Callable[[Path], Aligned], lora: LoraOptions
) -> None:
    """Write the parts in ``weights`` into the folder of a run.

    Args:
        weights: as ``patchbay train export`` writes it.
        folder: of the run; it must not have begun yet.
        untrained_bridges: folder of a base -> the model that the stages train.
        lora: of the third stage.

    Raises:
        FileExistsError: the run has begun; what to do is said.
        FileNotFoundError: a part is missing in ``weights``.

    """
    begun = sorted(path.parent.name for path in folder.glob("*/checkpoint.pt"))
    if begun:
        raise FileExistsError(
            f"{folder} holds {', '.join(begun)} already. Choose another folder with --runs, or remove this."
        )
    _adopt_autoencoders(weights, folder)
    for kind, modality in MODALITIES.items():
        _adopt_decoder(kind, weights / str(modality), folder)
    encoder = ImageBindEncoder.from_pretrained(weights / "encoder")
    encoder.save_pretrained(folder / "imagebind" / "encoder", torch.float32)
    shipped = LanguageModel.from_pretrained(weights / "llm")
    _adopt_language(weights / "llm" / checkpoint.BASE, shipped.tokenizer.signals, folder / "language")
    projections = {
        m: OutputProjection.from_pretrained(weights / "projections" / str(m)) for m in MODALITIES.values()
    }
    model = untrained_bridges(folder / "language" / "llm")
    _adopt_stages(Aligned(shipped, projections), folder, model, lora)


def _adopt_autoencoders(weights: Path, folder: Path) -> None:
    for step, modality in (
        ("picture-autoencoder", Modality.IMAGE),
        ("spectrogram-autoencoder", Modality.AUDIO),
    ):
        vae = PatchAutoencoderKL.from_pretrained(weights / str(modality) / "vae").float()
        vae.save_pretrained(folder / step / "vae")


def _adopt_decoder(kind: Kind, pipeline: Path, folder: Path) -> None:
    denoiser = _floats(load_file(pipeline / _UNET), "denoiser.")
    begin_from(folder / f"{kind}-denoiser", denoiser)
    captions = folder / f"{kind}-captions"
    begin_from(captions, _floats(load_file(pipeline / _TEXT_ENCODER), "encoder.model."))
    shutil.copytree(pipeline / "tokenizer", captions / "tokenizer")
    shutil.copy(pipeline / "text_encoder" / "config.json", captions / "config.json")


def _adopt_language(base: Path, signals: SignalVocabulary, folder: Path) -> None:
    tokenizer = ConversationTokenizer.load(base, signals)
    tokenizer.save(folder / "tokenizer")
    model = grown(base, tokenizer)
    model.save_pretrained(folder / "llm")
    model.train_only({"base"})
    begin_from(folder, _trainable(model))


def _adopt_stages(shipped: Aligned, folder: Path, model: Aligned, lora: LoraOptions) -> None:
    model.llm.add_lora(lora)
    values = dict(model.named_parameters()) | dict(shipped.named_parameters())  # what is new begins afresh
    for name, stage in STAGES.items():
        model.train_only(stage)
        begin_from(folder / name, {parameter: values[parameter] for parameter in _trainable(model)})


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _floats(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value.float() for name, value in tensors.items() if value.is_floating_point()}
