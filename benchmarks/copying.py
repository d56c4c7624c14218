"""What each query group is worth, on text that is given, that the model wrote itself, and that says itself twice.

    minitron importance model.restore_from_path=teacher.nemo calibration.data_prefix=[text_document] \
        calibration.seq_length=512 calibration.num_samples=64 output_path=scores
    python benchmarks/copying.py --teacher teacher.nemo --scores scores --json copying.json

For every layer and group: loss of the model without it, the rest of the layer's ``linear_proj`` re-solved as
``minitron prune`` does it, less the whole model's, in nats/token, on four samples of each kind. Samples of the third
kind say each stretch of 256 tokens twice, and the second time is measured (:mod:`nemo_minitron.importance.echoes`). The
regressions are on the first 32 samples that are given and the first 32 of the model's own.

A group that copies stands out in the last column alone; ``--layers`` asks for some layers, 0-based.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from provenance import provenance
from torch import Tensor
from zero_shot_bench import write_atomically

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.importance.echoes import echoed
from nemo_minitron.importance.group_loss import Candidate, GroupLoss, Groups
from nemo_minitron.importance.scores import Scores
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.model.decoder import read_head, read_layer
from nemo_minitron.model.next_token import IGNORED, loss_sums
from nemo_minitron.prune.choose import WEIGHTING
from nemo_minitron.prune.plan import Compensation

KINDS = ("given", "own", "repeated")
EACH, FITTED = 4, 32
"""Samples of a kind to measure on, and to fit on."""


class LossByKind(GroupLoss):
    """Keeps the losses of each kind, ``[3]`` nats/token, in ``by_kind``; samples are in the order of ``KINDS``."""

    def _losses(self, branches: Mapping[Candidate, Tensor]) -> dict[Candidate, float]:
        norm, head = read_head(self.reader, self.tokens.device)
        known = self.__dict__.setdefault("by_kind", {})
        for candidate, stream in branches.items():
            sums = [
                float(loss_sums(x[:-1], labels, norm, head, self.shape.layernorm_epsilon)[0])
                for x, labels in zip(stream, self._labels, strict=True)
            ]
            counts = [int((labels != IGNORED).sum()) for labels in self._labels]
            known[candidate] = [sum(sums[at : at + EACH]) / sum(counts[at : at + EACH]) for at in range(0, 12, EACH)]
        return dict.fromkeys(branches, 0.0)

    @torch.no_grad()
    def whole(self) -> list[float]:
        """Losses of the whole model."""
        stream = self._embed(self.tokens)
        for number in range(self.shape.num_layers):
            self._through(read_layer(self.reader, number, stream.device), stream)
        self._losses({(-1, -1): stream})
        return self.by_kind.pop((-1, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help=".nemo")
    parser.add_argument("--scores", type=Path, required=True, help="of `minitron importance`, with text of its own")
    parser.add_argument("--layers", type=int, nargs="+", help="some layers, 0-based")
    parser.add_argument("--json", type=Path, help="file for the table")
    given = parser.parse_args()
    scores = Scores.load(given.scores)
    if scores.tokens is None or scores.sensitivity is None or min(scores.own_samples, len(scores.tokens)) < FITTED:
        parser.error(f"--scores: expected tokens, {FITTED} samples of the model's own among them")
    everything = torch.from_numpy(scores.tokens.astype("int64"))
    first_own = len(everything) - scores.own_samples
    again, counted = echoed(everything[first_own + EACH : first_own + 2 * EACH])
    plain = torch.cat([everything[:EACH], everything[first_own : first_own + EACH]])
    counted = torch.cat([torch.ones_like(plain, dtype=torch.bool), counted])
    fitted = torch.cat([torch.arange(FITTED), torch.arange(first_own, first_own + FITTED)])
    weights, device = torch.tensor(scores.sensitivity[0::2])[:, fitted].pow(WEIGHTING), runtime.device()
    with NemoReader(given.teacher) as reader:
        layers = given.layers or range(reader.shape.num_layers)
        behind = sum(reader.shape.num_layers - 1 - layer for layer in layers) * reader.shape.num_query_groups * 3 * EACH
        work = behind + reader.shape.num_layers * len(fitted)
        with progress_bar(work, "groups", "sample", show=True) as bar:
            losses = LossByKind(
                reader,
                torch.cat([plain, again]).to(device),
                everything[fitted].to(device),
                weights.to(device),
                ridge=Compensation.attention,
                counted=counted.to(device),
                progress=bar.update,
            )
            whole = losses.whole()
            losses({layer: Groups() for layer in layers})
    print(f"{'layer':>5} {'group':>5}" + "".join(f"{kind:>10}" for kind in KINDS))
    rows = []
    for (layer, group), found in sorted(losses.by_kind.items()):
        above = [loss - base for loss, base in zip(found, whole, strict=True)]
        rows.append({"layer": layer, "group": group, "above": dict(zip(KINDS, above, strict=True))})
        print(f"{layer:>5} {group:>5}" + "".join(f"{loss:>10.3f}" for loss in above))
    if given.json:
        table = {"whole": dict(zip(KINDS, whole, strict=True)), "groups": rows}
        write_atomically(given.json, table | provenance())


if __name__ == "__main__":
    main()
