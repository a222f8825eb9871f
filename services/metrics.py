"""What the boxes count, in the text format that Prometheus reads.

Source: "Exposition formats", https://prometheus.io/docs/instrumenting/exposition_formats/,
text format 0.0.4.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.boxes import Counts

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

HELP = {
    "patchbay_agent_media_total": "Media that were spoken in replies.",
    "patchbay_agent_asked_total": "Media of those that were asked about instead of made.",
    "patchbay_agent_looked_total": "Media that the agent looked at once more.",
    "patchbay_agent_remade_total": "Media that were made again after that.",
    "patchbay_language_model_slots": "Replies that the language model can make at the same time.",
    "patchbay_language_model_slots_in_use": "Replies that it is making now.",
    "patchbay_language_model_waiting": "Replies that wait for a slot.",
    "patchbay_language_model_requests_total": "Replies that were asked for, or given to be scored.",
    "patchbay_language_model_steps_total": "Steps that the engine took.",
    "patchbay_language_model_prompt_tokens_total": "Tokens of all prompts.",
    "patchbay_language_model_reused_prompt_tokens_total": "Tokens of prompts that were still in a slot.",
    "patchbay_language_model_prefix_hit_rate": "The part of all prompt tokens that was still in a slot.",
    "patchbay_decoder_requests": "Media that are asked for and not done.",
    "patchbay_decoder_stepping": "Media in the denoising step that runs now.",
    "patchbay_decoder_most_stepping": "The most media that ever shared a step.",
    "patchbay_decoder_batch_limit": "Media that may share a step; fewer after a lack of memory.",
    "patchbay_decoder_queue_seconds": "Seconds until all that is asked for will be done.",
    "patchbay_decoder_prediction_error": "Median of |predicted - actual| / actual seconds of a step.",
    "patchbay_encoder_cache_hits_total": "Media whose encoding was still known.",
    "patchbay_encoder_cache_misses_total": "Media that had to be encoded.",
    "patchbay_encoder_cache_hit_rate": "The part of all media whose encoding was still known.",
    "patchbay_encoder_cache_media": "Encoded media that are kept.",
    "patchbay_encoder_cache_bytes": "Bytes of encoded media that are kept.",
}

NOT_DECODERS = ("agent", "encoder", "language_model")


def exposition(counts: Mapping[str, Mapping[str, Counts]]) -> str:
    """Return the metrics of :meth:`services.agent.Agent.counts`; a box that does not answer has none."""
    samples: dict[str, list[str]] = {name: [] for name in HELP}
    for box, replicas in counts.items():
        subject = box if box in NOT_DECODERS else "decoder"
        labels = "" if box in NOT_DECODERS else f'modality="{box}",'
        for replica, values in replicas.items():
            for name, value in values.items():
                full = f"patchbay_{subject}_{name}"
                samples[full].append(f'{full}{{{labels}replica="{replica}"}} {value:.12g}')
    lines = []
    for name, found in samples.items():
        if found:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {HELP[name]}", f"# TYPE {name} {kind}", *found]
    return "".join(f"{line}\n" for line in lines)
