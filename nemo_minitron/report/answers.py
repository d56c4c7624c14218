"""What each model of a run wrote to the same prompts: ``evaluation/ROLE.answers.jsonl`` of ``minitron generate``."""

from __future__ import annotations

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.plain import short
from nemo_minitron.files.text import parse_json
from nemo_minitron.report.inventory import Inventory
from nemo_minitron.report.measures import ROLES

LARGEST_FILE, MOST_PROMPTS, LONGEST_ANSWER = 4 << 20, 20, 600

Answers = dict[str, dict[str, str]]
"""Prompt → role → what that model wrote."""


def read_answers(files: Inventory, absent: list[str]) -> Answers:
    """Read the answers to the prompts that all models with such a file were given, in their order.

    Args:
        absent: gets a line for each file that is damaged, and one where prompts are left out.
    """
    found: dict[str, dict[str, str]] = {}
    for role in ROLES:
        path = files.folder / "evaluation" / f"{role}.answers.jsonl"
        if path not in files.files:
            continue
        try:
            lines = files.read(path, LARGEST_FILE).splitlines()
            records = [parse_json(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
        except MinitronError as error:
            absent.append(str(error))
            continue
        texts = [(short(record.get("text")), short(record.get("answer"), LONGEST_ANSWER)) for record in records]
        found[role] = {prompt: answer or "–" for prompt, answer in texts if prompt}
    if not found:
        return {}
    common = [prompt for prompt in next(iter(found.values())) if all(prompt in answers for answers in found.values())]
    if len(common) > MOST_PROMPTS:
        absent.append(f"Answers to {len(common):,} prompts are there: the first {MOST_PROMPTS} are shown.")
    return {prompt: {role: found[role][prompt] for role in found} for prompt in common[:MOST_PROMPTS]}
