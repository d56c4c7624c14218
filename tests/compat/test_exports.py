"""Every export is loaded by each of three versions of transformers: logits, RoPE, dtype, tokenizer, generation config.

Logits are compared with those of the ``.nemo`` that was exported, by the decoder of this package.
"""

import json

import pytest
import torch

from nemo_minitron.checkpoint import NemoReader
from tests.compat import versions
from tests.compat.models import CASES, frequencies, logits, make

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
