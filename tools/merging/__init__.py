"""How `tools.merge_kinetics` makes one data set of three."""
