"""One self-contained HTML page about one or several runs, for people who want to see what happened.

Imports run one way: reading -> partition and differences; plots -> heat_maps -> comparison, clients and merging;
all of them -> page -> __main__.
"""
