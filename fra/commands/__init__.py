"""The command `fra`: a module a subcommand (those about ledgers share one), each light to import. What they run stands
in the doors.
"""
