"""Fixtures that the tests of the command line share."""

import pytest

from resa.reference import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def called(capsys):
    """Runs one command in this process → (exit status, standard output, standard error)."""

    def run(main, *arguments, **more):
        try:
            status = main([str(argument) for argument in arguments], **more)
        except SystemExit as leaving:  # argparse leaves so
            status = leaving.code
        return status, *capsys.readouterr()

    return run
