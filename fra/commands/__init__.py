"""The command `fra`: a module a subcommand, each light to import. What they run stands in the doors."""
