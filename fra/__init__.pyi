from . import attribution as attribution
from . import cards as cards
from . import claim as claim
from . import errors as errors
from . import gauges as gauges
from . import induction as induction
from . import interventions as interventions
from . import report as report
from . import stimuli as stimuli
from . import structured as structured
from . import targets as targets
from ._census.census import census as census
from .claim import Claim as Claim
from .claim import Evidence as Evidence
from .claim import Verdict as Verdict
from .claim import judge as judge
from .core import sentences as sentences
from .core.output import resolve_output as resolve_output
from .core.resolve import resolve as resolve
from .dictionaries import blockdiag as blockdiag
from .interventions import patching as patching
from .interventions import remove as remove
from .targets import load_target as load_target
from .verdicts import ledger as ledger
from .verdicts import stats as stats

__version__: str
