"""``patchbay report``: write the figures of the documents from the results that commands have printed.

A document is prose with marked places, ``<!-- begin NAME -->`` to ``<!-- end NAME -->``. What stands
between the marks is written here, everything else stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alignment import ability, ablations, evaluation, link_check, link_designs, phrasings
from alignment.toybox import judge_check

RESULTS = {
    name: f"{name}.json"
    for name in ("evaluation", "judge", "links", "phrasings", "ability", "ablations", "link-designs")
}
DOCUMENTS = ("evaluation.md", "toybox.md", "links.md")
WORDINGS = {
    "training": "in words of training",
    "reserved": "in words that training never used",
}
WORST, MOST_NAMED_LOSSES = 3, 6
_MARKED = re.compile(r"(<!-- begin (?P<name>[a-z-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)

Result = Mapping[str, Any]


def write_report(folder: Path, runs: Path | None = None) -> list[Path]:
    """Fill the marked places of the documents in a folder.

    Args:
        folder: holds the documents and the results that there are (``evaluation.json``, ``judge.json``,
            ``links.json``, ``phrasings.json``, ``ability.json``, ``ablations.json``,
            ``link-designs.json``).
        runs: a folder of ``patchbay train``, of which the losses are drawn; None keeps the drawing.

    Returns:
        The documents that were written.

    Raises:
        ValueError: a document has a mark that is not known, or there is no document.

    """
    results = {
        name: json.loads((folder / file).read_text())
        for name, file in RESULTS.items()
        if (folder / file).exists()
    }
    if runs is not None:
        draw_losses(runs, folder / "evaluation" / "losses.png")
    written = []
    for path in (folder / name for name in DOCUMENTS):
        if path.exists():
            path.write_text(filled(path.read_text(), results, str(path)))
            written.append(path)
    if not written:
        raise ValueError(
            f"{folder} holds neither {' nor '.join(DOCUMENTS)}; expected at least one. "
            "Name the folder of the documents."
        )
    return written


def filled(text: str, results: Mapping[str, Result], where: str) -> str:
    """Return a document with its marked places written anew; a place that no result is for stays."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in PLACES:
            raise ValueError(
                f"{where} has a place {name!r}; expected one of {', '.join(PLACES)}. Mend the mark."
            )
        source, write = PLACES[name]
        if source not in results:
            return match[0]
        new = write(results[source]).strip()
        return f"{match[1]}{new}\n{match[3]}" if new else match[0]

    return _MARKED.sub(fill, text)


def draw_losses(runs: Path, path: Path) -> None:
    """Draw the losses of every step of a training run into one picture.

    Raises:
        ValueError: the run has no losses.

    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    logs = sorted(log for log in runs.glob("*/losses.jsonl") if log.stat().st_size)
    if not logs:
        raise ValueError(
            f"{runs} holds no losses; expected STEP/losses.jsonl. Name the run's folder, such as runs/toybox."
        )
    columns = min(4, len(logs))
    lines = -(-len(logs) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3 * columns, 2.2 * lines), squeeze=False)
    for axis in axes.flat[len(logs) :]:
        axis.axis("off")
    for axis, log in zip(axes.flat, logs, strict=False):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        names = sorted({key for row in rows for key in row} - {"step", "seconds", "rate"})
        for key in names:
            points = [(row["step"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), label=key, linewidth=0.6)
        if 0 < len(names) <= MOST_NAMED_LOSSES:
            axis.legend(fontsize=5)
        axis.set_yscale("log")
        axis.set_title(log.parent.name, fontsize=8)
        axis.tick_params(labelsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def directions_text(result: Result) -> str:
    """Return the table of directions and its conditions."""
    rows = [
        f"Seeds {', '.join(map(str, result['seeds']))}, {result['samples']} seen samples per direction and "
        f"seed, {WORDINGS[result['wordings']]}, {result['seconds']:.0f} s."
        + (
            " ± is half of what lies between the best and the worst seed." if len(result["seeds"]) > 1 else ""
        ),
        "",
    ]
    lines = evaluation.table({**result, "directions": _without_sections(result)}).splitlines()
    return "\n".join([*rows, *lines[:-2]])


def decision_text(result: Result) -> str:
    """Return what is measured of the decision; nothing where it was not."""
    row = result["directions"].get("decision", {})
    return evaluation.decision_table(row["decision"]) if "decision" in row else ""


def asking_text(result: Result) -> str:
    """Return what asking back would cost and catch; nothing where it was not measured."""
    asking = evaluation.asking_of(result["directions"])
    return evaluation.asking_table(asking) if asking else ""


def chains_text(result: Result) -> str:
    """Return what is measured of chains of edits; nothing where they were not."""
    chains = {name: row for name, row in result["directions"].items() if "drift" in row}
    return evaluation.drift_table(chains) if chains else ""


def sheets_text(result: Result) -> str:
    """Return the contact sheets of all directions that have one."""
    names = sorted(name for name, row in result["directions"].items() if "gallery" in row)
    return "\n\n".join(f"### {name}\n\n![{name}](evaluation/{quote(name)}.png)" for name in names)


def gallery_text(result: Result) -> str:
    """Return the gallery: what was said, shown and made, and the verdict; nothing without pictures."""
    if not any("gallery" in row for row in result["directions"].values()):
        return ""
    lines = ["| direction | said | shown | made | the agent's words | verdict |", "|---|---|---|---|---|---|"]
    for name, row in result["directions"].items():
        for entry in row.get("gallery", ()):
            shown, made = (_picture(entry[key]) for key in ("shown", "made"))
            verdict = "right" if not entry["wrong"] else f"wrong: {', '.join(entry['wrong'])}"
            said, answer = (entry[key].replace("|", "/") for key in ("said", "answer"))
            lines.append(f"| {name} | {said} | {shown} | {made} | {answer} | {verdict} |")
    return "\n".join(lines)


def confusions_text(result: Result) -> str:
    """Return confusion tables of the attributes that are wrong most often, one per attribute and medium."""
    parts = []
    for name, attribute, found, right in worst_attributes(result, WORST):
        columns = list(dict.fromkeys([*found, *(value for row in found.values() for value in row)]))
        lines = [
            f"### {attribute} in {name}: {right:.1%} right",
            "",
            f"| wanted | {' | '.join(columns)} |",
            f"|---|{'---|' * len(columns)}",
        ]
        for wanted, row in found.items():
            cells = " | ".join(
                f"**{row[c]}**" if c == wanted and c in row else str(row.get(c, "")) for c in columns
            )
            lines.append(f"| {wanted} | {cells} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def worst_attributes(result: Result, number: int) -> list[tuple[str, str, dict[str, dict[str, int]], float]]:
    """Return (direction, attribute, counts, share right) of the worst attributes, no attribute twice."""
    listed = []
    for name, row in result["directions"].items():
        for attribute, found in row["seen"]["found"].items():
            total = sum(sum(values.values()) for values in found.values())
            right = sum(values.get(wanted, 0) for wanted, values in found.items())
            listed.append((right / total, name, attribute, found))
    chosen: list[tuple[str, str, dict[str, dict[str, int]], float]] = []
    for right_share, name, attribute, found in sorted(listed, key=lambda one: one[:3]):
        plain = attribute.split()[-1]
        if len(chosen) < number and plain not in {one[1].split()[-1] for one in chosen}:
            ordered = {key: dict(sorted(found[key].items())) for key in sorted(found)}
            chosen.append((name, attribute, ordered, right_share))
    return chosen


def _without_sections(result: Result) -> dict[str, Any]:
    return {
        name: {key: value for key, value in row.items() if key not in ("asking", "decision", "drift")}
        for name, row in result["directions"].items()
    }


def _picture(file: str | None) -> str:
    return "" if file is None else f"![](evaluation/gallery/{quote(file)})"


PLACES: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "directions": ("evaluation", directions_text),
    "decision": ("evaluation", decision_text),
    "asking": ("evaluation", asking_text),
    "chains": ("evaluation", chains_text),
    "sheets": ("evaluation", sheets_text),
    "gallery": ("evaluation", gallery_text),
    "confusions": ("evaluation", confusions_text),
    "judge": ("judge", judge_check.table),
    "links": ("links", link_check.table),
    "phrasings": ("phrasings", phrasings.table),
    "ability": ("ability", ability.table),
    "ablations": ("ablations", ablations.table),
    "link-designs": ("link-designs", link_designs.table),
}
"""Place -> the result that it needs, and what writes it."""
