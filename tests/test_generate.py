"""``minitron generate``: greedy text is a dense float64 decode's for every shape and format; what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.formats import open_checkpoint
from nemo_minitron.cli import main
from nemo_minitron.config.compose import configure
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.plain import plain
from nemo_minitron.generate.chat import Chat
from nemo_minitron.generate.request import Prompt
from nemo_minitron.generate.talker import Answer, Talker, load
from nemo_minitron.generate.words import Words
from nemo_minitron.model.decoder import Rotary, read_head, read_layer, rms_norm
from nemo_minitron.model.layout import EMBEDDING
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA, SHAPES
from tests.qwen3 import random_qwen3

TEXT = "The import system, in short"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    """Folder of a shape's model: ``hf`` with a chat template, and ``model.nemo`` with a padded table made of it."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> Path:
        if name not in made:
            home = made[name] = folder / name
            home.mkdir()
            if name == "qwen3":
                random_qwen3(home / "hf", tied=False)
            else:
                make_llama(home / "hf", SHAPES[name])
            (home / "hf" / "chat_template.jinja").write_text(TEMPLATE)
            convert(home / "hf", home / "model.nemo", make_vocab_size_divisible_by=128)
        return made[name]

    return get


@pytest.fixture
def home(models, tmp_path, monkeypatch) -> Path:
    """The model with grouped queries; temporary files go to the test's own folder."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return models("gqa")


@pytest.fixture
def generate(home, tmp_path) -> Any:
    """Run the command on a model, greedily where nothing else is asked; its answers of ``output_path``."""

    def run(source: Path, *keys: str, tokens: int = 24) -> list[dict[str, Any]]:
        output = tmp_path / "out.jsonl"
        words = [f"model.restore_from_path={source}", f"output_path={output}", f"inference.tokens_to_generate={tokens}"]
        assert main(["generate", *words, "inference.temperature=0", *keys]) == 0
        assert not list((tmp_path / "tmp").iterdir()), "the exported folder is removed"
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def logits(reader: NemoReader, ids: list[int]) -> torch.Tensor:
    """Of every position, ``[s, V]``: all layers over the whole sequence in float64, without a cache."""
    shape, double = reader.shape, torch.float64
    x = F.embedding(torch.tensor([ids]), reader.tensor(EMBEDDING)).to(double)
    rotary = Rotary.of(shape, len(ids))
    for layer in range(shape.num_layers):
        x = read_layer(reader, layer, dtype=double).forward(x, rotary)
    norm, head = read_head(reader, dtype=double)
    return F.linear(rms_norm(x[0], norm, shape.layernorm_epsilon), head)


def decoded(source: Path, ids: list[int], count: int, end: int = 0) -> list[int]:
    """The likeliest token after all before it, ``count`` times or until the end."""
    new: list[int] = []
    with NemoReader(source) as reader:
        while len(new) < count and end not in new:
            new.append(int(logits(reader, ids + new)[-1].argmax()))
    return new


def tokenizer(home: Path) -> Any:
    return AutoTokenizer.from_pretrained(home / "hf")


def of_text(home: Path, text: str, count: int = 24) -> dict[str, Any]:
    """Text, tokens and end of the answer to a text, by :func:`decoded`."""
    words = tokenizer(home)
    new = decoded(home / "model.nemo", words(text)["input_ids"], count)
    reason = "stop" if new[-1] == words.eos_token_id else "length"
    return {"answer": words.decode(new, skip_special_tokens=True), "tokens": len(new), "finish_reason": reason}


def refused(capsys, *words: str) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert main(["generate", *words]) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("minitron: ")]
    assert not shown.out
    return line


def asked(source: Path, *words: str) -> Any:
    """The command's config for a source."""
    return configure("generate", [f"model.restore_from_path={source}", "inference.temperature=0", *words])


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("name", ["gqa", "tied", "head_dim", "padded", "llama3_rope", "biases", "qwen3"])
def test_greedy_text_is_that_of_a_dense_decode(name, models, generate):
    home = models(name)
    with NemoReader(home / "model.nemo") as reader:
        assert reader.shape.padded_vocab_size > reader.shape.vocab_size
    (found,) = generate(home / "model.nemo", f"prompt={TEXT}")
    assert found == {"text": TEXT, **of_text(home, TEXT)}
    assert found["tokens"] > 1


def test_every_format_answers_the_same(home, generate, tmp_path):
    convert(home / "hf", tmp_path / "model.gguf")
    with open_checkpoint(home / "hf") as reader:
        from nemo_minitron.checkpoint.safetensors_folder import SafetensorsFolder

        folder = SafetensorsFolder(home / "hf")
        older = tmp_path / "bin"
        older.mkdir()
        torch.save({name: folder.get(name).clone() for name in folder.sizes}, older / "pytorch_model.bin")
        folder.close()
        assert reader.shape == GQA
    for file in (home / "hf").glob("*.json"):
        (older / file.name).write_bytes(file.read_bytes())
    expected = [{"text": TEXT, **of_text(home, TEXT)}]
    for source in (home / "hf", tmp_path / "model.gguf", older):
        assert generate(source, f"prompt={TEXT}") == expected, source


def test_a_rope_that_transformers_4_does_not_find_is_followed(models, generate, tmp_path):
    home, newer = models("llama3_rope"), tmp_path / "newer"
    newer.mkdir()
    for file in (home / "hf").iterdir():
        (newer / file.name).write_bytes(file.read_bytes())
    config = json.loads((newer / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **config.pop("rope_scaling")}
    (newer / "config.json").write_text(json.dumps(config))
    assert generate(newer, f"prompt={TEXT}") == [{"text": TEXT, **of_text(home, TEXT)}]


def test_bf16(home, tmp_path):
    """In bfloat16 near ties may fall either way: every token is, but for the rounding, the likeliest in float64."""
    convert(home / "hf", tmp_path / "half.nemo", precision="bf16")
    cfg = asked(tmp_path / "half.nemo", f"prompt={TEXT}", "precision=bf16", "inference.tokens_to_generate=24")
    with open_checkpoint(tmp_path / "half.nemo") as reader:
        words, model = Words.of(reader, cfg), load(reader, cfg)
        assert model.dtype == torch.bfloat16
        ids = words.encode(Prompt(TEXT, "prompt"))
        (new,) = Talker(words, model, cfg).tokens([ids])
        exact = logits(reader, ids + new)[len(ids) - 1 : -1]
    chosen = exact.gather(1, torch.tensor(new)[:, None])[:, 0]
    assert len(new) > 1 and (exact.max(1).values - chosen).max() < 0.05
    assert exact.std() > 0.5, "a distance of 0.05 says something"


def test_drawing_follows_seed_and_keys(home, generate):
    def drawn(*keys: str) -> str:
        return generate(home / "hf", f"prompt={TEXT}", "inference.temperature=1.0", *keys)[0]["answer"]

    greedy = of_text(home, TEXT)["answer"]
    first = drawn("seed=1")
    assert drawn("seed=1") == first != drawn("seed=2") and first != greedy
    for keys in (["inference.greedy=true"], ["inference.top_k=1"], ["inference.top_p=1e-6"]):
        assert drawn("seed=1", *keys) == greedy, keys


def test_repetition_penalty(home, generate):
    """So high that no token comes twice."""
    cfg = asked(home / "hf", "prompt=a", "inference.repetition_penalty=1e6", "inference.tokens_to_generate=40")
    with open_checkpoint(home / "hf") as reader:
        words = Words.of(reader, cfg)
        (new,) = Talker(words, load(reader, cfg), cfg).tokens([[5, 6]])
    assert len(set(new)) == len(new)


def test_an_answer_ends_where_the_positions_do(home, generate):
    text, words = "import", tokenizer(home)
    while (room := GQA.max_position_embeddings - len(words(text)["input_ids"])) > 6:
        text += " a"
    assert room > 2
    (found,) = generate(home / "model.nemo", f"prompt={text}")
    assert found == {"text": text, **of_text(home, text, room)}
    assert (found["tokens"], found["finish_reason"]) == (room, "length")


def test_any_end_that_the_model_names_ends_a_text(home, generate, tmp_path):
    ends = decoded(home / "model.nemo", tokenizer(home)(TEXT)["input_ids"], 24)
    third = next(token for number, token in enumerate(ends) if number >= 3 and token not in ends[:number])
    for file in (home / "hf").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [319, third], "do_sample": True, "temperature": 5.0})
    )
    (found,) = generate(tmp_path, f"prompt={TEXT}")
    assert (found["tokens"], found["finish_reason"]) == (ends.index(third) + 1, "stop")


def test_add_bos_is_for_texts(home):
    for given, expected in (("true", [0]), ("false", []), ("null", [])):
        cfg = asked(home / "hf", "prompt=a", f"inference.add_BOS={given}")
        with open_checkpoint(home / "hf") as reader:
            found = Words.of(reader, cfg).ids(Prompt(TEXT, "prompt"))
        assert found == expected + tokenizer(home)(TEXT, add_special_tokens=False)["input_ids"]
    said = [{"role": "user", "content": "a"}]
    with open_checkpoint(home / "hf") as reader:
        words = Words.of(reader, asked(home / "hf", "prompt=a", "inference.add_BOS=false"))
        words.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        with pytest.raises(MinitronError, match=r"^p\.jsonl:1: inference\.add_BOS is of texts"):
            words.ids(Prompt(said, "p.jsonl:1"))
        unset = dataclasses.replace(words, add_bos=None)
        assert unset.ids(Prompt(said, "p.jsonl:1")) == tokenizer(home)("a", add_special_tokens=False)["input_ids"]


# ------------------------------------------------------------------------------------------------- prompts and stdout


def test_a_prompt_is_streamed(home, monkeypatch):
    """A word is written as soon as the next one begins; the prompt is not."""
    cfg = asked(home / "hf", f"prompt={TEXT}", "inference.tokens_to_generate=24")
    with open_checkpoint(home / "hf") as reader:
        words, model = Words.of(reader, cfg), load(reader, cfg)
    script = [*tokenizer(home)(" one two three four")["input_ids"], 0]
    seen: list[str] = []

    def as_the_script_says(module: Any, given: Any, output: Any) -> None:
        output.logits[0, -1, script[len(seen)]] = 1e6
        seen.append(out.getvalue())

    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    model.register_forward_hook(as_the_script_says)
    answer = Talker(words, model, cfg).answer(words.encode(Prompt(TEXT, "prompt")))
    monkeypatch.undo()
    assert answer == Answer(" one two three four", len(script), "stop")
    assert out.getvalue() == " one two three four\n"
    assert {" one ", " one two ", " one two three "} <= set(seen)


def test_what_a_model_says_does_nothing_to_the_terminal(home, capsys):
    words = SimpleNamespace(tokenizer=tokenizer(home), positions=128, room=9)
    new = [*words.tokenizer("a\x1b[2J\x9b b")["input_ids"], 0]

    class Stub:
        generation_config, device = SimpleNamespace(eos_token_id=None), "cpu"

        def generate(self, prompt, attention_mask, streamer, **more):
            for ids in (prompt, *torch.tensor(new)[:, None]):
                streamer.put(ids)
            streamer.end()
            return torch.cat([prompt[0], torch.tensor(new)])[None]

    answer = Talker(words, Stub(), asked(home, "prompt=a")).answer([5])
    assert answer == Answer("a\x1b[2J\x9b b", len(new), "stop")
    assert capsys.readouterr().out == "a\\x1b[2J\\x9b b\n"


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_of_a_file(home, generate, tmp_path, capsys, packed):
    import gzip

    lines = [{"text": "a b\nc"}, {"messages": [{"role": "user", "content": "who"}]}]
    path = tmp_path / f"prompts.jsonl{'.gz' * packed}"
    text = "".join(json.dumps(line) + "\n\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    found = generate(home / "hf", f"prompts={path}")
    texts = ["a b\nc", "[user] who\n[assistant] "]
    assert found == [{**line, **of_text(home, text)} for line, text in zip(lines, texts, strict=True)]
    first, second = (one["answer"] for one in found)
    assert capsys.readouterr().out == plain(f"1. a b c\n{first}\n\n2. who\n{second}\n")


def test_prompts_of_a_text_file_and_of_a_list_as_nemo_has_it(home, generate, tmp_path):
    (tmp_path / "prompts.txt").write_text('The {"import}\n\n system, \r\n')
    texts = ['The {"import}', " system, "]
    expected = [{"text": text, **of_text(home, text)} for text in texts]
    assert generate(home / "hf", f"prompts={tmp_path}/prompts.txt") == expected
    assert generate(home / "hf", "prompts=['The {\"import}',' system, ']") == expected


# --------------------------------------------------------------------------------------------------------------- chat


def conversation(*messages: tuple[str, str]) -> str:
    """What :data:`TEMPLATE` makes of roles and texts."""
    return "".join(f"[{role}] {text}\n" for role, text in messages) + "[assistant] "


def test_a_chat_through_a_pipe(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello, you\n\n  and now? \n/quit\nnever\n"))
    words = ["inference.tokens_to_generate=12", "inference.greedy=true", "system=Be brief, 'please'"]
    assert main(["generate", f"model.restore_from_path={home}/model.nemo", "chat=true", *words]) == 0
    said = [("system", "Be brief, 'please'"), ("user", "Hello, you")]
    first = of_text(home, conversation(*said), 12)["answer"]
    said += [("assistant", first), ("user", "and now?")]
    second = of_text(home, conversation(*said), 12)["answer"]
    assert capsys.readouterr().out == plain(f"{first}\n{second}\n")


def test_a_chat_forgets_what_no_longer_fits(home, capsys):
    cfg = asked(home / "hf", "chat=true", "inference.tokens_to_generate=20")
    with open_checkpoint(home / "hf") as reader:
        words = Words.of(reader, cfg)
    heard: list[list[int]] = []

    def answer(ids: list[int]) -> Answer:
        heard.append(ids)
        return Answer(f"answer {len(heard)}", 2, "stop")

    Chat(words, "s").talk([*(f"line {number}" for number in range(1, 9)), "x" * 300, "last"], answer)
    assert len(heard) == 9 and all(len(ids) + 20 <= GQA.max_position_embeddings for ids in heard)
    history = [("user", "last")]
    for number in range(8, 0, -1):  # as many as fit, from the newest
        longer = [("user", f"line {number}"), ("assistant", f"answer {number}"), *history]
        if len(words.ids(Prompt(conversation(("system", "s"), *longer), "x"))) + 20 > GQA.max_position_embeddings:
            break
        history = longer
    expected = conversation(("system", "s"), *history)
    assert words.tokenizer.decode(heard[-1]) == expected and 1 < len(history) < 17
    err = capsys.readouterr().err.splitlines()
    assert sum("what was said first no longer fits the model's 128 positions" in line for line in err) == 1
    assert sum("chat: expected less than 128 tokens" in line for line in err) == 1


def test_a_template_that_refuses_is_one_error(home, tmp_path, capsys):
    for file in (home / "hf").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    line = refused(capsys, f"model.restore_from_path={tmp_path}", "chat=true", "system=x")
    assert "chat: expected messages that the chat template of" in line and "no system here" in line
    (tmp_path / "chat_template.jinja").unlink()
    line = refused(capsys, f"model.restore_from_path={tmp_path}", "chat=true")
    assert "chat: expected a chat template in the tokenizer of" in line and "prompt=" in line


# ------------------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    (["model.restore_from_path=absent", "prompt=a"], "model.restore_from_path: expected a .nemo"),
    (["prompt=a"], "needs a value for model.restore_from_path"),
    ([], "expected one of prompt, prompts and chat=true, found none"),
    (["prompt=a", "chat=true"], "found prompt and chat"),
    (["prompt=a", "system=b"], "system: goes with chat=true"),
    (["chat=true", "output_path=o"], "output_path: goes with prompt or prompts"),
    (["prompt=a", "output_path=a/file/o"], "a/file"),
    (["prompts=absent.txt"], "prompts: expected a file of prompts, found nothing at absent.txt"),
    (["prompts=here"], "prompts: here: expected a regular file, found a folder"),
    (["prompts=empty.txt"], "prompts: expected a prompt in each line of empty.txt, found none"),
    (["prompts=bytes.txt"], "prompts: bytes.txt:2: expected UTF-8 text, found byte 0xff"),
    (["prompts=json.jsonl"], "prompts: json.jsonl:3: expected a JSON object, found"),
    (["prompts=keys.jsonl"], "prompts: keys.jsonl:1: expected one of text and messages, found ['txt']"),
    (["prompts=content.jsonl"], "prompts: content.jsonl:1: messages[0].content: expected text, found 3"),
    (["prompts=surrogate.jsonl"], "prompts: surrogate.jsonl:1: text: expected Unicode text, found half"),
    (["prompts=[a]", "batch_size=0"], "batch_size: expected at least 1, found 0"),
    (["prompts=[1,2]"], "prompts: expected a file or a list of texts, found [1, 2]"),
    (["prompt=a", "inference.temperature=-1"], "inference.temperature: expected a number of at least 0, found -1.0"),
    (["prompt=a", "inference.temperature=nan"], "inference.temperature: expected a number of at least 0, found nan"),
    (["prompt=a", "inference.top_p=0"], "inference.top_p: expected a number above 0 and at most 1, found 0.0"),
    (["prompt=a", "inference.top_k=-1"], "inference.top_k: expected at least 0, found -1"),
    (["prompt=a", "inference.repetition_penalty=0"], "inference.repetition_penalty: expected a number above 0"),
    (["prompt=a", "inference.tokens_to_generate=0"], "inference.tokens_to_generate: expected at least 1, found 0"),
    (["prompt=a", "inference.max_new_tokens=3"], "unknown key 'inference.max_new_tokens'"),
    (["prompt=a", "precision=16"], "precision: expected one of 32, bf16"),
    (["prompt=a", "accelerator=tpu"], "accelerator: expected one of auto, gpu, cpu"),
    (["prompt=a", "trainer.devices=2"], "unknown key 'trainer'"),
]


def test_mistakes_are_named_before_torch_is_imported(tmp_path):
    """Each in one process, from which what takes seconds to import stays away."""
    (tmp_path / "here").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    for name, text in {
        "empty.txt": b"\n \n",
        "bytes.txt": b"one\n\xff\n",
        "json.jsonl": b'{"text": "a"}\n\n{"text": \n',
        "keys.jsonl": b'{"txt": "a"}\n',
        "content.jsonl": b'{"messages": [{"role": "user", "content": 3}]}\n',
        "surrogate.jsonl": b'{"text": "\\ud83d"}\n',
    }.items():
        (tmp_path / name).write_bytes(text)
    code = f"""
import sys
from nemo_minitron.cli import main
for words, _ in {REFUSED!r}:
    named = any("restore_from_path" in word for word in words) or words == ["prompt=a"]
    assert main(["generate", *([] if named else ["model.restore_from_path=here"]), *words]) == 2, words
    assert not [name for name in ("torch", "transformers", "numpy") if name in sys.modules], words
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for (words, expected), line in zip(REFUSED, lines, strict=True):
        assert line.startswith("minitron: ") and expected in line, (words, line)


def test_several_processes_are_refused(home, monkeypatch, capsys):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    line = refused(capsys, f"model.restore_from_path={home}/hf", "prompt=a")
    assert "generate: runs in one process, found 2" in line


def test_prompts_that_the_model_cannot_take_leave_the_output_as_it_was(home, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("before\n")
    base = [f"model.restore_from_path={home}/model.nemo", f"output_path={output}"]
    (tmp_path / "long.txt").write_text("short\n" + "x " * 400 + "\n")
    line = refused(capsys, *base, f"prompts={tmp_path}/long.txt")
    assert f"{tmp_path}/long.txt:2: expected less than 128 tokens, the positions of {home}/model.nemo, found" in line
    assert "prompt: expected a text of at least one token, found ''" in refused(capsys, *base, "prompt=")
    assert output.read_text() == "before\n" and not list((tmp_path / "tmp").iterdir())


def test_a_model_without_a_tokenizer(home, generate, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).write_bytes((home / "hf" / name).read_bytes())
    convert(bare, tmp_path / "bare.nemo")
    for source in (bare, tmp_path / "bare.nemo"):
        line = refused(capsys, f"model.restore_from_path={source}", "prompt=a")
        assert f"model.restore_from_path: {source} carries no tokenizer" in line and "tokenizer.type=" in line
        found = generate(source, f"prompt={TEXT}", f"tokenizer.type={home}/hf")
        assert found == [{"text": TEXT, **of_text(home, TEXT)}]


def test_a_tokenizer_of_another_model(home, models, tmp_path, capsys):
    """250 rows, and ids up to 319."""
    for file in (models("padded") / "hf").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((home / "hf" / name).read_bytes())
    text = tokenizer(home).decode([300])
    line = refused(capsys, f"model.restore_from_path={tmp_path}", f"prompt='{text}'")
    assert "expected tokens below 250, the rows of the table" in line and "found 300" in line


def test_gpu_is_refused_where_there_is_none(home, monkeypatch, capsys):
    monkeypatch.setattr("nemo_minitron.runtime.has_cuda", lambda: False)
    line = refused(capsys, f"model.restore_from_path={home}/hf", "prompt=a", "accelerator=gpu")
    assert "accelerator=gpu: expected a CUDA device, found none" in line


def test_what_is_no_model_is_named(home, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("notes")
    line = refused(capsys, f"model.restore_from_path={tmp_path}/notes.txt", "prompt=a")
    assert f"{tmp_path}/notes.txt: expected a .nemo" in line
