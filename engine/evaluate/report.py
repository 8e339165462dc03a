"""The report of a folder: results.json, report.md, report.html and plots, from its files alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.evaluate import plots
from engine.evaluate.cautions import controls_text, main_cautions
from engine.evaluate.figures import figures
from engine.evaluate.results import RESULTS, Results, compared, write_whole
from engine.evaluate.statistics import FEWEST
from engine.evaluate.tables import Example, Section, Table, as_html, as_markdown

EXAMPLES = 3
EXAMPLE_CHARACTERS = 1500
MOST_ERRORS = 5
Figures = dict[str, Any]


def write_report(folder: Path) -> list[str]:
    """Writes everything; lines that say what was found and where it is. Raises ValueError, OSError."""
    results = Results.read(folder)
    made = figures(results)
    record = {**results.record, "figures": made}
    write_whole(folder / RESULTS, (json.dumps(record, indent=1) + "\n").encode())
    try:
        pictures, missing = plots.draw(results, made)
    except ImportError:
        pictures, missing = [], ["no plots: they need matplotlib (pip install 'diffpo-engine[plot]')"]
    title, sections = sections_of(results, made, pictures)
    for name, text in (("report.md", as_markdown(title, sections)), ("report.html", as_html(title, sections, folder))):
        write_whole(folder / name, text.encode(errors="backslashreplace"))
    main = made["variants"][made["main"]]
    found = f"{main['compared']} of {main['cases']} cases of {main['prompts']} prompts compared"
    if main.get("win_rate"):
        found += f", difference of reward {cell(main['difference'])}, win rate {percent(main['win_rate'])}"
    others = [f"{name}: {_left_out(one)}" for name, one in made["variants"].items() if one["errors"]]
    return [found, *others, *missing, f"report: {folder / 'report.html'}"]


def sections_of(results: Results, made: Figures, pictures: Sequence[str]) -> tuple[str, list[Section]]:
    """Title and parts."""

    def picture(name: str) -> str | None:
        return name if name in pictures else None

    main = made["variants"][made["main"]]
    sections = [_setting(results, made), _errors(results, made)]
    if main["compared"]:
        sections += [
            Section(
                "Base against refined", _main_table(made), main_cautions(made, results), picture=picture(plots.LENGTHS)
            ),
            _per_step(made, picture(plots.STEPS)),
            _controls(results, made, picture(plots.CONTROLS)),
            _draft(made),
            _parts("By category", "category", made["categories"], picture(plots.CATEGORIES)),
            _parts("By base model", "base model", made["models"], None),
            _latency(results, made),
        ]
    sections += _judges(made)
    sections += _examples(results, made)
    return "Base against refined answers", [section for section in sections if section]


def cell(value: Figures | None, digits: int = 3) -> str:
    """Mean and interval as text, without one of too few prompts; a dash where there is nothing."""
    if value is None:
        return "–"
    if value["prompts"] < FEWEST:
        return f"{value['mean']:.{digits}f} (–)"
    return f"{value['mean']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def percent(value: Figures | None) -> str:
    """The same of a rate."""
    if value is None or "reason" in value:
        return "–"
    return cell({**value, **{name: 100 * value[name] for name in ("mean", "low", "high")}}, 1) + " %"


def _share(count: int, of: int) -> str:
    return f"{count} of {of} ({100 * count / of:.0f} %)" if of else "–"


def _run(setup: Figures) -> str:
    return ", ".join(f"{name} {value}" for name, value in setup.items())


def _left_out(one: Figures) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in one["errors"].items())
    return f"{sum(one['errors'].values())} of {one['cases']} cases have no comparison and are left out of every figure: {kinds}"


def _setting(results: Results, made: Figures) -> Section:
    record, main = results.record, made["variants"][made["main"]]
    shown, setting = record["shown"], record["setting"]
    options = record["variants"][made["main"]]["options"]
    chosen = {name: value for name, value in options.items() if name != "concurrency"}
    scorer = ", ".join(f"{name} {value}" for name, value in setting["scorer"].items() if value is not None)
    cut = "drafts are cut there too" if setting["limit"]["drafts_cut"] else "drafts are left as they are"
    rows = [
        ["input", shown["input"]],
        ["refiner", f"{shown['model']} (digest {setting['model']['digest']})"],
        ["scorer", scorer],
        ["cases", f"{main['cases']}: {main['compared']} compared, of {main['prompts']} prompts"],
        ["length limit", f"{setting['limit']['max_new_tokens']} of the refiner's tokens; {cut}"],
        ["options", ", ".join(f"{name}={value}" for name, value in chosen.items() if value is not None)],
        ["run", "; then ".join(map(_run, results.setups(made["main"]))) or "not recorded"],
    ]
    text = [
        "Means are over prompts: the drafts of one prompt share its weight. Brackets hold 95 % intervals of a paired bootstrap "
        f"that draws prompts; fewer than {FEWEST} prompts have none. A tie is half a win."
    ]
    return Section("What was compared", Table(["", ""], rows), text=text)


def _errors(results: Results, made: Figures) -> Section | None:
    """Of every variant; a case that has the same error in several of them is shown once."""
    text, table = [], []
    seen: set[tuple[int, str]] = set()
    for name, rows in results.rows.items():
        failed = [row for row in rows if row["error"]]
        if not failed:
            continue
        text.append(f"{name}: {_left_out(made['variants'][name])}.")
        new = [row for row in failed if (row["index"], row["error"]["message"]) not in seen]
        seen |= {(row["index"], row["error"]["message"]) for row in new}
        table += [
            [name, str(row["id"]), row["error"]["type"], row["error"]["message"][:300]] for row in new[:MOST_ERRORS]
        ]
    if not text:
        return None
    return Section("Errors", Table(["variant", "id", "error", "message"], table), text=[*text, "The first ones:"])


def _main_table(made: Figures) -> Table:
    head = [
        "variant", "cases", "base reward", "refined reward", "difference", "win rate", "length-controlled",
        "ties", "same text", "base length", "refined length",
    ]  # fmt: skip
    rows = []
    for name, one in made["variants"].items():
        if not one["compared"]:
            continue
        counted = one["compared"]
        rows.append(
            [
                name, str(counted), cell(one["base_reward"]), cell(one["reward"]), cell(one["difference"]),
                percent(one["win_rate"]), percent(one["lc_win_rate"]), _share(one["ties"], counted),
                _share(one["identical"], counted), cell(one["base_length"], 0), cell(one["length"], 0),
            ]
        )  # fmt: skip
    return Table(head, rows)


def _per_step(made: Figures, picture: str | None) -> Section | None:
    names = [name for name in made["variants"] if name.startswith("steps-") and made["variants"][name]["compared"]]
    if not names:
        return None
    main = made["variants"][made["main"]]
    rows = [["0 (the draft)", cell(main["base_reward"]), "–", "–", "–", cell(main["draft_overlap_best"])]]
    for name in sorted(names, key=lambda name: int(name.partition("-")[2])):
        one = made["variants"][name]
        rows.append(
            [
                name.partition("-")[2], cell(one["reward"]), percent(one["win_rate"]),
                _share(one["converged"], one["compared"]), cell(one["overlap_draft"]), cell(one["overlap_best"]),
            ]
        )  # fmt: skip
    rows.append(
        [
            f"{made['main']}: {main['steps']['mean']:.1f} on average", cell(main["reward"]), percent(main["win_rate"]),
            _share(main["converged"], main["compared"]), cell(main["overlap_draft"]), cell(main["overlap_best"]),
        ]
    )  # fmt: skip
    head = [
        "steps",
        "reward",
        "win rate over the draft",
        "converged",
        "overlap with the draft",
        "overlap with the best",
    ]
    text = "The iterate as it stands after so many steps per block. Before it has converged the draft shapes it."
    return Section("Reward per Jacobi step", Table(head, rows), text=[text], picture=picture)


def _controls(results: Results, made: Figures, picture: str | None) -> Section | None:
    if not made["against"]:
        return None
    main = made["main"]
    head = ["variant", "what differs", "held equal", "cases", f"same text as {main}", f"reward minus {main}"]
    head += ["the same, for all rows together", "steps", f"steps minus {main}", "token-forwards"]
    rows = []
    for name, one in made["against"].items():
        variant, summed = results.record["variants"][name], made["variants"][name]
        if one["compared"]:
            rows.append(
                [
                    name, variant["changed"], variant["held"], str(one["compared"]),
                    _share(one["same_text"], one["compared"]), cell(one["difference"]), cell(one["difference_together"]),
                    cell(summed["steps"], 1), cell(one["steps_difference"], 1), cell(summed["forward_tokens"], 0),
                ]
            )  # fmt: skip
    return Section("Controls", Table(head, rows), controls_text(results, made), picture=picture)


def _draft(made: Figures) -> Section:
    rows = [
        [name, cell(one["overlap_draft"]), cell(one["overlap_best"]), cell(one["draft_overlap_best"])]
        for name, one in made["variants"].items()
        if one["compared"]
    ]
    head = ["variant", "answer with its case's draft", "answer with the best response", "draft with the best response"]
    text = [
        "Overlap of words, 1: the same text (difflib's ratio). Under alone, shuffled and random the first column compares with "
        "the draft that was not given: what overlap means without any dependence."
    ]
    return Section("Dependence on the draft", Table(head, rows), text=text)


def _parts(title: str, what: str, parts: dict[str, Figures], picture: str | None) -> Section | None:
    if not parts:
        return None
    head = [what, "cases", "prompts", "base", "refined", "difference", f"the same, for all {len(parts)} together"]
    rows = [
        [
            name, str(one["compared"]), str(one["prompts"]), cell(one.get("base_reward")), cell(one.get("reward")),
            cell(one.get("difference")), cell(one.get("difference_together")), percent(one.get("win_rate")),
            percent(one.get("lc_win_rate")),
        ]
        for name, one in parts.items()
    ]  # fmt: skip
    text = (
        f"Of {len(parts)} intervals of 95 % one in twenty misses by chance alone; those of the last difference hold together "
        "with 95 % (Bonferroni)."
    )
    return Section(
        title,
        Table([*head, "win rate", "length-controlled"], rows),
        text=[text] if len(parts) > 1 else [],
        picture=picture,
    )


def _latency(results: Results, made: Figures) -> Section:
    head = [
        "variant",
        "seconds, median",
        "90 %",
        "with the draft's, median",
        "steps",
        "tokens per step",
        "token-forwards",
    ]
    rows = []
    for name, one in made["variants"].items():
        if one["compared"]:
            whole = one["seconds_with_draft"]
            rows.append(
                [
                    name, f"{one['seconds']['median']:.3f}", f"{one['seconds']['p90']:.3f}",
                    f"{whole['median']:.3f}" if whole else "–", cell(one["steps"], 1), cell(one["tokens_per_step"], 2),
                    cell(one["forward_tokens"], 0),
                ]
            )  # fmt: skip
    setups = {name: results.setups(name) for name in made["variants"] if made["variants"][name]["compared"]}
    run = next(iter(setups[made["main"]]), None)
    where = "" if run is None else (
        f", with up to {run['max_batch_size']} answers at once on {run['device']} ({run['dtype']}, {run['threads']} threads)"
    )  # fmt: skip
    text = [
        f"Per case, from entry to end{where}: a batch's latency, not that of one request alone. Variants ran one after "
        "the other, so a busy machine shows in the seconds; steps and token-forwards don't depend on it."
    ]
    if any(len(mine) > 1 or mine != setups[made["main"]] for mine in setups.values()):
        text.append("Not all of it was measured on the same setup, so these seconds are not to be compared:")
        text += [f"{name}: {'; then '.join(map(_run, mine)) or 'not recorded'}." for name, mine in setups.items()]
    main = made["variants"][made["main"]]
    if not main["seconds_with_draft"]:
        text.append("The base model's time is not in the input (draft_seconds), so it is not counted.")
    return Section("Latency", Table(head, rows), text=text)


def _judges(made: Figures) -> list[Section]:
    sections = []
    for name, one in made["judges"].items():
        head = ["figure", "value"]
        rows = [["variant judged", one["variant"] or "not recorded"], ["verdicts", str(one["verdicts"])]]
        if one["win_rate"]:
            rows.append(["win rate of refined", percent(one["win_rate"])])
            rows.append(["length-controlled", percent(one["lc_win_rate"])])
            rows += [[f"win rate of refined, {name}", percent(value)] for name, value in one["categories"].items()]
        for label, scores in (("all turns", one["scores"]), *((f"turn {t}", s) for t, s in one["turns"].items())):
            if scores:
                rows += [[f"{side}, {label}", cell(scores[side], 2)] for side in ("base", "refined", "difference")]
        sections.append(Section(f"Judge: {name} ({one['format']})", Table(head, rows)))
    return sections


def _examples(results: Results, made: Figures) -> list[Section]:
    rows = compared(results.rows[made["main"]])
    order = sorted(rows, key=lambda row: row["reward"] - row["base_reward"])
    lost = [row for row in order if row["preference"] == 0][:EXAMPLES]
    won = [row for row in reversed(order) if row["preference"] == 1][:EXAMPLES]
    sections = []
    for title, chosen in (("Largest gains", won), ("Largest losses", lost)):
        if chosen:
            sections.append(Section(title, examples=[_example(row) for row in chosen]))
    return sections


def _example(row: Figures) -> Example:
    def shown(texts: Sequence[str]) -> str:
        whole = "\n\n— next turn —\n\n".join(texts)
        return whole if len(whole) <= EXAMPLE_CHARACTERS else whole[:EXAMPLE_CHARACTERS] + " […]"

    title = f"case {row['index']}, {row['model']}: reward {row['base_reward']:.3f} → {row['reward']:.3f}"
    return Example(title, shown(row["turns"]), shown(row["drafts"]), shown(row["answers"]))
