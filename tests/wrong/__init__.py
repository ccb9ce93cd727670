"""Mutants: small errors in kernels/, each of which the tests of its op must notice.

wrong/<file>.py holds MUTANTS, those that the tests of kernels/<file>.py must catch: its rows in
ops_table*.py through test_every_op.py, and tests/test_<file>.py. test_wrong.py runs them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One error: `old`, which occurs once in kernels/<file>, replaced by `new`."""

    name: str
    """What is wrong, in a few words."""
    file: str
    """The file of kernels/ that is changed, "_logits.py"."""
    old: str
    new: str
    test: str = ""
    """A test that notices it and is tried first; needed only where the others take long."""
