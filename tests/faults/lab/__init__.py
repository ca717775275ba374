"""The fault laboratory: a whole system on real servers, broken on purpose while it works, and then asked for every event.

run.py         one run, top to bottom: stage -> workload -> nemesis -> heal -> evidence -> verdict -> report
profile.py     smoke, standard, soak: how long, how much load, which faults
stage.py       servers, proxies, databases, daemons
workload.py    producers that do all that careless applications do, and the service that consumes
nemesis.py     which fault when, from the seed; kinds/ holds the faults themselves, one file for each thing that breaks
history.py     what happened, as it happened, appended to a file
evidence.py    what is compared in the end
checker.py     the comparison: pure; course.py tells when which fault was on, pace.py and usage.py judge waiting and growth,
               verdict.py holds what is concluded, and the limits
report.py      one readable page (page.py), drawn by charts.py from what tally.py condenses, in the words of words.py
"""
