from . import ledger as ledger
from . import stats as stats
