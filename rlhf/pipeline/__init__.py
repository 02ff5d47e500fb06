"""The stages as one table, what the main of every stage does, and the arguments of a whole run."""

from rlhf.pipeline.stage_run import StageRun, run_as_script, stage_main
from rlhf.pipeline.stages import STAGES, Stage, StageConfig, parse_stage

__all__ = ["STAGES", "Stage", "StageConfig", "StageRun", "parse_stage", "run_as_script", "stage_main"]
