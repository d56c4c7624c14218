"""Write the tables of model families in README.md and ``docs/families.md``, from the families themselves.

    python docs/families.py

What a cell of the page says is asked of the reader of ``config.json``: a key that it refuses for a family is not in
that family's column. README's table of formats sums up ``docs/doors.md``, which the tests of doors make.
``tests/test_families.py`` fails where the files are not what this writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nemo_minitron.checkpoint.hf_config import hf_config_from_shape, shape_from_hf  # noqa: E402
from nemo_minitron.errors import MinitronError  # noqa: E402
from nemo_minitron.model.family import Family  # noqa: E402
from nemo_minitron.model.shape import ModelShape  # noqa: E402
from nemo_minitron.registry import FAMILIES  # noqa: E402

README, PAGE, DOORS = ROOT / "README.md", ROOT / "docs" / "families.md", ROOT / "docs" / "doors.md"
BEGINS, ENDS = "<!-- Made by docs/families.py -->\n", "<!-- to here -->\n"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "llama3": {"factor": 8.0, **_LLAMA3},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0], "long_factor": [4.0]},
}
"""Kinds of RoPE that transformers has, with the numbers of one."""
FORMATS = {
    "Hugging Face": (("HF 4", "HF 5"), "hf"),
    "GGUF": (("GGUF",), "gguf"),
    "`.nemo`": (("`.nemo` of ours", "`.nemo` of NeMo"), "nemo"),
    "NeMo 2": (("NeMo 2",), "nemo2"),
    "Megatron-Bridge": (("Megatron-Bridge",), "bridge"),
    "Megatron-LM": (("Megatron-LM",), "megatron"),
}
"""Format as README calls it → its origins and its target in ``docs/doors.md``."""
BIASES = {"attention_bias": "queries, keys, values, attention output", "mlp_bias": "gate, up, down"}


def families() -> list[Family]:
    """Those of the package, whatever else this process knows."""
    folder = ROOT / "nemo_minitron" / "model" / "families"
    return [family for family in FAMILIES.every() if (folder / f"{family.name}.py").is_file()]


def accepts(family: Family, **keys: Any) -> bool:
    """Whether a ``config.json`` of this family is read with these keys in it."""
    shape = ModelShape(2, 48, 96, 4, 2, 16, 64, 64, qkv_bias=family.qkv_bias, family=family.layers)
    config = {key: value for key, value in hf_config_from_shape(shape, torch.float32).items() if key not in BIASES}
    config |= {**family.hf_fresh, "architectures": [family.architecture], "model_type": family.model_type, **keys}
    try:
        shape_from_hf(config)
    except MinitronError:
        return False
    return True


def kinds_of_rope(family: Family) -> list[str]:
    """The kinds that are read."""
    return [kind for kind, numbers in ROPE.items() if accepts(family, rope_scaling={"rope_type": kind, **numbers})]


def biases(family: Family) -> str:
    """Biases that its models have, and those that they may have."""
    optional = [f"`{key}`" for key in BIASES if accepts(family, **{key: True})]
    always = ["queries, keys, values"] if family.qkv_bias else []
    return "; ".join([*always, *([f"with {', '.join(optional)}"] if optional else [])]) or "none"


def window(family: Family) -> str:
    """What ``sliding_window`` may say."""
    if not accepts(family, sliding_window=64):
        return "null"
    if "sliding_window" in family.hf_neutral and not accepts(family, sliding_window=64, use_sliding_window=True):
        return "any, with `use_sliding_window: false`"
    return "null, or any for sequences that it holds"


def own(family: Family) -> str:
    """Parameters of a layer that a Llama does not have, by their names at HF's."""
    names = [name.removeprefix("model.layers.{l}.") for row in family.parameters for name in row.hf]
    return ", ".join(f"`{name}`" for name in names) or "none"


def gguf(family: Family) -> str:
    """The architecture of its GGUF files."""
    return f"`{family.gguf}`" if family.gguf else "none of its own"


def described(family: Family) -> str:
    """The first sentence that the family's module says of itself."""
    text = (ROOT / "nemo_minitron" / "model" / "families" / f"{family.name}.py").read_text()
    return text.removeprefix('"""').partition('"""')[0].rstrip(".").replace("``", "`")


def short_table() -> str:
    """README's table: which formats are read and written for each family."""
    lines = ["| family | " + " | ".join(FORMATS) + " |", "|---" * (len(FORMATS) + 1) + "|"]
    for family in families():
        cells = [doors(family, *columns) for columns in FORMATS.values()]
        lines.append(f"| {' | '.join([family.name, *cells])} |")
    return "\n".join([*lines, ""])


def doors(family: Family, origins: tuple[str, ...], target: str) -> str:
    """Whether a family comes from these origins and goes out to a format, by the rows of ``docs/doors.md``."""
    lines = [line for line in DOORS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    mine = [dict(zip(head, row, strict=True)) for row in rows if row[0].lower().split()[0].strip(",") == family.name]
    ways = {
        "in": [row["in"] for row in mine if row["from"] in origins],
        "out": [row[f"to {target}"] for row in mine if row["in"] == "yes"],
    }
    said = [f"{'' if set(cells) == {'yes'} else 'partly '}{way}" for way, cells in ways.items() if "yes" in cells]
    return ", ".join(said) or "no"


def long_table() -> str:
    """The table of ``docs/families.md``."""
    rows = {
        "`architectures`": [f"`{family.architecture}`" for family in families()],
        "`model_type`": [f"`{family.model_type}`" for family in families()],
        **{f"RoPE `{kind}`": [_yes(kind in kinds_of_rope(family)) for family in families()] for kind in ROPE},
        "biases": [biases(family) for family in families()],
        "`sliding_window`": [window(family) for family in families()],
        "tied, untied tables": [
            " ".join(_yes(accepts(family, tie_word_embeddings=tied)) for tied in (True, False)) for family in families()
        ],
        "parameters of its own": [own(family) for family in families()],
        "NeMo's keys": [
            ", ".join(f"`{key}: {str(value).lower()}`" for key, value in family.nemo.items()) or "none"
            for family in families()
        ],
        "GGUF": [gguf(family) for family in families()],
    }
    names = [family.name for family in families()]
    table = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    table += [f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items()]
    said = [f"- **{family.name}**: {described(family)}." for family in families()]
    return "\n".join([*said, "", *table, ""])


def _yes(whether: bool) -> str:
    return "yes" if whether else "refused"


def written(path: Path, table: str) -> str:
    """The text of a file with its table brought up to date."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGINS)
    _, _, after = rest.partition(ENDS)
    return f"{before}{BEGINS}{table}{ENDS}{after}"


TABLES = {README: short_table, PAGE: long_table}

if __name__ == "__main__":
    for file, table in TABLES.items():
        file.write_text(written(file, table()), encoding="utf-8")
