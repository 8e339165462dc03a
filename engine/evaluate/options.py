"""Options and help of the command line."""

import argparse
from pathlib import Path

from engine.evaluate.variants import CONTROLS
from engine.job.command import positive, subcommands
from engine.refine import add_model_options, add_refine_options

FORMATS = ("alpaca_eval", "fastchat", "hh_rlhf")

_EPILOG = """\
input rows:  those of engine.refine (prompt and draft, turns and drafts, AlpacaEval's outputs, FastChat's answers), with
             category or source, model, draft_seconds where known; or trajectory rows (prompt, responses): every response is a
             draft, the best one by reward is what overlaps are taken with. To the statistics, rows of one prompt are one.
equal for both sides: prompts, and the length limit: drafts longer than --max-new-tokens of the refiner's tokens are cut there,
             unless --whole-drafts; identical answers have identical rewards. Cases with errors are counted and left out.
output:      OUTPUT/VARIANT.jsonl, a row per case with both sides' answers and rewards; OUTPUT/results.json, the figures;
             OUTPUT/report.html, report.md and plots. Variants: given (the drafts as they are), steps-K, and the controls.
controls:    alone: the refiner without a draft; shuffled: drafts of other prompts; random: random words; steps: stopped after
             K steps; keep_prefix: the draft's first tokens are kept; condition: the draft also stands in the prompt.
             Greedy answers that are run to convergence don't depend on the draft: given, alone, shuffled and random then
             give the same texts, and the report says of how many cases they do.
resume:      the same command again goes on where the last one ended, however that was; another model, input, scorer or option
             is refused. rewards and controls may share an OUTPUT: what is there is not computed again.
exit status: 0 all done, 3 some cases have errors, under whatever variant, 2 wrong option or file, 1 failed on the way, 130
             Ctrl-C, 143 SIGTERM.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    wrong = "the same without a draft, with wrong ones, a kept prefix, the draft in the prompt"
    return subcommands(
        "python -m engine.evaluate",
        "Compare base with refined answers.",
        _EPILOG,
        {
            "rewards": ("refine, score both sides, report; also after 1, 2, 4 and 8 steps", _add_rewards),
            "controls": (wrong, _add_controls),
            "report": ("tables, plots and report.html of a folder's files", _add_report),
            "export": ("answers in the formats of AlpacaEval, FastChat and HH-RLHF", _add_export),
            "import": ("verdicts of judges in these formats", _add_import),
        },
    )


def _numbers(text: str) -> list[int]:
    if text in ("", "none"):
        return []
    return [positive(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = list(CONTROLS) if text == "all" else text.split(",")
    unknown = sorted(set(names) - set(CONTROLS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {unknown}: known are {', '.join(CONTROLS)}")
    return names


def _add_rewards(parser: argparse.ArgumentParser) -> None:
    _add_evaluation(parser)


def _add_controls(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("controls")
    text = f"which, of {','.join(CONTROLS)} (default: all)"
    group.add_argument("--controls", type=_names, default=list(CONTROLS), metavar="NAMES", help=text)
    text = "tokens that keep_prefix keeps (default: 8)"
    group.add_argument("--prefix-tokens", type=positive, default=8, metavar="N", help=text)
    _add_evaluation(parser)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "--input", required=True, metavar="FILE", help="prompts and drafts (.jsonl, .json, .gz, .parquet)"
    )
    group.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where everything is kept")
    group.add_argument("--questions", metavar="FILE", help="FastChat's question file, or the batch's input file")
    text = "at most so many drafts of a prompt, of different base models from prompt to prompt (default: all)"
    group.add_argument("--drafts-per-prompt", type=positive, metavar="N", help=text)
    group.add_argument("--whole-drafts", action="store_true", help="do not cut drafts to --max-new-tokens")
    text = "also the answers after so many steps, such as 1,2,4,8; none: leave that out (default: 1,2,4,8)"
    group.add_argument("--reward-at-steps", type=_numbers, default=[1, 2, 4, 8], metavar="K,..", help=text)
    text = "start anew; refined answers whose model, drafts and options are unchanged are kept"
    group.add_argument("--overwrite", action="store_true", help=text)
    group.add_argument("--retry-errors", action="store_true", help="do what failed again")
    group.add_argument("--no-report", action="store_true", help="leave report.html and the plots out")
    _add_scorer(parser)
    add_refine_options(parser.add_argument_group("refinement"))
    add_model_options(parser.add_argument_group("refiner"))


def _add_scorer(parser: argparse.ArgumentParser) -> None:
    scorer = parser.add_argument_group("scorer (one of these)").add_mutually_exclusive_group(required=True)
    text = "sequence classification model, folder or hub id; ArmoRM's kind needs --trust-scorer-code"
    scorer.add_argument("--reward-model", metavar="PATH", help=text)
    text = (
        "rows of prompt_id or prompt, model or text, and reward; a model stands for its whole draft of a single turn, "
        "MODEL+refined for its answer under given"
    )
    scorer.add_argument("--rewards", metavar="FILE", help=text)
    text = "Python function of a prompt and a list of texts that returns one number, or None, for each"
    scorer.add_argument("--callable", metavar="MODULE:NAME", help=text)
    group = parser.add_argument_group("reward model")
    text = "texts at once (default: 8)"
    group.add_argument("--scorer-batch-size", type=positive, default=8, metavar="N", help=text)
    text = "longer texts get no reward (default: the model's positions)"
    group.add_argument("--scorer-max-length", type=positive, metavar="N", help=text)
    group.add_argument("--scorer-device", default="cpu", metavar="DEVICE", help="such as cpu or cuda (default: cpu)")
    names = ("float32", "bfloat16", "float16")
    group.add_argument("--scorer-dtype", choices=names, default="float32", help="of the weights (default: float32)")
    group.add_argument("--trust-scorer-code", action="store_true", help="run code that the reward model brings")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output of rewards or controls")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output of rewards or controls")
    parser.add_argument("--format", required=True, choices=FORMATS)
    text = "where the files go (default: FOLDER/FORMAT, of another variant than given FOLDER/FORMAT+VARIANT)"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--variant", default="given", help="whose answers are the refined ones (default: given)")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output of rewards or controls that was judged")
    parser.add_argument("--format", required=True, choices=FORMATS)
    text = "AlpacaEval's annotations.json; FastChat's *_single.jsonl or *_pair.jsonl; rows of chosen and rejected (HH-RLHF)"
    parser.add_argument("--input", required=True, metavar="FILE", help=text)
    text = "of the judge, for the report (default: the file's, without suffix; +VARIANT behind it if that is not given)"
    parser.add_argument("--name", default=None, help=text)
    parser.add_argument("--variant", default="given", help="whose answers were judged (default: given)")
