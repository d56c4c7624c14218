"""Which tokenizer NeMo's model class is built with: packed, or asked for; never what the file names."""

from __future__ import annotations

import pytest

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.restore import job_config, load_model
from nemo_minitron.nemo.weights import save
from tests.checkpoint.test_tokenizer_open import hf, of_nemos_own, pieces

pytestmark = pytest.mark.parametrize("pair", ["gqa_untied"], indirect=True)


@pytest.fixture(params=["some-org/some-model", "folder", None])
def bare(request, pair, tmp_path):
    """A checkpoint that packs none, and names one that is there, one on the hub, or none."""
    source, nemo, _ = pair
    return of_nemos_own(nemo, tmp_path / "bare.nemo", hf(str(source) if request.param == "folder" else request.param))


def test_a_checkpoint_without_one_needs_a_key(bare, pair):
    source, nemo, _ = pair
    with NemoReader(bare) as reader:
        with pytest.raises(MinitronError, match=r"bare.nemo carries no tokenizer.*model.tokenizer.type=\.\.\."):
            job_config(reader, {})
        cfg, _ = job_config(reader, {"tokenizer": {"type": str(source)}})
        assert cfg.tokenizer.type == str(source) and cfg.tokenizer.library == "huggingface"
        cfg, _ = job_config(reader, {"tokenizer": {"library": "huggingface", "type": str(nemo), "use_fast": True}})
        assert cfg.tokenizer.type not in (None, str(source))  # what that .nemo packs
        with pytest.raises(MinitronError, match="library must be huggingface or sentencepiece"):
            job_config(reader, {"tokenizer": {"library": "tabular", "vocab_file": "x"}})


def test_nemo_gets_the_sentencepiece_model_that_is_packed(pair, trainer, tmp_path):
    section = {"library": "sentencepiece", "type": None, "model": "nemo:abc_tokenizer.model"}
    file = of_nemos_own(pair[1], tmp_path / "sp.nemo", section, abc_tokenizer__model=pieces(400))
    model = load_model(file, trainer)
    assert model.tokenizer.tokenizer.GetPieceSize() == 400
    save(model, tmp_path / "saved.nemo", model.storage_dtype)
    with NemoReader(file) as before, NemoReader(tmp_path / "saved.nemo") as after:
        assert after.tokenizer_folder() == before.tokenizer_folder() is not None
        assert after.config["tokenizer"] == before.config["tokenizer"]


def test_a_damaged_model_is_one_message(pair, trainer, tmp_path):
    section = {"library": "sentencepiece", "type": None, "model": "nemo:abc_tokenizer.model"}
    file = of_nemos_own(pair[1], tmp_path / "sp.nemo", section, abc_tokenizer__model=b"x")
    with pytest.raises(MinitronError, match="expected a tokenizer that NeMo loads, found"):
        load_model(file, trainer)
