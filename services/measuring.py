"""What ``patchbay eval`` measures, on the parts of a preset."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from alignment import ability, ablations, evaluation, link_check, link_designs, phrasings
from alignment.system import Folders
from alignment.toybox import judge_check
from decoders.settings import DecodeSettings
from services.doctor import expect_files
from services.errors import PresetProblem
from services.footprint import TAKEN_APART
from services.presets import Preset, load_preset


def measure(args: argparse.Namespace) -> str:
    """Measure what the arguments name; return what is printed."""
    if args.what == "judge":
        return _printed(args, judge_check.main_judge(args.samples or 1000, args.seed, args.jobs))
    folders = folders_of(load_preset(args.preset), args.link)
    keep = Path(args.keep) if args.keep else None
    if args.what == "links":
        found = link_check.main_links(folders, args.samples or 200, args.seed, args.jobs, args.seeds)
    elif args.what == "phrasings":
        found = phrasings.main_phrasings(folders, args.samples or 20, args.seed, args.jobs)
    elif args.what == "ability":
        found = ability.main_ability(folders, args.samples or 200, args.seed, args.jobs)
    elif args.what == "link-designs":
        found = link_designs.main_designs(folders, Path(args.trained), args.samples or 50, args.jobs, keep)
    elif args.what == "ablations":
        found = ablations.main_ablations(
            folders, Path(args.trained), args.samples or 50, args.seed, args.jobs, keep
        )
    else:
        found = evaluation.main_toybox(
            folders,
            None if args.directions == "all" else args.directions.split(","),
            args.samples or 200,
            args.seed,
            Path(args.sheets) if args.sheets else None,
            args.jobs,
            args.seeds,
            wordings=args.wordings,
            keep=keep,
        )
    return _printed(args, found)


def folders_of(preset: Preset, link: Any = None) -> Folders:
    """Return where the parts of a preset lie, and its settings; ``link`` is used in place of what it says.

    Raises:
        PresetProblem: some weights are missing, or a decoder cannot be measured.

    """
    expect_files(preset)
    for modality in preset.decoders:
        index = json.loads((preset.decoder_folder(modality) / "model_index.json").read_text(encoding="utf-8"))
        if (kind := index.get("_class_name")) not in TAKEN_APART:
            raise PresetProblem(
                f"The {modality.value} decoder of the preset {preset.name!r} is a {kind}, which runs as a "
                f"whole; expected one that is made in batches: {', '.join(TAKEN_APART)}. Talk to it with "
                f"`patchbay chat --preset {preset.as_argument}`, or measure a copy of the preset with one of "
                f"these in its place.",
                code="not_measurable",
            )
    return Folders(
        encoder=preset.encoder_folder,
        tiling=preset.tiling,
        language_model=preset.language_model_folder,
        projections={modality: preset.projection_folder(modality) for modality in preset.decoders},
        decoders={modality: preset.decoder_folder(modality) for modality in preset.decoders},
        links={modality: link or decoder.link for modality, decoder in preset.decoders.items()},
        base=preset.base_folder,
        bridge=preset.bridge_folder,
        settings={modality: decoder.fill(DecodeSettings()) for modality, decoder in preset.decoders.items()},
        edit_strengths={
            modality: decoder.edit_strength
            for modality, decoder in preset.decoders.items()
            if decoder.edit_strength is not None
        },
        keep_untouched=frozenset(m for m, decoder in preset.decoders.items() if decoder.keep_untouched),
        second_look=preset.second_look,
    )


_TABLES = {
    "toybox": evaluation.table,
    "judge": judge_check.table,
    "links": link_check.table,
    "phrasings": phrasings.table,
    "ability": ability.table,
    "ablations": ablations.table,
    "link-designs": link_designs.table,
}


def _printed(args: argparse.Namespace, result: dict[str, Any]) -> str:
    return json.dumps(result) if args.json else _TABLES[args.what](result)
