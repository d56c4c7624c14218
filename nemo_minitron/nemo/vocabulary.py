"""The vocabularies of models, data and teachers, compared token for token before a step is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo.collections.common.tokenizers import AutoTokenizer

from nemo_minitron.data.preprocess import read_facts
from nemo_minitron.data.tokenizer import vocabulary_fingerprint
from nemo_minitron.errors import MinitronError

if TYPE_CHECKING:
    from nemo_minitron.nemo.anywhere import AnywhereGPTModel


def of_transformers(tokenizer: Any) -> Any:
    """The transformers tokenizer inside of NeMo's; None where that is of another library."""
    return tokenizer.tokenizer if isinstance(tokenizer, AutoTokenizer) else None


def check_tokens(model: AnywhereGPTModel, prefixes: Sequence[str], key: str) -> None:
    """Refuse token files that were made with another vocabulary than the checkpoint's.

    Known where ``minitron preprocess`` left its record beside them; other tools' files are taken as they are.

    Args:
        key: the config's, by which messages name a file.

    Raises:
        MinitronError: naming the key and the file.
    """
    inner = of_transformers(model.tokenizer)
    if inner is None:
        return
    ours = vocabulary_fingerprint(inner.get_vocab())
    for prefix in prefixes:
        if not Path(f"{prefix}.json").is_file():
            continue
        theirs = read_facts(prefix)["tokenizer"]
        if theirs["fingerprint"] != ours:
            raise MinitronError(
                f"{key}: '{prefix}' was tokenized with another vocabulary ({theirs['vocab_size']} tokens) than the "
                f"checkpoint's ({len(inner)}); run minitron preprocess with tokenizer.type=CHECKPOINT.nemo"
            )


def check_sizes(teacher: int, student: int) -> None:
    """Refuse vocabularies of different sizes."""
    if teacher != student:
        raise MinitronError(
            f"model.kd_teacher_restore_from_path: the teacher's vocabulary has {teacher} tokens, the student's "
            f"{student}; distillation compares them token by token"
        )


def check_tokenizers(teacher: Any, student: Any) -> None:
    """Refuse vocabularies that differ in a token: equal sizes alone would let a permuted one through.

    Args:
        teacher, student: NeMo's tokenizers; of those that are not from transformers only the sizes are known.
    """
    inner = of_transformers(teacher), of_transformers(student)
    if None in inner:
        return
    theirs, ours = (tokenizer.get_vocab() for tokenizer in inner)
    if ours != theirs:
        token = next(iter(sorted(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t))))
        raise MinitronError(
            f"teacher and student tokenizers differ: token {token!r} is {theirs.get(token)} for the teacher and "
            f"{ours.get(token)} for the student"
        )
