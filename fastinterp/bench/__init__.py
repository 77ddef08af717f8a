"""`fastinterp bench`: the time of whole merges beside that of other programs. Kernel benchmarks are in benchmarks/."""
