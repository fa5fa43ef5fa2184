"""``kvstore verify --stress``: many processes that look for one wrong byte in what is read without asking anybody.

Three phases. *Index*: one process evicts, overwrites and moves records in an index and an arena of its own while others
read them through the compiled readers. *Controls*: the same with three faults put in (``faulty``), each of which must
be seen; they are what makes the zeros of the other phases mean something. *Daemon*: clients of a small private daemon
do everything the SDK can while clients are stopped and killed, with views open and slots in use, and the daemon is
killed and started again. Every byte of every hit is checked; in the end every slot must be free again.

Only private files and private daemons are used. Everything is bounded by time, ends by itself and is reaped.

What it does not show: that the full fences of the hazard protocol are needed (see ``faulty``), and anything about
processors other than this one.
"""

from __future__ import annotations

from kvstore.cli.stress.plan import run_stress
from kvstore.cli.stress.report import StageReport, StressReport, stress_tables

__all__ = ["StageReport", "StressReport", "run_stress", "stress_tables"]
