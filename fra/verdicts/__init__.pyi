from . import ledger as ledger
