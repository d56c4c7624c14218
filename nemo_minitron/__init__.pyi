from nemo_minitron.api import convert as convert
from nemo_minitron.api import distill as distill
from nemo_minitron.api import evaluate as evaluate
from nemo_minitron.api import finetune as finetune
from nemo_minitron.api import generate as generate
from nemo_minitron.api import importance as importance
from nemo_minitron.api import preprocess as preprocess
from nemo_minitron.api import prune as prune
from nemo_minitron.api import report as report
from nemo_minitron.api import run as run
from nemo_minitron.api import search as search
from nemo_minitron.api import synthesize as synthesize
from nemo_minitron.errors import MinitronError as MinitronError

__version__: str
