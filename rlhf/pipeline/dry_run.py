"""A stage's main up to where it would load weights: everything that can be wrong before, at the cost of seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.config import RunConfig
from rlhf.data.stage_data import StageData
from rlhf.models.architecture import ModelSize

STATE_BYTES = 12
"""Of a training state, for each weight that trains: the float32 master and Adam's two moments."""
ADAPTER_BYTES = 4
"""Of an exported adapter, for each of its weights."""


@dataclass(frozen=True)
class DryRun:
    """Has a stage stop where it would load weights, and collects what it found until then.

    `devices`: processes of the run that is checked. `bases`: stage of the same run -> what its model will be trained
    from, which stands for it in later stages. `report_dir`: where the list of skipped rows is written, and beside it
    what the stages share. `data`: the data sets by the name of their report; `trained`: the models
    that train, by role.
    """

    devices: int
    bases: Mapping[str, str]
    report_dir: Path
    data: dict[str, StageData] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)


class DryRunEndError(Exception):
    """Raised where a stage would load weights; `found` says what it would train."""

    def __init__(self, found: Findings) -> None:
        super().__init__("the dry run is over")
        self.found = found


@dataclass(frozen=True)
class Findings:
    """What a stage would train: optimizer steps and, by role, the sizes of its models.

    `export_bytes` is what it leaves on the disk, `state_bytes` what its training states take while it runs.
    """

    steps: int
    sizes: Mapping[str, ModelSize]
    export_bytes: int
    state_bytes: int


def disk_use(
    sizes: Mapping[str, ModelSize], run: RunConfig, *, steps: int, weight_bytes: int, adapted: bool
) -> tuple[int, int]:
    """(bytes of the exported models, bytes of the training states at a time), of models that train and are saved.

    `weight_bytes` is the size of an exported weight; with `adapted` only adapters are exported.
    """
    trainable = sum(size.trainable for size in sizes.values())
    exported = trainable * ADAPTER_BYTES if adapted else sum(size.weights for size in sizes.values()) * weight_bytes
    if run.keep_last == 0:
        return exported, 0
    permanent = steps // run.keep_every if run.keep_every else 0
    # the oldest state goes once a newer one is whole
    return exported, trainable * STATE_BYTES * (run.keep_last + 1 + permanent)
