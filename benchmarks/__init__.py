"""What the gateway costs: measured beside other gateways, in one run, on this machine.

`run` starts every contender, loads it and ends it; `report` turns the raw figures into a table.
"""
