"""What an operator's Prometheus reads."""

from __future__ import annotations

from services.metrics import HELP, exposition


def test_counts_become_samples_with_box_and_replica() -> None:
    text = exposition(
        {
            "language_model": {"r1": {"slots": 8, "requests_total": 123456789}},
            "image": {"r2": {"queue_seconds": 1.5}, "r3": {"queue_seconds": 0.0}},
            "audio": {"r4": {"queue_seconds": 0.25}},
            "video": {},
        }
    )
    assert text.splitlines() == [
        "# HELP patchbay_language_model_slots Replies that the language model can make at the same time.",
        "# TYPE patchbay_language_model_slots gauge",
        'patchbay_language_model_slots{replica="r1"} 8',
        "# HELP patchbay_language_model_requests_total Replies that were asked for, or given to be scored.",
        "# TYPE patchbay_language_model_requests_total counter",
        'patchbay_language_model_requests_total{replica="r1"} 123456789',
        "# HELP patchbay_decoder_queue_seconds Seconds until all that is asked for will be done.",
        "# TYPE patchbay_decoder_queue_seconds gauge",
        'patchbay_decoder_queue_seconds{modality="image",replica="r2"} 1.5',
        'patchbay_decoder_queue_seconds{modality="image",replica="r3"} 0',
        'patchbay_decoder_queue_seconds{modality="audio",replica="r4"} 0.25',
    ]
    assert text.endswith("\n")


def test_every_counter_is_named_as_one() -> None:
    assert all(name.startswith("patchbay_") and "\n" not in text for name, text in HELP.items())
