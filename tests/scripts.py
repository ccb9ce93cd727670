"""Runs of the scripts: how their tests start them and read what they say and write."""

import pytest


def read_refusal(capsys, function, *args, **options):
    """Call a function that must refuse: the one line that it prints before exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*args, **options)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]
