"""Every export is loaded by each of three versions of transformers: logits, RoPE, dtype, tokenizer, generation config.

Logits are compared with those of the ``.nemo`` that was exported, by the decoder of this package.
"""

import json

import pytest
import torch
from tokenizers import Tokenizer

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.synthetic import EOS
from tests.compat import versions
from tests.compat.models import CASES, frequencies, logits, make, saved_by_5

pytestmark = pytest.mark.slow
TOKENS = torch.randint(0, 320, (100,), generator=torch.Generator().manual_seed(1)).tolist()
TEXTS = [
    "The quick brown fox",
    " leading and  double spaces ",
    "naïve café, 東京 🗼",
    "x = [i**2 for i in range(10)]\n\n",
]
CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {name: make(case, folder / str(i)) for i, (name, case) in enumerate(CASES.items())}


@pytest.fixture(scope="module", params=versions.VERSIONS)
def loaded(request, exports, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    cases = {
        name: {
            "folder": str(export),
            "tokens": TOKENS,
            "texts": TEXTS,
            "chat": CHAT if (export / "chat_template.jinja").is_file() else None,
        }
        for name, (_, export) in exports.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    return versions.loaded(request.param, folder / "cases.json", folder / "found.pt")


@pytest.mark.parametrize("name", CASES)
def test_the_tokenizer_is_the_same(name, loaded, exports):
    _, export = exports[name]
    found = loaded[name]["tokenizer"]
    assert "error" not in found, found
    source = Tokenizer.from_file(str(export.parent / "hf" / "tokenizer.json"))
    expected = [source.encode(text).ids for text in TEXTS]
    if not (loaded["version"].startswith("5.") and CASES[name].written.startswith("Qwen")):
        # 5 divides words by Qwen's own rule in any Qwen, which this tokenizer is not made for
        assert found["ids"] == expected
        assert found["decoded"] == [source.decode(ids, skip_special_tokens=True) for ids in expected]
    assert found["length"] == source.get_vocab_size() == 320
    assert (found["named"]["bos_token"], found["named"]["eos_token"]) == (EOS, EOS)
    if CASES[name].spoil is saved_by_5:
        assert {source.id_to_token(300), source.id_to_token(310)} <= set(found["special"])
    if CASES[name].spoil is not None:
        assert found["chat"] == f"<|user|>What is 2 + 2?{EOS}<|assistant|>4{EOS}<|assistant|>"
        generation = loaded[name]["generation"]
        assert generation == generation | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    if name == "uneven":  # a Mistral for its class alone: nobody is told to load its tokenizer by a Mistral's rules
        assert found["regex"] is None


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_same(name, loaded, exports):
    nemo, _ = exports[name]
    found = loaded[name]["model"]
    assert "error" not in found, found
    assert found["info"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert (found["class"], found["dtype"]) == (CASES[name].written, str(CASES[name].dtype))
    torch.testing.assert_close(found["logits"], logits(nemo, TOKENS), rtol=1e-4, atol=1e-4)
    with NemoReader(nemo) as reader:
        torch.testing.assert_close(found["inv_freq"].double(), frequencies(reader.shape), rtol=1e-6, atol=0)
    assert found["scaling"] == 1.0
