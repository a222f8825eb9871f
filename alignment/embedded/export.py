"""Writing the trained parts as the folders that the presets name, in half precision.

Every folder is in its library's own layout, so that ``from_pretrained`` of that library works on it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AudioLDMPipeline, DDIMScheduler, StableDiffusionPipeline, TextToVideoSDPipeline

from alignment.embedded.captions import Kind
from alignment.embedded.denoisers import SCHEDULE, ConditionedDenoiser
from alignment.stages import Aligned
from alignment.system import DECODERS
from alignment.toybox.sound import LOUD_PEAK
from alignment.toybox.world import VIDEO_FPS, VIDEO_FRAMES
from decoders.patch_autoencoder import PatchAutoencoderKL
from decoders.vocoder import GriffinLimVocoder
from encoders.imagebind_encoder import TOWER_OF, ImageBindEncoder
from encoders.media import Modality

MODALITIES: Mapping[Kind, Modality] = {
    "look": Modality.IMAGE,
    "clip": Modality.VIDEO,
    "sound": Modality.AUDIO,
}
DEFAULTS: Mapping[Kind, Mapping[str, object]] = {
    "look": {"steps": 10, "guidance_scale": 2.0, "scheduler": "dpmsolver++"},
    "clip": {
        "steps": 10,
        "guidance_scale": 2.0,
        "scheduler": "dpmsolver++",
        "num_frames": VIDEO_FRAMES,
        "fps": VIDEO_FPS,
    },
    "sound": {"steps": 10, "guidance_scale": 2.0, "scheduler": "dpmsolver++", "duration_s": 2.56},
}


def export_decoder(kind: Kind, model: ConditionedDenoiser, vae: PatchAutoencoderKL, folder: Path) -> None:
    """Write one decoder as a diffusers pipeline, with its defaults beside it."""
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": model.captions.model,
        "tokenizer": model.captions.tokenizer,
        "unet": model.denoiser,
        "scheduler": DDIMScheduler(**SCHEDULE),
    }
    pipeline: Any
    if kind == "look":
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    elif kind == "sound":
        pipeline = AudioLDMPipeline(**parts, vocoder=GriffinLimVocoder(peak=LOUD_PEAK))
    else:
        pipeline = TextToVideoSDPipeline(**parts)
    shutil.rmtree(folder, ignore_errors=True)
    halved = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    for part in halved.values():
        part.half()
    pipeline.save_pretrained(folder, safe_serialization=True)
    for part in halved.values():
        part.float()
    forget_origins(folder)
    DECODERS[MODALITIES[kind]].load(folder).save_null()
    (folder / "patchbay.json").write_text(json.dumps(DEFAULTS[kind], indent=2) + "\n")


def forget_origins(folder: Path) -> None:
    """Take out of the configurations in ``folder`` from where on this machine their models were loaded."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_encoder(encoder: ImageBindEncoder, folder: Path) -> None:
    """Write the towers that read media; the text tower was there for them to learn from."""
    shutil.rmtree(folder, ignore_errors=True)
    encoder.save_pretrained(folder, torch.float16, sorted(set(TOWER_OF.values())))


def export_aligned(model: Aligned, weights: Path) -> None:
    """Write the language model and the output projections."""
    model.llm.save_pretrained(weights / "llm", torch.float16)
    for name, projection in model.projections.items():
        projection.half().save_pretrained(weights / "projections" / name)  # type: ignore[operator]
        projection.float()
