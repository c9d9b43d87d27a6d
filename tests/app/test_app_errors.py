"""Each mistake on the command line: one sentence, exit status 2, nothing written."""

import pathlib

import pytest

from dho2_jax.app import cli

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DIGITS = str(CONFIGS / "digits_mlp.py")


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    output = capsys.readouterr()
    assert exit_info.value.code == 2
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if "Compiling" not in line]
    assert len(lines) == 1 and lines[0].startswith("dho2: error: "), output.err
    assert "Traceback" not in output.err
    return lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.stepz=3", "`config.stepz` is not a field; did you mean `config.st"),
        (
            "--config.optimizer.num_larges=3",
            "`config.optimizer.num_larges` is not a field; "
            "did you mean `config.optimizer.num_largest`?",
        ),
        ("--config.num_largest=3", "did you mean `config.optimizer.num_largest`?"),
        ("--config.steps=ten", "`config.steps` must be of type int, got 'ten'"),
        ("--config.steps=3.5", "`config.steps` must be of type int, got '3.5'"),
        ("--config.steps=None", "`config.steps` must be of type int, got 'None'"),
        (
            "--config.optimizer.damping=big",
            "`config.optimizer.damping` must be of type float, got 'big'",
        ),
        ("--config.train_base=perhaps", "`config.train_base` must be of type bool"),
        ("--config.optimizer=3", "`config.optimizer` is a group of fields"),
        ("--config.steps", "needs a value: --config.steps=VALUE"),
        ("--config.steps=0", "`config.steps` must be at least 1, got 0"),
        ("--config.seed=-1", "`config.seed` must not be negative, got -1"),
        ("--config.task.num_validation=0", "must be at least 1, got 0"),
        ("--config.optimizer.momentum=1.0", "must lie in [0, 1), got 1.0"),
        ("--config.batch_size=5000", "between 1 and the 1437 training images"),
        ("--config.curvature_batch_size=300", "config.batch_size=256, got 300"),
        ("--config.task.widths=(8,0)", "must hold positive integers"),
        ("--config.optimizer.base=adm", "got 'adm'; did you mean `adam`?"),
        ("--config.optimizer.schedule=cosin", "did you mean `cosine`?"),
        ("--config.base_schedule=x", "`config.base_schedule` must name a schedule"),
        ("--config.task.name=digits", "got 'digits'; did you mean `digits_mlp`?"),
        ("--config.optimizer.num_largest=0", "config.optimizer: `num_largest`"),
        ("--config.optimizer.num_matvecs=2", "config.optimizer: `num_matvecs`"),
        ("--config.optimizer.refresh=never", "config.optimizer: `refresh`"),
        ("--config.checkpoint_every=-1", "must not be negative, got -1; 0 saves no"),
        ("--config.keep_checkpoints=0", "must be at least 1, got 0"),
        ("--config.resume=sometimes", "`config.resume` must be 'auto', 'never' or"),
        (
            "--config.workdir=gs://bucket/run",
            "must be a path of this machine, got 'gs:",
        ),
        ("--config.resume=gs://bucket/run", "mount the bucket and give the path"),
        ("--steps=3", "--steps=3"),
    ],
)
def test_wrong_override(override, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in fails(["train", DIGITS, override], capsys)
    assert not list(tmp_path.iterdir())


def test_compare_goes_on_with_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fails(["compare", DIGITS, f"--config.resume={tmp_path}"], capsys)
    assert "only `dho2 train` goes on with a run" in said
    assert not list(tmp_path.iterdir())


def test_more_pairs_than_parameters(tmp_path, capsys):
    arguments = [
        "train",
        DIGITS,
        f"--config.workdir={tmp_path}/out",
        "--config.task.widths=(1,)",
        "--config.optimizer.num_largest=500",
        "--config.optimizer.num_matvecs=500",
    ]
    assert "config.optimizer: `num_largest`" in fails(arguments, capsys)


def test_wrong_command_or_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean `train`?" in fails(["trian", DIGITS], capsys)
    assert "CONFIG" in fails(["train"], capsys)
    message = fails(["train", str(CONFIGS / "digit_mlp.py")], capsys)
    assert f"did you mean `{DIGITS}`?" in message
    assert "there is no config file `no/such.py`" in fails(
        ["compare", "no/such.py"], capsys
    )
    (tmp_path / "file").write_text("")
    blocked = ["train", DIGITS, f"--config.workdir={tmp_path}/file/below"]
    assert "cannot use" in fails(blocked, capsys)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("get_config = ", "does not run (SyntaxError"),
        ("x = 1", "must define `get_config()`"),
        ("def get_config(): return 3", "must return an ml_collections.ConfigDict"),
        ("def get_config(): return 1 / 0", "does not run (ZeroDivisionError"),
        ("{base}", "`config.steps` is missing"),
        ("{base}; c.steps = 'ten'", "`config.steps` must be of type int, got 'ten'"),
        ("{base}; c.steps = 3; c.stps = 4", "`config.stps` is not a field"),
        ("{base}; c.steps = 3; c.optimizer.bse = 'adam'", "config.optimizer.base`?"),
        ("{base}; c.steps = 3; c.task.name = 'x'", "must name a task, got 'x'"),
        ("{base}; c.steps = 3; c.task.widths = 3", "must be of type tuple, got 3"),
    ],
)
def test_wrong_config_file(source, expected, tmp_path, capsys):
    base = (
        "from ml_collections.config_dict import ConfigDict\n"
        "def get_config():\n"
        "  c = ConfigDict(dict(task=dict(name='digits_mlp'), optimizer={},"
        " batch_size=8, base_learning_rate=1e-3))"
    )
    text = source.replace("{base}", base)
    if text.startswith(base):
        text += "\n  return c"
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert expected in fails(["train", str(path)], capsys)
