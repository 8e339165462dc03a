"""What a run refuses before any work: unknown, wrong, contradictory settings, missing files, another run's output."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import train as command
from engine.training.config import ConfigError, TrainConfig
from engine.training.config_file import describe, make_config, read_config, yaml_text
from tests.engine.training.runs import make_data, run, small_run

NEEDED = {"model": "m", "data": "d", "output": "o"}
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))


def test_defaults_are_those_of_the_paper_and_its_ancestor() -> None:
    config = make_config(NEEDED)
    assert (config.omega, config.window, config.responses) == (1e3, 256, 6)
    assert (config.lr, config.schedule, config.warmup, config.epochs, config.weight_decay) == (
        2e-5,
        "cosine",
        0.03,
        1,
        0,
    )


def test_every_field_is_described() -> None:
    text = describe()
    for name, field in FIELDS.items():
        entry = text.partition(f"  {name} (")[2].partition("\n  ")[2].splitlines()[0]
        assert len(entry.split()) > 1, name
        if field.default is not dataclasses.MISSING:
            assert f"default: {yaml_text(field.default)}" in text
    for name in ("omega", "window", "responses"):
        assert "paper" in text.partition(f"  {name} (")[2].partition("\n  ")[2].splitlines()[0]


def test_a_default_written_down_is_the_default(tmp_path: Path) -> None:
    given = {name: field.default for name, field in FIELDS.items() if field.default is not dataclasses.MISSING}
    texts = [f"{name}={yaml_text(value)}" for name, value in {**NEEDED, **given}.items()]
    assert read_config(None, texts) == make_config(NEEDED)
    file = tmp_path / "all.yaml"
    file.write_text("\n".join(text.replace("=", ": ", 1) for text in texts))
    assert read_config(str(file)) == make_config(NEEDED)


@given(name=st.text(max_size=12), value=VALUES)
def test_unknown_names_are_refused(name: str, value: Any) -> None:
    if name not in FIELDS:
        with pytest.raises(ConfigError, match="there is no setting"):
            make_config({**NEEDED, name: value})


def attempt(values: dict[str, Any]) -> TrainConfig | str:
    """The settings, or why they are refused."""
    try:
        return make_config(values)
    except ConfigError as error:
        return str(error)


@given(name=st.sampled_from(sorted(FIELDS)), value=VALUES)
def test_a_value_is_taken_as_its_type_or_refused_by_name(name: str, value: Any) -> None:
    made = attempt({**NEEDED, name: value})
    if isinstance(made, str):
        assert name in made
        assert "\n" not in made
        return
    kept, hint = getattr(made, name), get_type_hints(TrainConfig)[name]
    if hint is float:
        assert kept == float(value)
        assert math.isfinite(kept)
    elif isinstance(kept, tuple):
        assert kept == ((value,) if isinstance(value, str) else tuple(value))
        assert all(isinstance(item, str) for item in kept)
    else:
        assert (kept, type(kept)) == (value, type(value))
        assert isinstance(value, bool) == (hint is bool)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("window", "a", "window must be integer, got 'a' (str)"),
        ("window", 2.0, "window must be integer, got 2.0 (float)"),
        ("steps", True, "steps must be integer or null, got True (bool)"),
        ("schedule", "cubic", "schedule must be cosine or linear or constant, got 'cubic' (str)"),
        ("bf16", "yes", "bf16 must be true or false, got 'yes' (str)"),
        ("report_to", [1], "report_to must be list of texts, got [1] (list)"),
        ("omgea", 1, "there is no setting 'omgea'; did you mean 'omega'?"),
        ("warmup", 3, "warmup is a share of the whole: expected 0 <= warmup < 1, got 3.0"),
        ("warmup", 1.0, "warmup is a share of the whole: expected 0 <= warmup < 1, got 1.0"),
        ("lr", 0, "lr must be above 0, got 0.0"),
        ("lr", math.inf, "lr must be a finite number, got inf"),
        ("drafts", -1, "drafts must be at least 0, got -1"),
        ("model", None, "model is missing: set it in the file, or as model=.."),
        ("output", "", "output is empty: name a file or folder, or leave it out"),
    ],
)
def test_messages(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({**NEEDED, name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"drafts": 0}, "drafts=0"),
        ({"responses": 1}, "responses=1"),
        ({"drafts": 6}, "drafts=6 cannot be drawn from responses=6"),
        ({"drafts": 2, "responses": 2, "omega": 0}, "drafts=2 cannot be drawn from responses=2"),
        ({"eval_data": "e", "held_out": 3}, "eval_data and held_out"),
        ({"steps": 5, "epochs": 2}, "steps=5 and epochs=2"),
        ({"micro_batch": 3}, "batch_size=8 is not a multiple of micro_batch=3"),
        ({"dtype": "bfloat16", "bf16": True}, "dtype=bfloat16"),
        ({"dtype": "bfloat16", "lora_rank": 4}, "bf16=true"),
        ({"fsdp": True, "lora_rank": 4}, "fsdp=true"),
        ({"lora_alpha": 8}, "lora_rank=0"),
        ({"lora_targets": ["q_proj"]}, "lora_rank=0"),
        ({"lora_rank": 4, "lora_targets": []}, "lora_targets is empty"),
        ({"attention": "flex_attention", "device": "cpu"}, "flex_attention"),
        ({"loss_impl": "triton", "device": "cpu"}, "triton"),
    ],
)
def test_contradictions(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config({**NEEDED, **settings})


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: d\noutput: o\nlr: 1e-4\nomega: 5\nreport_to: tensorboard\nsteps: null\n")
    config = read_config(str(file), ["omega=1e2", "report_to=[]", "bf16=true"])
    assert (config.lr, config.omega, config.report_to, config.bf16) == (1e-4, 100.0, (), True)
    for text, words in (
        ("- a", "must hold settings as 'key: value' lines, got a list"),
        ("a: [", "is not YAML"),
        ("lr: 1\nlr: 2", "lr is set twice"),
        ("? [a]\n: b", "is not YAML|there is no setting"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_config(str(file))
    with pytest.raises(ConfigError, match="expected key=value behind the config file, got 'omega'"):
        read_config(None, ["omega"])


def refused(settings: dict[str, Any], capfd: Any) -> str:
    """The one line in which a run is refused, exit status 2."""
    capfd.readouterr()
    assert run(settings) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("engine.train: error:")]
    assert len(lines) == 1
    return str(lines[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nothing": 1}, "there is no setting 'nothing'"),
        ({"model": "/not/there"}, "/not/there is not a model folder"),
        ({"data": "/not/there.jsonl"}, "/not/there.jsonl: No such file"),
        ({"held_out": 11}, "leaves 3 trajectories to train on, fewer than batch_size=4"),
        ({"max_tokens": 5}, "has no row that can be used"),
        ({"lora_rank": 2, "lora_targets": ["nope"]}, "lora_targets=['nope'] does not fit the model"),
        ({"report_to": ["nope"]}, "report_to has 'nope', which is not installed"),
        ({"fsdp": True}, "fsdp=true needs several processes: torchrun"),
    ],
)
def test_refusals_leave_nothing_behind(changes: dict[str, Any], words: str, tmp_path: Path, capfd: Any) -> None:
    settings = small_run(tmp_path, **changes)
    assert words in refused(settings, capfd)
    assert not Path(settings["output"]).exists()


def test_rows_without_drafts_are_refused_unless_omega_is_zero(tmp_path: Path, capfd: Any) -> None:
    settings = small_run(tmp_path, held_out=0, steps=1, epochs=1.0)
    data = Path(settings["data"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["responses"] = row["responses"][:1]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "has more than one scored response" in refused(settings, capfd)
    assert run({**settings, "omega": 0.0}) == 0


def test_bad_rows_cost_only_themselves(tmp_path: Path, capfd: Any) -> None:
    settings = small_run(tmp_path, steps=1, epochs=1.0)
    data = Path(settings["data"])
    long = {"prompt_id": "long", "prompt": "egg " * 300, "responses": [{"model": "m", "text": "a", "reward": 1}]}
    unscored = {"prompt_id": "unscored", "prompt": "egg", "responses": [{"model": "m", "text": "a"}]}
    data.write_text("not json\n" + "".join(json.dumps(row) + "\n" for row in (long, unscored)) + data.read_text())
    assert run(settings) == 0
    said = capfd.readouterr().err
    assert (
        "14 rows kept, left out: 1 not usable, 1 longer than the model's positions, 1 without a scored response" in said
    )
    assert "12 trajectories to train on, 12 of them with drafts; 2 to evaluate on" in said


def test_another_runs_output_is_not_touched(tmp_path: Path, capfd: Any) -> None:
    settings = small_run(tmp_path, steps=2, epochs=1.0)
    output = Path(settings["output"])
    assert run(settings) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert "holds this run, finished: its refiner is in" in refused(settings, capfd)
    assert "holds another run (settings lr 0.001, now 0.002)" in refused({**settings, "lr": 0.002}, capfd)
    make_data(Path(settings["data"]), seed=1)
    assert "holds another run (another content of the data)" in refused(settings, capfd)
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert run({**settings, "overwrite": True, "steps": 3}) == 0
    assert not (output / "checkpoint-2").exists() or (output / "checkpoint-3").exists()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "precious").write_text("")
    assert "holds files and is not the folder of a training run" in refused(
        {**settings, "output": str(stranger)}, capfd
    )
    assert "is a file: give a folder" in refused({**settings, "output": str(stranger / "precious")}, capfd)
    assert [path.name for path in stranger.iterdir()] == ["precious"]


def test_help(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert "omega (number; default: 1000.0)" in capsys.readouterr().out
