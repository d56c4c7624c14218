"""NVIDIA's NeMo Framework Launcher with three stages more: ``importance``, ``prune`` and ``distill``.

Takes the launcher's own command line and runs the launcher's own ``main`` on it, from the checkout that
``launcher_scripts_path`` names (docs/launcher.md):

    python3 integrations/nemo_launcher/minitron_launcher.py launcher_scripts_path=/opt/NeMo-Framework-Launcher/launcher_scripts \\
        stages=[prune,distill] prune=llama/minitron_4b_width distill=llama/minitron_4b_width …

The launcher writes ``RESULTS/JOB_hydra.yaml`` and ``RESULTS/JOB_submission.sh`` and submits the latter, as for its own
stages. The command in it is ``python3 -u -m nemo_minitron STAGE --config-path=RESULTS --config-name=JOB_hydra.yaml``.
"""  # noqa: E501

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = ("importance", "prune", "distill")


def stage_class(base: type, name: str) -> type:
    """The launcher's stage ``name``, which runs our command of the same name.

    Args:
        base: the launcher's ``NeMoStage``; its batch scripts, its containers and its environment are kept.
    """

    class MinitronStage(base):  # type: ignore[misc, valid-type]
        def setup_stage_vars(self, cfg: Any) -> None:
            self.stage_name = name
            self.stage_cfg = cfg.get(name)

        def _get_nemo_code_path(self, model_type: str) -> str:
            return f"-m nemo_minitron {name}"  # follows `python3 -u` or torchrun

        @property
        def _nemo_code_path(self) -> Path:
            return ROOT  # becomes the working folder and the first of PYTHONPATH

        def _make_container_mounts_string(self) -> str:
            return f"{super()._make_container_mounts_string()},{ROOT}:{ROOT}"

        def _make_hydra_override(self) -> list[str]:
            return []

    MinitronStage.__name__ = MinitronStage.__qualname__ = name.capitalize()
    return MinitronStage


def arguments(argv: list[str], scripts: Path) -> list[str]:
    """The launcher's command line: its config folder, ours beside it, our stages' groups added to its defaults."""
    words = ["--config-path", str(scripts / "conf"), f"hydra.searchpath=['file://{HERE / 'conf'}']"]
    for word in argv:
        name, equals, _ = word.partition("=")
        if equals and name in STAGES:
            words += [f"+{word}", f"+{name}_config=${{hydra:runtime.choices.{name}}}"]
        else:
            words.append(word)
    return words


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    scripts = Path(given.get("launcher_scripts_path", "."))
    if not (scripts / "nemo_launcher").is_dir():
        sys.exit(
            "minitron_launcher: expected launcher_scripts_path=…/launcher_scripts of a checkout of "
            f"NVIDIA/NeMo-Framework-Launcher, found '{scripts}'"
        )
    sys.path.insert(0, str(scripts))
    import main as launcher  # type: ignore[import-not-found]
    from nemo_launcher.core.stages import NeMoStage  # type: ignore[import-not-found]

    launcher.STR2STAGECLASS.update({name: stage_class(NeMoStage, name) for name in STAGES})
    sys.argv[1:] = arguments(sys.argv[1:], scripts)
    launcher.main()


if __name__ == "__main__":
    main()
