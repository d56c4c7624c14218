"""The stages as Python functions: ``import nemo_minitron as nm; nm.prune("teacher.nemo", ffn_hidden_size=1024)``.

Each function is a command of ``minitron`` with its common keys as arguments. It runs in a process of its own, prints
nothing unless ``verbose=True``, and returns what it wrote. Any other key of the command is given by its dotted name:
``settings={"model.tensor_model_parallel_size": 2}``. What a user can mend is raised as
:class:`nemo_minitron.errors.MinitronError`, anything else as :class:`RuntimeError` with the command's last lines.

    import nemo_minitron as nm

    teacher = nm.convert("Llama-3.2-1B", "teacher.nemo")
    text = nm.preprocess("articles.jsonl", "data/articles", tokenizer=teacher)
    scores = nm.importance(teacher, text, seq_length=512)
    student = nm.prune(teacher, scores=scores, ffn_hidden_size=6144)
    better = nm.distill(student, teacher, text, seq_length=512, max_steps=100)
    print(nm.evaluate(better, text, seq_length=512).loss)
    print(nm.generate(better, "The capital of France is"))
"""

from nemo_minitron.api.results import Checkpoint, Evaluation, Run, Scores, SearchResult, Student, Tokens
from nemo_minitron.api.stages import (
    convert,
    evaluate,
    generate,
    importance,
    preprocess,
    prune,
    report,
    run,
    synthesize,
)
from nemo_minitron.api.training import distill, finetune, search

__all__ = [
    "Checkpoint",
    "Evaluation",
    "Run",
    "Scores",
    "SearchResult",
    "Student",
    "Tokens",
    "convert",
    "distill",
    "evaluate",
    "finetune",
    "generate",
    "importance",
    "preprocess",
    "prune",
    "report",
    "run",
    "search",
    "synthesize",
]
