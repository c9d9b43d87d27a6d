"""`dho2 train NAME`: a path, or the name of a config that is shipped."""

import pathlib

import pytest

import dho2_jax
from dho2_jax.app import config_files
from dho2_jax.app.errors import UserError

CHECKOUT = pathlib.Path(dho2_jax.__file__).parents[1]


def test_names_in_a_checkout_are_those_of_its_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = config_files.find("patch_autoencoder")
    assert found == CHECKOUT / "configs" / "patch_autoencoder.py"
    assert config_files.load("patch_autoencoder").task.name == "patch_autoencoder"
    files = (CHECKOUT / "configs").glob("*.py")
    assert config_files.shipped().keys() == {file.stem for file in files}


def test_a_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits_mlp").write_text("mine")
    assert config_files.find("digits_mlp") == pathlib.Path("digits_mlp")


def test_names_outside_a_checkout_are_those_beside_the_file(tmp_path, monkeypatch):
    here = tmp_path / "site-packages" / "dho2_jax" / "app"
    (here / "configs").mkdir(parents=True)
    (here / "configs" / "small.py").write_text("")
    (tmp_path / "site-packages" / "configs").mkdir()  # somebody else's
    (tmp_path / "site-packages" / "configs" / "other.py").write_text("")
    monkeypatch.setattr(config_files, "HERE", here)
    assert config_files.shipped() == {"small": here / "configs" / "small.py"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patch_autoencodr", "`patch_autoencodr`; did you mean `patch_autoencoder`?"),
        ("configs/digits_mlp.py", "did you mean `digits_mlp`?"),
        ("mime.py", "did you mean `mine.py`?"),
        ("nothing", "give the path of a Python file, or one of the shipped names"),
        ("nothing", "`vit_b16`."),
    ],
)
def test_no_such_config(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(UserError) as error:
        config_files.find(name)
    assert expected in str(error.value)
