"""Which policy objective a stranger's loss is: it is asked about single tokens, in float64.

`calling` makes one function of arrays of it, `probes` measures, `verdict` names, `report` prints.
"""
