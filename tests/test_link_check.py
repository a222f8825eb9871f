from alignment.link_check import table


def test_the_table_says_what_the_link_loses_and_what_it_gains_over_captions() -> None:
    links = ({"signal": 0.9, "caption": 0.85}, {"signal": 0.5, "caption": 0.75})
    seen = {"n": 100, "chosen": 0.9, "links": links[0], "caption_keeping": 0.88, "ceiling": 0.95}
    held_out = {"n": 25, "chosen": 0.5, "links": links[1], "caption_keeping": 0.76, "ceiling": 0.75}
    result = {
        "chosen": {"image": "signal"},
        "directions": {"text-to-image": {"seen": seen, "held_out": held_out}},
        "seconds": 1.0,
        "seeds": [0],
    }
    printed = table(result)
    begun = "| text-to-image |"
    assert f"{begun} seen, 100 | 90.0% | 90.0% | 85.0% | 88.0% | 95.0% | +5.0 | +5.0 |" in printed
    assert (
        "| text-to-image | held out, 25 | 50.0% | 50.0% | 75.0% | 76.0% | 75.0% | +25.0 | -25.0 |" in printed
    )
    assert "Chosen: image signal." in printed
