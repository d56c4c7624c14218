"""``minitron run``: recipes, their stages, and what is known of those that ran."""

from nemo_minitron.recipe.comparison import report, table
from nemo_minitron.recipe.records import Records, settled
from nemo_minitron.recipe.stage import Compose, Stage, load_stages
from nemo_minitron.recipe.walk import run, run_stage

__all__ = ["Compose", "Records", "Stage", "load_stages", "report", "run", "run_stage", "settled", "table"]
