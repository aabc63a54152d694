"""A file that is no checkpoint of a fit is refused in one message, and nothing in it is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qratk.cli.checkpoint import require_checkpoint
from qratk.core.errors import ConfigurationError
from qratk.training.module import FineTuneModule


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.ckpt: there is no such file"):
        require_checkpoint(str(tmp_path / "nowhere.ckpt"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04cut"])
def test_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ConfigurationError, match="no checkpoint of a fit"):
        require_checkpoint(str(tmp_path / "x.ckpt"))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Touches(str(tmp_path / "ran"))))
    with pytest.raises(ConfigurationError, match="no checkpoint of a fit"):
        require_checkpoint(str(tmp_path / "x.ckpt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, {}, [1]])
def test_checkpoint_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ConfigurationError, match="no configuration"):
        require_checkpoint(str(tmp_path / "x.ckpt"))


@pytest.mark.parametrize("place", [0.2, 0.5, 0.7])
def test_flipped_bit_is_told_with_the_file(tmp_path, place):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}, "configuration": "4:8"}, path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 64
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"x\.ckpt is damaged: its part '.*' differs from its checksum"):
        require_checkpoint(str(path))


def test_damage_is_told_however_a_checkpoint_was_named(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1000)}, "configuration": "4:8"}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    module = FineTuneModule("embedded", configuration="4:8")
    module._trainer = SimpleNamespace(ckpt_path=str(path))
    with pytest.raises(ConfigurationError, match=r"last\.ckpt is damaged"):
        module.on_load_checkpoint(torch.load(path, weights_only=True))


def test_checkpoint_of_a_fit_and_lightnings_keywords_pass(tmp_path):
    torch.save({"state_dict": {}, "configuration": "4:8"}, tmp_path / "x.ckpt")
    for given in (str(tmp_path / "x.ckpt"), "best", "last"):
        require_checkpoint(given)


def test_address_with_its_secret_stays_what_was_given(tmp_path, monkeypatch, capsys):
    from qratk.cli.trainer import SearchTrainer
    from qratk.cli.validate import validate

    settings = {"model": "https://host/x", "learning_rate": 0.5}
    torch.save({"state_dict": {}, "configuration": "4:8", "hyper_parameters": settings}, tmp_path / "x.ckpt")
    validated = []
    monkeypatch.setattr(SearchTrainer, "validate", lambda self, model, **options: validated.append(model.options))
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--data=EmbeddedData", "--trainer.logger=false", "--trainer.accelerator=cpu",
        "--model.model=https://me:8675309@host/x", "--ckpt_path=x.ckpt",
    ]  # fmt: skip
    assert validate(arguments) == 0
    (options,) = validated
    assert (options.model, options.learning_rate) == ("https://me:8675309@host/x", 0.5)
    assert "8675309" not in capsys.readouterr().err
