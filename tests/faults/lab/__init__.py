"""The fault laboratory: a whole system on real servers, broken on purpose while it works, and then asked for every event.

run.py         one run, top to bottom: stage -> workload -> nemesis -> heal -> evidence -> verdict -> report
profile.py     smoke, standard, soak: how long, how much load, which faults
stage.py       servers, proxies, databases, daemons
workload.py    producers that do all that careless applications do, and the service that consumes
nemesis.py     which fault when, from the seed; kinds/ holds the faults themselves, one file for each thing that breaks
history.py     what happened, as it happened, appended to a file
evidence.py    what is compared in the end
checker.py     the comparison: pure
report.py      one readable page
"""
